import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvtools
from kvtools import ops
from kvtools.ops.scoring import LINKS, REDUCES, step_scores, token_logprobs
from kvtools.reference import scoring as reference
from kvtools.testing import assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEPS = [[1], [3, 0, 7, 1], [0, 0], [20, 4, 9, 1], []]  # steps of each rollout
PAIRS = [
    (link, reduce)
    for link in LINKS
    for reduce in REDUCES
    if link == "sigmoid" or reduce not in ("prod", "gmean")
]
# T, M, V: smallest, ragged, empty, then across the tiles of ids, of the width and of tokens.
TOKENS = [(1, 8, 2), (70, 16, 333), (0, 16, 9), (5, 32, 8193), (130, 200, 1700), (1030, 8, 50)]


def make_steps(steps, dtype, device, k=2, M=64):
    generator = torch.Generator().manual_seed(sum(steps) * 100 + k)
    S, T = sum(steps), 5 * sum(steps) + 3
    hidden_tm = torch.randn(T, M, generator=generator).to(device, dtype)
    weight_km = (torch.randn(k, M, generator=generator) / M**0.5).to(device, dtype)
    bias_k = torch.randn(k, generator=generator).to(device, dtype)
    step_s = torch.randperm(T, generator=generator)[:S].to(device, torch.int32)
    cu_steps = torch.tensor([0, *steps], device=device).cumsum(0, dtype=torch.int32)
    return hidden_tm, step_s, cu_steps, weight_km, bias_k


def plain_step_scores(hidden_tm, step_s, cu_steps, weight_km, bias_k, link, reduce, dtype):
    """Scores by a softmax over the head and a Python loop over rollouts."""
    logits_sk = hidden_tm.to(dtype)[step_s] @ weight_km.to(dtype).T + bias_k.to(dtype)
    k = len(weight_km)
    if k == 3:
        positive_s, negative_s = logits_sk[:, 1:].logsumexp(-1), logits_sk[:, 0]
    else:
        positive_s = logits_sk[:, 0]
        negative_s = logits_sk[:, 1] if k == 2 else torch.zeros_like(positive_s)
    margin_s = positive_s - negative_s
    p_s = torch.stack([negative_s, positive_s], -1).softmax(-1)[:, 1]
    prob_s = {"sigmoid": p_s, "difference": 2 * p_s - 1, "tanh": margin_s.tanh()}.get(
        link, margin_s
    )
    scores = []
    for first, last in zip(cu_steps.tolist(), cu_steps.tolist()[1:], strict=False):
        prob, margin = prob_s[first:last], margin_s[first:last]
        if first == last:
            scores.append(torch.tensor(math.nan, dtype=dtype, device=hidden_tm.device))
            continue
        scores.append(
            {
                "last": lambda p, _: p[-1],
                "min": lambda p, _: p.min(),
                "max": lambda p, _: p.max(),
                "mean": lambda p, _: p.mean(),
                "sum": lambda p, _: p.sum(),
                "prod": lambda p, _: p.prod(),
                "gmean": lambda p, _: p.prod() ** (1 / len(p)),
                "sum_logit": lambda _, m: m.sum(),
                "softmin": lambda p, _: ((-p / 0.1).softmax(0) * p).sum(),
            }[reduce](prob, margin)
        )
    return margin_s, prob_s, torch.stack(scores) if scores else margin_s.new_zeros(0)


def make_tokens(T, M, V, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_tm = torch.randn(T, M, generator=generator).to(device, dtype)
    weight_vm = torch.randn(V, M, generator=generator).to(device, dtype)
    target_t = torch.randint(V, (T,), generator=generator).to(device)
    target_t[1::5] = -100
    bias_v = torch.randn(V, generator=generator).to(device, dtype)
    return hidden_tm, weight_vm, target_t, bias_v


def plain_token_logprobs(hidden_tm, weight_vm, target_t, bias_v, softcap, dtype):
    logits_tv = hidden_tm.to(dtype) @ weight_vm.to(dtype).T + bias_v.to(dtype)
    if softcap:
        logits_tv = softcap * (logits_tv / softcap).tanh()
    column_t1 = target_t.clamp(min=0).unsqueeze(1)
    logprob_t = logits_tv.log_softmax(-1).gather(1, column_t1).squeeze(1)
    return logprob_t.masked_fill(target_t == -100, 0)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_step_scores(steps, dtype, k, device, impl):
    args = make_steps(steps, dtype, device, k)
    for link, reduce in PAIRS:
        actual = step_scores(*args, link=link, reduce=reduce, impl=impl)
        exact = plain_step_scores(*args, link, reduce, torch.float64)
        eager = plain_step_scores(*args, link, reduce, torch.float32)
        for name, *triple in zip(("margin", "prob", "score"), actual, exact, eager, strict=True):
            assert triple[0].dtype == torch.float32
            assert_within_budget(f"{name} of {link}, {reduce}", *triple)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 1100, 2072])
def test_margins_of_any_width(M, dtype, k, device, impl):
    args = make_steps([20, 40], dtype, device, k, M)
    actual_s, *_ = step_scores(*args, link="identity", impl=impl)
    exact_s, eager_s = (
        plain_step_scores(*args, "identity", "last", d)[0] for d in (torch.float64, torch.float32)
    )
    assert_within_budget("margin", actual_s, exact_s, eager_s)


def test_step_scores_without_bias_and_strided(device, impl):
    hidden_tm, step_s, cu_steps, weight_km, _ = make_steps([3, 0, 7], torch.float32, device)
    expected = step_scores(
        hidden_tm, step_s, cu_steps, weight_km, torch.zeros(2, device=device), impl=impl
    )
    actual = step_scores(
        hidden_tm.T.contiguous().T, step_s.long(), cu_steps.long(), weight_km, impl=impl
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", DTYPES, ids=str)
def test_step_scores_of_mixed_dtypes(hidden, weight, device, impl):
    hidden_tm, step_s, cu_steps, weight_km, bias_k = make_steps([2, 5], hidden, device, M=600)
    args = hidden_tm, step_s, cu_steps, weight_km.to(weight), bias_k.float()
    actual_s, *_ = step_scores(*args, impl=impl)
    exact_s, eager_s = (
        plain_step_scores(*args, "sigmoid", "last", d)[0] for d in (torch.float64, torch.float32)
    )
    assert_within_budget("margin", actual_s, exact_s, eager_s)


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("reduce", REDUCES)
def test_a_nan_stays(reduce, at, device, impl):
    """In a step of the first rollout; the other rollouts do not see it."""
    hidden_tm, step_s, *rest = make_steps([20, 3, 2], torch.float32, device)
    hidden_tm[step_s[at]] = torch.nan
    _, prob_s, score_r = step_scores(hidden_tm, step_s, *rest, reduce=reduce, impl=impl)
    assert prob_s.isnan().nonzero().tolist() == [[at]]
    assert score_r.isnan().tolist() == [reduce != "last", False, False]


def test_margins_keep_what_probabilities_lose(device, impl):
    """64 rollouts of one step with margins around +-20: equal probabilities in bf16, ranks here."""
    margin_s = torch.cat([torch.linspace(19, 21, 32), torch.linspace(-21, -19, 32)]).to(device)
    hidden_tm = torch.stack([margin_s, torch.zeros_like(margin_s)], -1)
    head = torch.eye(2, device=device)
    index = torch.arange(65, dtype=torch.int32, device=device)
    for reduce in ("last", "min", "mean", "sum", "softmin", "sum_logit"):
        actual_s, _, score_r = step_scores(
            hidden_tm, index[:64], index, head, link="identity", reduce=reduce, impl=impl
        )
        assert len(actual_s.unique()) == len(score_r.unique()) == 64
        assert torch.equal(score_r.argsort(), margin_s.argsort())
    _, prob_s, _ = step_scores(hidden_tm, index[:64], index, head, impl=impl)
    assert len(prob_s.bfloat16().unique()) < 64


def test_prod_keeps_what_rounded_probabilities_lose(device, impl):
    """4,096 steps at margin 18, where every fp32 probability is 1: their product is not 1."""
    S = 4096
    hidden_tm = torch.full((S, 1), 18.0, device=device)
    index = torch.arange(S, dtype=torch.int32, device=device)
    cu_steps = torch.tensor([0, S], dtype=torch.int32, device=device)
    _, prob_s, score_r = step_scores(
        hidden_tm, index, cu_steps, torch.ones(1, 1, device=device), reduce="prod", impl=impl
    )
    assert (prob_s == 1).all()
    assert float(score_r) == pytest.approx((1 + math.exp(-18)) ** -S, rel=1e-6) != 1


def test_step_scores_makes_nothing_larger_than_the_gathered_rows(device):
    args = make_steps([4] * 16, torch.float32, device)
    for link, reduce in PAIRS:
        with Largest() as largest:
            reference.step_scores(*args, link, reduce, 0.1)
        assert largest.numel == 64 * 64


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids="softcap={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,M,V", TOKENS)
def test_token_logprobs(T, M, V, dtype, softcap, device, impl):
    args = make_tokens(T, M, V, dtype, device)
    actual_t, sum_x = token_logprobs(*args, softcap=softcap, impl=impl)
    exact_t = plain_token_logprobs(*args, softcap, torch.float64)
    eager_t = plain_token_logprobs(*args, softcap, torch.float32)
    assert actual_t.dtype == torch.float32 and sum_x.shape == (0,)
    assert (actual_t[1::5] == 0).all()
    assert_within_budget("logprob", actual_t, exact_t, eager_t)


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids="softcap={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,M,V", TOKENS)
def test_token_logprobs_with_entropies(T, M, V, dtype, softcap, device, impl):
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(T, M, V, dtype, device)
    hidden_tm, bias_v = hidden_tm / M**0.5, bias_v.float()
    bias_v[: V // 2] = -torch.inf  # softcap brings it back
    bias_v[V // 2 :] += torch.linspace(0, 9, V - V // 2, device=device)  # the peak comes late
    if impl == "triton":
        with pytest.raises(RuntimeError, match="has no entropies: use impl='auto'"):
            token_logprobs(hidden_tm, weight_vm, target_t, bias_v, entropies=True, impl=impl)
        return

    def plain(dtype):
        logits_tv = hidden_tm.to(dtype) @ weight_vm.to(dtype).T + bias_v.to(dtype)
        if softcap:
            logits_tv = softcap * (logits_tv / softcap).tanh()
        logp_tv = logits_tv.log_softmax(-1)
        return torch.special.entr(logp_tv.exp()).sum(-1), logits_tv.argmax(-1)

    ignored_t = target_t == -100
    target_t[::2] = plain(torch.float64)[1][::2].masked_fill(ignored_t[::2], -100)
    args, how = (hidden_tm, weight_vm, target_t, bias_v), dict(softcap=softcap, impl=impl)
    logprob_t, sum_x, entropy_t, greedy_t = token_logprobs(*args, **how, entropies=True)
    for ours, alone in zip((logprob_t, sum_x), token_logprobs(*args, **how), strict=True):
        assert torch.equal(ours, alone)
    exact_t, eager_t = (
        plain(d)[0].masked_fill(ignored_t, 0) for d in (torch.float64, torch.float32)
    )
    assert entropy_t.dtype == torch.float32 and greedy_t.dtype == torch.bool
    assert_within_budget("entropy", entropy_t, exact_t, eager_t)
    if not softcap:  # which brings the highest so near together that they change places
        assert torch.equal(greedy_t, plain(torch.float64)[1] == target_t)


def test_entropies_of_equal_logits(device, impl):
    """The first of them is the most likely, wherever it stands."""
    if impl == "triton":
        return
    for v in (7, 20, 2000, 9000):
        for at in (0, v // 2, v - 1):
            bias_v = torch.full((v,), -torch.inf, device=device)
            bias_v[[at, v - 1]] = 2.0
            target_t = torch.tensor([at, v - 1], device=device)
            found = token_logprobs(
                torch.ones(2, 1, device=device), torch.zeros(v, 1, device=device), target_t, bias_v,
                entropies=True, impl=impl,
            )  # fmt: skip
            sizes = 1 + (at < v - 1)
            assert found[2].tolist() == pytest.approx([math.log(sizes)] * 2, abs=1e-6)
            assert found[3].tolist() == [True, at == v - 1]


@pytest.mark.parametrize("v", [1, 9000])
def test_entropy_where_all_is_ruled_out(v, device, impl):
    """No distribution, so no entropy, and no log-probability either."""
    if impl == "triton":
        return
    found = token_logprobs(
        torch.ones(2, 1, device=device), torch.ones(v, 1, device=device),
        torch.tensor([0, -100], device=device), torch.full((v,), -torch.inf, device=device),
        entropies=True, impl=impl,
    )  # fmt: skip
    for x in (found[0], found[2]):
        assert x[0].isnan() and x[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logprobs_against_a_reference_model(dtype, device, impl):
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(70, 16, 333, dtype, device)
    ref_hidden_tm, ref_weight_vm, _, ref_bias_v = make_tokens(70, 24, 400, dtype, device, seed=1)
    cu_seqlens = torch.tensor([0, 11, 11, 64, 70], dtype=torch.int32, device=device)
    actual_t, sum_x = token_logprobs(
        hidden_tm.T.contiguous().T,
        weight_vm,
        target_t.int(),
        bias_v,
        softcap=5.0,
        cu_seqlens=cu_seqlens,
        ref_hidden_tm=ref_hidden_tm,
        ref_weight_vm=ref_weight_vm,
        ref_bias_v=ref_bias_v,
        impl=impl,
    )
    exact_t, eager_t = (
        plain_token_logprobs(hidden_tm, weight_vm, target_t, bias_v, 5.0, d)
        - plain_token_logprobs(ref_hidden_tm, ref_weight_vm, target_t, ref_bias_v, 5.0, d)
        for d in (torch.float64, torch.float32)
    )
    assert_within_budget("logprob", actual_t, exact_t, eager_t)
    exact_x, eager_x = (
        torch.stack([part.sum() for part in x.split([11, 0, 53, 6])]) for x in (exact_t, eager_t)
    )
    assert_within_budget("sum", sum_x, exact_x, eager_x)


def test_token_logprobs_of_mixed_dtypes_and_strides(device, impl):
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(7, 40, 99, torch.float16, device)
    args = hidden_tm.bfloat16(), weight_vm.T.contiguous().T, target_t, bias_v.float()
    actual_t, _ = token_logprobs(*args, impl=impl)
    exact_t, eager_t = (plain_token_logprobs(*args, 0.0, d) for d in (torch.float64, torch.float32))
    assert_within_budget("logprob", actual_t, exact_t, eager_t)


def test_token_logprobs_where_most_are_ignored(device, impl):
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(300, 16, 50, torch.float32, device)
    target_t[:290] = -100
    cu_seqlens = torch.tensor([0, 280, 300], dtype=torch.int32, device=device)
    actual_t, sum_x = token_logprobs(
        hidden_tm, weight_vm, target_t, bias_v, cu_seqlens=cu_seqlens, impl=impl
    )
    expected_t, _ = token_logprobs(
        hidden_tm[290:], weight_vm, target_t[290:], bias_v, impl="reference"
    )
    assert (actual_t[:290] == 0).all() and sum_x[0] == 0
    torch.testing.assert_close(actual_t[290:], expected_t)
    torch.testing.assert_close(sum_x[1], expected_t.sum())


def test_token_logprobs_with_padded_vocabulary(device, impl):
    """A bias of -inf takes ids out, more of them side by side than are taken together."""
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(9, 8, 1700, torch.float32, device)
    bias_v[:600] = -torch.inf
    target_t = target_t.clamp(min=600)
    actual_t, _ = token_logprobs(hidden_tm, weight_vm, target_t, bias_v, impl=impl)
    expected_t, _ = token_logprobs(
        hidden_tm, weight_vm[600:], target_t - 600, bias_v[600:], impl="reference"
    )
    torch.testing.assert_close(actual_t, expected_t)


def test_token_logprobs_of_rising_logits(device, impl, monkeypatch):
    """The peak is met last, in the last of more splits than are merged at once."""
    if impl == "triton":
        monkeypatch.setattr("kvtools.kernels.scoring.SPLIT_V", 64)
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(9, 8, 4500, torch.float32, device)
    args = hidden_tm, weight_vm, target_t, 9 * bias_v.sort().values
    actual_t, _ = token_logprobs(*args, impl=impl)
    exact_t, eager_t = (plain_token_logprobs(*args, 0.0, d) for d in (torch.float64, torch.float32))
    assert_within_budget("logprob", actual_t, exact_t, eager_t)


@pytest.mark.only(when=lambda impl: impl != "reference")  # claimed of the kernels
def test_token_logprobs_of_a_row_depend_on_neither_batch_nor_threads(device, impl):
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(150, 40, 3200, torch.float32, device)
    if impl == "triton" and not torch.cuda.is_available():
        # Exact products: those of the interpreter round a row by its place in the tile.
        hidden_tm, weight_vm = hidden_tm.round(), weight_vm.round()
    whole_t, _ = token_logprobs(hidden_tm, weight_vm, target_t, bias_v, softcap=9.0, impl=impl)
    before = torch.get_num_threads()
    for threads in (1,) if impl == "triton" else (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (slice(None), slice(0, 1), slice(20, 41), slice(99, 150)):
            args = hidden_tm[rows], weight_vm, target_t[rows], bias_v
            part_t, _ = token_logprobs(*args, softcap=9.0, impl=impl)
            assert torch.equal(part_t, whole_t[rows])
    torch.set_num_threads(before)


@pytest.mark.only(when=lambda impl: impl != "reference")  # claimed of the kernels
def test_step_scores_of_a_row_depend_on_neither_batch_nor_threads(device, impl):
    hidden_tm, step_s, cu_steps, *head = make_steps([4] * 16, torch.float32, device)
    whole = step_scores(hidden_tm, step_s, cu_steps, *head, impl=impl)
    before = torch.get_num_threads()
    for threads in (1,) if impl == "triton" else (1, 2, 3):
        torch.set_num_threads(threads)
        for r in (0, 7):
            steps = slice(4 * r, 4 * r + 4)
            part = step_scores(hidden_tm, step_s[steps], cu_steps[:2], *head, impl=impl)
            for ours, theirs in zip(part, whole, strict=True):
                expected = theirs[steps] if len(theirs) == 64 else theirs[r : r + 1]
                assert torch.equal(ours, expected)
    torch.set_num_threads(before)


def test_token_logprobs_tiles_do_not_show(device, monkeypatch):
    args = make_tokens(70, 16, 333, torch.float64, device)
    how = 2.0, None, None, None, None, True
    expected = reference.token_logprobs(*args, *how)
    monkeypatch.setattr(reference, "TILE_T", 9)
    monkeypatch.setattr(reference, "TILE_V", 50)
    torch.testing.assert_close(reference.token_logprobs(*args, *how), expected)


def test_token_logprobs_never_holds_the_logits(device):
    T, V = 1500, 20_000
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(T, 8, V, torch.float32, device)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    with Largest() as largest:
        reference.token_logprobs(
            hidden_tm, weight_vm, target_t, bias_v, 2.0, cu_seqlens, hidden_tm, weight_vm, bias_v,
            True,
        )  # fmt: skip
    assert largest.numel == reference.TILE_T * reference.TILE_V < T * V


STEP_ARGS = ("hidden_tm", "step_s", "cu_steps", "weight_km", "bias_k")
TOKEN_ARGS = ("hidden_tm", "weight_vm", "target_t", "bias_v")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_tm": torch.zeros(1, 23, 64)}, r"hidden_tm: expected \[t, m\]"),
        ({"hidden_tm": torch.zeros(23, 64).double()}, "hidden_tm: torch.float64 is not"),
        ({"weight_km": torch.zeros(2, 65)}, r"weight_km: expected \[rows, 64\]"),
        ({"weight_km": torch.zeros(4, 64), "bias_k": None}, "weight_km: expected 1, 2 or 3 rows"),
        ({"weight_km": torch.zeros(2, 64, device="meta")}, "weight_km: on meta but hidden_tm on"),
        ({"bias_k": torch.zeros(3)}, r"bias_k: expected \[2\]"),
        ({"step_s": torch.zeros(4)}, "step_s: torch.float32 is not"),
        ({"step_s": torch.zeros(2, 2).int()}, "step_s: expected one axis"),
        ({"step_s": torch.tensor([0, 1, 2, -1])}, "step_s: expected rows of hidden_tm, 0 to 22"),
        ({"step_s": torch.tensor([0, 1, 2, 23])}, "step_s: expected rows of hidden_tm, 0 to 22"),
        ({"step_s": torch.zeros(4, device="meta").long()}, "step_s: on meta but hidden_tm on"),
        ({"cu_steps": torch.tensor([0, 3, 5])}, "cu_steps: expected offsets rising from 0 to 4"),
        ({"cu_steps": torch.tensor([0, 5, 4])}, "cu_steps: expected offsets rising from 0 to 4"),
        ({"cu_steps": torch.zeros(0).int()}, "cu_steps: expected at least one entry"),
        ({"link": "softmax"}, "link='softmax': expected one of sigmoid"),
        ({"reduce": "median"}, "reduce='median': expected one of last"),
        ({"link": "tanh", "reduce": "prod"}, "reduce='prod' is undefined for link='tanh'"),
        ({"link": "identity", "reduce": "gmean"}, "reduce='gmean' is undefined"),
        ({"temperature": 0.0}, "temperature=0.0: expected temperature > 0"),
        ({"impl": "fast"}, "impl='fast': expected one of"),
    ],
)
def test_step_scores_raises(change, message):
    good = dict(zip(STEP_ARGS, make_steps([3, 1], torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        step_scores(**(good | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_tm": torch.zeros(6)}, r"hidden_tm: expected \[t, m\]"),
        ({"weight_vm": torch.zeros(9, 7)}, r"weight_vm: expected \[rows, 8\]"),
        ({"weight_vm": torch.zeros(0, 8), "bias_v": None}, "weight_vm: expected at least one row"),
        ({"bias_v": torch.zeros(8)}, r"bias_v: expected \[9\]"),
        ({"target_t": torch.zeros(5).long()}, r"target_t: expected \[6\]"),
        ({"target_t": torch.zeros(6)}, "target_t: torch.float32 is not"),
        ({"target_t": torch.full((6,), 9)}, "target_t: expected ids from 0 to 8"),
        ({"target_t": torch.full((6,), -1)}, "target_t: expected ids from 0 to 8, or -100"),
        ({"softcap": -1.0}, "softcap=-1.0: expected softcap >= 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: expected offsets rising from 0 to 6"),
        ({"ref_hidden_tm": torch.zeros(6, 4)}, "ref_hidden_tm and ref_weight_vm: give both"),
        ({"ref_bias_v": torch.zeros(9)}, "ref_bias_v: give ref_hidden_tm"),
        (
            {"ref_hidden_tm": torch.zeros(5, 4), "ref_weight_vm": torch.zeros(9, 4)},
            "ref_hidden_tm: expected 6 rows",
        ),
        (
            {"ref_hidden_tm": torch.zeros(6, 4), "ref_weight_vm": torch.zeros(9, 5)},
            r"ref_weight_vm: expected \[rows, 4\]",
        ),
    ],
)
def test_token_logprobs_raises(change, message):
    good = dict(zip(TOKEN_ARGS, make_tokens(6, 8, 9, torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(good | change))


def test_indices_that_nobody_read(device, impl):
    """On a GPU: rows, targets and offsets outside give NaN and touch nothing."""
    if impl not in ("triton", "cuda"):
        return  # these read what they are given, and so does the check before
    hidden, step, cu, weight, bias = make_steps([3, 2], torch.float32, device)
    step, cu = step.clone(), cu.clone()
    step[1], cu[-1] = len(hidden) + 5, 9
    margin, prob, score = ops.scoring._step_scores(
        impl, hidden, step, cu, weight, bias, "sigmoid", "mean", 1.0
    )
    want = kvtools.step_scores(hidden, step.clamp(max=0), cu.clamp(max=5), weight, bias)[0]
    assert margin.isnan().tolist() == prob.isnan().tolist() == [False, True, False, False, False]
    assert want.isfinite().all() and score.isnan().tolist() == [True, False]
    if impl == "triton":
        target = torch.tensor([1, 0, 99, 2], device=device)
        logprob, total, *_ = ops.scoring._token_logprobs(
            impl, hidden[:4], weight, target, None, 0.0, torch.tensor([0, 2, 9], device=device),
            None, None, None, False,
        )  # fmt: skip
        assert logprob.isnan().tolist() == [False, False, True, True] and total[1].isnan()


def test_scoring_is_for_inference():
    hidden_tm, *rest = make_steps([3, 1], torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="inference only"):
        step_scores(hidden_tm.requires_grad_(), *rest)
    hidden_tm, *rest = make_tokens(6, 8, 9, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="inference only"):
        token_logprobs(hidden_tm.requires_grad_(), *rest)


def test_step_scores_opcheck(device, opcheck):
    for k, (link, reduce) in zip((1, 2, 3), (PAIRS[0], PAIRS[5], PAIRS[-1]), strict=True):
        args = make_steps([3, 2, 7], torch.float32, device, k)  # opcheck takes NaN for a difference
        opcheck("step_scores", (*args, link, reduce, 0.1))


def test_step_scores_contract(device):
    compiled = torch.compile(step_scores, fullgraph=True, dynamic=True)
    for steps in ([3, 0, 7], [2, 5, 1, 9]):
        args = make_steps(steps, torch.bfloat16, device)
        expected = step_scores(*args, reduce="prod")
        for ours, theirs in zip(compiled(*args, reduce="prod"), expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_token_logprobs_opcheck(device, opcheck):
    hidden_tm, weight_vm, target_t, bias_v = make_tokens(7, 8, 50, torch.float32, device)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    optional = cu_seqlens, hidden_tm, weight_vm, bias_v
    opcheck("token_logprobs", (hidden_tm, weight_vm, target_t, bias_v, 2.0, *optional, False))
    opcheck("token_logprobs", (hidden_tm, weight_vm, target_t, None, 0.0, *(None,) * 4, False))


def test_token_logprobs_contract(device):
    compiled = torch.compile(token_logprobs, fullgraph=True, dynamic=True)
    for T in (7, 12):
        hidden_tm, weight_vm, target_t, _ = make_tokens(T, 8, 50, torch.float32, device)
        cu_seqlens = torch.tensor([0, 3, T], dtype=torch.int32, device=device)
        kwargs = {"softcap": 2.0, "cu_seqlens": cu_seqlens}
        expected = token_logprobs(hidden_tm, weight_vm, target_t, **kwargs)
        actual = compiled(hidden_tm, weight_vm, target_t, **kwargs)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
