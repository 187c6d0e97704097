"""Row `evict`: importance from a window of queries, who goes, and closing the gaps."""

from dataclasses import replace

import pytest
import torch

import kvtools
from kvtools import KVPages
from kvtools.ops.quant import EMPTY, FORMATS
from kvtools.testing import assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_window(B, H, G, W, S, D, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H * G, W, D, generator=generator).to(device, dtype)
    k = torch.randn(B, H, S, D, generator=generator).to(device, dtype)
    return q, k


def naive_key_scores(q, k, *, sink_h=None, sinks=0, softcap=0.0, sliding=0, group="all"):
    """One query at a time, in the dtype of `q`."""
    (B, H, S, D), W, G = k.shape, q.shape[2], q.shape[1] // k.shape[1]
    mass, low = q.new_zeros(B, H, S), torch.zeros(B, H, S, dtype=torch.int32, device=q.device)
    for b, h, w in torch.cartesian_prod(*map(torch.arange, (B, H, W))).tolist():
        now = S - W + w
        begin = max(0, now + 1 - sliding) if sliding else 0
        p, mean = q.new_zeros(G, now + 1), q.new_zeros(G)
        for g in range(G):
            x = k[b, h, begin : now + 1] @ q[b, h * G + g, w] * D**-0.5
            if softcap:
                x = softcap * torch.tanh(x / softcap)
            if sink_h is not None:
                x = torch.cat([x, sink_h[h * G + g, None].to(x.dtype)])
            p[g, begin:] = x.softmax(0)[: now + 1 - begin]
            mean[g] = p[g, sinks:].sum() / max(now + 1 - max(begin, sinks), 1)
        mass[b, h, : now + 1] += p.mean(0)
        below = (p < mean[:, None]).all(0) if group == "all" else p.mean(0) < mean.mean()
        low[b, h, : now + 1] += below
    return mass, low


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", ["all", "mean"])
@pytest.mark.parametrize("options", [{}, {"sinks": 3, "sliding": 9}, {"softcap": 2.0, "sinks": 2},
                                     {"sink_h": True, "sinks": 1}], ids=str)  # fmt: skip
@pytest.mark.parametrize("B,H,G,W,S,D", [(1, 1, 1, 1, 1, 8), (2, 2, 3, 7, 21, 16),
                                         (1, 2, 2, 70, 70, 8), (1, 2, 2, 9, 33, 144),
                                         (0, 2, 1, 2, 5, 8)])  # fmt: skip
def test_key_scores(B, H, G, W, S, D, options, group, dtype, device, impl):
    q, k = make_window(B, H, G, W, S, D, dtype, device)
    options = options | {"group": group}
    if "sink_h" in options:
        options["sink_h"] = torch.linspace(-1, 1, H * G, device=device)
    exact, exact_low = naive_key_scores(q.double(), k.double(), **options)
    eager, _ = naive_key_scores(q.float(), k.float(), **options)
    mass, low = kvtools.key_scores(q, k, **options, impl=impl)
    assert_within_budget("mass", mass, exact, eager)
    assert torch.equal(low, exact_low)


def test_key_scores_of_float64(device):
    q, k = make_window(2, 2, 2, 5, 12, 8, torch.float64, device)
    exact, exact_low = naive_key_scores(q, k, sinks=2)
    mass, low = kvtools.key_scores(q, k, sinks=2)
    assert mass.dtype == torch.float64
    torch.testing.assert_close(mass, exact, rtol=0, atol=1e-14)
    assert torch.equal(low, exact_low)


@pytest.mark.parametrize("axes", [(1, 2), (2, 3)])
def test_key_scores_of_views(axes, device, impl):
    q, k = make_window(2, 2, 2, 5, 12, 8, torch.float32, device)
    expected = kvtools.key_scores(q, k, sinks=2, impl=impl)
    q, k = (x.transpose(*axes).contiguous().transpose(*axes) for x in (q, k))
    assert not q.is_contiguous()
    for actual, contiguous in zip(
        kvtools.key_scores(q, k, sinks=2, impl=impl), expected, strict=True
    ):
        torch.testing.assert_close(actual, contiguous)


def test_key_scores_of_mixed_types(device, impl):
    q, k = make_window(1, 2, 2, 5, 12, 8, torch.float32, device)
    k = k.bfloat16()
    exact, exact_low = naive_key_scores(q.double(), k.double(), sinks=2)
    eager, _ = naive_key_scores(q, k.float(), sinks=2)
    mass, low = kvtools.key_scores(q, k, sinks=2, impl=impl)
    assert_within_budget("mass", mass, exact, eager)
    assert torch.equal(low, exact_low)


@pytest.mark.parametrize("group", ["all", "mean"])
def test_key_scores_in_threads(group, device, impl):
    """Bitwise the same, and many chunks of keys agree with the reference."""
    n, w, s = (1, 12, 300) if impl == "triton" else (2, 40, 1100)  # it may be interpreted
    q, k = make_window(n, n, 3, w, s, 20, torch.float32, device)
    options = dict(sinks=4, sliding=s * 7 // 11, group=group)
    one = kvtools.key_scores(q, k, **options, impl=impl)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    two = kvtools.key_scores(q, k, **options, impl=impl)
    torch.set_num_threads(before)
    exact, exact_low = kvtools.key_scores(q.double(), k.double(), **options)
    eager, _ = kvtools.key_scores(q, k, **options, impl="reference")
    assert impl == "reference" or all(map(torch.equal, one, two))
    assert_within_budget("mass", one[0], exact, eager)
    # A probability within rounding of the mean may fall on either side.
    assert (one[1] - exact_low).abs().sum() <= 4


def test_key_scores_of_equal_keys(device, impl):
    """No key is below the mean of equals, however that rounds."""
    q = torch.randn(1, 2, 5, 8, device=device)
    mass, low = kvtools.key_scores(q, torch.ones(1, 1, 7, 8, device=device), impl=impl)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 1), 5.0, device=device))
    assert impl == "reference" or not low.any()


def make_candidates(N, H, S, device, seed=0):
    """Few distinct worths, so that ties abound; a quarter of the slots empty."""
    generator = torch.Generator().manual_seed(seed)
    score, tie = torch.randint(0, 4, (2, N, H, S), generator=generator)
    position = torch.rand(N, H, S, generator=generator).argsort(-1).int()
    position[torch.rand(N, H, S, generator=generator) < 0.25] = EMPTY
    below = torch.arange(N, dtype=torch.int32) % 4
    start = S - torch.arange(N, dtype=torch.int32) % 5
    return [x.to(device) for x in (score, tie.float(), position, below, start)]


def naive_victims(score, tie, position, below, start, count):
    n, h, s = score.shape
    out = torch.zeros(n, h, count, dtype=torch.int32)
    for i in range(n):
        for j in range(h):

            def order(x, i=i, j=j):
                at = int(position[i, j, x])
                protected = at != EMPTY and (at < below[i] or at >= start[i])
                return protected, at != EMPTY, float(score[i, j, x]), float(tie[i, j, x]), at

            out[i, j] = torch.tensor(sorted(range(s), key=order)[:count], dtype=torch.int32)
    return out


WORTHS = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16,
          torch.float16]  # fmt: skip


@pytest.mark.parametrize("dtype", WORTHS, ids=str)
@pytest.mark.parametrize("N,H,S,count", [(1, 1, 1, 1), (6, 2, 23, 7), (3, 2, 16, 0), (5, 3, 9, 9),
                                         (1, 2, 600, 450), (0, 2, 4, 2)])  # fmt: skip
def test_select_victims(N, H, S, count, dtype, device, impl):
    score, tie, position, below, start = make_candidates(N, H, S, device)
    protect = dict(tie_nhs=tie, protect_below_n=below, protect_from_n=start)
    actual = kvtools.select_victims(score.to(dtype), position, count, **protect, impl=impl)
    assert torch.equal(actual.cpu(), naive_victims(score, tie, position, below, start, count))
    for row in range(N):
        alone = {name: x[row : row + 1] for name, x in protect.items()}
        one = kvtools.select_victims(
            score[row : row + 1].to(dtype), position[row : row + 1], count, **alone, impl=impl
        )
        assert torch.equal(one[0], actual[row])


@pytest.mark.only(when=lambda impl: impl != "triton")  # which splits rows much shorter
@pytest.mark.parametrize("worths", ["few", "many", "one"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [100, 4100])
def test_select_victims_of_many(count, dtype, worths, device, impl):
    """More tokens than a block sorts: it finds its part of them, digit by digit."""
    score, tie, position, below, start = make_candidates(1, 2, 4500, device)
    if worths == "many":
        score = torch.randn(score.shape).to(device) * 2**40
    elif worths == "one":
        score, tie, position = (x.fill_(7) for x in (score, tie, position))
    # Every other token of a tensor, so that nothing is contiguous.
    score, tie, position = (
        x.repeat_interleave(2, -1)[..., ::2] for x in (score.to(dtype), tie, position)
    )
    args = score, position, count
    protect = dict(tie_nhs=tie, protect_below_n=below + 9, protect_from_n=start - 9)
    actual = kvtools.select_victims(*args, **protect, impl=impl)
    assert torch.equal(actual, kvtools.select_victims(*args, **protect, impl="reference"))


def test_select_victims_by_special_numbers(device, impl):
    """Negative before zero, zeros equal, NaN last; in views and in threads."""
    nan, inf = torch.nan, torch.inf
    score = torch.tensor([nan, 0.0, inf, -0.0, -1.0, 1e-40, -nan, -inf, -1e-40], device=device)
    position = torch.arange(9, 0, -1, dtype=torch.int32, device=device)
    order = [7, 4, 8, 3, 1, 5, 2, 6, 0]
    rows = 6 if impl == "triton" else 600
    score, position = (x[None, None].expand(rows, 2, 9) for x in (score, position))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        actual = kvtools.select_victims(score, position, 9, impl=impl)
        assert (actual.cpu() == torch.tensor(order)).all()
    torch.set_num_threads(before)


def test_select_victims_by_long_integers(device, impl):
    score = torch.tensor([2**40, 2**40 - 1, -(2**62), 2**62, 5, 2**40, -(2**40)], device=device)
    tie = torch.tensor([-(2**33), 0, 0, 0, 0, -(2**33) - 1, 0], device=device)
    position = torch.arange(7, dtype=torch.int32, device=device)
    args = (x[None, None] for x in (score, position))
    actual = kvtools.select_victims(*args, 7, tie_nhs=tie[None, None], impl=impl)
    assert actual[0, 0].tolist() == [2, 6, 4, 1, 5, 0, 3]


def test_select_victims_without_ties_or_protection(device, impl):
    score, _, position, _, _ = make_candidates(4, 2, 17, device)
    everything = torch.zeros(4, dtype=torch.int32), torch.full((4,), EMPTY)
    expected = naive_victims(score, 0 * score, position, *everything, 9)
    actual = kvtools.select_victims(score, position, 9, impl=impl)
    assert torch.equal(actual.cpu(), expected)


def make_pages(device, *, k_format="int4", v_format="fp8", pages=5, H=2, page_size=4):
    """Pages full of random bytes, with everything that a policy may need."""
    made = KVPages.empty(pages, H, page_size, 16, k_format=k_format, v_format=v_format,
                         dtype=torch.bfloat16, device=device, position=True, importance=True,
                         window=40)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for x in contents(made):
        x.copy_(torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8))
    return made


def contents(pages):
    """Everything in pages as bytes [pages, H, page_size, bytes], so that NaN equals NaN."""
    tensors = (x for x in pages.tensors() if x is not None)
    return [(x if x.dim() == 4 else x[..., None]).view(torch.uint8) for x in tensors]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("v_format", FORMATS)
@pytest.mark.parametrize("k_format", FORMATS)
def test_compact_kv(k_format, v_format, index, device, impl):
    pages = make_pages(device, k_format=k_format, v_format=v_format)
    before = [x.clone() for x in contents(pages)]
    # Heads move different tokens; the targets are the sources of others.
    source = torch.stack([torch.randperm(20)[:9], torch.randperm(20)[:9]], 1).to(device, index)
    target = torch.stack([source[:, 0].roll(1), torch.randperm(20)[:9].to(source)], 1)
    kvtools.compact_kv(source, target, pages, impl=impl)
    for old, new in zip(before, contents(pages), strict=True):
        expected = old.clone()
        for h in range(2):
            for s, t in zip(source[:, h].tolist(), target[:, h].tolist(), strict=True):
                expected[t // 4, h, t % 4] = old[s // 4, h, s % 4]
        assert torch.equal(new, expected)


def test_compact_kv_of_nothing_and_in_views(device, impl):
    pages, view = make_pages(device), make_pages(device)
    for name in ("k", "v", "position"):  # token-major, as other servers have it
        x = getattr(view, name)
        setattr(view, name, x.transpose(1, 2).contiguous().transpose(1, 2))
    none = torch.zeros(0, 2, dtype=torch.int32, device=device)
    kvtools.compact_kv(none, none, pages, impl=impl)
    assert all(map(torch.equal, contents(pages), contents(view)))
    source, target = torch.tensor([[3, 4], [17, 0]]), torch.tensor([[17, 5], [0, 4]])
    for x in (pages, view):
        kvtools.compact_kv(source.to(device), target.to(device), x, impl=impl)
    assert all(map(torch.equal, contents(pages), contents(view)))


def test_compact_kv_writes_nothing_outside(device, impl):
    """What goes to or from a negative slot is skipped, and so is one that the pages do not have on
    a GPU; on a CPU that is an error."""
    around = make_pages(device, pages=7)
    pages = KVPages(*(x if x is None else x[1:6] for x in around.tensors()))
    expected = [x.clone() for x in contents(around)]
    for x in expected:
        x[2, 0, 1] = x[1, 0, 0]
    far = -1 if impl in ("reference", "cpu") else 20
    source = torch.tensor([[0, 3], [-1, far], [4, 2**31 - 1 if far > 0 else -9]], device=device)
    target = torch.tensor([[5, -1], [3, 2], [far, 7]], device=device)
    kvtools.compact_kv(source, target, pages, impl=impl)
    assert all(map(torch.equal, contents(around), expected))
    if impl in ("reference", "cpu"):
        for args, name in (((source + 20, target), "source_nh"), ((source, target + 20), "target")):
            with pytest.raises((IndexError, RuntimeError), match=f"{name}.* holds slot 2"):
                kvtools.compact_kv(*args, pages, impl=impl)
        assert all(map(torch.equal, contents(around), expected))


@pytest.mark.parametrize("at", ["query", "head", "sink", "key"])
@pytest.mark.parametrize("group", ["all", "mean"])
def test_key_scores_of_nan(at, group, device, impl):
    """It spoils the mass of its KV head, and nothing is low there for queries that see it."""
    q, k = make_window(1, 2, 2, 3, 40, 16, torch.float32, device)
    expected = kvtools.key_scores(q, k, sinks=2, group=group, impl=impl)
    if at in ("query", "head"):
        q[0, 0 if at == "query" else 1 : 2, :, 3] = torch.nan
    else:
        k[0, 0, 1 if at == "sink" else 20, 3] = torch.nan
    mass, low = kvtools.key_scores(q, k, sinks=2, group=group, impl=impl)
    assert mass[0, 0].isnan().all() and (low[0, 0] == 0).all()
    for x, y in zip((mass, low), expected, strict=True):
        assert torch.equal(x[0, 1], y[0, 1])


def test_key_scores_with_a_sink_that_takes_nothing(device, impl):
    q, k = make_window(1, 2, 2, 3, 40, 16, torch.float32, device)
    none = torch.full((4,), -torch.inf, device=device)
    actual = kvtools.key_scores(q, k, sink_h=none, impl=impl)
    for x, y in zip(actual, kvtools.key_scores(q, k, impl=impl), strict=True):
        torch.testing.assert_close(x, y)


def test_evict_raises(device):
    q, k = make_window(1, 2, 2, 3, 5, 8, torch.float32, device)
    score, _, position, _, _ = make_candidates(2, 2, 5, device)
    pages, slots = make_pages(device), torch.zeros(3, 2, dtype=torch.int32, device=device)
    cases = [
        (lambda: kvtools.key_scores(q[0], k), r"must be \[b, heads, tokens, D\]"),
        (lambda: kvtools.key_scores(q, k[:, :, :2]), "q_bhwd has 3 queries for 2 keys"),
        (lambda: kvtools.key_scores(q[:, :3], k), "q_bhwd has 3 heads, not a multiple of the 2"),
        (lambda: kvtools.key_scores(q, k, group="any"), "group='any': expected 'all' or 'mean'"),
        (lambda: kvtools.key_scores(q, k, sinks=-1), "sinks=-1 must not be negative"),
        (lambda: kvtools.key_scores(q, k[:, :0]), "not a multiple of the 0 of k_bhsd"),
        (lambda: kvtools.key_scores(q, k[..., :4]), "q_bhwd has shape .* must agree"),
        (lambda: kvtools.key_scores(q[..., :0], k[..., :0]), "q_bhwd has shape .* must agree"),
        (lambda: kvtools.key_scores(q[:0], k), "q_bhwd has shape .* must agree"),
        (lambda: kvtools.key_scores(q.int(), k), "q_bhwd is torch.int32"),
        (lambda: kvtools.key_scores(q, k, sink_h=q[0, 0, :, 0]), "sink_h must be"),
        (lambda: kvtools.key_scores(q, k, softcap=-1.0), "softcap=-1.0"),
        (lambda: kvtools.key_scores(q, k, sliding=-1), "sliding=-1"),
        (lambda: kvtools.key_scores(q, k, scale=float("inf")), "scale=inf"),
        (lambda: kvtools.key_scores(q, k.to("meta")), "k_bhsd on meta"),
        (lambda: kvtools.select_victims(score, position, 2, tie_nhs=score[:1]), "tie_nhs has sh"),
        (lambda: kvtools.select_victims(score[0], position[0], 2), "position_nhs is"),
        (lambda: kvtools.select_victims(score, position.float(), 2), "position_nhs is"),
        (lambda: kvtools.select_victims(score.to(torch.complex64), position, 2), "score_nhs has d"),
        (
            lambda: kvtools.select_victims(score, position, 2, protect_below_n=position[0, 0]),
            "protect_below_n is",
        ),
        (
            lambda: kvtools.select_victims(
                score, position, 2, protect_from_n=score[:, 0, 0].float()
            ),
            "protect_from_n is torch.float32",
        ),
        (lambda: kvtools.select_victims(score[:1], position, 2), "score_nhs has shape"),
        (lambda: kvtools.select_victims(score, position, 6), "count=6 must be between 0 and the 5"),
        (lambda: kvtools.select_victims(score, position, -1), "count=-1 must be between"),
        (lambda: kvtools.compact_kv(slots, slots[:2], pages), r"must both be \[n, 2\]"),
        (lambda: kvtools.compact_kv(slots[:, :1], slots[:, :1], pages), r"must both be \[n, 2\]"),
        (lambda: kvtools.compact_kv(slots.float(), slots, pages), "source_nh is torch.float32"),
        (lambda: kvtools.compact_kv(slots, slots.to("meta"), pages), "target_nh on meta"),
        (lambda: kvtools.compact_kv(slots, slots, replace(pages, v=pages.v[:2])), "pages.v has"),
        (
            lambda: kvtools.compact_kv(slots, slots, replace(pages, position=pages.position[:2])),
            "pages.position has",
        ),
        (
            lambda: kvtools.compact_kv(slots, slots, replace(pages, k=pages.k[:, :, :0])),
            "pages.k has shape",
        ),
        (lambda: kvtools.key_scores(q, k, impl="mkl"), "impl='mkl': expected one of"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="key_scores is for inference only"):
        kvtools.key_scores(q.requires_grad_(), k)


def test_key_scores_contract(device, opcheck):
    sink_h = torch.zeros(4, device=device)
    args = (*make_window(1, 2, 2, 3, 5, 8, torch.float32, device), sink_h, 1, 0.5, 2.0, 3, "mean")
    opcheck("key_scores", args)
    compiled = torch.compile(kvtools.key_scores, fullgraph=True, dynamic=True)
    for B in (3, 7):
        args = make_window(B, 2, 2, 3, 5 + B, 8, torch.float32, device)
        torch.testing.assert_close(compiled(*args, sinks=1), kvtools.key_scores(*args, sinks=1))


def test_select_victims_contract(device, opcheck):
    score, tie, position, below, start = make_candidates(3, 2, 9, device)
    args = (score, tie, position, below, start, 4)
    opcheck("select_victims", args)
    compiled = torch.compile(kvtools.select_victims, fullgraph=True, dynamic=True)
    for N in (3, 7):
        score, tie, position, below, start = make_candidates(N, 2, 9 + N, device)
        options = dict(tie_nhs=tie, protect_below_n=below, protect_from_n=start)
        expected = kvtools.select_victims(score, position, 4, **options)
        assert torch.equal(compiled(score, position, 4, **options), expected)


def test_compact_kv_contract(device, opcheck):
    compiled = torch.compile(kvtools.compact_kv, fullgraph=True, dynamic=True)
    for n in (3, 7):
        source, target = torch.randperm(20).repeat(2, 1).T[: 2 * n].to(device).split(n)
        eager, traced = make_pages(device), make_pages(device)
        kvtools.compact_kv(source, target, eager)
        compiled(source, target, traced)
        assert all(map(torch.equal, contents(eager), contents(traced)))
    pages = make_pages(device, v_format="int2")  # opcheck cannot compare fp8
    for x in contents(pages):
        x.fill_(1)
    args = (source, target, *pages.tensors())
    opcheck("compact_kv", args)
