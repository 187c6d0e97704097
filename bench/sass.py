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
    found = {}
    for section in re.split(r"^\s*\.section\s+", text, flags=re.M)[1:]:
        kind, _, name = section.partition(",")[0].rpartition(".")
        kind, name = (
            re.match(r"\.(text|nv\.constant2)\.(.+)", f"{kind}.{name}").groups()
            if (section.startswith((".text.", ".nv.constant2.")))
            else ("", "")
        )
        if not kind:
            continue
        function = found.setdefault(name, Function())
        if kind == "nv.constant2":
            function.tables = bytes(int(x, 16) for x in re.findall(r"\b0x([0-9a-f]{2})\b", section))
            continue
        for label, at, text, control in LINE.findall(section):
            if label:
                function.labels[label] = len(function.code)
                continue
            guard, op, operands = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", text, re.S).groups()
            function.code.append(
                Instruction(int(at, 16), guard or "", op, tuple(
                    x.strip() for x in operands.split(",") if x.strip()
                ), int(control, 16) >> 41)
            )  # fmt: skip
    return found


Value = int | float | None  # of a register, None where nothing is known
BITS = 0xFFFFFFFF


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


COMPARE: dict[str, Callable] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


class Lane:
    """Lane 0 of warp 0 of block 0, as far as its integers follow from the kernel's parameters.

    What floats, shared memory and foreign memory hold is not known. A branch that depends on it is
    not taken, since compilers leave the common case in line; an index into parameters that depends
    on it counts as 0. Other lanes are taken to hold what this one holds.
    """

    def __init__(self, function: Function, parameters: bytes, read: Callable) -> None:
        """`read`: the bytes at an address, given their number, or None."""
        self.function, self.read = function, read
        self.banks = {0: bytes(0x210) + parameters, 2: function.tables}
        self.values: dict[str, Value] = {}
        self.guessed = 0  # branches

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
                self.guessed += live is None
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
        """What an instruction writes, and how many registers."""
        if (
            x.name in ("ST", "STG", "STS", "LDGSTS", "RED", "BAR", "DEPBAR", "R2P")
            or not x.operands
        ):
            return []
        width = 4 if PRODUCT.match(x.op) or x.op.endswith((".128", ".4")) else 1
        if ".64" in x.op or ".WIDE" in x.op or x.op == "CS2R":
            width = 2
        lead = [x.operands[0]]
        # Carries, a second comparison, or a register behind a predicate.
        extra = {"IADD3": 2, "LEA": 1, "IMAD": 1, "PLOP3": 1, "LOP3": 1, "SHFL": 1}
        for y in x.operands[1 : 1 + extra.get(x.name.removeprefix("U"), "SETP" in x.name)]:
            if not re.fullmatch(r"U?P[\dT]" if lead[0][-2:-1] != "P" or x.name[-4:] == "SETP"
                                or "PLOP" in x.name else r"U?R[\dZ]+", y):  # fmt: skip
                break
            lead.append(y)
        return [(y, width if y[-1] != "T" and "R" in y else 1) for y in lead]

    def step(self, x: Instruction) -> None:
        written = self.written(x)
        values = self.compute(x, written)
        for i, (name, width) in enumerate(written):
            value = values[i] if values and i < len(values) else None
            self.put(name, list(value) if isinstance(value, tuple) else [value] * width)

    def compute(self, x: Instruction, written: list) -> list | None:
        """What is written, in order; None where nothing is known of it."""
        name = x.name.removeprefix("U") if x.name != "UNKNOWN" else x.name
        given = x.operands[len([w for w in written if w[0] in x.operands[: len(written)]]) :]
        of = [self.get(y) for y in given]
        known = lambda n: all(type(y) is int for y in of[:n])  # noqa: E731
        carry = lambda y: self.predicate(y) if re.fullmatch(r"!?U?P[\dT]", y) else None  # noqa: E731
        carries = [carry(y) for y in given if carry(y) is not None]

        if name in ("LDC", "LDG", "LD", "LDC"):
            width = written[0][1]
            if name == "LDC":
                return [tuple(self.get(given[0], i) for i in range(width))]
            match = re.match(r"(?:desc\[\w+\])?\[(R\d+)(?:\.\w+)?(?:\+(-?0x\w+))?\]", given[0])
            base = self.pair(match[1]) if match else None
            if base is None or x.bytes < 4:
                return None
            words = [self.read(base + int(match[2] or "0", 16) + 4 * i, 4) for i in range(width)]
            return [tuple(None if w is None else int.from_bytes(w, "little") for w in words)]
        if name in ("MOV", "S2R", "2UR", "R2UR", "S2UR", "CS2R"):
            return [(of[0],) * written[0][1]]
        if name == "SHFL":
            return [True, of[0]]
        if name == "VOTE":
            return [carries[-1]] if carries else None
        if name == "IMAD":
            if not known(2):
                return [of[2]] if 0 in of[:2] and ".W" not in x.op and ".H" not in x.op else None
            a, b = (of[:2] if ".U32" in x.op or ".WIDE" not in x.op and ".HI" not in x.op
                    else map(signed, (y & BITS for y in of[:2])))  # fmt: skip
            if ".WIDE" in x.op or ".HI" in x.op:
                c = self.pair(given[2])
                if c is None:
                    return None
                total = a * b + c
                if ".HI" in x.op:
                    return [total >> 32]
                return [(total & BITS, total >> 32 & BITS), total >> 64 & 1 == 1]
            if type(of[2]) is not int or ".X" in x.op and not carries:
                return None
            return [a * b + of[2] + (carries[-1] if ".X" in x.op else 0)]
        if name in ("IADD3", "VIADD"):
            if not known(3 if name == "IADD3" else 2):
                return None
            plus = sum(carries[-2:]) if ".X" in x.op else 0
            if ".X" in x.op and any(carry(y) is None for y in given[3:]):
                return None
            total = sum(of[: 3 if name == "IADD3" else 2]) + plus
            return [total, total >> 32 & 1 == 1, total >> 33 & 1 == 1]
        if name == "LEA":
            if not known(2):
                return None
            if ".HI" not in x.op:
                total = (of[0] << of[2] & BITS) + of[1]
                return [total, total >> 32 == 1]
            wide = ".SX32" in x.op
            if not wide and type(of[2]) is not int:
                return None
            top = (BITS if of[0] >> 31 else 0) if wide else of[2]
            plus = carries[-1] if ".X" in x.op and carries else 0
            shift = of[2 if wide else 3]
            total = ((of[0] | top << 32) << shift >> 32 & BITS) + of[1] + plus
            return [total, total >> 32 == 1]
        if name == "LOP3":
            table, (a, b, c) = int(given[3], 16), of[:3]
            if None in (a, b, c):
                if table == 0xC0 and 0 in (a, b):
                    return [0]
                return None
            result = 0
            for i in range(8):
                if table >> i & 1:
                    result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result &= BITS
            return [result != 0, result] if "P" in written[0][0] else [result]
        if name == "SHF":
            if type(of[1]) is not int or None in (of[0], of[2]):
                return None
            both = of[0] | (signed(of[2]) if ".S" in x.op else of[2]) << 32
            if ".L" in x.op:
                return [(both << of[1]) >> (32 if ".HI" in x.op else 0)]
            return [both >> of[1] >> (32 if ".HI" in x.op else 0)]
        if name in ("ISETP", "FSETP"):
            how, join = x.op.split(".")[1], "OR" if ".OR" in x.op else "AND"
            if not known(2) or how not in COMPARE:
                return None
            a, b = (y & BITS for y in of[:2])
            if name == "FSETP":
                a, b = (float(np.uint32(y).view(np.float32)) for y in (a, b))
            elif ".U32" not in x.op:
                a, b = signed(a), signed(b)
            result = COMPARE[how](a, b)
            if ".EX" in x.op:
                below = carry(given[3])
                if below is None:
                    return None
                if a == b:
                    result = below
            also = carry(given[2])
            if also is None:
                return [join == "OR"] if result == (join == "OR") else None
            return [result or also if join == "OR" else result and also,
                    not result or also if join == "OR" else not result and also]  # fmt: skip
        if name == "PLOP3":
            bits = [carry(y) for y in given[:3]]
            if None in bits:
                return None
            return [bool(int(given[3], 16) >> (bits[0] << 2 | bits[1] << 1 | bits[2]) & 1)]
        if name == "SEL":
            chosen = carry(given[2])
            return None if chosen is None else [of[0] if chosen else of[1]]
        if name == "P2R" and type(of[1]) is int and type(of[2]) is int:
            places = [i for i in range(7) if of[2] >> i & 1]
            bits = [self.values.get(f"P{i}") for i in places]
            if None in bits:
                return None
            return [of[1] & ~of[2] | sum(y << i for y, i in zip(bits, places, strict=True))]
        if name == "PRMT" and known(3):
            source = of[0] | of[2] << 32
            picked = [source >> 8 * (of[1] >> 4 * i & 7) & 255 for i in range(4)]
            return [sum(y << 8 * i for i, y in enumerate(picked))]
        if name == "IABS" and known(1):
            return [abs(signed(of[0] & BITS))]
        if name in ("VIMNMX", "VIADDMNMX"):
            count = 2 if name == "VIMNMX" else 3
            least = carry(given[count])
            if not known(count) or least is None:
                return None
            a, b = of[0] + (of[1] if count == 3 else 0) & BITS, of[count - 1] & BITS
            if ".U32" not in x.op:
                a, b = signed(a), signed(b)
            return [min(a, b) if least else max(a, b)]
        # Integer division goes by way of floats.
        if name in ("I2F", "I2FP") and known(1):
            return [int(np.float32(of[0]).view(np.uint32))]
        if x.op == "MUFU.RCP" and known(1):
            return [int((np.float32(1) / np.uint32(of[0]).view(np.float32)).view(np.uint32))]
        if name == "F2I" and known(1):
            number = float(np.uint32(of[0]).view(np.float32))
            return [int(number)] if abs(number) < 2**32 else None
        return None
