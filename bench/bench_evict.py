"""Importance from a window of queries, who goes, and closing the gaps."""

from dataclasses import dataclass

import pytest
import torch

from kvtools import KVPages
from kvtools.ops import NATIVE
from kvtools.ops.evict import compact_kv, key_scores, select_victims


@dataclass(frozen=True)
class Shape:
    n: int  # rows
    h: int
    g: int
    s: int
    d: int
    w: int  # queries of a row
    m: int  # victims of a row and head

    def __str__(self):
        return ",".join(f"{name}={value}" for name, value in vars(self).items())


# A prompt compressed after prefill; 32 rows that drop 32 of 640 tokens.
SHAPES = [Shape(1, 3, 3, 2048, 64, 32, 1536), Shape(32, 3, 3, 640, 64, 32, 32)]
PAGE_SIZE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SINKS = 4


def snapkv(q_bhwd, k_bhsd):
    """The rival of `key_scores`: attention of the window by eager softmax, as SnapKV has it."""
    (b, h, s, d), w = k_bhsd.shape, q_bhwd.shape[2]
    k_bhsd = k_bhsd.repeat_interleave(q_bhwd.shape[1] // h, 1)
    x_bhws = (q_bhwd @ k_bhsd.mT) * d**-0.5
    future = torch.ones(w, s, dtype=torch.bool, device=q_bhwd.device).triu(s - w + 1)
    p_bhws = x_bhws.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32)
    return p_bhws.sum(2).view(b, h, -1, s).mean(2)


def topk(score_nhs, position_nhs, count):
    """The rival of `select_victims`: no ties, no protection."""
    return score_nhs.topk(count, largest=False).indices


def index_move(source_nh, target_nh, pages):
    """The rival of `compact_kv`: codes alone."""
    head_h = torch.arange(pages.k.shape[1], device=pages.k.device)
    for x in (pages.k, pages.v):
        moved = x[source_nh // PAGE_SIZE, head_h, source_nh % PAGE_SIZE]
        x[target_nh // PAGE_SIZE, head_h, target_nh % PAGE_SIZE] = moved


OPS = {
    "key_scores": (lambda *args, impl: key_scores(*args, sinks=SINKS, impl=impl), snapkv),
    "select_victims": (select_victims, topk),
    "compact_kv": (compact_kv, index_move),
}
RIVALS = [NATIVE[DEVICE], "reference", "eager"]


def inputs(op, shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    n, h, g, s, d, w, m = vars(shape).values()
    if op == "key_scores":
        q_bhwd = torch.randn(n, h * g, w, d, generator=generator)
        k_bhsd = torch.randn(n, h, s, d, generator=generator)
        return q_bhwd.to(device, dtype), k_bhsd.to(device, dtype)
    if op == "select_victims":
        score_nhs = torch.rand(n, h, s, generator=generator)
        position_nhs = torch.arange(s, dtype=torch.int32).expand(n, h, s)
        return score_nhs.to(device), position_nhs.to(device), m
    pages = KVPages.empty(
        n * s // PAGE_SIZE, h, PAGE_SIZE, d, k_format="int4", v_format="int4", device=device,
        position=True, importance=True,
    )  # fmt: skip
    slots = [torch.randperm(n * s, generator=generator)[: n * m] for _ in range(2 * h)]
    source_nh, target_nh = torch.stack(slots, 1).to(device).split(h, 1)
    return source_nh, target_nh, pages


def nbytes(op, shape, dtype):
    """What must be read and written once."""
    n, h, g, s, d, w, m = vars(shape).values()
    if op == "key_scores":
        return n * h * ((g * w + s) * d * dtype.itemsize + s * 8)
    if op == "select_victims":
        return n * h * (s * 8 + m * 4)
    return 2 * n * m * h * (d + 2 * 2 + 4 + 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rival", RIVALS)
@torch.inference_mode()
def test_evict(benchmark, rival, op, shape):
    args = inputs(op, shape, DTYPE, DEVICE)
    ours, eager = OPS[op]

    def run():
        eager(*args) if rival == "eager" else ours(*args, impl=rival)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {shape}"
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
    benchmark.extra_info.update(
        op=op, impl=eager.__name__ if rival == "eager" else rival,
        shape=str(shape), dtype=str(DTYPE), device=DEVICE, threads=torch.get_num_threads(),
    )  # fmt: skip
    if benchmark.stats:
        benchmark.extra_info["bytes"] = nbytes(op, shape, DTYPE)
        benchmark.extra_info["GB/s"] = nbytes(op, shape, DTYPE) / benchmark.stats["median"] / 1e9
