"""What the Triton kernels take of a GPU, read from binaries compiled for it on any machine.

Every kernel is compiled as its launcher would launch it, for each architecture. None may spill or
ask for more shared memory than there is, and a product of matrices must be on tensor cores.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvtools import KVPages, ops
from kvtools.ops.attention import merge_states, tree_attention
from kvtools.ops.evict import compact_kv, key_scores, select_victims
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import LINKS, REDUCES, step_scores, token_logprobs

from . import bench_attention, bench_evict, bench_quant, bench_sampling, bench_scoring
from .targets import Targets

# Shared memory that a program may have, in KiB, by compute capability.
ARCHS = {80: 163, 90: 227, 100: 227}
FORMATS = ["none", "fp8", "int8", "int6", "int4", "int3", "int2"]
SIZES = [64, 128, 256]
BF16, FP32 = torch.bfloat16, torch.float32
FIGURES = ["registers", "spilled", "shared", "products"]
PRODUCTS = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma)\.\S+")

Case = tuple[str, Callable]  # what it is, and a call that lacks its `impl`
Found = dict[tuple[str, str], dict[int, "Binary"]]  # by kernel and case, then by architecture


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one architecture. Bytes, but for `registers` of a thread."""

    kernel: str
    key: str
    registers: int
    spilled: int
    shared: int
    products: int  # tensor-core instructions


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
def compiling(arch: int) -> Iterator[list[Binary]]:
    """Launches on CPU tensors compile for `arch` and run nothing; what they compile is listed."""
    binaries = []
    run = JITFunction.run

    def compile(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        binaries.append(read(compiled))
        return compiled

    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.runtime.driver, "_active", Device(arch)))
        stack.enter_context(patch.object(JITFunction, "run", compile))
        stack.enter_context(patch.object(ops, "_interpreted", lambda impl, place: True))
        yield binaries


def read(compiled) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    usage = usage_of(compiled.metadata.name, listing)
    return Binary(
        compiled.metadata.name, compiled.hash, usage["REG"], usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared, len(PRODUCTS.findall(compiled.asm["ptx"])),
    )  # fmt: skip


def usage_of(kernel: str, listing: str) -> dict[str, int]:
    """The figures of a kernel in the listing of `cuobjdump --dump-resource-usage`."""
    line = re.search(rf"Function {kernel}:\s*(.*)", listing)[1]
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def quant() -> Iterator[Case]:
    for d, format in product(SIZES, FORMATS):
        k_thd, *rest = bench_quant.inputs(bench_quant.Shape(32, 2, d), format, BF16, "cpu")
        yield f"{format} D={d}", partial(append_kv, k_thd, *rest)
        if format != "none":
            codes = quantize_kv(k_thd, format)
            yield f"{format} D={d}", partial(quantize_kv, k_thd, format)
            yield f"{format} D={d}", partial(dequantize_kv, *codes, d, dtype=BF16)
    for format in ("none", "int4"):
        k_thd, *rest = bench_quant.inputs(bench_quant.Shape(32, 2, 128), format, FP32, "cpu")
        yield f"{format} D=128 fp32", partial(append_kv, k_thd, *rest)


def attention() -> Iterator[Case]:
    def case(rows, d, k_format, v_format=None, dtype=BF16, tracks=False, **options):
        step = bench_attention.inputs(bench_attention.Shape(rows, 64, 40, 2, 4, d), dtype, "cpu")
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
        for rows in (2, 64):
            yield f"{format} D={d} rows={rows}", case(rows, d, format)
    for d, format in product(SIZES, ("none", "int4")):
        yield f"{format} D={d} fp32", case(64, d, format, dtype=FP32)
    for formats in (("int8", "int4"), ("int4", "int2"), ("none", "int4"), ("fp8", "int3")):
        yield " ".join(formats), case(64, 128, *formats)
    for format in ("none", "int4"):
        for group in ("all", "mean"):
            run = case(64, 128, format, tracks=True, group=group)
            yield f"{format} importance, {group}", run
        kept = torch.zeros(64, 8, 128, dtype=BF16), torch.zeros(64, 8)
        options = {"softcap": 30.0, "sliding": 32, "sink_h": torch.zeros(8), "state": kept}
        before_t = torch.zeros(64, dtype=torch.int32)
        yield f"{format} all options", case(64, 128, format, before_t=before_t, **options)
    for d, dtype in product(SIZES, (BF16, FP32)):
        out, lse = torch.zeros(64, 8, d, dtype=dtype), torch.zeros(64, 8)
        yield f"D={d} {short(dtype)}", partial(merge_states, out, lse, out, lse)


def evict() -> Iterator[Case]:
    def inputs(op, s=640, d=128, dtype=BF16):
        return bench_evict.inputs(op, bench_evict.Shape(2, 2, 4, s, d, 32, 32), dtype, "cpu")

    for d, dtype in product(SIZES, (BF16, FP32)):
        args = inputs("key_scores", d=d, dtype=dtype)
        yield f"D={d} {short(dtype)}", partial(key_scores, *args, sinks=4)
    args = inputs("key_scores")
    options = {"group": "mean", "softcap": 30.0, "sliding": 32, "sink_h": torch.zeros(8)}
    yield "all options", partial(key_scores, *args, **options)
    for s in (640, 4096, 32768):
        yield f"S={s}", partial(select_victims, *inputs("select_victims", s))
    source_nh = torch.arange(64).view(32, 2)
    for format in FORMATS:
        pages = KVPages.empty(
            8, 2, 16, 128, k_format=format, v_format=format, dtype=BF16, position=True,
            importance=True, window=32,
        )  # fmt: skip
        yield format, partial(compact_kv, source_nh, source_nh + 64, pages)


def sampling() -> Iterator[Case]:
    for v, dtype in product((49_152, 151_936), (BF16, FP32)):
        args = bench_sampling.inputs(bench_sampling.Shape(2, v), dtype, "cpu")
        yield f"V={v} {short(dtype)}", partial(sample, *args, top_k=50, top_p=0.9)


def scoring() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        shape = bench_scoring.Shape(4, 256, 20, 4096, 4096)
        hidden_tm, weight_vm, step_s, cu_steps, target_t = bench_scoring.inputs(shape, dtype, "cpu")
        # Links and reductions are branches apart, and so is the size of the head.
        for i, reduce in enumerate(REDUCES):
            k, link = i % 3 + 1, "sigmoid" if reduce in ("prod", "gmean") else LINKS[i % len(LINKS)]
            head = weight_vm[:k], weight_vm[:k, 0].contiguous()
            yield (
                f"k={k} {link} {reduce} {short(dtype)}",
                partial(step_scores, hidden_tm, step_s, cu_steps, *head, link=link, reduce=reduce),
            )
        args = hidden_tm, weight_vm, target_t
        yield short(dtype), partial(token_logprobs, *args)
        reference = {"ref_hidden_tm": hidden_tm, "ref_weight_vm": weight_vm}
        options = {"softcap": 30.0, "cu_seqlens": cu_steps * 64 // 5, **reference}
        yield (
            f"all options {short(dtype)}",
            partial(token_logprobs, *args, weight_vm[:, 0].contiguous(), **options),
        )
    yield "bf16 and fp32", partial(token_logprobs, hidden_tm.bfloat16(), weight_vm, target_t)


# Each row's cases, and its kernels that multiply matrices.
ROWS = {
    "quant": (quant, set()),
    "attention": (attention, {"_attend_kernel"}),
    "evict": (evict, {"_key_scores_kernel"}),
    "sampling": (sampling, set()),
    "scoring": (scoring, {"_token_logprobs_kernel"}),
}


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


@cache
def cases(row: str) -> list[Case]:
    return list(ROWS[row][0]())


def build(row: str, index: int, arch: int) -> list[Binary]:
    """What a case launches, compiled; in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what, run = cases(row)[index]
    try:
        with compiling(arch) as binaries:
            run(impl="triton")
    except Exception as error:
        raise RuntimeError(f"{row}, {what}: does not compile for sm_{arch}") from error
    return binaries


def build_all(rows: list[str], jobs: int, console: Console) -> Found:
    """Every kernel once, under the first case that launches it."""
    tasks = [(row, i, arch) for row in rows for i in range(len(cases(row))) for arch in ARCHS]
    with (
        ProcessPoolExecutor(jobs, get_context("spawn")) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        bar = progress.add_task("compiling", total=len(tasks))
        futures = [pool.submit(build, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found, seen = {}, set()
    for (row, index, arch), future in zip(tasks, futures, strict=True):
        what, count = cases(row)[index][0], Counter()
        for binary in future.result():
            if binary.key not in seen:
                seen.add(binary.key)
                count[binary.kernel] += 1
                nth = f" ({count[binary.kernel]})" if count[binary.kernel] > 1 else ""
                found.setdefault((binary.kernel, what + nth), {})[arch] = binary
    return found


def judge(found: Found, multiply: set[str]) -> Targets:
    """The rules; `multiply` names the kernels whose products must be on tensor cores."""
    targets = Targets()
    for arch, limit in ARCHS.items():
        binaries = [each[arch] for each in found.values()]
        without = {b.kernel for b in binaries if not b.products}
        without |= multiply - {b.kernel for b in binaries}
        name = f"sm_{arch}:"
        targets.add(f"{name} bytes spilled", max(b.spilled for b in binaries), 0)
        targets.add(f"{name} KiB shared", max(b.shared for b in binaries) / 1024, limit)
        targets.add(f"{name} products off tensor cores", len(without & multiply), 0)
    return targets


def table(found: Found) -> Table:
    """Registers per architecture; of the others the worst."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("kernel", no_wrap=True)
    result.add_column("case")
    for name in ("registers " + "/".join(map(str, ARCHS)), "spilled", "KiB", "products"):
        result.add_column(name, justify="right")
    order = list(dict.fromkeys(kernel for kernel, _ in found))
    before = None
    for kernel, case in sorted(found, key=lambda name: order.index(name[0])):
        binaries = list(found[kernel, case].values())
        result.add_row(
            "" if kernel == before else kernel.strip("_").removesuffix("_kernel"),
            case,
            " ".join(f"{b.registers:>3}" for b in binaries),
            str(max(b.spilled for b in binaries)),
            f"{max(b.shared for b in binaries) / 1024:.1f}",
            str(min(b.products for b in binaries)),
        )
        before = kernel
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.resources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="results")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count())
    args = parser.parse_args(argv)

    console = Console()
    found = build_all(args.rows, args.jobs, console)
    targets = judge(found, set().union(*(ROWS[row][1] for row in args.rows)))
    console.print(table(found))
    targets.show(console)
    if args.json:
        kernels = [
            {"kernel": kernel, "case": case}
            | {
                f"sm_{arch}": {name: getattr(b, name) for name in FIGURES}
                for arch, b in each.items()
            }
            for (kernel, case), each in found.items()
        ]
        result = {"triton": triton.__version__, "kernels": kernels, "targets": targets}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(target["ok"] for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
