"""Which launches bench.resources compiles: every kernel, as each of its arguments changes it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import numpy as np
import torch

from kvtools import KVPages, Plan, _host
from kvtools.ops.attention import merge_states, tree_attention
from kvtools.ops.evict import compact_kv, key_scores, select_victims
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import LINKS, REDUCES, step_scores, token_logprobs

from . import bench_attention, bench_evict, bench_quant, bench_sampling, bench_scoring

FORMATS = ["none", "fp8", "int8", "int6", "int4", "int3", "int2"]
SIZES = [64, 128, 256]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Cases that spill for now, and what of. They are shown, and judged apart.
SPILLS = "fp32 heads of 256, in attention"
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
# What is compiled for AMD besides: it takes ten times as long.
ON_AMD = {f"{format} D={d}" for format in ("none", "fp8", "int4") for d in SIZES} | {"D=256 bf16"}

Case = tuple[str, Callable]  # what it is, and a call that lacks its `impl`


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
CUDA_MULTIPLY = {f"{x}_kernel<{d}, false>" for x in ("attend", "track") for d in SIZES} | {
    f"{x}_kernel<{d}, {format}>" for x in ("few", "many") for d in (64, 128)
    for format in ("Plain<__half> ", "Plain<__nv_bfloat16> ", "PackedFp8", *(
        f"Packed<{bits}> " for bits in (8, 4, 2)))
}  # fmt: skip
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
