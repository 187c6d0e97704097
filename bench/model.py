"""How fast tree_attention's kernels can be on an H100, from their machine code for sm_90.

Of each loop over tiles of keys and values this counts what a tile costs every pipe, plays how long
the warps of a multiprocessor take for it by the compiler's own scheduling and the latencies below,
and tells what is on its way from memory meanwhile. No GPU is needed, and none has confirmed it.
Triton's loops are read from end to end; in csrc/cuda a lane is followed through the branches.

It cannot see: bank conflicts, the instruction cache, bubbles behind branches, conflicts of register
banks, TLBs, what heads find in L2, row conflicts and bursts of DRAM, queues near saturation, clocks
under a power limit. All blocks of a multiprocessor are taken to have the same loop, and peaks not
to move, which in most tiles they do not. Times are of the attention kernel alone, to 30 % at best;
ratios between variants of one kernel are better.
"""

import argparse
import ctypes
import heapq
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

from kvtools import results
from kvtools.ops.attention import PLACES, TILE_ROWS
from kvtools.reference.quant import width

from .bench_attention import Inputs, Shape, nbytes
from .resources import compiling, cuobjdump, read, usage_of
from .resources_cases import cases
from .sass import LOAD, PRODUCT, Function, Instruction, Lane, disassemble
from .targets import Targets


class Rate(NamedTuple):
    value: float
    unit: str
    source: str


GUIDE = "CUDA C++ Programming Guide, throughput of arithmetic instructions, capability 9.0"
ASSUMED = "assumed"
RATES = {
    "HBM": Rate(3.0e12, "B/s", "a read stream on an H100 SXM (3.35e12 nominal), assumed"),
    "L2 rate": Rate(
        5.5e12, "B/s", "what reads get of an H100's L2, published for its PCIe card; assumed"
    ),
    "clock": Rate(1.755e9, "Hz", "H100 boost, NVIDIA; under load it may be less"),
    "SMs": Rate(132, "", "H100 SXM, NVIDIA"),
    # A multiprocessor's, for a cycle.
    "issue": Rate(4, "warp instructions", "four schedulers, H100 whitepaper"),
    "ALU": Rate(64, "lanes", GUIDE),
    "IMAD": Rate(64, "lanes", GUIDE),
    "FMA": Rate(128, "lanes", f"{GUIDE}; IMAD takes from it"),
    "XU": Rate(16, "lanes", GUIDE),
    "shared": Rate(128, "B", "banks of 4 B, CUDA C++ Programming Guide; a shuffle is 128 B"),
    "mma.sync": Rate(0.62 * 2048, "FMA", "62 % of wgmma, arXiv 2402.13499"),
    "wgmma": Rate(2048, "FMA", "989 TFLOP/s dense bf16, H100 data sheet"),
    # Cycles until a result can be used; of what has a fixed latency the compiler writes it down.
    "DRAM": Rate(600, "cycles", "478 to 850 published (arXiv 2402.13499), loaded; assumed"),
    "L2": Rate(280, "cycles", "about 260 published (arXiv 2402.13499); loads of 4 B, of tables"),
    "LDS": Rate(30, "cycles", "29 published (arXiv 2402.13499)"),
    "LDC": Rate(30, "cycles", ASSUMED),
    "SHFL": Rate(25, "cycles", ASSUMED),
    "other": Rate(20, "cycles", f"MUFU, I2F, S2R and others that set a barrier; {ASSUMED}"),
    "read": Rate(15, "cycles", f"until a store or a copy has read its registers; {ASSUMED}"),
    "barrier": Rate(16, "cycles", f"of a block, once its warps are there; {ASSUMED}"),
    "block": Rate(2000, "cycles", f"of a block before and after its tiles; {ASSUMED}"),
}
PIPES = ("issue", "ALU", "IMAD", "FMA", "XU", "shared", "mma.sync", "wgmma")
PIPE = {
    "ALU": "IADD3 VIADD LEA LOP3 SHF PRMT ISETP SEL FSEL FSETP FMNMX VIMNMX VIADDMNMX PLOP3 P2R "
    "R2P IABS MOV F2FP I2FP CS2R HSETP2 HMNMX2 VHMNMX BMSK SGXT VOTE",
    "IMAD": "IMAD",
    "FMA": "FFMA FMUL FADD HFMA2 HMUL2 HADD2",
    "XU": "MUFU I2F F2I F2F POPC FLO BREV I2I",
    "shared": "LDS LDSM STS STSM SHFL LDGSTS LDG LD STG ATOMS",
}
PIPE_OF = {name: pipe for pipe, names in PIPE.items() for name in names.split()}
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32  # of a multiprocessor, sm_90
LLAMA = (8, 4, 128)  # KV heads, query heads of each, head size
SHAPES = [Shape(64, 0, 4096, *LLAMA), Shape(64, 8192, 256, *LLAMA)]
SHOWN = ("none", "fp8", "int8", "int4", "int2")


def cycles(name: str) -> float:
    """Of a thing that RATES has in cycles."""
    return RATES[name].value


# A multiprocessor's bytes in a cycle.
HBM_BYTES, L2_BYTES = (cycles(x) / cycles("SMs") / cycles("clock") for x in ("HBM", "L2 rate"))


def product(x: Instruction) -> tuple[str, float]:
    """The pipe of a product of matrices, and its multiplications: of a warp, or of four."""
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)", x.op):
        return "wgmma", math.prod(map(int, match.groups()))
    match = re.search(r"\.(16|8)(8)(\d+)", x.op)
    return "mma.sync", math.prod(map(int, match.groups()))


def cost(x: Instruction, warps: int) -> tuple[str, float]:
    """The pipe of an instruction besides the schedulers, and its cycles there for all warps."""
    if x.idle:
        return "issue", 0
    if PRODUCT.match(x.op):
        pipe, count = product(x)
        return pipe, count * warps / (4 if pipe == "wgmma" else 1) / cycles(pipe)
    pipe = PIPE_OF.get(x.name, "issue")
    if pipe == "issue":
        return pipe, 0
    size = 32
    if pipe == "shared":
        matrices = re.search(r"\.(?:M88|MT88)\.?(\d?)", x.op)
        size *= 4 * int(matrices[1] or 1) if matrices else max(x.bytes, 4)
    return pipe, warps * size / cycles(pipe)


def by_pipe(trace: Sequence[Instruction], warps: int) -> dict[str, float]:
    """Cycles of each pipe for what all warps of a block issue."""
    found = dict.fromkeys(PIPES, 0.0)
    found["issue"] = len(trace) * warps / cycles("issue")
    for x in trace:
        pipe, count = cost(x, warps)
        if count:
            found[pipe] += count
            if pipe == "IMAD":
                found["FMA"] += warps * 32 / cycles("FMA")
    return found


def latency(x: Instruction, far: str) -> float:
    if x.name in ("LDG", "LD", "LDGSTS"):
        return cycles("L2" if x.bytes == 4 else far)
    return cycles({"LDS": "LDS", "LDSM": "LDS", "LDC": "LDC", "SHFL": "SHFL"}.get(x.name, "other"))


class Warp:
    """What one of the warps of `simulate` waits for."""

    def __init__(self, index: int, block: int) -> None:
        self.scheduler, self.block, self.at = index % 4, block, 0
        self.barriers = [0.0] * 6  # when each is free
        self.groups: list[tuple[float, int]] = []  # of copies: when they are there, their bytes
        self.arrives, self.asked, self.most, self.multiplied = 0.0, 0, 0, 0.0


def simulate(
    trace: Sequence[Instruction], warps: int, blocks: int, far: str = "DRAM", tiles: int = 6
) -> tuple[float, int]:
    """Cycles in which each of the blocks of a multiprocessor does a tile, in the steady state; and
    the bytes of a lane that copies have on their way at once. Keys and values are in `far`."""
    # Pipes of a scheduler hold up the next instruction for them, others have queues.
    steps = []
    widest = max((x.bytes for x in trace if x.name == "LDGSTS"), default=0)
    for x in trace:
        pipe, spent = cost(x, 1)
        own = pipe in ("ALU", "IMAD", "FMA", "mma.sync")
        steps.append((x, pipe, spent * 4 if own else spent, own, *x.barriers, latency(x, far)))
    free = dict.fromkeys([*PIPES, *((pipe, i) for pipe in PIPES for i in range(4))], 0.0)
    every = [Warp(i, i // warps) for i in range(warps * blocks)]
    # When each may go on, since when it waits: who has waited longest is first.
    queue = [(97.0 * warp.block, 0.0, i) for i, warp in enumerate(every)]
    heapq.heapify(queue)
    began: list[list[float]] = [[] for _ in range(blocks)]
    there: list[list[int]] = [[] for _ in range(blocks)]  # at a barrier
    while min(map(len, began)) < tiles:
        now, since, i = heapq.heappop(queue)
        warp = every[i]
        x, pipe, spent, own, done, been_read, late = steps[warp.at]
        start = max([now, free["issue", warp.scheduler], *(warp.barriers[w] for w in x.waits)])
        if own:
            start = max(start, free[pipe, warp.scheduler])
        if x.name == "DEPBAR" and not x.idle:
            left = int(x.operands[-1], 16)
            while len(warp.groups) > left:
                start = max(start, warp.groups.pop(0)[0])
        elif x.op.startswith("WARPGROUP.DEPBAR"):
            start = max(start, warp.multiplied)
        if start > now:
            heapq.heappush(queue, (start, since, i))
            continue
        if warp.at == 0 and i % warps == 0:
            began[warp.block].append(now)
        free["issue", warp.scheduler] = now + 1
        served = now
        if own:
            free[pipe, warp.scheduler] = now + spent
        elif spent:
            served = free[pipe] = max(free[pipe], now) + spent
        if done < 6:
            warp.barriers[done] = max(warp.barriers[done], served + late)
        if been_read < 6:
            warp.barriers[been_read] = max(warp.barriers[been_read], served + cycles("read"))
        after = now + x.stall
        if x.idle:
            pass
        elif x.name == "LDGSTS":
            codes = x.bytes in (8, 16, widest)  # and no table
            warp.arrives = max(warp.arrives, served + (cycles(far) if codes else late))
            warp.asked += x.bytes * codes
            warp.most = max(warp.most, warp.asked + sum(size for _, size in warp.groups))
        elif x.name == "LDGDEPBAR":
            warp.groups.append((warp.arrives, warp.asked))
            warp.asked = 0
        elif pipe == "wgmma":
            warp.multiplied = served
        elif x.name == "MEMBAR":
            after += cycles("barrier")
        warp.at += 1
        if warp.at == len(steps):
            warp.at = 0
        if x.name == "BAR" and not x.idle:
            there[warp.block].append(i)
            if len(there[warp.block]) == warps:
                for other in there[warp.block]:
                    heapq.heappush(queue, (after + cycles("barrier"), now, other))
                there[warp.block].clear()
        else:
            heapq.heappush(queue, (after, now, i))
    first = tiles // 2 - 1
    steady = [(x[tiles - 1] - x[first]) / (tiles - 1 - first) for x in began]
    return sum(steady) / blocks, max(warp.most for warp in every)


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Blocks of a multiprocessor: registers are given by warp and 256, 1 KiB shared is the
    system's."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(REGISTERS // (of_warp * warps), SHARED // (shared + 1024), WARPS // warps, BLOCKS)


class Kernel(NamedTuple):
    """A loop over tiles, as a block runs it."""

    impl: str
    format: str
    d: int
    tile: str  # for few query rows, or for many
    rows: int  # query rows for which a tile is loaded
    slots: int  # of a tile
    warps: int
    registers: int
    shared: int
    trace: list[Instruction]  # a warp's for a tile

    def figures(self) -> dict[str, Any]:
        """What a tile costs, and what that allows."""
        blocks = occupancy(self.registers, self.shared, self.warps)
        pipes = by_pipe(self.trace, self.warps)
        # Tiles for many rows are loaded for other rows, too: they are in L2.
        far = "L2" if self.tile == "many" else "DRAM"
        simulated, copied = simulate(self.trace, self.warps, blocks, far)
        size = self.slots * slot_bytes(self.format, self.d)
        counts = Counter(product(x)[0] if PRODUCT.match(x.op) else PIPE_OF.get(x.name, "other")
                         for x in self.trace)  # fmt: skip
        asked = sum(x.bytes for x in self.trace if LOAD.match(x.op) and not x.idle)
        found = {key: value for key, value in self._asdict().items() if key != "trace"}
        return found | {
            "blocks": blocks, "instructions": len(self.trace), "of pipes": dict(counts),
            "bytes": size, "bytes asked for": asked * 32 * self.warps,
            "bytes in flight": copied * 32 * self.warps * blocks, "cycles of pipes": pipes,
            "simulated cycles": simulated, "cycles of HBM": size / HBM_BYTES,
            **rated(pipes, simulated, blocks, size / HBM_BYTES,
                    size / (L2_BYTES if far == "L2" else HBM_BYTES)),
        }  # fmt: skip


def slot_bytes(format: str, d: int) -> int:
    """Of a KV head's key and value, scales included."""
    return 4 * d if format == "none" else 2 * (width(format, d) + 2)


def rated(
    pipes: dict[str, float], simulated: float, blocks: int, hbm: float, memory: float
) -> dict[str, Any]:
    """What bounds a tile, given cycles of each pipe, of HBM and of the memory that it comes from,
    those in which each of the blocks of a multiprocessor does one, and how many these are: the pipe
    and its ceiling as a share of the HBM rate; with latency, too, the cycles, what binds, and the
    share."""
    pipe = max(pipes, key=pipes.__getitem__)
    busy = blocks * pipes[pipe]
    took = max(simulated, busy, blocks * memory)
    # A pipe that is never idle for long is what binds.
    binds = "latency" if took >= busy / 0.9 else pipe
    if took == blocks * memory:
        binds = "HBM" if memory == hbm else "L2"
    return {
        "pipe": pipe, "ceiling": hbm / pipes[pipe], "binds": binds, "cycles": took,
        "rate": blocks * hbm / took,
    }  # fmt: skip


def of_triton() -> Iterator[Kernel]:
    """Both loops of each default kernel, and the one of launches with few rows only."""
    runs = dict(cases("attention"))
    wanted = [f"{format} D={d}" for d in (64, 128, 256) for format in SHOWN]
    for case in wanted + [f"{format} D=128, 2 rows" for format in SHOWN]:
        with compiling(90) as found:
            runs[case](impl="triton")
        [compiled] = [x for (name, _), x in found.items() if name == "_attend_kernel"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            function = disassemble(Path(file.name))["_attend_kernel"]
        names = compiled.src.fn.arg_names
        sizes = {names[at[0]]: x for at, x in compiled.src.constants.items() if len(at) == 1}
        format, d = re.match(r"(\w+) D=(\d+)", case).groups()
        binary = read(compiled)
        # The loop for many rows goes over tiles of rows, too.
        loops = sorted(function.loops(), key=lambda loop: loop.depth)
        tiles = ("few, alone",) if "rows" in case else ("few", "many")
        for loop, tile in zip(loops, tiles, strict=True):
            yield Kernel(
                "triton", format, int(d), tile, sizes["BLOCK_M"] if tile == "many" else 16,
                sizes["SMALL_N" if tile == "few" else "BLOCK_N"], compiled.metadata.num_warps,
                binary.registers, binary.shared, function.code[loop.begin : loop.end + 1],
            )  # fmt: skip


class Launch(ctypes.Structure):
    """Of model_launch.cu."""

    _fields_ = [
        ("parameters", ctypes.c_char * 4096), ("parameter_bytes", ctypes.c_int32),
        ("shared", ctypes.c_int32), ("threads", ctypes.c_int32), ("slots", ctypes.c_int32),
    ]  # fmt: skip


def nvcc(*args: str | Path) -> str:
    found = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    return subprocess.check_output([found, *args], text=True)


# What kernels for one format have in their names.
MANGLED = {
    "none": "5PlainI13__nv_bfloat16E", "fp8": "9PackedFp8", "int8": "6PackedILi8EE",
    "int4": "6PackedILi4EE", "int2": "6PackedILi2EE",
}  # fmt: skip


def of_cuda() -> Iterator[Kernel]:
    """The way through a tile of each format and head size, for one token and for 16."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(__file__).with_name("model_launch.cu")
        nvcc(  # as setup.py does, for one architecture
            "-std=c++17", "-O3", "-fmad=false", "-gencode=arch=compute_90a,code=sm_90a",
            "-Xcompiler=-fPIC", "--shared", "--keep", "--keep-dir", folder, source,
            "-o", f"{folder}/launch.so",
        )  # fmt: skip
        library = ctypes.CDLL(f"{folder}/launch.so")
        cubin = Path(folder, "model_launch.cubin")
        functions = disassemble(cubin)
        usage = {
            name: usage_of(found) for name, found in
            re.findall(r"Function (\S+):\s*(.*)", cuobjdump("--dump-resource-usage", cubin))
        }  # fmt: skip
        for d in (64, 128, 256):
            for format in SHOWN:
                for tile, tokens in (("few", 1), ("many", TILE_ROWS["cuda"] // LLAMA[1])):
                    launched, few = f"attend {tile}", 8
                    kernel = f"{tile}_kernelILi{d}ENS0_{MANGLED[format]}E"
                    if d > 128:  # the kernel for all that those for one format do not take
                        launched, few, kernel = "attend", 16, f"attend_kernelILi{d}ELb0E"
                    rows = few if tile == "few" else TILE_ROWS["cuda"]
                    [name] = [x for x in functions if kernel in x]
                    launch, trace = follow(library, functions[name], launched, format, d, tokens)
                    yield Kernel(
                        "cuda", format, d, tile, rows, launch.slots,
                        launch.threads // 32, usage[name]["REG"],
                        usage[name]["SHARED"] + launch.shared, trace,
                    )  # fmt: skip


def follow(
    library: ctypes.CDLL, function: Function, launched: str, format: str, d: int, tokens: int
) -> tuple[Launch, list[Instruction]]:
    """How attend is launched over 768 slots of a node, and what a warp issues for a tile of it."""
    slots = 768
    plan = [
        np.ascontiguousarray(x, dtype=np.int32)
        for x in ([slots - 1] * tokens, [0, slots // 16], range(slots // 16), [0], [slots], [0],
                  [0], range(tokens), [0, 0, tokens, 0, slots, 0])
    ]  # fmt: skip
    pointers = (ctypes.c_void_p * len(plan))(*(x.ctypes.data for x in plan))
    note = library.kvtools_attend_launch
    note.restype = ctypes.POINTER(Launch)
    at = ["none", "fp8", "int8", "int6", "int4", "int3", "int2"].index(format)
    launch = Launch.from_buffer_copy(
        note(launched.encode(), at, d, *LLAMA[:2], tokens, slots // 16, pointers).contents
    )

    def memory(address: int, size: int) -> bytes | None:
        for x in plan:
            if 0 <= address - x.ctypes.data <= x.nbytes - size:
                return ctypes.string_at(address, size)
        return None

    parameters = bytes(launch)[: launch.parameter_bytes]
    issued = Lane(function, parameters, memory).run(500_000)
    [loop] = [x for x in function.loops() if x.begin in issued]
    heads = [i for i, at in enumerate(issued) if at == loop.begin]
    middle = len(heads) // 2
    return launch, [function.code[at] for at in issued[heads[middle] : heads[middle + 1]]]


def seconds(shape: Shape, of: dict[str, dict]) -> float:
    """Of the attention kernel: blocks in the order of their launch, each on the place that is free
    first; at the least what HBM takes. `of`: the figures of a kernel's tiles."""
    impl = of["few"]["impl"]
    if not shape.p and "few, alone" in of:
        of = {"few": of["few, alone"]}
    levels = [torch.empty(2, *level, shape.h, shape.d, device="meta") for level in shape.levels]
    step = Inputs(torch.empty(shape.n, shape.h * shape.g, 1, shape.d, device="meta"), levels)
    processors = int(cycles("SMs"))
    forest, _ = step.forest
    # As `limits` cuts for such a GPU.
    plan = forest.plan(
        np.ones(shape.n, np.int32), tile=TILE_ROWS[impl] // shape.g,
        items=PLACES[impl] * processors // shape.h,
    )  # fmt: skip
    blocks: dict[str, list[float]] = {"many": [], "few": []}
    for node, first, last, begin, end, _ in plan["item"]:
        rows = (last - first) * shape.g
        name = "few" if rows <= of["few"]["rows"] else "many"
        tile = of[name]
        slots = min(end, plan["length"][node]) - begin
        rounds = -(-rows // tile["rows"]) * -(-slots // tile["slots"])
        # Triton has one launch for both.
        launch = name if impl == "cuda" else "few"
        blocks[launch].append(cycles("block") + rounds * tile["cycles"])
    # Triton has all heads of an item together, csrc/cuda all items of a head.
    each, heads = (shape.h, 1) if impl == "triton" else (1, shape.h)
    took = 0.0
    for launch, found in blocks.items():
        if found:
            free = [0.0] * (processors * of[launch]["blocks"])
            for block in [x for x in found for _ in range(each)] * heads:
                heapq.heapreplace(free, free[0] + block)
            took += max(free)
    return max(took / cycles("clock"), floor(shape, of["few"]["format"]))


def floor(shape: Shape, format: str) -> float:
    """Seconds that HBM takes for what is read and written once."""
    return nbytes(shape, torch.bfloat16, format) / cycles("HBM")


def measured(shape: Shape, format: str, impl: str, folder: Path) -> float | None:
    """Microseconds that a GPU took, by the results of bench.gpu."""
    cell = f"llama {shape.n} x " + (f"{shape.p} + " if shape.p else "") + str(shape.s)
    row = "kvtools" + f" {format}" * (format != "none") + ", CUDA C++" * (impl == "cuda")
    for path in sorted(folder.glob("*.json")):
        parts = json.loads(path.read_text()).get("parts", {})
        found = parts.get("attention", {}).get("cells", {}).get(cell, {}).get(row, {})
        if "ms" in found:
            return 1e3 * found["ms"]
    return None


def times(kernels: list[dict], folder: Path) -> list[dict]:
    """Each implementation's microseconds for the shapes, in bf16 and int4."""
    rows = []
    for impl in dict.fromkeys(x["impl"] for x in kernels):
        for shape in SHAPES:
            for format in ("none", "int4"):
                of = {x["tile"]: x for x in kernels
                      if (x["impl"], x["format"], x["d"]) == (impl, format, shape.d)}  # fmt: skip
                rows.append({
                    "impl": impl, "rows": shape.n, "shared": shape.p, "own": shape.s,
                    "format": format, "floor us": 1e6 * floor(shape, format),
                    "us": 1e6 * seconds(shape, of),
                    "measured us": measured(shape, format, impl, folder),
                })  # fmt: skip
    return rows


def judge(kernels: list[dict], predicted: list[dict]) -> Targets:
    """What the project wants of heads of 128, by this model."""
    targets = Targets()
    for impl in dict.fromkeys(x["impl"] for x in kernels):
        few = {x["format"]: x for x in kernels
               if (x["impl"], x["tile"], x["d"]) == (impl, "few", 128)}  # fmt: skip
        for format, least in (("none", 0.95), ("int8", 0.85), ("fp8", 0.85), ("int4", 0.7)):
            name = f"{impl}, {named(format)}: of the HBM rate, nothing shared"
            targets.add(f"{name}, by pipes", few[format]["ceiling"], least, least=True)
            targets.add(f"{name}, with latency", few[format]["rate"], least, least=True)
        targets.add(f"{impl}, bf16: KiB in flight of a multiprocessor",
                    few["none"]["bytes in flight"] / 1024, 24, least=True)  # fmt: skip
        us = {(x["shared"], x["format"]): x["us"] for x in predicted if x["impl"] == impl}
        targets.add(f"{impl}: int4 over bf16, 64 x 4096", us[0, "none"] / us[0, "int4"], 3,
                    least=True)  # fmt: skip
        for format, most in (("none", 60), ("int4", 40)):
            targets.add(f"{impl}, {named(format)}: us, 64 x 8192 + 256", us[8192, format], most)
    return targets


def named(format: str) -> str:
    return "bf16" if format == "none" else format


def arrow(before: str | None, after: str) -> str:
    return after if before in (None, after) else f"{before} → {after}"


def table(result: dict) -> list[list[str]]:
    """Heads of 128, for people; behind what the base had."""
    heads = ["kernel", "instructions", "registers", "blocks", "KiB in flight", "pipe", "ceiling",
             "binds", "of the HBM rate"]  # fmt: skip

    def rows(kernels: list[dict]) -> dict[str, list[str]]:
        return {
            f"{x['impl']}, {named(x['format'])}, {x['tile']}": [
                f"{x['instructions']} / {x['slots']}", str(x["registers"]), str(x["blocks"]),
                f"{x['bytes in flight'] / 1024:.0f}", x["pipe"], f"{x['ceiling']:.2f}", x["binds"],
                f"{x['rate']:.2f}",
            ]
            for x in kernels if x["d"] == 128
        }  # fmt: skip

    before = rows(result["base"]["kernels"]) if result["base"] else {}
    return [heads] + [
        [kernel, *map(arrow, before.get(kernel, [None] * len(row)), row)]
        for kernel, row in rows(result["kernels"]).items()
    ]


def times_table(result: dict) -> list[list[str]]:
    shape = "{rows} x {own}", "{rows} x {shared} + {own}"

    def name(x: dict) -> str:
        return f"{x['impl']}, {named(x['format'])}, {shape[x['shared'] > 0].format(**x)}"

    before = {name(x): f"{x['us']:.0f}" for x in result["base"]["times"]} if result["base"] else {}
    return [["attention of a layer", "floor us", "predicted us", "measured us"]] + [
        [name(x), f"{x['floor us']:.0f}", arrow(before.get(name(x)), f"{x['us']:.0f}"),
         "-" if x["measured us"] is None else f"{x['measured us']:.0f}"]
        for x in result["times"]
    ]  # fmt: skip


def caption(result: dict) -> str:
    base = result["base"] and f" Before each arrow is commit {result['base']['commit']}."
    return (
        f"H100, by the model alone: Triton {result['triton']}, nvcc {result['nvcc']}, heads of "
        "128. "
        "Instructions of a warp for a tile of so many slots; blocks and KiB of copies on their way "
        f"are a multiprocessor's.{base or ''}"
    )


def base(commit: str, parts: Path | None) -> dict:
    """What another commit's kernels give by its own bench.model, here and now; `parts` as in
    bench.step."""
    from .step import built

    root = built(commit, parts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        subprocess.run(
            [sys.executable, "-m", "bench.model", "--json", path], cwd=root, check=True,
            env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = json.loads(path.read_text())
    return {"commit": commit, "kernels": found["kernels"], "times": found["times"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="results")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="file whose tables to rewrite")
    parser.add_argument("--base", metavar="COMMIT", help="build to compare with")
    parser.add_argument("--base-build", type=Path, metavar="FOLDER",
                        help="its compiled parts; default: they are compiled")  # fmt: skip
    args = parser.parse_args(argv)
    if args.json:
        results.claim(args.json, {}, ["rates", "kernels", "times", "targets"])
    console = Console()
    kernels = [x.figures() for found in (of_triton(), of_cuda()) for x in found]
    predicted = times(kernels, Path(__file__).with_name("results"))
    result = {
        "triton": triton.__version__, "nvcc": re.search(r"release ([\d.]+)", nvcc("--version"))[1],
        "rates": {name: x._asdict() for name, x in RATES.items()}, "kernels": kernels,
        "times": predicted, "base": args.base and base(args.base, args.base_build),
        "targets": judge(kernels, predicted),
    }  # fmt: skip
    for rows in (table(result), times_table(result)):
        shown = Table(*rows[0], box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows[1:]:
            shown.add_row(*row)
        console.print(shown)
    result["targets"].show(console)
    if args.json:
        results.write(args.json, json.dumps(result, indent=1) + "\n")
    if args.readme:
        from kvtools.cli import demo

        demo.rewrite(args.readme, "model", table(result), caption(result))
        demo.rewrite(args.readme, "model-times", times_table(result), caption(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
