"""Of what Triton compiles for the tests of the rows: run by `make launches`."""

import re
import sys
from collections import Counter
from functools import partial

import pytest
import torch

from bench import bench_attention, bench_evict, bench_sampling, bench_scoring
from bench.resources import compiling
from bench.resources_cases import stores
from kvtools import KVPages
from kvtools.kernels import attention as kernels
from kvtools.ops.attention import merge_states, tree_attention
from kvtools.ops.evict import compact_kv, select_victims
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import step_scores, token_logprobs

launches = sys.modules.get("launches")
pytestmark = pytest.mark.skipif(launches is None, reason="for make launches")
BF16 = torch.bfloat16


def attention(rows, format="none", tracks=False, impl="triton"):
    step = bench_attention.inputs(bench_attention.Shape(rows, 20, 9, 2, 1, 64), BF16, "cpu")
    position, pages, plan = step.pages(format)
    options = {}
    if tracks:
        pages.importance = torch.zeros(pages.k.shape[:3])
        pages.history = torch.zeros(*pages.k.shape[:3], 1, dtype=torch.int32)
        options["window"] = 32
    return tree_attention(step.q.squeeze(2), position, pages, plan, impl=impl, **options)


def of_stores(rows, format):
    stores(-(-rows // 4), 64, format)(impl="triton")  # more than one small tile has others


def append(rows, format, also=False, impl="triton"):
    k_thd, v_thd = torch.zeros(2, rows, 2, 64, dtype=BF16)
    pages = KVPages.empty(2, 2, 16, 64, k_format=format, v_format=format, dtype=BF16,
                          position=True, importance=True, window=32)  # fmt: skip
    slot_t, options = torch.arange(rows), {}
    if also:
        ring = KVPages.empty(rows, 2, 1, 64, k_format="int8", v_format="int8")
        options = dict(also=(slot_t, ring), frame=torch.ones(rows, 2, 2, 64), frame_t=slot_t.int())
    append_kv(k_thd, v_thd, slot_t, pages, slot_t.int(), impl=impl, **options)


def quantize(rows, format):
    codes, scale = quantize_kv(torch.zeros(rows, 2, 64, dtype=BF16), format, impl="triton")
    dequantize_kv(codes, scale, 64, impl="triton")


def merge(rows):
    state = torch.zeros(rows, 2, 64), torch.zeros(rows, 2)
    merge_states(*state, *state, impl="triton")


def evict(rows, op):
    shape = bench_evict.Shape(rows, 2, 2, 64, 64, 8, 4)
    args = bench_evict.inputs(op, shape, BF16, "cpu")
    if op == "compact_kv":
        source_nh, _, pages = args
        compact_kv(source_nh[:rows], source_nh[:rows], pages, impl="triton")
    else:
        select_victims(*args, impl="triton")


def draw(rows):
    sample(*bench_sampling.inputs(bench_sampling.Shape(rows, 300), BF16, "cpu"), impl="triton")


def score(rows, op):
    shape = bench_scoring.Shape(rows, 4 * rows, 2 * rows, 64, 300)
    hidden_tm, weight_vm, step_s, cu_steps, target_t = bench_scoring.inputs(shape, BF16, "cpu")
    if op == "steps":
        step_scores(hidden_tm, step_s, cu_steps, weight_vm[:2], impl="triton")
    else:
        token_logprobs(hidden_tm, weight_vm, target_t, cu_seqlens=2 * cu_steps, impl="triton")


@pytest.mark.parametrize("call,args", [
    (attention, ()), (attention, ("int4", True)), (append, ("none",)), (append, ("int6",)),
    (of_stores, ("int4",)), (append, ("int4", True)),
    (quantize, ("int4",)), (quantize, ("fp8",)), (merge, ()), (evict, ("select_victims",)),
    (evict, ("compact_kv",)), (draw, ()), (score, ("steps",)),
    (score, ("logprobs",)),
])  # fmt: skip
def test_rows_that_leave_compile_nothing(call, args, launched):
    found = []
    for rows in (16, 15, 1):
        call(rows, *args)
        found.append({(name, key) for name, kernels in launched.items() for key in kernels})
    assert found[0] and found[1] - found[0] == found[2] - found[0] == set()


@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("format", ["none", "int4"])
def test_a_call_is_few_launches(format, tracks):
    """What a step's host time is made of. All of frames, stores and places are in these."""
    kernels = ["_attend_kernel", "_merge_parts_kernel", *["_track_kernel"] * tracks]
    for call, expected in (
        (partial(attention, 3, format, tracks), kernels),
        (stores(3, 64, format, window=32 * tracks), kernels),
        (partial(append, 3, format, also=True), ["_append_kv_kernel"]),
    ):
        before = Counter(launches.count)
        call(impl="triton")
        assert launches.count - before == Counter(expected)


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(launches, "launched", {})
    return launches.launched


def test_what_tokens_share_is_ordered(launched):
    """Each new token of a row reads what others' threads have written for the one before."""
    attention(3, "int4", tracks=True)
    (compiled,) = launched["_track_kernel"].values()
    stores = re.findall(r"tt\.store.*\n(.*)", compiled.asm["ttir"])
    assert len(stores) == 2 and sum("barrier" in after for after in stores) == 1, stores


def test_tiles_are_those_of_the_architecture_that_is_compiled_for():
    """Whatever one was before, in the same process."""
    store, sizes = (BF16, (16, 64), BF16, 64, True, True, False), []
    for arch in (80, 90, 80):
        with compiling(arch):
            of = kernels._constants(0, BF16, 8, 2, 64, False, False, "all", 0, store)
        sizes.append(of.sizes)
    assert sizes[0] == sizes[2] != sizes[1], sizes
