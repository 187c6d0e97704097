import numpy as np
import pytest
import scipy.stats
import torch

from kvtools.ops.sampling import drawn, sample
from kvtools.reference import sampling as reference
from kvtools.testing import assert_within_budget

SHAPES = [
    (1, 1),
    (3, 5),
    (4, 1000),
    (0, 7),
    (2, 4099),
]  # B, V: smallest, ragged, even, empty, large
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_k, top_p": {"top_k": 60, "top_p": 0.7},
    "top_k, min_p": {"top_k": 30, "min_p": 0.05},
    "top_p, min_p": {"top_p": 0.9, "min_p": 0.05},
    "all": {"temperature": 1.4, "top_k": 80, "top_p": 0.85, "min_p": 0.08},
}
filters = pytest.mark.parametrize("kwargs", FILTERS.values(), ids=FILTERS.keys())


def interpreted(impl):
    """Whether a CPU stands for the GPU of `impl`: some milliseconds a row, so fewer of them."""
    return impl in ("triton", "cuda") and not torch.cuda.is_available()


def make_rows(B, V, dtype, device, scale=3.0):
    generator = torch.Generator().manual_seed(B * 100_003 + V)
    logits_bv = (scale * torch.randn(B, V, generator=generator)).to(device, dtype)
    seed_b = torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator).to(device)
    return logits_bv, seed_b, torch.arange(7, 7 + B, dtype=torch.int32, device=device)


def plain_logprobs(logits_bv, dtype, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """log softmax of a row before and after the filters, by sorting; -inf where filtered."""
    z_bv = logits_bv.to(dtype) / temperature
    kept_bv = z_bv > -torch.inf
    if 0 < top_k < z_bv.shape[1]:
        kept_bv &= z_bv >= z_bv.topk(top_k).values[:, -1:]
    p_bv = z_bv.masked_fill(~kept_bv, -torch.inf).softmax(-1)
    greater_bvv = p_bv.unsqueeze(1) > p_bv.unsqueeze(2)
    kept_bv &= (greater_bvv * p_bv.unsqueeze(1)).sum(-1) < top_p
    kept_bv &= p_bv >= min_p * p_bv.amax(-1, keepdim=True)
    return z_bv.log_softmax(-1), z_bv.masked_fill(~kept_bv, -torch.inf).log_softmax(-1)


def numpy_philox(counter, key):
    c = [np.asarray(word, np.uint64) for word in counter]
    k = [np.asarray(word, np.uint64) for word in key]
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> shift) ^ c[1] ^ k[0], b & low, (a >> shift) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox4x32_known_answers(counter, key, words, device):
    actual = reference.philox4x32(
        *(tuple(torch.tensor(x, device=device) for x in xs) for xs in (counter, key))
    )
    assert tuple(int(word) for word in actual) == words
    assert tuple(int(word) for word in numpy_philox(counter, key)) == words


def test_philox4x32_equals_numpy(device):
    words = np.random.default_rng(0).integers(0, 2**32, (6, 100_000))
    tensors = tuple(torch.from_numpy(words).to(device))
    actual = reference.philox4x32(tensors[:4], tensors[4:])
    for ours, theirs in zip(actual, numpy_philox(words[:4], words[4:]), strict=True):
        assert np.array_equal(ours.cpu().numpy(), theirs.astype(np.int64))


def test_sample_token_is_the_documented_one(device, impl):
    B, V = 64, 1003
    logits_bv, seed_b, position_b = make_rows(B, V, torch.float32, device, scale=1.0)
    token_b, _, _ = sample(logits_bv, seed_b, position_b, temperature=0.8, impl=impl)
    seed_b1 = seed_b.cpu().numpy().view(np.uint64)[:, None]
    token_1v = np.arange(V, dtype=np.uint64)[None]
    counter = token_1v // 4, position_b.cpu().numpy()[:, None] + 0 * token_1v, 0 * token_1v, 0
    words = numpy_philox(counter, (seed_b1 & np.uint64(2**32 - 1), seed_b1 >> np.uint64(32)))
    word_bv = np.choose((token_1v % 4).astype(int), words).astype(np.float64)
    u_bv = (word_bv + 0.5) * 2.0**-32
    score_bv = logits_bv.double().cpu().numpy() / 0.8 - np.log(-np.log1p(-u_bv))
    assert np.array_equal(token_b.cpu().numpy(), score_bv.argmax(-1))


def test_noise_of_some_tokens_equals_that_of_all(device):
    _, seed_b, position_b = make_rows(5, 1, torch.float32, device)
    for V in (1, 4, 1002):
        token_bk = torch.randint(V, (5, 33), device=device)
        all_bv = reference.gumbel_noise_of_all(seed_b, position_b, V)
        some_bk = reference.gumbel_noise(seed_b, position_b, token_bk)
        torch.testing.assert_close(some_bk, all_bv.gather(1, token_bk))


@filters
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,V", SHAPES[:4])
def test_sample(B, V, dtype, kwargs, device, impl):
    args = make_rows(B, V, dtype, device)
    token_b, *actual = sample(*args, **kwargs, impl=impl)
    assert token_b.dtype == torch.int64 and token_b.shape == (B,)
    exact, eager = (plain_logprobs(args[0], d, **kwargs) for d in (torch.float64, torch.float32))
    for name, ours_b, exact_bv, eager_bv in zip(
        ("logprob", "filtered_logprob"), actual, exact, eager, strict=True
    ):
        assert ours_b.dtype == torch.float32
        chosen = (x.gather(1, token_b.unsqueeze(1)).squeeze(1) for x in (exact_bv, eager_bv))
        assert_within_budget(name, ours_b, *chosen)


@pytest.fixture
def one_thread():
    """Many small operations, often in several test processes: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# All give the same tokens; other tests show that.
@pytest.mark.long_if(when=lambda impl, again: again or impl == "reference" or interpreted(impl))
@pytest.mark.parametrize("name", list(FILTERS)[1:])
def test_sample_frequencies(name, device, impl, one_thread):
    """Many draws against the filtered distribution: chi-square, and nothing filtered is drawn."""
    kwargs = FILTERS[name]
    V, batch, draws = (1000, 500, 200_000) if not interpreted(impl) else (20, 50, 50)
    logits_1v, seed, _ = make_rows(1, V, torch.float32, device, scale=2.0)
    logits_bv = logits_1v.repeat(batch, 1)
    count_v = torch.zeros(V, dtype=torch.int64, device=device)
    for start in range(0, draws, batch):
        position_b = torch.arange(start, start + batch, device=device)
        token_b, _, _ = sample(logits_bv, seed.expand(batch), position_b, **kwargs, impl=impl)
        count_v += token_b.bincount(minlength=V)
    p_v = plain_logprobs(logits_1v, torch.float64, **kwargs)[1][0].exp()
    assert count_v[p_v == 0].sum() == 0
    rare_v = p_v * draws < 5
    observed, expected = count_v[~rare_v].tolist(), (p_v[~rare_v] * draws).tolist()
    if p_v[rare_v].sum() > 0:
        observed.append(int(count_v[rare_v].sum()))
        expected.append(float(p_v[rare_v].sum()) * draws)
    assert scipy.stats.chisquare(observed, expected).pvalue > 0.001


@filters
def test_kept_as_in_transformers(kwargs, device):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits_bv, _, _ = make_rows(16, 4099, torch.float32, device, scale=2.0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | kwargs
    scores_bv = warpers.TemperatureLogitsWarper(options["temperature"])(None, logits_bv)
    if options["top_k"]:
        scores_bv = warpers.TopKLogitsWarper(options["top_k"])(None, scores_bv)
    if options["top_p"] < 1:
        scores_bv = warpers.TopPLogitsWarper(options["top_p"])(None, scores_bv)
    if options["min_p"]:
        scores_bv = warpers.MinPLogitsWarper(options["min_p"])(None, scores_bv)
    z_bv = logits_bv / options["temperature"]
    rows = (torch.full((16,), options[x], device=device) for x in ("top_k", "top_p", "min_p"))
    kept_bv = z_bv >= reference.lowest_kept(z_bv, *rows).unsqueeze(1)
    assert torch.equal(kept_bv, scores_bv > -torch.inf)


def test_filters_never_split_ties(device, impl):
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 3.0, 2.0, -torch.inf], device=device)
    cases = [  # the best two hold 0.617 of the mass; 0.644 of what top_k=3 leaves
        ({"top_k": 1}, {1, 4}),
        ({"top_k": 3}, {1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {1, 4}),
        ({"top_p": 0.6}, {1, 4}),
        ({"top_p": 0.63}, {1, 2, 3, 4, 5}),
        ({"top_k": 3, "top_p": 0.63}, {1, 4}),
        ({"top_k": 3, "top_p": 0.65}, {1, 2, 3, 4, 5}),
        ({"min_p": 1.0}, {1, 4}),
        ({}, {0, 1, 2, 3, 4, 5}),
    ]
    B = 12 if interpreted(impl) else 2000
    seed_b = torch.arange(72, 72 + B, device=device)  # soon draw the unlikely token, too
    for kwargs, expected in cases:
        token_b, _, _ = sample(row.repeat(B, 1), seed_b, seed_b, **kwargs, impl=impl)
        assert set(token_b.tolist()) == expected, kwargs


@pytest.mark.parametrize("guess", [1, 50, 5000])
def test_shortcuts_do_not_show(guess, device, monkeypatch):
    z_bv, _, _ = make_rows(12, 4099, torch.float32, device, scale=1.0)
    top_k_b = torch.tensor([0, 0, 0, 10, 5000, 4098] * 2, device=device)
    top_p_b = torch.tensor([0.1, 0.9, 0.99999994, 0.5, 0.999, 1.0] * 2, device=device)
    expected_b = reference.lowest_kept(z_bv, top_k_b, top_p_b, torch.zeros_like(top_p_b))
    monkeypatch.setattr(reference, "NUCLEUS_GUESS", guess)
    for rows in (slice(None), slice(0, 1), slice(3, 6), slice(5, 9)):
        top_k, top_p = top_k_b[rows], top_p_b[rows]
        floor_b = reference.lowest_kept(z_bv[rows], top_k, top_p, torch.zeros_like(top_p))
        assert torch.equal(floor_b, expected_b[rows])


@pytest.mark.long_if(when=interpreted)
@filters
def test_row_does_not_depend_on_its_batch(kwargs, device, impl):
    B = 2 if interpreted(impl) else 9
    args = make_rows(B, 4099, torch.float32, device)
    whole = sample(*args, **kwargs, impl=impl)
    order = torch.tensor([4, 8, 3, 7, 1, 6, 0, 2, 5], device=device)
    order = order[order < B]
    for index in (order, order[: B // 2], *torch.arange(B, device=device).split(1)):
        part = sample(*(x[index] for x in args), **kwargs, impl=impl)
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[index])


@filters
def test_implementations_agree(kwargs, device, impl):
    rows = (3, 1, 1) if interpreted(impl) else (40, 6, 6)
    for B, V, scale in zip(rows, (4099, 50_000, 50_000), (3.0, 4.0, 0.01), strict=True):
        args = make_rows(B, V, torch.float32, device, scale)
        expected = sample(*args, **kwargs, impl="reference")
        actual = sample(*args, **kwargs, impl=impl)
        assert torch.equal(actual[0], expected[0])
        for ours, theirs in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs)


# The interpreter takes minutes.
@pytest.mark.only(when=lambda impl: impl != "triton" or not interpreted(impl))
def test_large_vocabulary(device, impl):
    """Of a language model, and rows that take all ways through the kernels."""
    options = {
        "temperature": [0.7, 0.0, 1.0, 1.5, 0.9, 0.8],
        "top_k": [0, 0, 50, 0, 3000, 20],
        "top_p": [1.0, 1.0, 0.9, 0.95, 0.5, 1.0],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.1],
    }
    args = make_rows(6, 151_936, torch.bfloat16, device, scale=4.0)
    args[0][5, 2000:] = -torch.inf  # in fewer parts than top-k keeps tokens
    args[0][5, 100_000] = args[0][5].max()
    tensors = {name: torch.tensor(values, device=device) for name, values in options.items()}
    expected = sample(*args, **tensors, impl="reference")
    actual = sample(*args, **tensors, impl=impl)
    assert torch.equal(actual[0], expected[0])
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_division_is_rounded(device, impl):
    """Logits that are next to each other are equal after division, or are not: top-k tells."""
    B, V = 40 if interpreted(impl) else 300, 4
    generator = torch.Generator().manual_seed(0)
    _, seed_b, position_b = make_rows(B, V, torch.float32, device)
    exponent_b1 = torch.randint(-6, 7, (B, 1), generator=generator)
    exponent_b1[::10] *= 20
    logit_b1 = (1 + torch.rand(B, 1, generator=generator)) * 2.0**exponent_b1
    bits_bv = logit_b1.view(torch.int32) + torch.arange(V, dtype=torch.int32)
    logits_bv = bits_bv.view(torch.float32).to(device)
    temperature_b = (1 + torch.rand(B, generator=generator)).to(device)
    args = logits_bv, seed_b, position_b
    kwargs = {"temperature": temperature_b, "top_k": 1}
    expected = sample(*args, **kwargs, impl="reference")
    actual = sample(*args, **kwargs, impl=impl)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2])  # - log of how many are equal


def test_implementations_agree_at_the_boundary(device, impl):
    """top_p on the edge of a token: one unit of mass would keep one token more or fewer."""
    B, V = 20 if impl == "triton" and interpreted(impl) else 300, 500
    logits_bv, seed_b, position_b = make_rows(B, V, torch.float32, device)
    mass_bv = reference._relative_mass(logits_bv.sort(descending=True).values).cumsum(-1)
    kept_b = torch.arange(B, device=device) % 50
    top_p_b = mass_bv[torch.arange(B), kept_b].double() / mass_bv[:, -1]
    for ulp in (-1, 0, 1):
        top_p = (top_p_b.float().view(torch.int32) + ulp).view(torch.float32)
        args = logits_bv, seed_b, position_b
        expected = sample(*args, top_p=top_p, impl="reference")
        actual = sample(*args, top_p=top_p, impl=impl)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual[2], expected[2])


@pytest.mark.only(when=lambda impl: impl not in ("triton", "cuda"))  # which run no threads
@pytest.mark.parametrize("B", [1, 2, 5])
@filters
def test_threads_do_not_show(B, kwargs, device, impl, one_thread):
    args = make_rows(B, 4099, torch.bfloat16, device)
    expected = sample(*args, **kwargs, impl=impl)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for ours, theirs in zip(sample(*args, **kwargs, impl=impl), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_noise_depends_on_seed_and_position(device, impl):
    B = 32 if interpreted(impl) else 512
    logits_bv = torch.zeros(B, 1000, device=device)
    seed_b = torch.arange(B, device=device)
    zero_b = torch.zeros_like(seed_b)
    by_low, _, _ = sample(logits_bv, seed_b, zero_b, impl=impl)
    by_high, _, _ = sample(logits_bv, seed_b << 32, zero_b, impl=impl)
    by_position, _, _ = sample(logits_bv, zero_b, seed_b, impl=impl)
    for token_b in (by_low, by_high, by_position):
        # 401 of 1,000 expected from 512 independent draws, 31.5 from 32.
        assert len(token_b.unique()) > 0.6 * B
    assert not torch.equal(by_low, by_high) and not torch.equal(by_low, by_position)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_zero_is_greedy(dtype, device, impl):
    logits_bv, seed_b, position_b = make_rows(6, 5000, dtype, device)
    logits_bv[2] = 0.0
    logits_bv[3, 100:103] = 50.0
    token_b, logprob_b, filtered_b = sample(
        logits_bv, seed_b, position_b, temperature=0.0, top_k=3, top_p=0.5, impl=impl
    )
    assert torch.equal(token_b, logits_bv.argmax(-1))
    assert token_b[2] == 0 and token_b[3] == 100
    expected_bv = logits_bv.float().log_softmax(-1)
    torch.testing.assert_close(logprob_b, expected_bv.gather(1, token_b.unsqueeze(1)).squeeze(1))
    assert (filtered_b == 0).all()


def test_parameters_per_row(device, impl):
    args = make_rows(6, 1000, torch.float32, device)
    options = {
        "temperature": [1.0, 0.0, 0.5, 2.0, 1.0, 0.9],
        "top_k": [0, 5, 1000, 20, 3000, 7],
        "top_p": [1.0, 0.5, 0.9, 0.3, 0.7, 1.0],
        "min_p": [0.0, 0.1, 0.0, 0.02, 1.0, 0.2],
    }
    tensors = {name: torch.tensor(values, device=device) for name, values in options.items()}
    together = sample(*args, **tensors, impl=impl)
    for row in range(6):
        scalars = {name: values[row] for name, values in options.items()}
        alone = sample(*(x[row : row + 1] for x in args), **scalars, impl=impl)
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours, theirs[row : row + 1])


def test_greater_top_p_changes_a_token_only_if_it_was_filtered(device, impl):
    B = 25 if interpreted(impl) else 4000
    logits_bv = make_rows(1, 1000, torch.float32, device)[0].repeat(B, 1)
    seed_b = torch.arange(B, device=device)
    tokens = [sample(logits_bv, seed_b, seed_b, top_p=p, impl=impl)[0] for p in (0.3, 0.6, 0.95)]
    for p, narrow_b, wide_b in zip((0.3, 0.6), tokens, tokens[1:], strict=False):
        kept_v = plain_logprobs(logits_bv[:1], torch.float64, top_p=p)[1][0] > -torch.inf
        changed_b = narrow_b != wide_b
        assert changed_b.any() and not changed_b.all()
        assert torch.equal(changed_b, ~kept_v[wide_b])


def test_rows_without_a_finite_maximum(device, impl):
    logits_bv, seed_b, position_b = make_rows(6, 101, torch.float32, device)
    logits_bv[0] = -torch.inf
    logits_bv[1, 50] = torch.nan
    logits_bv[2, 50] = torch.inf
    logits_bv[3, :-1] = -torch.inf
    for kwargs in FILTERS.values():
        token_b, *logprobs = sample(logits_bv, seed_b, position_b, **kwargs, impl=impl)
        assert token_b[:3].tolist() == [-1, -1, -1] and token_b[3] == 100
        for logprob_b in logprobs:
            assert logprob_b[:3].isnan().all() and logprob_b[3] == 0
            assert logprob_b[4:].isfinite().all()
        alone = sample(logits_bv[4:], seed_b[4:], position_b[4:], **kwargs, impl=impl)
        assert torch.equal(token_b[4:], alone[0])


@pytest.mark.long_if(when=interpreted)
@filters
def test_masked_and_huge_logits(kwargs, device, impl):
    """As constrained decoding has them; and too great for fp64 to hold the noise beside them."""
    logits_bv, seed_b, position_b = make_rows(5, 2500, torch.float32, device)
    logits_bv[0, 20:] = -torch.inf
    logits_bv[1, :2300] = torch.finfo(torch.float32).min
    logits_bv[2, ::2] = -1e9
    logits_bv[3] *= 1e15
    logits_bv[4, 100:300] = 1e20
    args = logits_bv, seed_b, position_b
    expected = sample(*args, **kwargs, impl="reference")
    actual = sample(*args, **kwargs, impl=impl)
    assert torch.equal(actual[0], expected[0])
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


# Seeds at whose position 5 a token's word of Philox is 0: no noise is greater.
GREATEST_NOISE = {2020416: 1154, 2845786: 2319, 3459769: 3511, 3969686: 1798}


@pytest.mark.parametrize("others", [-30.0, -torch.inf], ids=["low", "-inf"])
def test_a_token_wins_by_its_noise_alone(others, device, impl):
    """Where the greatest logit has just less or just more than another token and its noise; the
    other is among those with the most noise, so that a bound on it may not be any tighter."""
    few = interpreted(impl)
    B, V = 4 + (4 if few else 44), 12_293
    row = torch.arange(B, device=device)
    seed_b = row.clone()
    seed_b[:4] = torch.tensor(list(GREATEST_NOISE), device=device)
    position_b = torch.full_like(seed_b, 5)
    noise_bv = reference.gumbel_noise_of_all(seed_b, position_b, V)
    other_b = noise_bv[:, :4096].topk(8).indices[row, row % 8]
    other_b[:4] = torch.tensor(list(GREATEST_NOISE.values()), device=device)
    assert (noise_bv[row, other_b][:4] > 22.87).all()
    # The best is far from it, as groups, slices and programs see it, or next to it.
    best_b = torch.where(row % 3 == 2, other_b ^ 1, 8192 + (other_b + 37 * row) % 4096)
    for temperature in (0.8,) if few else (0.8, 1.0):
        logits_bv = torch.full((B, V), others, device=device)
        logits_bv[row, best_b] = 3.0
        score_b = logits_bv[row, best_b].div(temperature) + noise_bv[row, best_b]
        least_b = (temperature * (score_b - noise_bv[row, other_b])).float().clamp(max=3.0)
        seen = []
        for ulp in (-2, 2) if few else (-2, -1, 0, 1, 2):
            bits_b = least_b.view(torch.int32) + ulp * torch.where(least_b < 0, -1, 1).int()
            logits_bv[row, other_b] = bits_b.view(torch.float32)
            args = logits_bv, seed_b, position_b
            expected = sample(*args, temperature=temperature, impl="reference")
            actual = sample(*args, temperature=temperature, impl=impl)
            assert torch.equal(actual[0], expected[0])
            seen.append(expected[0] == other_b)
        assert seen[0].sum() < seen[-1].sum()  # both sides of the tie were met


@pytest.mark.parametrize("temperature", [1.0, 1e-40, 1e38], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"top_p": 0.9}], ids=["none", "top_p"])
def test_rounding_of_z_shows(kwargs, temperature, device, impl):
    """z so large that it is rounded to steps, all of which count; temperatures so low that their
    inverse is infinite; and so high that of logits nothing but -inf still shows."""
    B = 3 if interpreted(impl) else 40
    args = make_rows(B, 1500, torch.float32, device, scale=1.0)
    if temperature == 1:
        args[0].add_(20_000.0)
    elif temperature < 1:
        args[0].mul_(temperature)
    else:
        args[0][::2, 100:] = -torch.inf
        args[0][1].mul_(1e38)
    expected = sample(*args, temperature=temperature, **kwargs, impl="reference")
    actual = sample(*args, temperature=temperature, **kwargs, impl=impl)
    assert torch.equal(actual[0], expected[0])
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kwargs", [FILTERS["none"], FILTERS["all"]], ids=["none", "all"])
def test_inputs_are_read_only_and_may_be_strided(kwargs, device, impl):
    logits_bv, seed_b, position_b = make_rows(5, 1001, torch.float32, device)
    strided_bv = logits_bv.T.contiguous().T
    before_bv = strided_bv.clone()
    expected = sample(logits_bv, seed_b, position_b, **kwargs, impl=impl)
    actual = sample(strided_bv, seed_b, position_b.long(), **kwargs, impl=impl)
    assert torch.equal(strided_bv, before_bv)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_double_precision_reference(device):
    logits_bv, seed_b, position_b = make_rows(8, 1000, torch.float64, device)
    ones_b = torch.ones(8, device=device)
    rows = ones_b, 0 * ones_b.int(), 0.9 * ones_b, 0 * ones_b
    token_b, *actual = reference.sample(logits_bv, seed_b, position_b, *rows)
    expected = plain_logprobs(logits_bv, torch.float64, top_p=0.9)
    for ours_b, theirs_bv in zip(actual, expected, strict=True):
        assert ours_b.dtype == torch.float64
        torch.testing.assert_close(ours_b, theirs_bv.gather(1, token_b.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected 0 <= temperature"),
        ({"temperature": float("nan")}, "temperature=nan: expected"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature: expected .* in every row"),
        ({"temperature": torch.ones(2)}, r"temperature: expected \[3\]"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, "temperature: torch.int64 is not"),
        ({"top_k": -1}, "top_k=-1: expected top_k >= 0"),
        ({"top_k": torch.ones(3)}, "top_k: torch.float32 is not"),
        ({"top_k": torch.tensor([1, -1, 1])}, "top_k: expected .* in every row"),
        ({"top_p": 0.0}, "top_p=0.0: expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p=1.5: expected"),
        ({"min_p": 1.01}, "min_p=1.01: expected 0 <= min_p <= 1"),
        ({"min_p": torch.tensor([0.0, 0.0, -0.1])}, "min_p: expected .* in every row"),
        ({"min_p": torch.ones(3, device="meta")}, "logits_bv is on cpu, but min_p_b on meta"),
        ({"seed_b": torch.ones(3, device="meta").long()}, "but seed_b on meta"),
        ({"top_k": 2.5}, "top_k=2.5: expected"),
        ({"top_k": np.float64(3)}, "top_k=.*3.0.*: expected top_k >= 0"),
        ({"temperature": [1.0]}, r"temperature=\[1.0\]: expected 0 <= temperature"),
        ({"top_p": np.array([0.5])}, r"top_p=array\(\[0.5\]\): expected 0 < top_p"),
        ({"min_p": None}, "min_p=None: expected 0 <= min_p"),
        ({"temperature": 1j}, "temperature=1j: expected"),
        ({"logits_bv": torch.zeros(3, 1, 9)}, r"logits_bv: expected \[b, v\]"),
        ({"logits_bv": torch.zeros(3, 0)}, r"logits_bv: expected \[b, v\]"),
        ({"logits_bv": torch.zeros(3, 9, dtype=torch.float64)}, "logits_bv: torch.float64 is not"),
        ({"seed_b": torch.zeros(2, dtype=torch.int64)}, r"seed_b: expected \[3\]"),
        ({"seed_b": torch.zeros(3, dtype=torch.int32)}, "seed_b: torch.int32 is not"),
        ({"position_b": torch.zeros(3)}, "position_b: torch.float32 is not"),
        ({"impl": "fast"}, "impl='fast': expected one of"),
    ],
)
def test_sample_raises(change, message):
    logits_bv, seed_b, position_b = make_rows(3, 9, torch.float32, "cpu")
    good = {"logits_bv": logits_bv, "seed_b": seed_b, "position_b": position_b}
    with pytest.raises(ValueError, match=message):
        sample(**(good | change))


def test_top_k_beyond_int32_keeps_all(device, impl):
    args = make_rows(3, 9, torch.float32, device)
    expected = sample(*args, impl=impl)
    for top_k in (2**31, 2**40 + 1, torch.tensor([2**31, 2**32 + 1, 2**63 - 1], device=device)):
        for x, y in zip(sample(*args, top_k=top_k, impl=impl), expected, strict=True):
            assert torch.equal(x, y)


def test_sample_is_for_inference():
    logits_bv, seed_b, position_b = make_rows(3, 9, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="inference only"):
        sample(logits_bv.requires_grad_(), seed_b, position_b)


def test_sample_opcheck(device, opcheck):
    args = make_rows(3, 50, torch.float32, device)
    rows = (torch.full((3,), x, device=device) for x in (0.8, 5, 0.9, 0.1))
    opcheck("sample", (*args, *rows))


def test_sample_contract(device):
    compiled = torch.compile(sample, fullgraph=True, dynamic=True)
    for B in (3, 7):
        args = make_rows(B, 50, torch.bfloat16, device)
        kwargs = {"temperature": 0.8, "top_k": torch.arange(B, device=device), "top_p": 0.9}
        for ours, theirs in zip(compiled(*args, **kwargs), sample(*args, **kwargs), strict=True):
            assert torch.equal(ours, theirs)


def test_drawn():
    """-1 is an error that names the rows and their steps; anything else passes."""
    assert drawn(torch.tensor([3, 0]), 7) == drawn([3, 0], [7, 9]) == [3, 0]
    assert drawn([], 0) == drawn(np.zeros(0, np.int64), np.int64(0)) == []
    with pytest.raises(ValueError, match="for row 1 at step 7: the logits hold NaN"):
        drawn(torch.tensor([3, -1]), 7)
    with pytest.raises(ValueError, match="for row 5 at step 2, row 4 at step 0: "):
        drawn([-1, 3, -1], [2, 1, 0], torch.tensor([5, 9, 4]))
    with pytest.raises(ValueError, match="row 7 at step 0 and 92 more"):
        drawn([-1] * 100, 0)
    with pytest.raises(ValueError, match="token_b: on meta"):
        drawn(torch.empty(2, device="meta", dtype=torch.int64), 0)
