"""NVIDIA's machine code as nvdisasm prints it: instructions, loops over tiles, and the way that a
lane takes through branches. Fields of scheduling are those of sm_70 to sm_90."""

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import triton

PRODUCT = re.compile(r"[HIQ]G?MMA\b")
LOAD = re.compile(r"LDGSTS|LDG\b|UBLKCP|UTMALDG")
LINE = re.compile(
    r"^(?:(\.L\S+|\$\S+|\w+):\s*$|\s+/\*([0-9a-f]{4,})\*/\s+([^;/]*?)\s*;"
    r".*?/\* 0x[0-9a-f]{16} \*/\s*/\* (0x[0-9a-f]{16}) \*/)",
    re.M | re.S,
)
INTEGER = re.compile(r"-?(0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class Instruction:
    at: int
    guard: str  # a predicate, or nothing
    op: str
    operands: tuple[str, ...]
    control: int  # how it is scheduled

    @cached_property
    def name(self) -> str:
        return self.op.split(".")[0]

    @property
    def idle(self) -> bool:
        """Whether it is there to fill an issue slot."""
        return self.guard in ("!PT", "!UPT") or self.name == "NOP"

    @property
    def stall(self) -> int:  # cycles until the next may issue
        return max(self.control & 15, 1)

    @property
    def barriers(self) -> tuple[int, int]:  # set until it is done, until it has read; 7 for none
        return self.control >> 5 & 7, self.control >> 8 & 7

    @property
    def waits(self) -> list[int]:  # barriers that it waits for
        return [i for i in range(6) if self.control >> 11 >> i & 1]

    @cached_property
    def bytes(self) -> int:
        """Of a lane of a load or a store."""
        width = re.search(r"\.(?:[US](8|16)|(64|128))\b", self.op)
        return int(width[1] or width[2]) // 8 if width else 4


@dataclass(frozen=True)
class Loop:
    begin: int  # index of an instruction
    end: int  # of the last
    depth: int  # other loops around it


@dataclass
class Function:
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of an instruction
    tables: bytes = b""  # for jumps

    def targets(self, x: Instruction) -> list[int]:
        """Where a jump may go to, as indices."""
        if x.name not in ("BRA", "BRX", "CALL"):
            return []
        return [self.labels[y] for y in re.findall(r"[.$][\w$]+", " ".join(x.operands))]

    def loops(self) -> list[Loop]:
        """The innermost that load from memory and multiply matrices: from a label to the last
        branch back to it, of those that are reached only by way of the label."""
        leaders = {0, len(self.code)}
        for i, x in enumerate(self.code):
            if targets := self.targets(x):
                leaders |= {*targets, i + 1}
        begins = sorted(leaders)
        block = {begin: n for n, begin in enumerate(begins)}
        before: list[set[int]] = [set() for _ in begins]
        back = []
        for n, end in enumerate(begins[1:]):
            last = self.code[end - 1]
            for target in self.targets(last):
                before[block[target]].add(n)
                if target < end:
                    back.append((n, block[target]))
            if (
                last.guard
                or last.name not in ("BRA", "BRX", "EXIT", "RET")
                or len(last.operands) > 1
            ):
                before[n + 1].add(n)
        # A block's dominators, as bits.
        dominators = [(1 << len(begins)) - 1] * len(begins)
        dominators[0], changed = 1, True
        while changed:
            changed = False
            for n in range(1, len(begins)):
                common = (1 << len(begins)) - 1
                for m in before[n]:
                    common &= dominators[m]
                changed |= dominators[n] != (common := common | 1 << n)
                dominators[n] = common
        ends: dict[int, int] = {}
        for n, head in back:
            if dominators[n] >> head & 1:
                ends[begins[head]] = max(ends.get(begins[head], 0), begins[n + 1] - 1)
        spans = sorted(ends.items())
        working = [
            (begin, end) for begin, end in spans
            if all(any(kind.match(x.op) for x in self.code[begin : end + 1] if not x.idle)
                   for kind in (LOAD, PRODUCT))
        ]  # fmt: skip
        inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]  # noqa: E731
        return [
            Loop(*x, sum(inside(x, y) for y in spans))
            for x in working if not any(inside(y, x) for y in working)
        ]  # fmt: skip


def disassemble(cubin: Path) -> dict[str, Function]:
    tool = triton.knobs.nvidia.nvdisasm.path
    return parse(subprocess.check_output([tool, "-hex", cubin], text=True))


def parse(text: str) -> dict[str, Function]:
    """What nvdisasm -hex printed, by the name of the function."""
    found: dict[str, Function] = {}
    for section in re.split(r"^\s*\.section\s+", text, flags=re.M):
        kind = re.match(r"\.(text|nv\.constant2)\.([^,]+)", section)
        if not kind:
            continue
        function = found.setdefault(kind[2], Function())
        if kind[1] != "text":
            function.tables = bytes(int(x, 16) for x in re.findall(r"\b0x([0-9a-f]{2})\b", section))
            continue
        for label, at, text, control in LINE.findall(section):
            if label:
                function.labels[label] = len(function.code)
                continue
            guard, op, rest = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", text, re.S).groups()
            operands = tuple(x.strip() for x in rest.split(",") if x.strip())
            function.code.append(
                Instruction(int(at, 16), guard or "", op, operands, int(control, 16) >> 41)
            )
    return found


Value = int | None  # of a register or a predicate, None where nothing is known
BITS = 0xFFFFFFFF


PREDICATE, REGISTER = re.compile(r"U?P[\dT]"), re.compile(r"U?R[\dZ]+")
# Operands beyond the first that may be written too; and how many must be known to know more.
WRITTEN = {
    "IADD3": 2,
    "LEA": 1,
    "IMAD": 1,
    "PLOP3": 1,
    "LOP3": 1,
    "SHFL": 1,
    "ISETP": 1,
    "FSETP": 1,
}
KNOWN = {
    "IADD3": 3, "VIADD": 2, "LEA": 2, "LOP3": 3, "SHF": 3, "ISETP": 2, "FSETP": 2, "IMAD": 2,
    "PRMT": 3, "VIMNMX": 2, "VIADDMNMX": 3, "P2R": 3,
}  # fmt: skip
SILENT = {"ST", "STG", "STS", "LDGSTS", "RED", "BAR", "DEPBAR"}


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def real(x: int) -> float:
    return float(np.uint32(x).view(np.float32))


COMPARE: dict[str, Callable] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


class Lane:
    """Lane 0 of warp 0 of block 0, as far as its integers follow from the kernel's parameters.

    What floats, shared memory and foreign memory hold is not known. A branch that depends on it is
    not taken, since compilers leave the common case in line; a vote of all, of which it depends, is
    unanimous; an index into parameters that depends
    on it counts as 0. Other lanes are taken to hold what this one holds.
    """

    def __init__(self, function: Function, parameters: bytes, read: Callable) -> None:
        """`read`: the bytes at an address, given their number, or None."""
        self.function, self.read = function, read
        self.banks = {0: bytes(0x210) + parameters, 2: function.tables}
        self.values: dict[str, Value] = {}

    def run(self, most: int) -> list[int]:
        """Indices of the instructions that it issues, `most` at the most."""
        at, trace, back = 0, [], []
        by_address = {x.at: i for i, x in enumerate(self.function.code)}
        while len(trace) < most:
            x = self.function.code[at]
            trace.append(at)
            at += 1
            live = self.predicate(x.guard) if x.guard else True
            if x.name in ("BRA", "EXIT", "CALL", "RET", "BRX"):
                if x.op.startswith("BRA.DIV"):  # all lanes are together
                    continue
                if x.name == "BRA" and len(x.operands) > 1 and live:
                    live = self.predicate(x.operands[0])
                if not live:
                    continue
                if x.name == "EXIT":
                    break
                if x.name == "CALL":
                    back.append(at)
                if x.name == "BRX":
                    base, offset = re.match(r"(\w+) (-?0x[0-9a-f]+)", x.operands[0]).groups()
                    if self.values.get(base) is None:
                        raise ValueError(f"the branch at {x.at:#x} depends on what is not known")
                    at = by_address[self.values[base] + x.at + 16 + int(offset, 16)]
                else:
                    at = back.pop() if x.name == "RET" else self.function.targets(x)[0]
            elif live is None:
                if x.name == "LOP3" and x.operands[0] == x.operands[1]:
                    continue  # a flag that is kept among others
                for name, width in self.written(x):
                    self.put(name, [None] * width)
            elif live:
                self.step(x)
        return trace

    def predicate(self, name: str) -> bool | None:
        if name.startswith("!"):
            value = self.predicate(name[1:])
            return None if value is None else not value
        return True if name in ("PT", "UPT") else self.values.get(name)

    def get(self, operand: str, high: int = 0) -> Value:
        """A register, the one `high` registers behind it, or a number."""
        operand = operand.removesuffix(".reuse")
        if operand[0] in "-~" and not INTEGER.fullmatch(operand):
            x = self.get(operand[1:], high)
            # Not cut to 32 bits: of a - b this is what is carried.
            return None if type(x) is not int else ~x & BITS if operand[0] == "~" else 2**32 - x
        if match := re.fullmatch(r"(U?R)(\d+)", operand):
            return self.values.get(f"{match[1]}{int(match[2]) + high}", 0)
        if operand in ("RZ", "URZ", "SRZ") or operand.startswith("SR_"):
            return 0
        if match := re.fullmatch(r"c\[(0x\w+)\]\[(?:(U?R[Z\d]+)\+?)?(-?0x\w+)?\]", operand):
            index = (self.get(match[2]) or 0) if match[2] else 0
            at = index + int(match[3] or "0", 16) + 4 * high
            word = self.banks.get(int(match[1], 16), b"")[at : at + 4] if at >= 0 else b""
            return int.from_bytes(word, "little") if len(word) == 4 else None
        if INTEGER.fullmatch(operand):
            return int(operand, 0) >> 32 * high & BITS
        return None

    def pair(self, operand: str) -> int | None:
        low, high = self.get(operand), self.get(operand, 1)
        if INTEGER.fullmatch(operand) or operand in ("RZ", "URZ"):
            high = 0
        return None if type(low) is not int or type(high) is not int else low | high << 32

    def put(self, name: str, values: Sequence[Value]) -> None:
        if match := re.fullmatch(r"(U?R)(\d+)", name):
            for i, x in enumerate(values):
                self.values[f"{match[1]}{int(match[2]) + i}"] = x & BITS if type(x) is int else x
        elif name not in ("RZ", "URZ", "PT", "UPT"):
            self.values[name] = values[0]

    def written(self, x: Instruction) -> list[tuple[str, int]]:
        """What an instruction writes, its first operands, and how many registers of each."""
        if x.name in SILENT or not x.operands:
            return []
        width = 4 if PRODUCT.match(x.op) or x.op.endswith((".128", ".4")) else 1
        if ".64" in x.op or ".WIDE" in x.op or x.op == "CS2R":
            width = 2
        name, written = x.name.removeprefix("U"), [x.operands[0]]
        # A carry, a second comparison; or the register of what begins with a predicate.
        more = PREDICATE if "R" in written[0] or "SETP" in name or name == "PLOP3" else REGISTER
        for y in x.operands[1 : 1 + WRITTEN.get(name, 0)]:
            if not more.fullmatch(y):
                break
            written.append(y)
        return [(y, 1 if PREDICATE.fullmatch(y) else width) for y in written]

    def step(self, x: Instruction) -> None:
        written = self.written(x)
        values = self.compute(x, x.operands[len(written) :], written[0][1] if written else 0)
        for i, (name, width) in enumerate(written):
            value = values[i] if values and i < len(values) else None
            self.put(name, list(value) if isinstance(value, tuple) else [value] * width)

    def compute(self, x: Instruction, given: Sequence[str], width: int) -> list | None:
        """What is written, given the other operands; None where nothing is known of it."""
        name, of = x.name.removeprefix("U"), [0 if y == "PR" else self.get(y) for y in given]
        predicates = [
            self.predicate(y) if PREDICATE.fullmatch(y.lstrip("!")) else None for y in given
        ]
        if name == "LDC":
            return [tuple(self.get(given[0], i) for i in range(width))]
        if name in ("LDG", "LD"):
            return self.load(x, given[0], width)
        if name in ("MOV", "S2R", "R2UR", "S2UR", "CS2R"):
            return [(of[0],) * width]
        if name == "SHFL":
            return [True, of[0]]
        if name == "VOTE":
            unanimous = True if ".ALL" in x.op else None
            return [unanimous if predicates[-1] is None else predicates[-1]]
        if name == "PLOP3":
            a, b, c = predicates[:3]
            return None if None in (a, b, c) else [int(given[3], 16) >> (a << 2 | b << 1 | c) & 1]
        if name == "SEL":
            return None if predicates[2] is None else [of[0] if predicates[2] else of[1]]
        if name == "IMAD" and None in of[:2] and 0 in of[:2] and not x.op.startswith("IMAD.W"):
            return [of[2]]
        if None in of[: KNOWN.get(name, 1)]:
            return None
        carried = predicates[-2:] if ".X" in x.op else []
        carry = sum(y or 0 for y in carried)
        unsigned = ".U32" in x.op

        if name == "IMAD":
            wide = ".WIDE" in x.op or ".HI" in x.op
            a, b = (y if unsigned or not wide else signed(y & BITS) for y in of[:2])
            if not wide:
                return None if of[2] is None else [a * b + of[2] + carry]
            if (c := self.pair(given[2])) is None:
                return None
            total = a * b + c
            if ".HI" in x.op:
                return [total >> 32]
            return [(total & BITS, total >> 32 & BITS), total >> 64 & 1]
        if name in ("IADD3", "VIADD"):
            total = sum(of[: KNOWN[name]]) + carry
            return [total, total >> 32 & 1, total >> 33 & 1]
        if name == "LEA":
            high = ".HI" in x.op
            extended = ".SX32" in x.op
            upper = (BITS if of[0] >> 31 else 0) if extended else of[2]
            shift = of[3] if high and not extended else of[2]
            if None in (upper, shift):
                return None
            part = (of[0] | upper << 32) << shift >> 32 & BITS if high else of[0] << shift & BITS
            total = part + of[1] + carry
            return [total, total >> 32 & 1]
        if name == "LOP3":
            table, result = int(given[3], 16), 0
            for i in range(8):
                if table >> i & 1:
                    a, b, c = (y if i & bit else ~y for y, bit in zip(of, (4, 2, 1), strict=False))
                    result |= a & b & c
            result &= BITS
            return [result != 0, result] if PREDICATE.fullmatch(x.operands[0]) else [result]
        if name == "SHF":
            both = of[0] | (signed(of[2]) if ".S" in x.op else of[2]) << 32
            both = both << of[1] if ".L" in x.op else both >> of[1]
            return [both >> (32 if ".HI" in x.op else 0)]
        if name in ("ISETP", "FSETP"):
            how, either = x.op.split(".")[1], ".OR" in x.op
            if how not in COMPARE:
                return None
            a, b = (y & BITS for y in of[:2])
            if name == "FSETP":
                a, b = map(real, (a, b))
            elif not unsigned:
                a, b = signed(a), signed(b)
            result = COMPARE[how](a, b)
            if ".EX" in x.op and a == b:
                result = predicates[3]  # of the lower halves
            known, other = predicates[2], None if result is None else not result
            return [joined(result, known, either), joined(other, known, either)]
        if name == "P2R":
            bits = [self.values.get(f"P{i}") if of[2] >> i & 1 else 0 for i in range(7)]
            if None in bits:
                return None
            return [of[1] & ~of[2] | sum(y << i for i, y in enumerate(bits))]
        if name == "PRMT":
            source = of[0] | of[2] << 32
            return [sum((source >> 8 * (of[1] >> 4 * i & 7) & 255) << 8 * i for i in range(4))]
        if name == "IABS":
            return [abs(signed(of[0] & BITS))]
        if name in ("VIMNMX", "VIADDMNMX"):
            count = KNOWN[name]
            a, b = of[0] + (of[1] if count == 3 else 0) & BITS, of[count - 1] & BITS
            if not unsigned:
                a, b = signed(a), signed(b)
            least = predicates[count]
            return None if least is None else [min(a, b) if least else max(a, b)]
        # Integer division goes by way of floats.
        if name in ("I2F", "I2FP"):
            return [int(np.float32(of[0]).view(np.uint32))]
        if x.op == "MUFU.RCP" and of[0]:
            return [int(np.float32(1 / real(of[0])).view(np.uint32))]
        if name == "F2I":
            return [int(real(of[0]))] if abs(real(of[0])) < 2**32 else None
        return None

    def load(self, x: Instruction, place: str, width: int) -> list | None:
        match = re.match(r"(?:desc\[\w+\])?\[(R\d+)(?:\.\w+)?(?:\+(-?0x\w+))?\]", place)
        base = self.pair(match[1]) if match else None
        if base is None or x.bytes < 4:
            return None
        words = [self.read(base + int(match[2] or "0", 16) + 4 * i, 4) for i in range(width)]
        return [tuple(None if w is None else int.from_bytes(w, "little") for w in words)]


def joined(a: bool | None, b: bool | None, either: bool) -> bool | None:
    """a or b, or both of them: known where one decides."""
    if either in (a, b):
        return either
    return None if None in (a, b) else not either
