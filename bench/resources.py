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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvtools import KVPages, Plan, _host, ops, results
from kvtools.ops.attention import merge_states, tree_attention
from kvtools.ops.evict import compact_kv, key_scores, select_victims
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import LINKS, REDUCES, step_scores, token_logprobs

from . import bench_attention, bench_evict, bench_quant, bench_sampling, bench_scoring
from .targets import Targets

# Shared memory that a program may have, in KiB, by architecture: for Triton, and of csrc/cuda.
ARCHS = {80: 163, 90: 227, 100: 227}
CUDA_ARCHS = {"80": 163, "90a": 227, "100": 227, "120": 99}
FORMATS = ["none", "fp8", "int8", "int6", "int4", "int3", "int2"]
SIZES = [64, 128, 256]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Cases that spill for now, and what of. They are shown, and judged apart.
SPILLS = "fp32 heads of 256, in attention"
# Bytes of a thread that others spill where a version of Triton finds no better, and who has it.
SPILLED = {"3.6.0": 64}  # of torch 2.11
# Whatever a kernel's integers are, it must compile: for this architecture, in these cases, which
# launch every kernel, and with these numbers for all of its integers.
EDGES = {
    "quant": {"none D=128 bf16", "int6 D=128 bf16", "int4, also int8, frames"},
    "attention": {"int4 importance, all", "none all options", "D=64 fp32", "stores"},
    "evict": {"all options", "S=640", "int4"},
    "sampling": {"V=49152 fp32"},
    "scoring": {"k=3 sigmoid prod fp32", "all options bf16"},
}
EDGE_ARCH, INTEGERS = 90, (1, 15, 16)
PRODUCTS = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma)\.")
CUDA_PRODUCTS = re.compile(r"\b[HIQU]G?MMA\b")

Case = tuple[str, Callable]  # what it is, and a call that lacks its `impl`


@dataclass(frozen=True)
class Binary:
    """What a kernel takes, and how many instructions for tensor cores it has."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread that are in memory
    shared: int  # bytes of a program
    products: int


class Device:
    """What a launch asks of Triton's driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int, integer: int | None = None) -> Iterator[dict[tuple[str, str], Any]]:
    """Launches on CPU tensors compile for `arch` and run nothing, with `integer` for each integer
    argument if there is one. Yields what Triton compiled, by the name of the kernel and a hash."""
    found = {}
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


def quant() -> Iterator[Case]:
    sizes = [*product(SIZES, FORMATS, ["bf16"]), *product([128], ["none", "int4"], ["fp32"])]
    for d, format, name in sizes:
        shape, dtype = bench_quant.Shape(32, 2, d), DTYPES[name]
        k_thd, *rest = bench_quant.inputs(shape, format, dtype, "cpu")
        what = f"{format} D={d} {name}"
        yield what, partial(append_kv, k_thd, *rest)
        if format != "none":
            yield what, partial(quantize_kv, k_thd, format)
            yield what, partial(dequantize_kv, *quantize_kv(k_thd, format), d, dtype=dtype)
    k_thd, *rest = bench_quant.inputs(bench_quant.Shape(32, 2, 128), "int4", DTYPES["bf16"], "cpu")
    ring = KVPages.empty(32, 2, 1, 128, k_format="int8", v_format="int8")
    frames = dict(frame=torch.ones(2, 2, 2, 128), frame_t=torch.zeros(32, dtype=torch.int32))
    yield (
        "int4, also int8, frames",
        partial(append_kv, k_thd, *rest, also=(torch.arange(32), ring), **frames),
    )


def attention() -> Iterator[Case]:
    def case(rows, d, k_format, v_format=None, name="bf16", tracks=False, **options):
        shape = bench_attention.Shape(rows, 64, 40, 2, 4, d)
        step = bench_attention.inputs(shape, DTYPES[name], "cpu")
        position, pages, plan = step.pages(k_format)
        if v_format:
            _, other, _ = step.pages(v_format)
            pages = replace(pages, v=other.v, v_scale=other.v_scale)
        if tracks:
            slots = pages.k.shape[:3]
            importance, history = torch.zeros(slots), torch.zeros(*slots, 1, dtype=torch.int32)
            pages = replace(pages, importance=importance, history=history)
            options["window"] = 32
        return partial(tree_attention, step.q.squeeze(2), position, pages, plan, **options)

    for d, format in product(SIZES, FORMATS):
        yield f"{format} D={d}", case(64, d, format)
    for format in FORMATS:
        yield f"{format} D=128, 2 rows", case(2, 128, format)
    for d, format in product(SIZES, ("none", "int4")):
        what = f"{format} D={d} fp32" if d < 256 else f"{format} {SPILLS}"
        yield what, case(64, d, format, name="fp32")
    for formats in (("int8", "int4"), ("int4", "int2"), ("none", "int4"), ("fp8", "int3")):
        yield " ".join(formats), case(64, 128, *formats)
    for format in ("none", "int4"):
        for group in ("all", "mean"):
            run = case(64, 128, format, tracks=True, group=group)
            yield f"{format} importance, {group}", run
        options = {
            "softcap": 30.0, "sliding": 32, "before_t": torch.zeros(64, dtype=torch.int32),
            "sink_h": torch.zeros(8),
            "state": (torch.zeros(64, 8, 128, dtype=torch.bfloat16), torch.zeros(64, 8)),
        }  # fmt: skip
        yield f"{format} all options", case(64, 128, format, **options)
    for d in SIZES:
        yield "stores" if d == 128 else f"stores D={d}", stores(64, d)
    yield "stores, 2 rows", stores(2, 128)
    yield "stores importance", stores(64, 128, window=32)
    for d, name in product(SIZES, DTYPES):
        state = torch.zeros(64, 8, d, dtype=DTYPES[name]), torch.zeros(64, 8)
        yield f"D={d} {name}", partial(merge_states, *state, *state)


def stores(rows: int, d: int, format: str = "int4", window: int = 0) -> Callable:
    """A decode step over pages in a format, a ring of 8 bits for each row, and sinks in bf16."""
    step = bench_attention.inputs(
        bench_attention.Shape(rows, 64, 40, 2, 4, d), DTYPES["bf16"], "cpu"
    )
    position, pages, _ = step.pages(format)
    if window:
        slots = pages.k.shape[:3]
        history = torch.zeros(*slots, 1, dtype=torch.int32)
        pages = replace(pages, importance=torch.zeros(slots), history=history)
    ring = KVPages.empty(rows, 2, 128, d, k_format="int8", v_format="int8", position=True)
    sinks = KVPages.empty(1, 2, 4, d, dtype=DTYPES["bf16"])
    plan = Plan.from_host([
        step.forest[0].plan(np.ones(rows, np.int32), tile=16),
        *(_host.plan_from_block_table(table, np.full(rows, size), size, tile=16)
          for table, size in ((np.arange(rows)[:, None], 128), (np.zeros((rows, 1), int), 4))),
    ])  # fmt: skip
    return partial(
        tree_attention, step.q.squeeze(2), position, [pages, replace(ring, recent=True), sinks],
        plan, before_t=position - 100, frame=torch.ones(1, 2, 2, d, dtype=DTYPES["bf16"]),
        frame_t=torch.zeros_like(position), window=window,
    )  # fmt: skip


def evict() -> Iterator[Case]:
    def inputs(op, s=640, d=128, name="bf16"):
        return bench_evict.inputs(op, bench_evict.Shape(2, 2, 4, s, d, 32, 32), DTYPES[name], "cpu")

    for d, name in product(SIZES, DTYPES):
        args = inputs("key_scores", d=d, name=name)
        yield f"D={d} {name}", partial(key_scores, *args, sinks=4)
    options = {"group": "mean", "softcap": 30.0, "sliding": 32, "sink_h": torch.zeros(8)}
    yield "all options", partial(key_scores, *inputs("key_scores"), **options)
    for s in (640, 4096, 32768):
        yield f"S={s}", partial(select_victims, *inputs("select_victims", s))
    source_nh = torch.arange(64).view(32, 2)
    for format in FORMATS:
        pages = KVPages.empty(
            8, 2, 16, 128, k_format=format, v_format=format, dtype=torch.bfloat16, position=True,
            importance=True, window=32,
        )  # fmt: skip
        yield format, partial(compact_kv, source_nh, source_nh + 64, pages)


def sampling() -> Iterator[Case]:
    for v, name in product((49_152, 151_936), DTYPES):
        args = bench_sampling.inputs(bench_sampling.Shape(2, v), DTYPES[name], "cpu")
        yield f"V={v} {name}", partial(sample, *args, top_k=50, top_p=0.9)


def scoring() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        shape = bench_scoring.Shape(4, 256, 20, 4096, 4096)
        hidden_tm, weight_vm, step_s, cu_steps, target_t = bench_scoring.inputs(shape, dtype, "cpu")
        # Links and reductions are branches apart, and so is the size of the head.
        for i, reduce in enumerate(REDUCES):
            k, link = i % 3 + 1, "sigmoid" if reduce in ("prod", "gmean") else LINKS[i % len(LINKS)]
            args = hidden_tm, step_s, cu_steps, weight_vm[:k], weight_vm[:k, 0].contiguous()
            run = partial(step_scores, *args, link=link, reduce=reduce)
            yield f"k={k} {link} {reduce} {name}", run
        args = hidden_tm, weight_vm, target_t
        yield name, partial(token_logprobs, *args)
        options = {
            "bias_v": weight_vm[:, 0].contiguous(), "softcap": 30.0,
            "cu_seqlens": torch.tensor([0, 100, 256]), "ref_hidden_tm": hidden_tm,
            "ref_weight_vm": weight_vm,
        }  # fmt: skip
        yield f"all options {name}", partial(token_logprobs, *args, **options)
    yield "bf16 and fp32", partial(token_logprobs, hidden_tm.bfloat16(), weight_vm, target_t)


# The kernels of csrc/cuda that multiply matrices.
CUDA_MULTIPLY = {f"{x}_kernel<{d}, false>" for x in ("attend", "track") for d in SIZES}
# Each row's cases, and its kernels that multiply matrices.
ROWS = {
    "quant": (quant, set()),
    "attention": (attention, {"_attend_kernel", "_track_kernel"}),
    "evict": (evict, {"_key_scores_kernel"}),
    "sampling": (sampling, set()),
    "scoring": (scoring, {"_token_logprobs_kernel"}),
}


@cache
def cases(row: str) -> list[Case]:
    return list(ROWS[row][0]())


def build(row: str, index: int, arch: int, integer: int | None = None) -> dict:
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
        raise RuntimeError(f"{row}, {what}: does not compile for sm_{arch}{numbers}") from error
    return {key: read(compiled) for key, compiled in found.items()}


def edges(row: str) -> list[tuple[str, int, int, int]]:
    """The arguments of `build` for the numbers that a kernel must compile with."""
    return [
        (row, i, EDGE_ARCH, integer)
        for i, (what, _) in enumerate(cases(row))
        for integer in (INTEGERS if what in EDGES[row] else ())
    ]


def build_all(
    rows: list[str], archs: list[int], jobs: int, console: Console
) -> dict[tuple[str, str], dict]:
    """Binaries by kernel and case, then by architecture; each under the first case that has it."""
    tasks = [(row, i, arch) for row in rows for i in range(len(cases(row))) for arch in archs]
    apart = [task for row in rows for task in edges(row)]
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
    if missing := {kernel for kernel, _ in found} - at_edges:
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
            targets.add(f"sm_{arch}: bytes spilled{by}", most, 0 if by else spills)
        targets.add(f"sm_{arch}: KiB shared", shared / 1024, limit)
        off = sum(not products.get(kernel) for kernel in multiply)
        targets.add(f"sm_{arch}: kernels off tensor cores", off, 0)
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
    parser.add_argument("--archs", nargs="+", type=int, choices=ARCHS, default=list(ARCHS),
                        metavar="SM", help=f"of {', '.join(map(str, ARCHS))}")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count(), help="processes")
    parser.add_argument("--cuda", type=Path, metavar="PATH", help="library with csrc/cuda")
    args = parser.parse_args(argv)
    if args.json:
        results.claim(args.json, {}, ["triton", "kernels", "cuda", "targets"])

    console = Console()
    version = triton.__version__
    archs = {arch: ARCHS[arch] for arch in args.archs}
    found = build_all(args.rows, args.archs, args.jobs, console)
    multiply = set().union(*(ROWS[row][1] for row in args.rows))
    targets = judge(found, multiply, archs, SPILLED.get(version, 0))
    console.print(table(found, archs))
    of_cuda = {}
    if args.cuda:
        of_cuda = read_library(args.cuda)
        console.print(table(of_cuda, CUDA_ARCHS))
        for target in judge(of_cuda, CUDA_MULTIPLY, CUDA_ARCHS):
            targets.append(target | {"name": f"CUDA, {target['name']}"})
    console.print(f"Triton {version}", highlight=False)
    targets.show(console)
    if args.json:

        def rows(found):
            return [
                {"kernel": kernel, "case": case} | {f"sm_{a}": asdict(b) for a, b in each.items()}
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
