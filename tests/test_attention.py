"""Row `attention`: attention over a forest, merging states, importance."""

import os
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtools
from kvtools import KVPages, Plan, _host
from kvtools.ops import CUDA
from kvtools.ops.quant import FORMATS
from kvtools.reference import attention as reference
from kvtools.reference import quant
from kvtools.testing import assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_states(B, H, D, dtype, device):
    generator = torch.Generator().manual_seed(B)
    a, b = torch.randn(2, B, H, D, generator=generator).to(device, dtype)
    a_lse, b_lse = (3 * torch.randn(2, B, H, generator=generator)).to(device)
    if B > 0:
        a_lse[0], a[0] = -torch.inf, torch.nan  # row 0: A empty
    if B > 1:
        a_lse[1] = b_lse[1] = -torch.inf  # row 1: both empty
    return a, a_lse, b, b_lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,H,D", [(1, 1, 16), (3, 2, 63), (5, 4, 128), (0, 2, 64)])
def test_merge_states(B, H, D, dtype, device, impl):
    args = make_states(B, H, D, dtype, device)
    exact = reference.merge_states(*(x.double() for x in args))
    eager = reference.merge_states(*args)
    actual = kvtools.merge_states(*args, impl=impl)
    for name, *triple in zip(("out", "lse"), actual, exact, eager, strict=True):
        assert_within_budget(name, *triple)
    if B > 1:
        assert (actual[0][1] == 0).all() and (actual[1][1] == -torch.inf).all()
        assert torch.equal(actual[0][0], args[2][0])


def test_merge_states_of_a_row_does_not_depend_on_its_batch(device, impl):
    args = make_states(7, 3, 33, torch.float32, device)
    together = kvtools.merge_states(*args, impl=impl)
    for row in range(7):
        alone = kvtools.merge_states(*(x[row : row + 1] for x in args), impl=impl)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])


def test_merge_states_raises():
    a, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    with pytest.raises(ValueError, match="b_bhd is"):
        kvtools.merge_states(a, lse, a[:1], lse)
    with pytest.raises(ValueError, match="a_lse_bh has shape"):
        kvtools.merge_states(a, lse[:1], a, lse)


class Case:
    """A random forest with content in every layout, and the dense keys of each row."""

    def __init__(self, seed, *, k_format="none", v_format="none", page_size=16, H=2, G=3, D=16,
                 tile=0, chunk=0, dtype=torch.float64, scatter=False, most=3,
                 longest=40):  # fmt: skip
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        forest = _host.Forest(4096 // page_size + 64, page_size)
        for _ in range(int(rng.integers(1, 4))):
            forest.insert(int(rng.integers(1, longest)), 0, int(rng.integers(1, 5)))
        for _ in range(3):
            forest.append(rng.integers(0, 20, forest.num_rows).astype(np.int32))
            forest.gather(rng.integers(0, forest.num_rows, forest.num_rows).astype(np.int32))
            lengths = forest.lengths()
            forest.crop(np.maximum(lengths - rng.integers(0, 4, len(lengths)), 1).astype(np.int32))
        self.counts = rng.integers(0, most + 1, forest.num_rows).astype(np.int32)
        self.counts[0] = max(self.counts[0], 1)
        forest.append(self.counts)
        self.lengths = forest.lengths()
        self.plan = Plan.from_host(forest.plan(self.counts, tile, chunk))
        self.forest, self.D, self.dtype = forest, D, dtype
        self.pages = KVPages.empty(
            forest.num_pages, H, page_size, D, k_format=k_format, v_format=v_format, dtype=dtype,
            position=scatter,
        )  # fmt: skip
        for name in ("k", "v"):
            poison = getattr(self.pages, name)
            poison.fill_(torch.nan) if poison.is_floating_point() else poison.fill_(255)
        used = np.unique(np.concatenate([forest.row_slots(r) for r in range(forest.num_rows)]))
        slot = torch.from_numpy(used.astype(np.int64))
        k, v = torch.randn(2, len(used), H, D, generator=generator, dtype=torch.float64).to(dtype)
        true = {}
        for row in range(forest.num_rows):
            true |= dict(zip(forest.row_slots(row).tolist(), range(10**6), strict=False))
        position = torch.tensor([true[s] for s in used], dtype=torch.int32)
        kvtools.append_kv(k, v, slot, self.pages, position)
        T = int(self.counts.sum())
        self.q = torch.randn(T, H * G, D, generator=generator, dtype=torch.float64).to(dtype)
        ends = np.repeat(self.lengths, self.counts)
        within = np.concatenate([np.arange(c) for c in self.counts])
        start = ends - np.repeat(self.counts, self.counts)
        self.position = torch.from_numpy((start + within).astype(np.int32))
        self.row = np.repeat(np.arange(forest.num_rows), self.counts)

    def content(self, row):
        """Dense, dequantised k and v [s, h, d] in fp64 of a row."""
        slot = torch.from_numpy(self.forest.row_slots(row).astype(np.int64))
        where = (slot // self.pages.page_size, slice(None), slot % self.pages.page_size)
        for pages, scale in (
            (self.pages.k, self.pages.k_scale),
            (self.pages.v, self.pages.v_scale),
        ):
            if scale is None:
                yield pages[where].double()
            else:
                yield quant.dequantize_kv(pages[where], scale[where], self.D, torch.float64)

    def expanded(self, *, scale=None, softcap=0.0, sliding=0, before=0, sink_h=None):
        """The same attention, token by token over each row's own copy of keys and values."""
        outs, lses = [], []
        for q_hd, position, row in zip(
            self.q.double(), self.position.tolist(), self.row, strict=True
        ):
            k_shd, v_shd = self.content(row)
            group = len(q_hd) // k_shd.shape[1]
            k_shd, v_shd = (x.repeat_interleave(group, 1) for x in (k_shd, v_shd))
            x_hs = torch.einsum("hd,shd->hs", q_hd, k_shd) * (scale or self.D**-0.5)
            if softcap:
                x_hs = torch.tanh(x_hs / softcap) * softcap
            key = torch.arange(x_hs.shape[1])
            hidden = (key > position) | ((key <= position - sliding) if sliding else False)
            hidden = hidden | (key > position - before)
            x_hs = x_hs.masked_fill(hidden, -torch.inf)
            if sink_h is not None:
                x_hs = torch.cat([x_hs, sink_h.double()[:, None]], 1)
                v_shd = torch.cat([v_shd, torch.zeros_like(v_shd[:1])])
            lses.append(x_hs.logsumexp(-1))
            outs.append(torch.einsum("hs,shd->hd", x_hs.softmax(-1).nan_to_num(), v_shd))
        return torch.stack(outs), torch.stack(lses)


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 5.0},
    "sliding": {"sliding": 7},
    "before": {"before": 6},
    "before all": {"before": 10**6},
    "sink": {"sink_h": torch.linspace(-1, 2, 6, dtype=torch.float64)},
    "all": {"scale": 0.5, "softcap": 3.0, "sliding": 9, "sink_h": torch.ones(6).double()},
}


def native(impl):
    """The dtype in which an implementation is held to the truth: the reference is exact in fp64."""
    return torch.float64 if impl == "reference" else torch.float32


def interpreted(impl):
    return impl == "triton" and not torch.cuda.is_available()


def emulated(impl):
    """Whether kernels for GPUs run on the CPU, some thousand times slower."""
    return interpreted(impl) or (impl == "cuda" and CUDA == "cpu")


def some_items(plan, which):
    """The plan with a part of its work items, and the lists of partial results that go with it."""
    item, tokens = plan.item[which].clone(), len(plan.part_indptr) - 1
    size = item[:, 2] - item[:, 1]
    item[:, 5] = size.cumsum(0) - size
    chosen = [plan.token[begin:end] for _, begin, end, *_ in item.tolist()]
    token = torch.cat([plan.token[:0], *chosen])
    count = torch.bincount(token, minlength=tokens).cumsum(0)
    part_indptr = torch.cat([torch.zeros(1), count]).int()
    part = token.argsort(stable=True).int()
    return replace(plan, item=item, part_indptr=part_indptr, part=part)


def attend(case, impl, **how):
    return kvtools.tree_attention(case.q, case.position, case.pages, case.plan, impl=impl, **how)


def check(case, impl, exact, **how):
    """The reference to fp64; a kernel within the budget of the reference in its dtype."""
    actual = attend(case, impl, **how)
    if impl == "reference" and case.dtype == torch.float64:
        for x, y in zip(actual, exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        return
    eager = attend(case, "reference", **how)
    assert_all_within_budget(impl, case.pages, actual, exact, eager)


def assert_all_within_budget(impl, pages, actual, exact, eager):
    for name, *triple in zip(("out", "lse"), actual, exact, eager, strict=True):
        # GPUs take products of 16-bit queries with codes in fp16.
        halves = impl in ("triton", "cuda") and pages.k_scale is not None
        halves = halves and eager[0].dtype.itemsize == 2 and name == "lse"
        assert_within_budget(name, *triple, torch.float16 if halves else None)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tree_attention_equals_expanded(options, page_size, impl):
    for seed in range(2 if emulated(impl) else 4):
        case = Case(11 + seed, page_size=page_size, dtype=native(impl))
        how = {**options}
        if "before" in how:
            how["before_t"] = case.position - how.pop("before") + 1
        if "sink_h" in how:
            how["sink_h"] = how["sink_h"].to(case.dtype)
        check(case, impl, case.expanded(**options), **how)


@pytest.mark.parametrize("k_format,v_format", [(f, f) for f in FORMATS] + [("int8", "int4")])
@pytest.mark.parametrize("D", [16, 64, 80])
def test_tree_attention_formats(k_format, v_format, D, impl):
    for seed in range(1 if interpreted(impl) else 2 if emulated(impl) else 4):
        scatter = (seed + D // 16) % 2 == 0
        case = Case(11 + seed, k_format=k_format, v_format=v_format, scatter=scatter, D=D,
                    dtype=native(impl))  # fmt: skip
        check(case, impl, case.expanded())


INTERPRETED = {  # heads; all of them would take minutes
    torch.float32: [(1, 16), (3, 64), (12, 24)],
    torch.float16: [(3, 64), (7, 128)],
    torch.bfloat16: [(7, 128), (12, 24)],
}


@pytest.mark.only(
    when=lambda impl, dtype, G, D: not interpreted(impl) or (G, D) in INTERPRETED[dtype]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("G,D", [(1, 16), (3, 64), (7, 128), (12, 24)])
def test_tree_attention_within_budget(format, dtype, G, D, impl):
    case = Case(12, k_format=format, v_format=format, dtype=dtype, G=G, D=D)
    check(case, impl, case.expanded())


# Kernels of csrc/cuda that take pages of whole pieces of 16 slots, and the general one for others.
@pytest.mark.only(when=lambda impl: impl == "cuda")
@pytest.mark.parametrize(
    "format,dtype,D,page_size,G,most,scatter,tile,chunk,options",
    [
        ("none", torch.bfloat16, 128, 16, 4, 1, False, 0, 0, {}),
        ("none", torch.float16, 64, 48, 2, 5, True, 3, 48, {"sliding": 37}),
        ("none", torch.bfloat16, 64, 64, 16, 9, False, 0, 64, {"scale": 0.5}),
        ("fp8", torch.bfloat16, 128, 32, 1, 1, True, 0, 0, {"scale": 0.5}),
        ("fp8", torch.float16, 64, 16, 5, 8, False, 16, 160, {}),
        ("int8", torch.float16, 128, 64, 8, 1, False, 0, 0, {"sliding": 100}),
        ("int8", torch.bfloat16, 64, 16, 3, 20, True, 40, 0, {"before": 30}),
        ("int4", torch.bfloat16, 128, 16, 4, 1, False, 0, 0, {"scale": 1.0}),
        ("int4", torch.bfloat16, 128, 32, 7, 6, False, 5, 96, {"scale": 1.0}),
        ("int4", torch.float16, 64, 16, 1, 2, True, 0, 0, {"sink_h": torch.ones(2).double()}),
        ("int2", torch.bfloat16, 64, 48, 4, 1, False, 0, 0, {"before": 10**6}),
        ("int2", torch.float16, 128, 16, 12, 7, True, 10, 0, {}),
        ("int4", torch.float16, 128, 24, 4, 3, False, 0, 0, {}),
        ("int4", torch.float16, 128, 1, 2, 1, False, 0, 0, {"softcap": 5.0}),
    ],
)  # fmt: skip
def test_tree_attention_by_pieces(
    format, dtype, D, page_size, G, most, scatter, tile, chunk, options, impl
):
    case = Case(21, k_format=format, v_format=format, dtype=dtype, D=D, page_size=page_size, H=2,
                G=G, most=most, scatter=scatter, tile=tile, chunk=chunk, longest=700)  # fmt: skip
    how = {**options}
    if "before" in how:
        how["before_t"] = case.position - how.pop("before") + 1
    if "sink_h" in how:
        how["sink_h"] = how["sink_h"].to(case.dtype)
    exact = case.expanded(**options)
    check(case, impl, exact, **how)
    if format == "none":
        return
    # Scales in words of both, and apart.
    k_scale, v_scale = torch.stack([case.pages.k_scale, case.pages.v_scale], -1).unbind(-1)
    case.pages.k_scale, case.pages.v_scale = k_scale, v_scale
    check(case, impl, exact, **how)
    apart = [x[..., None].repeat(1, 1, 1, 3)[..., 1] for x in (k_scale, v_scale)]
    case.pages.k_scale, case.pages.v_scale = apart
    check(case, impl, exact, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "k_format,v_format,D",
    [("none", "none", 256), ("none", "int4", 160), ("int4", "none", 200), ("int3", "int2", 96),
     ("int2", "int6", 256), ("fp8", "int8", 40), ("int6", "int3", 64)],
)  # fmt: skip
def test_tree_attention_mixes_formats(k_format, v_format, D, dtype, impl):
    """Keys and values each in a format of their own; products of 16 bits."""
    case = Case(12, k_format=k_format, v_format=v_format, dtype=dtype, G=5, D=D, tile=4, most=5)
    check(case, impl, case.expanded())


@pytest.mark.only(when=lambda impl: impl == "cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["int8", "int4", "int2"])
@pytest.mark.parametrize("D", [64, 256])
def test_one_token_is_nearly_all(D, format, dtype, impl):
    """And what all others have, in one element, still adds up: each of them has so little weight
    that it may not be rounded as the first one's is. But a sum in float32, slot after slot, may
    round it: all in one direction, since they are alike."""
    forest = _host.Forest(5, 16)
    forest.insert(63)
    forest.append([1])
    slot = torch.from_numpy(forest.row_slots(0).astype(np.int64))
    pages = KVPages.empty(5, 1, 16, D, k_format="none", v_format=format, dtype=dtype)
    k, v = torch.zeros(2, 64, 1, D)
    k[0, 0, 0] = 1
    v[0, 0] = 20 * quant.rotation(D, torch.float32, torch.device("cpu"))[:, 5]
    v[1:, 0, 3] = 2 * D**0.5
    kvtools.append_kv(k.to(dtype), v.to(dtype), slot, pages)
    plan, position = Plan.from_host(forest.plan([1])), torch.tensor([63], dtype=torch.int32)
    at = slot // 16, slice(None), slot % 16
    v_shd = quant.dequantize_kv(pages.v[at], pages.v_scale[at], D, torch.float64)
    rotation = quant.rotation(D, torch.float64, torch.device("cpu"))
    found = [[], [], [], []]  # exact, summed, eager, actual
    for beyond in torch.linspace(10.25, 12, 8).to(dtype):
        q = (beyond * k[:1]).to(dtype)
        p_s = (beyond.double() * k[:, 0, 0].double()).softmax(0)
        found[0].append(torch.einsum("s,shd->hd", p_s, v_shd)[None])
        total = summed = 0
        for p, v_hd in zip((p_s / p_s[0]).float(), (v_shd @ rotation).float(), strict=True):
            total, summed = total + p, summed + p * v_hd
        found[1].append(((summed / total).double() @ rotation.T).to(dtype)[None])
        for out, which in zip(found[2:], ("reference", impl), strict=True):
            out += kvtools.tree_attention(q, position, pages, plan, scale=1.0, impl=which)[:1]
    exact, *eager, actual = map(torch.stack, found)
    worse = max(eager, key=lambda x: (x.double() - exact).abs().max())
    assert_within_budget("out", actual, exact, worse)


@pytest.mark.parametrize("pad", [1, 2, 4])
@pytest.mark.parametrize("format", ["none", "int8", "int6"])
def test_tree_attention_of_unaligned_slots(format, pad, impl):
    """Slots, and queries, so many elements apart that few can be read at once."""
    case = Case(12, k_format=format, v_format=format, dtype=torch.float16, D=32)
    expected = attend(case, impl)

    def spread(x):
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + pad)
        wide[..., pad:] = x
        return wide[..., pad:]

    case.q, case.pages.k, case.pages.v = map(spread, (case.q, case.pages.k, case.pages.v))
    # Triton reads codes that lie on words by words, and sums their fields apart.
    by_words = impl == "triton" and format == "int8" and pad % 2
    for x, y in zip(attend(case, impl), expected, strict=True):
        if by_words:
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("k_format,v_format", [("int4", "int4"), ("int8", "int2"), ("fp8", "none")])
def test_scales_side_by_side_do_not_show(k_format, v_format, impl):
    """Those of keys and values in one tensor, one behind the other for each slot."""
    case = Case(12, k_format=k_format, v_format=v_format, dtype=torch.float16, D=64, page_size=20)
    scales = [case.pages.k_scale, case.pages.v_scale]
    scales = [None if x is None else x.contiguous() for x in scales]  # apart
    case.pages.k_scale, case.pages.v_scale = scales
    expected = attend(case, impl)
    both = torch.stack([torch.full_like(scales[0], 9) if x is None else x for x in scales], -1)
    case.pages.k_scale = both[..., 0]
    case.pages.v_scale = None if scales[1] is None else both[..., 1]
    for x, y in zip(attend(case, impl), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.long_if(
    when=lambda impl, format: interpreted(impl) and format not in ("none", "int4", "int3")
)
@pytest.mark.parametrize(
    "format,dtype",
    [(f, torch.float32) for f in FORMATS] + [("none", torch.float16), ("none", torch.bfloat16)],
)
@pytest.mark.parametrize("most", [1, 40])
def test_tree_attention_splits_over_threads(format, dtype, most, impl):
    """Many rows over long nodes: several tiles, each cut where a thread's share ends."""
    H, D, rows, less = 3, 64, 24, 1
    if impl not in ("reference", "cpu"):  # which may be interpreted: less, and larger tiles
        H, less, most = 1, 8, min(most, 4)
        dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    generator = torch.Generator().manual_seed(most)
    forest = _host.Forest(400, 16)
    forest.insert(701 // less, 0, rows)
    forest.append(np.arange(50, 50 + rows, dtype=np.int32) // less)
    counts = np.ones(rows, np.int32)
    counts[::5] = most
    forest.append(counts)
    pages = KVPages.empty(forest.num_pages, H, 16, D, k_format=format, v_format=format, dtype=dtype)
    for x in pages.tensors()[:4]:
        if x is not None:
            x.fill_(255 if x.dtype == torch.uint8 else torch.nan)
    used = np.unique(np.concatenate([forest.row_slots(r) for r in range(rows)]))
    k, v = torch.randn(2, len(used), H, D, generator=generator, dtype=dtype)
    kvtools.append_kv(k, v, torch.from_numpy(used.astype(np.int64)), pages)
    q = torch.randn(int(counts.sum()), 3 * H, D, generator=generator, dtype=dtype)
    ends = np.repeat(forest.lengths() - counts, counts)
    ahead = np.concatenate([np.arange(c) for c in counts])
    position = torch.from_numpy((ends + ahead).astype(np.int32))
    plan = Plan.from_host(forest.plan(counts))
    exact = kvtools.tree_attention(q.double(), position, pages, plan, impl="reference")
    eager = kvtools.tree_attention(q, position, pages, plan, impl="reference")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5) if impl == "cpu" else (1,):
            torch.set_num_threads(threads)
            actual = kvtools.tree_attention(q, position, pages, plan, impl=impl)
            assert_all_within_budget(impl, pages, actual, exact, eager)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["greatest", "uneven", "queries"])
@pytest.mark.parametrize("format,G,D", [("int8", 1, 64), ("int4", 3, 64), ("int4", 8, 128),
                                        ("int2", 2, 128)])  # fmt: skip
def test_tree_attention_of_values(format, G, D, values, dtype, impl):
    """Weights and queries may be rounded with those beside them: all alike on the greatest codes,
    where sums are as large as can be; or such that few slots count, of values great and small, or
    few elements of a query."""
    generator = torch.Generator().manual_seed(D)
    forest = _host.Forest(8, 16)
    forest.insert(101, 0, 1)
    forest.append(np.ones(1, np.int32))
    slot = torch.from_numpy(forest.row_slots(0).astype(np.int64))
    k, v = torch.randn(2, len(slot), 1, D, generator=generator)
    q = 3 * torch.randn(1, G, D, generator=generator)
    back = quant.rotation(D, v.dtype, v.device).T
    if values == "greatest":
        q = torch.ones_like(q) @ back
        k = v = torch.full_like(v, 30) @ back
    elif values == "queries":
        q = q * 4 ** (4 * torch.rand(D, generator=generator) - 2) @ back
    else:
        v *= 4 ** (8 * torch.rand(len(slot), 1, 1, generator=generator) - 4)
    pages = KVPages.empty(forest.num_pages, 1, 16, D, k_format=format, v_format=format, dtype=dtype)
    kvtools.append_kv(k.to(dtype), v.to(dtype), slot, pages)
    case = SimpleNamespace(
        q=q.to(dtype), pages=pages, position=torch.tensor([101], dtype=torch.int32),
        plan=Plan.from_host(forest.plan(np.ones(1, np.int32), 0, 0)),
    )  # fmt: skip
    exact = attend(SimpleNamespace(**vars(case) | {"q": case.q.double()}), "reference")
    eager = attend(case, "reference")
    assert_all_within_budget(impl, pages, attend(case, impl), exact, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tree_attention_keeps_a_nan_of_fp8(dtype, impl):
    case = Case(5, k_format="fp8", v_format="fp8", dtype=dtype)
    page, offset = divmod(int(case.forest.row_slots(0)[0]), case.pages.page_size)
    case.pages.v.view(torch.uint8)[page, 0, offset, 3] = 0x7F
    out, expected = (attend(case, x)[0].isnan() for x in (impl, "reference"))
    assert expected.any() and not expected.all() and torch.equal(out, expected)


def test_tree_attention_merges_many_parts(impl):
    """A slot per work item: more partial results than a kernel takes at once."""
    case = Case(12, page_size=1, chunk=1, D=64, G=12, H=1, dtype=native(impl))
    assert case.plan.part_indptr.diff().max() > 20
    check(case, impl, case.expanded())


@pytest.mark.long_if(when=interpreted)
def test_tree_attention_random(impl):
    examples = 6 if interpreted(impl) else 60

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 10**6),
        page_size=st.sampled_from([1, 3, 16]),
        tile=st.integers(0, 4),
        chunks=st.integers(0, 3),
        format=st.sampled_from(FORMATS),
        most=st.sampled_from([1, 5]),
        D=st.sampled_from([8, 16, 48]),
    )
    def run(seed, page_size, tile, chunks, format, most, D):
        case = Case(seed, page_size=page_size, tile=tile, chunk=chunks * page_size, k_format=format,
                    v_format=format, scatter=seed % 2 == 0, most=most, G=seed % 3 + 1, D=D,
                    dtype=native(impl))  # fmt: skip
        check(case, impl, case.expanded())

    run()


def test_tree_attention_state(impl):
    """Keys split over two stores, chained by `state`, are one attention."""
    case = Case(14, dtype=native(impl))
    sink_h = torch.ones(6, dtype=case.dtype)
    exact = case.expanded(sink_h=sink_h)
    whole = case.plan
    for cut in range(len(whole.item) + 1):
        case.plan, rest = some_items(whole, slice(cut)), some_items(whole, slice(cut, None))
        state = attend(case, impl)
        case.plan = rest
        check(case, impl, exact, state=state, sink_h=sink_h)


def test_strides_do_not_show(impl):
    """Inputs of which no axis is contiguous."""

    def spread(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    case = Case(12, dtype=native(impl))
    state = attend(case, impl)
    expected = attend(case, impl, state=state)
    case.q = spread(case.q)
    actual = attend(case, impl, state=(spread(state[0]), spread(state[1])))
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    states = make_states(5, 4, 24, native(impl), "cpu")
    states = [x.to(native(impl)) for x in states]
    merged = kvtools.merge_states(*states, impl=impl)
    apart = kvtools.merge_states(*map(spread, states), impl=impl)
    for x, y in zip(apart, merged, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("formats", [("int4", "int4"), ("int8", "fp8"), ("int4", "int2")])
def test_how_scales_and_codes_lie_does_not_show(formats, impl):
    """A slot's two scales in one word, in the other order, and apart; codes at odd addresses."""
    case = Case(17, k_format=formats[0], v_format=formats[1], D=32, dtype=native(impl))
    expected = attend(case, impl)
    paired = case.pages
    k, v = paired.k_scale, paired.v_scale
    turned = torch.stack([v, k], -1)
    others = [dict(k_scale=k.contiguous(), v_scale=v.contiguous()),
              dict(k_scale=turned[..., 1], v_scale=turned[..., 0])]  # fmt: skip
    odd = {}
    for name in ("k", "v"):
        x = getattr(paired, name)
        wide = torch.empty(*x.shape[:3], x.shape[3] + 3, dtype=torch.uint8).view(x.dtype)
        odd[name] = wide[..., 1:-2].copy_(x)
    for changed in (*others, odd):
        case.pages = replace(paired, **changed)
        for x, y in zip(attend(case, impl), expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.skipif(not kvtools.ops.TRITON, reason="needs Triton")
@pytest.mark.parametrize("format", ["fp8", "int8", "int4", "int2"])
def test_ptx_of_unpacking(format):
    """What NVIDIA's GPUs run, run here instruction by instruction, gives the levels of all words:
    fields in the order of `word_element`, low bytes first, exact but for fp16's last rounding."""
    from kvtools.kernels import format as kernels

    low = np.arange(2**16, dtype=np.uint32)
    words = low | low[::-1] << 16
    bits = 8 if format == "fp8" else int(format[3:])
    code = kernels.FORMATS[format]
    found = run_ptx(kernels.unpacking(code), words, 16 // bits)
    for i, pair in enumerate(found):
        for half in range(2):
            codes = words >> (16 * half + bits * i) & 2**bits - 1
            if format == "fp8":
                x = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
                expected = x.to(torch.float16).numpy()
            else:
                c = codes - (2**bits - 1) / 2
                unit = kernels.word_unit(code)
                expected = (c if unit == 1 else c * (c * c + 1 / unit)).astype(np.float16)
            actual = (pair >> 16 * half & 0xFFFF).astype(np.uint16).view(np.float16)
            np.testing.assert_array_equal(actual, expected)


def run_ptx(text, words, outputs):
    """What registers $0, $1, ... hold of a straight piece of PTX over uint32 words."""
    held = {f"${outputs}": words}

    def get(name):
        return held[name] if name in held else np.uint32(int(name, 0))

    def halves(function, *names):
        x = [[(get(n) >> s & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
              for n in names] for s in (0, 16)]  # fmt: skip
        low, high = (function(*y).astype(np.float16).view(np.uint16).astype(np.uint32) for y in x)
        return low | high << 16

    def table(a, b, c, lut):  # a and b as bits of an index into lut, and so on
        bits = (get(n) >> np.arange(32, dtype=np.uint32)[:, None] & 1 for n in (a, b, c))
        x, y, z = np.broadcast_arrays(*bits)
        bit = int(lut, 0) >> (x << 2 | y << 1 | z) & 1
        return (bit.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(
            0, dtype=np.uint32
        )

    def permuted(a, b, selector):
        both = get(a).astype(np.uint64) | np.uint64(get(b)) << np.uint64(32)
        index = [int(selector, 0) >> 4 * i & 15 for i in range(4)]
        assert max(index) < 8
        return sum((both >> np.uint64(8 * j) & np.uint64(255)) << np.uint64(8 * i)
                   for i, j in enumerate(index)).astype(np.uint32)  # fmt: skip

    def e4m3(a):
        byte = torch.from_numpy(np.stack([get(a) & 255, get(a) >> 8 & 255]).astype(np.uint8))
        low, high = byte.view(torch.float8_e4m3fn).half().view(torch.int16).numpy()
        return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16

    run = {
        "mov.b32": get, "shl.b32": lambda a, n: get(a) << int(n), "lop3.b32": table,
        "shr.u32": lambda a, n: get(a) >> int(n), "prmt.b32": permuted,
        "add.rn.f16x2": lambda *x: halves(lambda a, b: a + b, *x),
        "mul.rn.f16x2": lambda *x: halves(lambda a, b: a * b, *x),
        "fma.rn.f16x2": lambda *x: halves(lambda a, b, c: a * b + c, *x),
        "cvt.rn.f16x2.e4m3x2": e4m3,
    }  # fmt: skip
    for line in text.strip("{} ").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        if rest.startswith("{"):  # two halves of a register
            names, source = rest[1:].split("}")
            for shift, name in zip((0, 16), names.split(","), strict=True):
                held[name.strip()] = get(source.strip(", ")) >> shift & 0xFFFF
            continue
        to, *given = (x.strip() for x in rest.split(","))
        held[to] = run[op](*given)
    return [held[f"${i}"] for i in range(outputs)]


def test_tree_attention_sees_nothing(impl):
    case = Case(6, dtype=native(impl))
    nothing = some_items(case.plan, slice(0))
    out, lse = kvtools.tree_attention(case.q, case.position, case.pages, nothing, impl=impl)
    assert (out == 0).all() and (lse == -torch.inf).all()
    none = Plan.from_host(case.forest.plan(0 * case.counts))
    out, lse = kvtools.tree_attention(case.q[:0], case.position[:0], case.pages, none, impl=impl)
    assert out.shape == (0, 6, 16) and lse.shape == (0, 6)


def test_plans_take_turns_in_reserved_tensors(impl):
    """What is captured once serves other plans of as many query tokens."""
    dtype = native(impl)
    small, large = (Case(seed, dtype=dtype, tile=2, chunk=16) for seed in (14, 12))
    sizes = {name: len(getattr(large.plan, name)) + 3 for name in Plan.TENSORS}
    sizes["part_indptr"] = 1 + max(len(small.q), len(large.q))
    tokens = sizes["part_indptr"] - 1
    held = small.plan.reserve(**sizes, pages=large.plan.pages[0])
    for case in (small, large, small):
        expected = attend(case, impl)
        blank = tokens - len(case.q)
        q = torch.cat([case.q, case.q.new_ones(blank, *case.q.shape[1:])])
        position = torch.cat([case.position, case.position.new_zeros(blank)])
        held.copy_(case.plan)
        actual = kvtools.tree_attention(q, position, case.pages, held, impl=impl)
        for x, y, nothing in zip(actual, expected, (0, -torch.inf), strict=True):
            torch.testing.assert_close(x[: len(y)], y)  # tiles may differ
            assert (x[len(y) :] == nothing).all()
    with pytest.raises(ValueError, match=r"reserve\(page"):
        small.plan.reserve(pages=large.plan.pages[0]).copy_(large.plan)
    with pytest.raises(ValueError, match=r"reserve\(pages=...\) more"):
        small.plan.reserve(**sizes).copy_(large.plan)
    with pytest.raises(ValueError, match="no rows"):
        small.plan.reserve(rows=3)


@pytest.mark.gpu
def test_tree_attention_in_a_graph():
    """Captured once, replayed while rows grow, are gathered and finish."""
    H, G, D, rows = 2, 4, 64, 6
    forest = _host.Forest(200, 16)
    forest.insert(300, 0, rows)
    ones = np.ones(rows, np.int32)
    forest.append(ones)
    limits = dict(tile=16, chunk=64)
    pages = KVPages.empty(200, H, 16, D, k_format="int4", v_format="int4", device="cuda")
    every = torch.arange(200 * 16, device="cuda")
    kvtools.append_kv(*torch.randn(2, len(every), H, D, device="cuda"), every, pages)
    q = torch.randn(rows, H * G, D, device="cuda")
    position = torch.zeros(rows, dtype=torch.int32, device="cuda")
    plan = Plan.from_host(forest.plan(ones, **limits), "cuda")
    plan = plan.reserve(pages=200, **{name: 4 * len(getattr(plan, name)) for name in Plan.TENSORS
                                      if name != "part_indptr"})  # fmt: skip
    kvtools.tree_attention(q, position, pages, plan)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kvtools.tree_attention(q, position, pages, plan)
    for step in range(40):
        index = np.roll(np.arange(rows), step)
        if step % 7 == 3:
            index[1] = index[0]
        forest.gather(index.astype(np.int32))
        counts = np.where(np.arange(rows) < rows - step // 10, 1, 0).astype(np.int32)
        forest.append(counts)
        position.copy_(torch.from_numpy(forest.lengths() - 1))
        fresh = Plan.from_host(forest.plan(counts, **limits), "cuda")
        active = counts.sum()
        plan.copy_(fresh.reserve(part_indptr=rows + 1))
        graph.replay()
        expected = kvtools.tree_attention(q[:active], position[:active], pages, fresh)
        for x, y in zip(captured, expected, strict=True):
            torch.testing.assert_close(x[:active], y)
        assert (captured[0][active:] == 0).all()


@pytest.mark.parametrize("layout", ["vllm", "vllm_nhd", "sglang"])
def test_tree_attention_in_foreign_layouts(layout, impl):
    """Another server's pages and block table, as views: no copy."""
    page_size = 1 if layout == "sglang" else 16
    H, D, blocks, rows, dtype = 2, 16, 64, 5, native(impl)
    generator = torch.Generator().manual_seed(0)
    if layout == "sglang":  # [slots, Hkv, D], one buffer for K and one for V
        k, v = torch.randn(2, blocks, H, D, generator=generator).to(dtype)
        pages = KVPages(*(x[:, :, None] for x in (k, v)))
    elif layout == "vllm":  # [blocks, Hkv, block, 2 D]
        kv = torch.randn(blocks, H, page_size, 2 * D, generator=generator).to(dtype)
        pages = KVPages(kv[..., :D], kv[..., D:])
    else:  # the same, physically [blocks, block, Hkv, 2 D]
        kv = torch.randn(blocks, page_size, H, 2 * D, generator=generator).to(dtype).transpose(1, 2)
        pages = KVPages(kv[..., :D], kv[..., D:])
    shared = 3
    lens = torch.tensor([3 * page_size + 1, 4 * page_size, 5, 5 * page_size, 3 * page_size])
    lens = lens.clamp(min=1).int()
    table = torch.full((rows, 8), 2**31 - 1, dtype=torch.int32)
    free = iter(torch.randperm(blocks, generator=generator).tolist())
    common = [next(free) for _ in range(shared)]
    for row, length in enumerate(lens.tolist()):
        need = -(-length // page_size)
        own = [next(free) for _ in range(max(need - shared, 0))]
        table[row, :need] = torch.tensor((common + own)[:need])
    q = torch.randn(rows, 4, D, generator=generator).to(dtype)
    plan = kvtools.plan_from_block_table(table, lens, page_size)
    assert len(plan.first) < rows * 2  # the shared blocks are found
    out, _ = kvtools.tree_attention(q, lens - 1, pages, plan, impl=impl)
    for row, length in enumerate(lens.tolist()):
        slot = torch.arange(length)
        where = (table[row].long()[slot // page_size], slice(None), slot % page_size)
        k, v = (x[where].transpose(0, 1)[None] for x in (pages.k, pages.v))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[row][None, :, None], k, v, enable_gqa=True
        )
        torch.testing.assert_close(out[row], expected[0, :, 0])


@pytest.mark.only(when=lambda impl: impl in ("cpu", "reference"))
@pytest.mark.parametrize("options", ["plain", "scale", "softcap", "sliding", "sink"])
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("D", [32, 64, 96, 256])
def test_many_rows_in_bf16(D, page_size, options, impl):
    """What instruction sets with products of bf16 compute in pairs, or in tiles: any number of
    rows and slots, in pages of any size; scores are kept where importance is wanted."""
    rows, slots = set(), set()
    how = {k: v for k, v in OPTIONS[options].items() if k != "sink_h"}
    if options == "sink":
        how["sink_h"] = torch.linspace(-1, 2, 10).bfloat16()
    for seed in range(3):
        case = Case(seed, page_size=page_size, G=5, D=D, dtype=torch.bfloat16, most=12, longest=200)
        rows |= {5 * (end - begin) for _, begin, end, *_ in case.plan.item.tolist()}
        slots |= set(case.plan.length.tolist())
        found = []
        for q, which in ((case.q.double(), "reference"), (case.q, "reference"), (case.q, impl)):
            case.pages.importance = torch.zeros(case.pages.k.shape[:3])
            out = attend(SimpleNamespace(**vars(case) | {"q": q}), which, **how)
            found.append((*out, case.pages.importance))
        exact, eager, actual = found
        assert exact[2].max() > 0
        assert_all_within_budget(impl, case.pages, actual[:2], exact[:2], eager[:2])
        assert_within_budget("importance", actual[2], exact[2], eager[2], torch.bfloat16)
    assert {min(1, x // 9) + min(1, x // 97) for x in rows} == {0, 1, 2}  # few, many, some tiles
    assert {x % 32 > 16 for x in slots} == {False, True} and {x % 2 for x in slots} == {0, 1}


@pytest.mark.only(when=lambda impl: impl in ("cpu", "reference"))
@pytest.mark.parametrize("D", [32, 64])
def test_what_is_behind_the_last_slot_does_not_count(D, impl):
    """However the last of an odd number of slots is: an infinity stays one."""
    rows, slots = 24, 65
    forest = _host.Forest(rows + 5, 16)
    forest.insert(slots, 0, rows)
    forest.append(np.ones(rows, np.int32))
    generator = torch.Generator().manual_seed(0)
    pages = KVPages.empty(rows + 5, 1, 16, D, dtype=torch.bfloat16)
    k, v = torch.randn(2, slots + rows, 1, D, generator=generator).bfloat16()
    v[slots - 1, 0, 3] = torch.inf
    slot = np.concatenate([forest.row_slots(r)[x:] for r, x in enumerate([0] + [slots] * 23)])
    kvtools.append_kv(k, v, torch.from_numpy(slot.astype(np.int64)), pages)
    case = SimpleNamespace(
        q=torch.randn(rows, 1, D, generator=generator).bfloat16(), pages=pages,
        plan=Plan.from_host(forest.plan([1] * rows)),
        position=torch.full((rows,), slots, dtype=torch.int32),
    )  # fmt: skip
    out, lse = attend(case, impl)
    assert (out[..., 3] == torch.inf).all() and lse.isfinite().all()
    assert out[..., [x for x in range(D) if x != 3]].isfinite().all()


@pytest.fixture
def tiles():
    """Makes C++ kernels compute by tiles of AMX, or by their emulation; skips where it cannot."""
    use = torch.ops.kvtools.cpu_isa
    before = use("auto")

    def choose(name):
        if lacks := torch.ops.kvtools.cpu_lacks(name):
            pytest.skip(f"{name}: {lacks}")
        use(name)

    yield choose
    use(before)


@pytest.mark.parametrize("D", [32, 128])
def test_tiles_are_those_of_their_emulation(D, tiles):
    case = Case(2, G=5, D=D, dtype=torch.bfloat16, most=12, longest=200)
    found = []
    for name in ("amx-emulated", "amx"):
        tiles(name)
        found.append(attend(case, "cpu"))
    exact = attend(SimpleNamespace(**vars(case) | {"q": case.q.double()}), "reference")
    assert_all_within_budget("cpu", case.pages, found[1], exact, found[0])


def test_machine_code_of_tiles(tmp_path):
    """Executed by the processor, or where it lacks AMX by what its traps call."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler or torch.ops.kvtools.cpu_lacks("amx-emulated"):
        pytest.skip("needs a C++ compiler and AVX-512 with VNNI")
    wide = [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni")]
    source, program = Path(__file__).with_name("amx_trap.cpp"), tmp_path / "amx_trap"
    define = ["-DKVTOOLS_ISA=amx", "-DKVTOOLS_TILES=1"]
    subprocess.run([compiler, "-std=c++17", "-O2", *wide, "-mfma", *define, source, "-o", program],
                   check=True)  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if torch.ops.kvtools.cpu_lacks("amx"):
        assert int(done.stdout.split()[0]) > 100


@pytest.mark.parametrize("name", ["amx-emulated", "amx"])
def test_tiles_take_denormals_for_zeros(name, tiles):
    """As products of bf16 do on every processor that has them; those of fp32 do not."""
    tiles(name)
    case = Case(2, G=12, D=32, dtype=torch.bfloat16)
    least = torch.finfo(torch.bfloat16).smallest_normal
    for value, expected in ((least, True), (least / 2, False)):
        case.pages.v.fill_(value)
        assert attend(case, "cpu")[0].any() == expected
    assert attend(case, "reference")[0].any()


@pytest.mark.parametrize("group", ["all", "mean"])
@pytest.mark.parametrize("most", [1, 4])
def test_importance(group, most, impl):
    """`importance` and `history` against dense probabilities; only own nodes change."""
    window = 37
    sink_h = torch.linspace(-1, 1, 6, dtype=native(impl))
    for seed in (11, 12, 14):
        case = Case(seed, scatter=True, most=most, dtype=native(impl))
        shape = case.pages.k.shape[:3]
        case.pages.importance = torch.zeros(shape)
        case.pages.history = torch.zeros(*shape, 2, dtype=torch.int32)
        options = dict(sink_h=sink_h, sliding=11)
        _, lse = kvtools.tree_attention(
            case.q, case.position, case.pages, case.plan, window=window, group=group, impl=impl,
            **options,
        )  # fmt: skip
        own_slots = set()
        for i in case.plan.own.nonzero()[:, 0]:
            pages = case.plan.page[case.plan.page_indptr[i] : case.plan.page_indptr[i + 1]]
            offset = case.plan.first[i] + torch.arange(int(case.plan.length[i]))
            size = case.pages.page_size
            own_slots |= set((pages[offset // size] * size + offset % size).tolist())
        mass, low = torch.zeros(shape).double(), torch.zeros(*shape, 64, dtype=torch.bool)
        for t, (position, row) in enumerate(zip(case.position.tolist(), case.row, strict=True)):
            k_shd, _ = case.content(row)
            q_hgd = case.q[t].double().view(2, 3, -1)
            x = torch.einsum("hgd,shd->hgs", q_hgd, k_shd) * case.D**-0.5
            key = torch.arange(x.shape[-1])
            visible = (key <= position) & (key > position - 11)
            p = (x - lse[t].view(2, 3, 1)).exp() * visible
            mean = p.sum(-1, keepdim=True) / visible.sum()
            is_low = (p < mean).all(1) if group == "all" else p.mean(1) < mean.mean(1)
            for s, slot in enumerate(case.forest.row_slots(row).tolist()):
                page, offset = divmod(slot, case.pages.page_size)
                if slot in own_slots and s <= position:
                    mass[page, :, offset] += p[:, :, s].mean(1)
                    low[page, :, offset, position % window] = is_low[:, s]
        torch.testing.assert_close(case.pages.importance.double(), mass, rtol=1e-5, atol=1e-6)
        bits = (case.pages.history[..., None] >> torch.arange(32)) & 1
        assert torch.equal(bits.flatten(-2).bool(), low)
        assert mass.sum() > 0 and low.any()


@pytest.mark.parametrize("tile", [1, 3])
def test_importance_of_tokens_in_several_items(tile, impl):
    """However the tokens of a row's own node are cut into items, all of them count."""
    T, window, dtype = 7, 9, native(impl)
    q, content = torch.randn(T, 4, 16).to(dtype), torch.randn(2, 3, 2, 8, 16).to(dtype)
    position = torch.arange(24 - T, 24, dtype=torch.int32)
    found = []
    before = torch.get_num_threads()
    for limits in ({}, dict(tile=tile), dict(tile=tile, chunk=8)):
        table, lens, counts = torch.arange(3)[None], torch.tensor([24]), torch.tensor([T])
        plan = kvtools.plan_from_block_table(table, lens, 8, query_lens=counts, **limits)
        pages = KVPages.empty(3, 2, 8, 16, dtype=dtype, importance=True, window=window)
        for x, filled in zip(pages.tensors()[:2], content, strict=True):
            x.copy_(filled)
        pages.importance.zero_(), pages.history.zero_()
        torch.set_num_threads(4)
        try:
            kvtools.tree_attention(q, position, pages, plan, window=window, impl=impl)
        finally:
            torch.set_num_threads(before)
        found.append(pages)
    for pages in found[1:]:
        torch.testing.assert_close(pages.importance, found[0].importance, rtol=1e-5, atol=1e-6)
        assert torch.equal(pages.history, found[0].history) and pages.history.any()
    assert 6.9 < float(found[0].importance.sum() / 2) < 7.1


class Several(Case):
    """A case of which sinks and the newest tokens of each row lie in stores of their own: sinks in
    one page for all rows, not quantised, a ring of 9 slots per row, and new tokens one by one."""

    NEW, RING = 6, 9  # positions that a query reads in recent pages, slots of a ring

    def __init__(self, seed, formats, *, H=2, G=3, D=16, dtype=torch.float64, most=3, **how):
        k_format, v_format, recent = formats
        super().__init__(
            seed, k_format=k_format, v_format=v_format, H=H, G=G, D=D, dtype=dtype, most=most,
            scatter=True, **how,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        rows, total = len(self.counts), len(self.q)

        def filled(pages, page_size, format, **how):
            new = KVPages.empty(
                pages, H, page_size, D, k_format=format, v_format=format, dtype=dtype, **how
            )
            k, v = torch.randn(2, pages * page_size, H, D, generator=generator).to(dtype)
            if how:
                new.position.fill_(0)
                new.recent = True
            kvtools.append_kv(k, v, torch.arange(len(k)), new, torch.zeros(len(k)).int())
            return new

        def plan(table, lens, size):
            return _host.plan_from_block_table(np.array(table), np.array(lens), size, self.counts)

        sinks = filled(1, 3, "none")
        ring, new = (filled(*size, recent, position=True) for size in ((rows, 9), (total, 1)))
        last = torch.from_numpy(self.lengths.astype(np.int32))
        back = torch.randint(-2, 20, ring.position.shape, generator=generator, dtype=torch.int32)
        ring.position[:] = last[:, None, None] - back
        new.position[:] = self.position[:, None, None]
        start = np.cumsum(self.counts) - self.counts
        own = start[:, None] + np.arange(max(self.counts))
        self.all = [self.pages, sinks, ring, new]
        self.arrays = [
            self.forest.plan(self.counts, *(how.get(x, 0) for x in ("tile", "chunk"))),
            plan([[0]] * rows, [3] * rows, 3), plan(np.arange(rows)[:, None], [9] * rows, 9),
            plan(np.minimum(own, total - 1), self.counts, 1),
        ]  # fmt: skip
        self.before = self.position - self.NEW + 1
        self.frame = torch.stack(
            [torch.zeros(2, H, D), 2.0 ** torch.randint(-3, 4, (2, H, D), generator=generator)], 1
        ).to(dtype)
        self.frame_t = torch.arange(total, dtype=torch.int32) % 2

    def attend(self, impl, stores=4, **how):
        plan = Plan.from_host(self.arrays[:stores])
        return kvtools.tree_attention(
            self.q, self.position, self.all[:stores], plan, before_t=self.before,
            frame=self.frame, frame_t=self.frame_t, impl=impl, **how,
        )  # fmt: skip

    def chained(self, stores=4, *, window=0, group="all", sink_h=None, **how):
        """The same by one call of the reference for each store."""
        gain = self.frame[self.frame_t.long(), 1]
        q = self.q / gain.repeat_interleave(self.q.shape[1] // gain.shape[1], 1)
        state = None
        for i in (*range(1, stores), 0):
            how |= dict(sliding=self.NEW) if i > 1 else dict(sliding=0)
            if i == 0:
                how |= dict(before_t=self.before, window=window, group=group, sink_h=sink_h)
            pages = replace(self.all[i], recent=False)
            state = kvtools.tree_attention(
                q, self.position, pages, Plan.from_host(self.arrays[i]), state=state,
                impl="reference", **how,
            )  # fmt: skip
        return state


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("stores", [2, 3, 4])
@pytest.mark.parametrize("formats", [
    ("int4", "int4", "int8"), ("none", "int4", "none"), ("int8", "none", "fp8"),
    ("int3", "fp8", "none"), ("none", "none", "none"),
])  # fmt: skip
def test_stores_in_one_call(formats, stores, most, impl):
    """Equal to a chain of calls by `state`, importance and history included."""
    sink_h = torch.linspace(-1, 1, 6, dtype=native(impl))
    for seed, tracked in ((11, True), (12, False)):
        case = Several(seed, formats, most=most, dtype=native(impl), tile=2, chunk=16)
        for pages in case.all:
            for x in (pages.k, pages.v):
                x.nan_to_num_() if x.dtype.itemsize > 1 else None
        how = dict(scale=0.3, sink_h=sink_h)
        signals = []

        def run(attend, case=case, how=how, tracked=tracked, signals=signals):
            if tracked:
                shape = case.pages.k.shape[:3]
                case.pages.importance = torch.zeros(shape)
                case.pages.history = torch.zeros(*shape, 1, dtype=torch.int32)
                signals.append((case.pages.importance, case.pages.history))
                how = how | dict(window=29, group="mean")
            return attend(stores=stores, **how)

        actual = run(partial(case.attend, impl))
        eager = run(case.chained)
        case.q, case.frame = case.q.double(), case.frame.double()
        exact = run(case.chained, how=dict(scale=0.3, sink_h=sink_h.double()))
        if impl == "reference":
            for x, y in zip(actual, exact, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        else:
            assert_all_within_budget(impl, case.pages, actual, exact, eager)
        if tracked:
            torch.testing.assert_close(signals[0][0], signals[2][0], rtol=1e-4, atol=1e-5)
            assert torch.equal(signals[0][1], signals[2][1]) and signals[0][1].any()


@pytest.mark.long_if(when=interpreted)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formats,G,D", [
    (("int4", "int4", "int8"), 20, 128), (("none", "int4", "none"), 3, 64),
    (("int8", "int8", "fp8"), 2, 256), (("int3", "fp8", "none"), 3, 96),
    (("none", "none", "int4"), 3, 40),
])  # fmt: skip
def test_stores_of_16_bits(formats, G, D, dtype, impl):
    """Queries of 16 bits meet stores that rotate and stores that do not, in any order."""
    for seed, order in ((31, (0, 1, 2, 3)), (32, (3, 1, 0))):
        case = Several(seed, formats, G=G, D=D, dtype=dtype, tile=2, chunk=32)
        for pages in case.all:
            for x in (pages.k, pages.v):
                x.nan_to_num_() if x.dtype.itemsize > 1 else None
        plan = Plan.from_host([case.arrays[i] for i in order])
        plan = replace(plan, part=plan.part.clone())
        for begin, end in pairwise(plan.part_indptr.tolist()):
            plan.part[begin:end] = plan.part[begin:end].flip(0)

        def attend(q, frame, impl, case=case, order=order, plan=plan):
            return kvtools.tree_attention(
                q, case.position, [case.all[i] for i in order], plan, before_t=case.before,
                frame=frame, frame_t=case.frame_t, scale=0.3 * D**-0.5, impl=impl,
            )  # fmt: skip

        exact = attend(case.q.double(), case.frame.double(), "reference")
        eager = attend(case.q, case.frame, "reference")
        quantised = next((x for x in case.all if x.k_scale is not None), case.pages)
        actual = attend(case.q, case.frame, impl)
        assert_all_within_budget(impl, quantised, actual, exact, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("G,D", [(3, 64), (20, 128), (2, 256)])
def test_importance_of_16_bits(G, D, dtype, impl):
    case = Case(2, dtype=dtype, G=G, D=D, most=3)
    shape = case.pages.k.shape[:3]

    def tracked(q, impl):
        case.pages.importance = torch.zeros(shape)
        case.pages.history = torch.zeros(*shape, 1, dtype=torch.int32)
        kvtools.tree_attention(
            q, case.position, case.pages, case.plan, window=29, softcap=20.0, impl=impl,
            group="mean" if G > 16 else "all",
        )  # fmt: skip
        return case.pages.importance, case.pages.history

    exact, history = tracked(case.q.double(), "reference")
    eager, _ = tracked(case.q, "reference")
    actual, actual_history = tracked(case.q, impl)
    assert_within_budget("importance", actual, exact.double(), eager)
    assert torch.equal(actual_history, history) and history.any()


def tree_args(case):
    plan = case.plan
    return (
        case.q, case.position, *case.pages.tensors(), [], 0, plan.page_indptr, plan.page,
        plan.first, plan.length, plan.base, plan.own, plan.store, plan.token_indptr, plan.token,
        plan.item, plan.part_indptr, plan.part, case.position, None, None, None, None,
        None, 0.25, 0.0, 0, 0, "all",
    )  # fmt: skip


def several_args(case):
    plan = Plan.from_host(case.arrays)
    nothing = torch.empty(0)
    more = [nothing if x is None else x for pages in case.all[1:] for x in pages.tensors()[:5]]
    return (
        case.q, case.position, *case.pages.tensors(), more, 0b1100,
        *(x for n, x in zip(Plan.TENSORS, plan.tensors(), strict=True) if n != "leaf"),
        case.before, case.frame, case.frame_t, None, None, None, 0.25, 0.0, 0, 0, "all",
    )  # fmt: skip


def test_attention_contract(opcheck):
    case = Case(1, dtype=torch.float32)
    several = Several(11, ("int4", "none", "int8"), dtype=torch.float32)
    for pages in (case.pages, *several.all):
        for x in (pages.k, pages.v):
            x.nan_to_num_() if x.dtype.is_floating_point else None
    opcheck("tree_attention", tree_args(case))
    opcheck("tree_attention", several_args(several))
    args = make_states(3, 2, 8, torch.float32, "cpu")
    opcheck("merge_states", [x.nan_to_num(0, neginf=-9) for x in args])


def test_attention_compiles():
    merge = torch.compile(kvtools.merge_states, fullgraph=True, dynamic=True, backend="eager")
    for B in (3, 7):
        args = make_states(B, 2, 8, torch.float32, "cpu")
        torch.testing.assert_close(merge(*args), kvtools.merge_states(*args), equal_nan=True)
    tree = torch.compile(kvtools.tree_attention, fullgraph=True, dynamic=True, backend="eager")
    for seed in (1, 2):
        case = Case(seed, dtype=torch.float32, k_format="int4")
        args = (case.q, case.position, case.pages, case.plan)
        for x, y in zip(tree(*args), kvtools.tree_attention(*args), strict=True):
            torch.testing.assert_close(x, y)


def meta(x):
    return x.to("meta")


# What is changed in the arguments of a call, and the error.
BAD = [
    (lambda a: dict(q_thd=a.q_thd[:, :5]), "not a multiple of the pages' 2 KV heads"),
    (lambda a: dict(q_thd=a.q_thd[:, :0]), "q_thd has 0 heads"),
    (lambda a: dict(q_thd=a.q_thd[0]), "q_thd has dtype torch.float32 and shape"),
    (lambda a: dict(q_thd=a.q_thd.int()), "q_thd has dtype torch.int32"),
    (lambda a: dict(q_thd=torch.randn(10, 6, 24)), "heads of size 24 need"),
    (lambda a: dict(q_thd=a.q_thd[..., :0]), "pages.k has shape .* heads are of size 0"),
    (lambda a: dict(q_thd=a.q_thd.clone().requires_grad_()), "inference only"),
    # A plan for other query tokens, other pages.
    (lambda a: dict(q_thd=a.q_thd[:9], position_t=a.position_t[:9]), "plan was made for 10"),
    (lambda a: dict(q_thd=a.q_thd[:0], position_t=a.position_t[:0]), "plan was made for 10"),
    (lambda a: dict(pages=cut(a.pages, slice(3))), "3 pages of 16 slots, plan was made for 13"),
    (lambda a: dict(pages=cut(a.pages, slice(None), 8)), "of 8 slots, plan was made for .* of 16"),
    (lambda a: dict(position_t=a.position_t[:1]), "position_t has shape"),
    (lambda a: dict(position_t=a.position_t.long()), "position_t .*int64"),
    (lambda a: dict(before_t=a.position_t[:1]), "before_t has shape"),
    (lambda a: dict(before_t=a.position_t.float()), "before_t .*float32"),
    (lambda a: dict(group="any"), "group='any'"),
    (lambda a: dict(softcap=-1.0), "softcap and sliding"),
    (lambda a: dict(softcap=float("nan")), "softcap and sliding"),
    (lambda a: dict(softcap=float("inf")), "softcap and sliding"),
    (lambda a: dict(scale=float("inf")), "scale=inf"),
    (lambda a: dict(scale=float("nan")), "scale=nan"),
    (lambda a: dict(sliding=2**31), "softcap and sliding"),
    (lambda a: dict(sink_h=torch.zeros(2)), "sink_h must have shape"),
    (lambda a: dict(sink_h=torch.zeros(6).int()), "sink_h must have shape"),
    (lambda a: dict(window=3), "window=3 does not fit"),
    (lambda a: dict(state=(a.q_thd[:9], a.state[1])), "state: out is"),
    (lambda a: dict(state=(a.q_thd[..., :8], a.state[1])), "state: out is"),
    (lambda a: dict(state=(a.q_thd.int(), a.state[1])), "state: out is torch.int32"),
    (lambda a: dict(state=(a.q_thd, a.state[1][:9])), "state: lse is"),
    (lambda a: dict(state=(a.q_thd, a.state[1].half())), "state: lse is torch.float16"),
    # Pages that do not fit one another.
    (lambda a: dict(pages=replace(a.pages, v=a.pages.v[:5])), "pages.v has shape"),
    (lambda a: dict(pages=replace(a.pages, v=a.pages.v.byte())), "pages.v_scale of shape"),
    (lambda a: dict(pages=replace(a.pages, k=a.pages.k[0])), "pages.k has shape"),
    (lambda a: dict(pages=replace(a.pages, k=a.pages.k[:, :0])), "pages.k has shape"),
    (lambda a: dict(pages=replace(a.pages, k=a.pages.k.int())), "pages.k has dtype torch.int32"),
    (lambda a: dict(pages=replace(a.pages, position=int32(5, 2, 16))), "pages.position is"),
    (lambda a: dict(pages=replace(a.pages, position=a.pages.k[..., 0])), "pages.position is"),
    (lambda a: dict(pages=replace(a.pages, importance=torch.zeros(5, 2, 16))), "pages.importance"),
    (lambda a: dict(pages=replace(a.pages, history=int32(5, 2, 16, 1)), window=9), "pages.history"),
    # Stores.
    (lambda a: dict(pages=[]), "pages are 0 stores, expected 1 to 4"),
    (lambda a: dict(pages=[a.pages] * 5), "pages are 5 stores"),
    (lambda a: dict(pages=[a.pages] * 2), "of 16 slots, plan was made for 13 pages"),
    (lambda a: dict(pages=[a.pages, few_heads(a.pages)]), r"pages have \[2, 1\] KV heads"),
    (lambda a: dict(pages=[a.pages, replace(a.pages, v=a.pages.v[:5])]), "pages.v has shape"),
    # Frames.
    (lambda a: dict(frame=torch.ones(1, 2, 2, 16)), "give both or none"),
    (lambda a: dict(frame_t=int32(10)), "give both or none"),
    (lambda a: dict(frame=torch.ones(1, 2, 2, 8), frame_t=int32(10)), "frame is torch.float32"),
    (lambda a: dict(frame=torch.ones(0, 2, 2, 16), frame_t=int32(10)), "frame holds no frames"),
    (lambda a: dict(frame=torch.ones(1, 2, 2, 16), frame_t=int32(9)), "frame_t has shape"),
    (lambda a: dict(frame=torch.ones(1, 2, 2, 16), frame_t=int32(10).long()), "frame_t .*int64"),
    # Devices.
    (lambda a: dict(pages=a.pages, frame=meta(torch.ones(1, 2, 2, 16)), frame_t=int32(10)),
     "frame on meta"),
    (lambda a: dict(position_t=meta(a.position_t)), "position_t on meta"),
    (lambda a: dict(plan=a.plan.to("meta")), "page_indptr on meta"),
    (lambda a: dict(pages=replace(a.pages, v=meta(a.pages.v))), "but v on meta"),
    (lambda a: dict(state=tuple(map(meta, a.state))), "state_out on meta, state_lse on meta"),
    (lambda a: dict(sink_h=meta(torch.zeros(6))), "sink_h on meta"),
    (lambda a: dict(before_t=meta(a.position_t)), "before_t on meta"),
]  # fmt: skip


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def few_heads(pages):
    return KVPages(*(None if x is None else x[:, :1] for x in pages.tensors()))


def cut(pages, which, slots=None):
    return KVPages(*(None if x is None else x[which, :, :slots] for x in pages.tensors()))


@pytest.mark.parametrize("change,message", BAD)
def test_tree_attention_raises(change, message):
    case = Case(0, dtype=torch.float32)
    state = torch.zeros(len(case.q), 6, 16), torch.zeros(len(case.q), 6)
    args = SimpleNamespace(
        q_thd=case.q, position_t=case.position, pages=case.pages, plan=case.plan, state=state
    )
    kvtools.tree_attention(**vars(args))
    with pytest.raises((ValueError, RuntimeError), match=message):
        kvtools.tree_attention(**{**vars(args), **change(args)})


def test_merge_states_raises_for_what_kernels_do_not_take():
    a, lse = torch.zeros(3, 2, 8), torch.zeros(3, 2)
    for args, message in [
        ((a[0], lse[0], a[0], lse[0]), "a_bhd is"),
        ((a.int(), lse, a.int(), lse), "a_bhd is torch.int32"),
        ((a, lse.half(), a, lse), "a_lse_bh is torch.float16"),
        ((a, lse, meta(a), lse), "b_bhd on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            kvtools.merge_states(*args)


# Of a plan: which tensor is changed, how, and the error.
BROKEN = [
    ("page", lambda x: x - 10, IndexError, "page holds -"),
    ("page", lambda x: x[:-1], IndexError, "page_indptr holds"),
    ("first", lambda x: x + 16, IndexError, "first holds 16; there are 16 slots in a page"),
    ("first", lambda x: x - 1, IndexError, "first holds -1"),
    ("first", lambda x: x[:-1], ValueError, "first"),
    ("length", lambda x: x - 1000, ValueError, "length holds -"),
    ("length", lambda x: x[:-1], ValueError, "length has"),
    ("length", lambda x: x[0], ValueError, "length (has shape|must have 1 dim)"),
    ("first", lambda x: x[0], ValueError, "first"),
    ("page", lambda x: x[0], ValueError, "page must have 1 dim"),
    ("base", lambda x: x + 2**31 - 20, ValueError, "base holds"),
    ("base", lambda x: torch.full_like(x, -(2**31)), ValueError, "base holds .* no position"),
    ("own", lambda x: x[:-1], ValueError, "own has"),
    ("token_indptr", lambda x: x.flip(0), IndexError, "token_indptr holds"),
    ("token", lambda x: x + 1, IndexError, "token holds 10; there are 10 query tokens"),
    ("token", lambda x: x - 1, IndexError, "token holds -1"),
    ("token", lambda x: x.flip(0), ValueError, "part: token"),
    ("item", lambda x: x[:, :5].contiguous(), ValueError, "item must be"),
    ("item", lambda x: x.flatten(), ValueError, "item must have 2 dim"),
    ("item", lambda x: x + int32(6).index_fill_(0, torch.tensor(0), 99), IndexError, "item holds"),
    ("item", lambda x: x + int32(6).index_fill_(0, torch.tensor(2), 1), IndexError, "tokens"),
    ("item", lambda x: x + int32(6).index_fill_(0, torch.tensor(3), -1), IndexError, "slots -1"),
    ("item", lambda x: x + int32(6).index_fill_(0, torch.tensor(4), 16), IndexError, "slots"),
    ("item", lambda x: x + int32(6).index_fill_(0, torch.tensor(5), 1), IndexError, "partial"),
    ("item", lambda x: x[:-1], ValueError, "part: token"),
    ("part", lambda x: x + 1000, IndexError, "part holds"),
    ("part", lambda x: x.flip(0), ValueError, "part: token"),
    ("part_indptr", lambda x: x + 1, IndexError, "part_indptr holds"),
    ("leaf", lambda x: x + 99, IndexError, "leaf holds"),
    ("page", lambda x: x.long(), ValueError, "page must be contiguous int32"),
    ("page", lambda x: meta(x), ValueError, "page must be contiguous int32"),
    ("page", lambda x: x.repeat_interleave(2)[::2], ValueError, "page must be contiguous int32"),
    ("page_size", lambda x: 0, ValueError, "page_size=0"),
    ("page_size", lambda x: 4.0, ValueError, "page_size=4.0"),
]


@pytest.mark.parametrize("name,change,error,message", BROKEN)
def test_plans_are_checked_when_they_are_made(name, change, error, message):
    plan = Case(0).plan
    parts = {n: getattr(plan, n) for n in (*Plan.TENSORS, "page_size")}
    assert Plan(**parts).pages == plan.pages == (int(plan.page.max()) + 1,)
    parts[name] = change(parts[name])
    with pytest.raises(error, match=message):
        Plan(**parts)
    if not message.startswith("length holds"):
        with pytest.raises(error, match=message):
            replace(plan, **{name: parts[name]})
    if name != "page_size" and parts[name].dtype == torch.int32 and not parts[name].is_meta:
        arrays = {n: x if n == "page_size" else x.numpy() for n, x in parts.items()}
        if parts[name].is_contiguous():
            with pytest.raises(error, match=message):
                Plan.from_host(arrays)


@pytest.mark.long_if(when=interpreted)
def test_a_plan_may_be_followed_whatever_its_lengths_become(impl):
    """`length` is the caller's to change: items bound what is read."""
    case = Case(7, dtype=native(impl), tile=2, chunk=16)
    plan, whole = case.plan, case.plan.length.clone()
    expected = attend(case, impl)
    for length in (2**31 - 1, -5):
        case.plan = replace(plan, length=torch.full_like(plan.length, length))
        out, lse = attend(case, impl)
        assert out.shape == expected[0].shape
        if length < 0:
            assert (out == 0).all() and (lse == -torch.inf).all()
    case.plan = replace(plan, length=whole)
    assert torch.equal(attend(case, impl)[0], expected[0])


def test_positions_below_zero_are_noted_within_history(impl):
    """The remainder counts from 0: a bit in a word before the slot's own would be another's."""
    histories = []
    for each in (impl, "reference"):
        case = Case(3, dtype=native(impl))
        tracks(case, 64)
        case.position = -33 - torch.arange(len(case.q), dtype=torch.int32)
        case.pages.position = int32(*case.pages.history.shape[:3]) - 1000
        attend(case, each, window=64)
        histories.append(case.pages.history)
    assert (histories[1] != 0).any() and torch.equal(*histories)


def few(impl, format, value):
    """Fewer cases where a CPU stands for the GPU."""
    return not interpreted(impl) or (format != "fp8" and (value == torch.inf) != (format == "int4"))


@pytest.mark.only(when=few)
@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("format", ["none", "int4", "fp8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_never_look_like_numbers(format, value, what, impl):
    """What a query sees makes its output NaN; the rows of other prompts keep theirs."""
    many = not interpreted(impl)
    case = Case(12, k_format=format, v_format=format, dtype=native(impl), D=32, G=9 if many else 2)
    tracks(case, 40)
    expected = attend(case, impl, window=40)
    row = int(case.row[-1])
    slot = torch.from_numpy(case.forest.row_slots(row)[:1].astype(np.int64))  # of its prompt
    root = case.forest.root_of(row)
    hit = torch.tensor([case.forest.root_of(r) == root for r in case.row])
    assert hit.any() and not hit.all()
    bad = torch.randn(1, 2, 32, dtype=case.dtype)
    bad[0, 1, 3] = value
    if what == "q":
        hit[:] = False
        hit[-1] = True
        case.q[-1, -1] = bad[0, 1]
    else:
        good = torch.ones_like(bad)
        kvtools.append_kv(*((bad, good) if what == "k" else (good, bad)), slot, case.pages)
    out, lse = attend(case, impl, window=40)
    last = slice(-1, None) if what == "q" else slice(case.q.shape[1] // 2, None)
    if value == torch.inf and format == "none" and what != "q":
        # A score of -inf is that of a key that is not seen; infinite values give infinities.
        seen = case.q[hit, last, 3] > 0
        assert (
            (out[hit, last].isnan().any(-1) == seen).all()
            if what == "k"
            else (out[hit, last, 3].isinf().all())
        )
        return
    assert out[hit, last].isnan().any(-1).all()
    if what == "q" or format != "none":  # with NaN codes or queries, all of the head
        assert out[hit, last].isnan().all()
    if what == "v":
        assert lse.isfinite().all()
    else:
        assert lse[hit, last].isnan().all()
    assert torch.equal(out[~hit], expected[0][~hit]) and torch.equal(lse[~hit], expected[1][~hit])


def test_nan_in_states(impl):
    """A lse that is NaN or +inf makes both results NaN; an empty state may hold anything."""
    a, a_lse, b, b_lse = make_states(5, 4, 24, torch.float32, "cpu")
    for x, value in ((a_lse, torch.nan), (b_lse, torch.nan), (b_lse, torch.inf)):
        args = [t.clone() for t in (a, a_lse, b, b_lse)]
        bad = args[1] if x is a_lse else args[3]
        bad[:, 1] = value
        out, lse = kvtools.merge_states(*args, impl=impl)
        assert out[:, 1].isnan().all() and lse[:, 1].isnan().all()
        assert out[:, 0].isfinite().all() and not lse[:, 0].isnan().any()
    case = Case(14, dtype=native(impl))
    state = (
        torch.zeros_like(case.q),
        torch.full(case.q.shape[:2], -torch.inf, dtype=lse_dtype(impl)),
    )
    state[1][0, 1] = torch.nan
    out, lse = attend(case, impl, state=state)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan()
    assert out[0, 0].isfinite().all() and lse[1:].isfinite().all()


def lse_dtype(impl):
    return torch.float64 if native(impl) == torch.float64 else torch.float32


def tracks(case, window):
    """Let pages hold importance, and a history of `window` steps."""
    lead = case.pages.k.shape[:3]
    case.pages.importance = torch.zeros(lead)
    case.pages.history = int32(*lead, -(-window // 32))


@pytest.mark.only(when=lambda: bool(CUDA))
def test_tree_attention_of_large_heads_in_cuda_raises():
    for D in (60, 264):
        case = Case(0, dtype=torch.float32, D=D)
        device = "cuda" if CUDA == "cuda" else "cpu"
        args = [x.to(device) if isinstance(x, torch.Tensor) else x for x in tree_args(case)]
        with pytest.raises(RuntimeError, match=f"heads of size {D}.*impl='triton'"):
            torch.ops.kvtools.tree_attention.cuda(*args)


@pytest.mark.only(when=lambda impl: impl in ("reference", "cpu"))
def test_frames_that_do_not_exist_are_named(impl):
    case = Case(0, dtype=torch.float32)
    for wrong in (3, -1):
        frame_t = int32(len(case.q))
        frame_t[-1] = wrong
        with pytest.raises((RuntimeError, IndexError), match="frame_t holds .* 3 frames"):
            kvtools.tree_attention(
                case.q, case.position, case.pages, case.plan, impl=impl,
                frame=torch.ones(3, 2, 2, 16), frame_t=frame_t,
            )  # fmt: skip


@pytest.mark.only(when=lambda impl: impl == "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frames_that_do_not_exist_are_not_read(dtype, impl):
    case = Case(0, dtype=dtype)
    frame = (1 + torch.rand(3, 2, 2, 16)).to(dtype)
    for wrong in (3, -1, 2**31 - 1, -(2**31)):
        frame_t = int32(len(case.q))
        frame_t[-1] = wrong
        out, _ = attend(case, impl, frame=frame, frame_t=frame_t)
        expected, _ = attend(case, impl, frame=frame, frame_t=frame_t.clamp(0, 2))
        assert torch.equal(out, expected)


def test_plan_from_block_table_raises():
    table, lens = int32(2, 3), torch.tensor([1, 2], dtype=torch.int32)
    big = table.long() + 2**32
    for change, message in [
        (dict(block_table=table[0]), "block_table must be"),
        (dict(block_table=table.float()), "block_table has dtype torch.float32"),
        (dict(block_table=table - 1), "block_table: row 0 has a block"),
        (dict(block_table=big), "block_table: row 0 has a block"),
        (dict(seq_lens=torch.ones(3).int()), "seq_lens has shape"),
        (dict(seq_lens=lens.float()), "seq_lens has dtype torch.float32"),
        (dict(seq_lens=torch.tensor([1, 13])), "seq_lens: row 1 has 13"),
        (dict(seq_lens=torch.tensor([1, 2**32 + 1])), "seq_lens holds 4294967297"),
        (dict(seq_lens=torch.tensor([1, -1])), "seq_lens: row 1 has -1"),
        (dict(query_lens=lens[:1]), "query_lens has shape"),
        (dict(query_lens=lens.half()), "query_lens has dtype"),
        (dict(query_lens=torch.tensor([1, 3])), "query_lens: row 1 has 3, seq_lens has 2"),
        (dict(query_lens=torch.tensor([-1, 2])), "query_lens: row 0 has -1"),
        (dict(query_lens=torch.tensor([1, 2**32])), "query_lens: row 1 has 4294967296"),
        (dict(page_size=0), "page_size=0"),
        (dict(page_size=2**31), "page_size=2147483648"),
        (dict(tile=-1), "tile is negative"),
        (dict(chunk=3), "chunk must be a multiple"),
    ]:
        args = dict(block_table=table, seq_lens=lens, page_size=4) | change
        with pytest.raises(ValueError, match=message):
            kvtools.plan_from_block_table(**args)
    # What lies past a row's end may be no int32.
    far = torch.cat([table, big], 1)
    plan = kvtools.plan_from_block_table(far, lens, 4)
    assert plan.pages == (1,) and plan.page_size == 4
    # One page too few.
    pages = KVPages.empty(1, 1, 4, 8)
    q, position = torch.randn(2, 1, 8), lens - 1
    kvtools.tree_attention(q, position, pages, plan)
    with pytest.raises(ValueError, match="pages has 1 pages of 4 slots, plan was made for 2"):
        kvtools.tree_attention(
            q, position, pages, kvtools.plan_from_block_table(table + 1, lens, 4)
        )
