"""What the kernels take of a GPU, read from binaries compiled for it on any machine.

Every Triton kernel is compiled as its launcher would launch it, for each architecture; those in
CUDA C++ are read from a library (`make cuda`). None may spill, but for a case that is named, or ask
for more shared memory than there is, and products of matrices must be on tensor cores. Each must
also compile for whatever integers it may meet: Triton makes a constant of 1, and a kernel apart for
multiples of 16.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvtools import ops, results
from kvtools.kernels import attention

from .resources_cases import CUDA_MULTIPLY, EDGE_ARCH, EDGES, INTEGERS, ON_AMD, ROWS, SPILLS, cases
from .targets import Targets

# Shared memory that a program may have, in KiB, by architecture: for Triton, and of csrc/cuda.
ARCHS = {80: 163, 90: 227, 100: 227}
CUDA_ARCHS = {"80": 163, "90a": 227, "100": 227, "120": 99}
AMD = {"gfx942": 64, "gfx950": 160}
# Bytes of a thread that others spill where a version of Triton finds no better, and who has it.
SPILLED = {"3.6.0": 248, "3.9.0": 32}  # the first is torch 2.11's
PRODUCTS = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma)\.")
AMD_PRODUCTS = re.compile(r"\bv_mfma_")
CUDA_PRODUCTS = re.compile(r"\b[HIQU]G?MMA\b")


Arch = int | str  # of NVIDIA its number


def named(arch: Arch) -> str:
    return arch if arch in AMD else f"sm_{arch}"


@dataclass(frozen=True)
class Binary:
    """What a kernel takes, and how many instructions for tensor cores it has."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread that are in memory; on AMD, its scratch
    shared: int  # bytes of a program
    products: int


class Device:
    """What a launch asks of Triton's driver."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        if self.arch in AMD:
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> Arch:
        return self.arch  # kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: Arch, integer: int | None = None) -> Iterator[dict[tuple[str, str], Any]]:
    """Launches on CPU tensors compile for `arch` and run nothing, with `integer` for each integer
    argument if there is one. Yields what Triton compiled, by the name of the kernel and a hash."""
    found = {}
    attention._constants.cache_clear()  # a device's are remembered, and this one has many
    run = JITFunction.run

    def argument(x):
        if isinstance(x, tuple):
            return type(x)(*map(argument, x)) if hasattr(x, "_fields") else tuple(map(argument, x))
        return x if integer is None or type(x) is not int else integer

    def compile(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *map(argument, args), grid=grid, warmup=True, **kwargs)
        found[compiled.metadata.name, compiled.hash] = compiled

    with (
        patch.object(triton.runtime.driver, "_active", Device(arch)),
        patch.object(JITFunction, "run", compile),
        patch.object(ops, "_runs_on", lambda impl, place: True),
    ):
        yield found


def cuobjdump(*args: str | Path) -> str:
    return subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, *args], text=True)


def usage_of(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def read(compiled) -> Binary:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        products = len(AMD_PRODUCTS.findall(text))
        return Binary(registers, spilled, compiled.metadata.shared, products)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = cuobjdump("--dump-resource-usage", file.name)
    usage = usage_of(re.search(rf"Function {compiled.metadata.name}:\s*(.*)", listing)[1])
    return Binary(
        usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared,
        len(PRODUCTS.findall(compiled.asm["ptx"])),
    )  # fmt: skip


def read_library(library: Path) -> dict[tuple[str, str], dict]:
    """Binaries of csrc/cuda by kernel, of a case without a name, then by architecture. What shared
    memory a launch asks for is not in them; csrc/testing checks it."""
    products, found = Counter(), {}
    for line in cuobjdump("-sass", library).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif "Function : " in line:
            name = line.split()[-1]
        elif CUDA_PRODUCTS.search(line):
            products[arch, name] += 1
    listing = cuobjdump("--dump-resource-usage", library)
    readable = subprocess.run(["c++filt"], input=listing, capture_output=True, text=True).stdout
    for line, plain in zip(listing.splitlines(), readable.splitlines(), strict=True):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif line.startswith(" Function "):
            name = line.split()[1].rstrip(":")
            plain = re.sub(r"kvtools::cuda::|\(anonymous namespace\)::", "", plain)
            kernel = re.search(r"(\w+(?:<.*>)?)\(", plain)[1]
        elif line.strip().startswith("REG:"):
            usage = usage_of(line)
            found.setdefault((kernel, ""), {})[arch] = Binary(
                usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"],
                products[arch, name],
            )  # fmt: skip
    return found


def build(row: str, index: int, arch: Arch, integer: int | None = None) -> dict:
    """Binaries of what a case launches, compiled; in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", ".*FP_FUSION")  # what a launch leaves to the version
    torch.set_num_threads(1)
    what, run = cases(row)[index]
    try:
        with compiling(arch, integer) as found:
            run(impl="triton")
    except Exception as error:
        numbers = "" if integer is None else f" where all integers are {integer}"
        raise RuntimeError(f"{row}, {what}: does not compile for {named(arch)}{numbers}") from error
    return {key: read(compiled) for key, compiled in found.items()}


def edges(row: str) -> list[tuple[str, int, int, int]]:
    """The arguments of `build` for the numbers that a kernel must compile with."""
    return [
        (row, i, EDGE_ARCH, integer)
        for i, (what, _) in enumerate(cases(row))
        for integer in (INTEGERS if what in EDGES[row] else ())
    ]


def build_all(
    rows: list[str], archs: list[Arch], jobs: int, console: Console
) -> dict[tuple[str, str], dict]:
    """Binaries by kernel and case, then by architecture; each under the first case that has it."""
    tasks = [
        (row, i, arch) for row in rows for i, (what, _) in enumerate(cases(row)) for arch in archs
        if arch not in AMD or what in EDGES[row] | ON_AMD
    ]  # fmt: skip
    apart = [task for row in rows for task in edges(row)] if set(archs) - AMD.keys() else []
    with (
        ProcessPoolExecutor(jobs, get_context("spawn")) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        bar = progress.add_task("compiling", total=len(tasks + apart))
        futures = [pool.submit(build, *task) for task in tasks + apart]
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found, seen = {}, set()
    for (row, index, arch), future in zip(tasks, futures[: len(tasks)], strict=True):
        what, count = cases(row)[index][0], Counter()
        for (kernel, key), binary in future.result().items():
            if key not in seen:
                seen.add(key)
                count[kernel] += 1
                nth = f" ({count[kernel]})" if count[kernel] > 1 else ""
                found.setdefault((kernel, what + nth), {})[arch] = binary
    at_edges = {kernel for future in futures[len(tasks) :] for kernel, _ in future.result()}
    if apart and (missing := {kernel for kernel, _ in found} - at_edges):
        raise RuntimeError(f"EDGES has no case that launches {', '.join(sorted(missing))}")
    return found


def judge(
    found: dict[tuple[str, str], dict], multiply: set[str], archs: dict = ARCHS, spills: int = 0
) -> Targets:
    """The rules; `multiply` names the kernels whose products must be on tensor cores, `spills` is
    how many bytes of a thread may be in memory."""
    targets = Targets()
    for arch, limit in archs.items():
        products, spilled, shared = {}, {"": 0}, 0
        for (kernel, case), each in found.items():
            if arch not in each:
                continue
            binary = each[arch]
            products[kernel] = min(products.get(kernel, binary.products), binary.products)
            by = f" by {SPILLS}" if SPILLS in case else ""
            spilled[by] = max(spilled.get(by, 0), binary.spilled)
            shared = max(shared, binary.shared)
        for by, most in spilled.items():
            targets.add(f"{named(arch)}: bytes spilled{by}", most, 0 if by else spills)
        targets.add(f"{named(arch)}: KiB shared", shared / 1024, limit)
        off = sum(not products.get(kernel) for kernel in multiply)
        targets.add(f"{named(arch)}: kernels off tensor cores", off, 0)
    return targets


def table(found: dict[tuple[str, str], dict], archs: dict = ARCHS) -> Table:
    """Registers per architecture; of the others the worst."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("kernel", no_wrap=True)
    result.add_column("case")
    for name in ("registers " + "/".join(map(str, archs)), "spilled", "KiB", "products"):
        result.add_column(name, justify="right")
    order = list(dict.fromkeys(kernel for kernel, _ in found))
    for kernel, case in sorted(found, key=lambda name: order.index(name[0])):
        binaries = found[kernel, case].values()
        spilled = max(b.spilled for b in binaries)
        result.add_row(
            kernel.strip("_").removesuffix("_kernel"),
            case,
            " ".join(f"{b.registers:>3}" for b in binaries),
            str(spilled),
            f"{max(b.shared for b in binaries) / 1024:.1f}",
            str(min(b.products for b in binaries)),
            style="red" if spilled else "",
        )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.resources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="results")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)}")  # fmt: skip
    every = ARCHS | AMD
    parser.add_argument("--archs", nargs="+", type=lambda x: int(x) if x.isdigit() else x,
                        choices=every, default=list(ARCHS), metavar="ARCH",
                        help=f"of {', '.join(map(str, every))}")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count(), help="processes")
    parser.add_argument("--cuda", type=Path, metavar="PATH", help="library with csrc/cuda")
    args = parser.parse_args(argv)
    if args.json:
        results.claim(args.json, {}, ["triton", "kernels", "cuda", "targets"])

    console = Console()
    version = triton.__version__
    archs = {arch: every[arch] for arch in args.archs}
    found = build_all(args.rows, args.archs, args.jobs, console)
    multiply = set().union(*(ROWS[row][1] for row in args.rows))
    spills = SPILLED.get(version, 0) if archs.keys() & ARCHS.keys() else 0
    targets = judge(found, multiply, archs, spills)
    console.print(table(found, archs))
    of_cuda = {}
    if args.cuda:
        of_cuda = read_library(args.cuda)
        held = {x: kib for x, kib in CUDA_ARCHS.items() if any(x in y for y in of_cuda.values())}
        if not held:
            parser.error(f"--cuda {args.cuda} holds no kernels of csrc/cuda: make cuda")
        console.print(table(of_cuda, held))
        for target in judge(of_cuda, CUDA_MULTIPLY, held):
            targets.append(target | {"name": f"CUDA, {target['name']}"})
    console.print(f"Triton {version}", highlight=False)
    targets.show(console)
    if args.json:

        def rows(found):
            return [
                {"kernel": kernel, "case": case} | {named(a): asdict(b) for a, b in each.items()}
                for (kernel, case), each in found.items()
            ]

        result = {
            "triton": version, "kernels": rows(found), "cuda": rows(of_cuda),
            "targets": targets,
        }  # fmt: skip
        results.write(args.json, json.dumps(result, indent=1) + "\n")
    return 0 if all(target["ok"] or SPILLS in target["name"] for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
