"""Of what Triton compiles for the tests of the rows: run by `make launches`."""

import re
import sys

import pytest
import torch

from bench import bench_attention, bench_evict, bench_sampling, bench_scoring
from kvtools import KVPages
from kvtools.ops.attention import merge_states, tree_attention
from kvtools.ops.evict import compact_kv, select_victims
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import step_scores, token_logprobs

launches = sys.modules.get("launches")
pytestmark = pytest.mark.skipif(launches is None, reason="for make launches")
BF16 = torch.bfloat16


def attention(rows, format="none", tracks=False):
    step = bench_attention.inputs(bench_attention.Shape(rows, 20, 9, 2, 1, 64), BF16, "cpu")
    position, pages, plan = step.pages(format)
    options = {}
    if tracks:
        pages.importance = torch.zeros(pages.k.shape[:3])
        pages.history = torch.zeros(*pages.k.shape[:3], 1, dtype=torch.int32)
        options["window"] = 32
    return tree_attention(step.q.squeeze(2), position, pages, plan, impl="triton", **options)


def append(rows, format):
    k_thd, v_thd = torch.zeros(2, rows, 2, 64, dtype=BF16)
    pages = KVPages.empty(2, 2, 16, 64, k_format=format, v_format=format, dtype=BF16,
                          position=True, importance=True, window=32)  # fmt: skip
    slot_t = torch.arange(rows)
    append_kv(k_thd, v_thd, slot_t, pages, slot_t.int(), impl="triton")


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
