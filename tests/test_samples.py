"""Many samples in bounded memory."""

import itertools

import pytest
import torch
from models import padded_prompts, random_ids, tiny_model
from transformers import StoppingCriteriaList

import kvtools
from kvtools import CacheConfig
from kvtools.hf import CACHE, Session
from kvtools.samples import CHUNK

EOS, NEW = (7, 90, 130, 200), 30
TIGHT = dict(bits=8, budget=14, recent=4, window=8, drop=4, sinks=2)


def rollouts(config=None, **options):
    options = dict(seed=4, eos_token_id=EOS, temperature=1.2) | options
    return kvtools.Rollouts(tiny_model(), config, **options)


def prompts(*lengths):
    return [random_ids(n, seed=i) for i, n in enumerate(lengths)]


def plain(texts, n, **options):
    """What all rows at once give: tokens and log-probabilities by prompt and number."""
    r = rollouts(**options)
    r.prefill(texts, n)
    new = r.generate(NEW)
    return {divmod(row, n): (x, r.logprobs[row], int(r.seeds[row])) for row, x in enumerate(new)}


@pytest.mark.parametrize("config", [{}, dict(bits=4, recent=8), TIGHT], ids=["16", "4", "tight"])
def test_the_same_whatever_the_rows(config):
    # What is rounded to codes may round the other way.
    bound, texts = 0.05 if config else 1e-3, prompts(20, 9, 33, 12, 15)
    config = CacheConfig(**config)
    want = plain(texts, 7, config=config)
    for rows in (1, 3, 8, 64):
        r = rollouts(config)
        got = list(r.sample(texts, 7, rows=rows, max_new_tokens=NEW))
        assert r.rows == 0 and r.kv.stores[0].forest.num_nodes == 0
        assert len(got) == 35 and {(x.prompt, x.number) for x in got} == set(want)
        for x in got:
            tokens, logprobs, seed = want[x.prompt, x.number]
            assert (x.tokens, x.seed) == (tokens, seed)
            assert x.logprobs == pytest.approx(logprobs, abs=bound)
            assert x.why == ("eos" if x.tokens[-1] in EOS else "length")
            assert (x.why == "length") <= (len(x.tokens) == NEW)


def test_rows_are_refilled_and_bounded():
    """Never more rows than asked for, besides a waiting one per prompt; always as many as that
    while there are samples to come."""
    r, seen = rollouts(), []
    step = r._session.extend

    def extend(tokens, counts, *more, **how):
        seen.append((int((counts > 0).sum()), r.kv.rows))
        return step(tokens, counts, *more, **how)

    r._session.extend = extend
    got = list(r.sample(prompts(20, 9), [40, 30], rows=6, max_new_tokens=NEW))
    assert len(got) == 70
    assert max(live for live, _ in seen) == 6 and max(rows for _, rows in seen) == 8
    steps = sum(len(x.tokens) - 1 for x in got)
    assert sum(live for live, _ in seen) == steps  # nothing is sampled in vain
    assert len(seen) < 1.9 * steps / 6


def test_prompts_take_turns():
    order = [(x.prompt, x.number) for x in rollouts(eos_token_id=()).sample(
        prompts(20, 9, 12), [2, 1, 3], rows=2, max_new_tokens=3)]  # fmt: skip
    assert order == [(0, 0), (1, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


def test_early_ends():
    texts = prompts(20, 9)
    want = plain(texts, 20)
    first = {p: next(i for i in range(20) if want[p, i][0][-1] in EOS) for p in (0, 1)}
    verdicts = []

    def enough(sample):
        verdicts.append(sample)
        return sample.prompt == 0 and sample.why == "eos"

    got = list(rollouts().sample(texts, 20, rows=4, max_new_tokens=NEW, enough=enough))
    assert got == verdicts and all(x.tokens == want[x.prompt, x.number][0] for x in got)
    assert [x.why for x in got if x.prompt == 0][-1] == "eos"
    assert sum(x.prompt == 0 and x.why == "eos" for x in got) == 1
    assert sum(x.prompt == 1 for x in got) == 20 and first[0] < 20

    got = list(rollouts().sample(texts, 20, rows=4, max_new_tokens=NEW, max_tokens=100))
    total = sum(len(x.tokens) for x in got)
    assert 100 <= total < 100 + 4 * CHUNK and any(x.why == "budget" for x in got)
    for x in got:
        tokens = want[x.prompt, x.number][0]
        assert x.tokens == tokens[: len(x.tokens)]
    got = list(rollouts().sample(texts, 20, rows=4, max_new_tokens=NEW, max_seconds=0.0))
    assert len(got) == 4

    r = rollouts()
    for x in itertools.islice(r.sample(texts, 20, rows=4, max_new_tokens=NEW), 3):
        assert x.tokens
    assert r.rows == 0
    assert list(rollouts().sample(texts, [0, 0], max_new_tokens=3)) == []
    assert [x.prompt for x in rollouts().sample(texts, [0, 1], max_new_tokens=3)] == [1]


def test_until():
    texts, stop = prompts(20, 9), {11, 12, 13, 14, 15, 16, 17, 18, 19, 20}
    want = plain(texts, 5)
    for until in (stop, lambda tokens: tokens[-1] in stop):
        for x in rollouts().sample(texts, 5, rows=3, max_new_tokens=NEW, until=until):
            tokens = want[x.prompt, x.number][0]
            cut = next((i for i, t in enumerate(tokens) if t in stop), None)
            assert x.tokens == (tokens if cut is None else tokens[: cut + 1])
            assert (x.why == "until") == (cut is not None)
    seen = []
    got = list(rollouts().sample(texts, 1, max_new_tokens=NEW, until=lambda x: seen.append(len(x))))
    assert sorted(seen) == sorted(i + 1 for x in got for i in range(len(x.tokens)))


def test_texts():
    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            return " ".join(map(str, tokens)) if skip_special_tokens else None

    for x in rollouts().sample(prompts(20), 3, max_new_tokens=4, tokenizer=Tokenizer()):
        assert x.text == " ".join(map(str, x.tokens))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(prompts=[[]]), "an empty prompt"),
        (dict(n=-1), "n=-1 must be at least 0"),
        (dict(n=[1, 2]), "n has 2 entries for 1 prompts"),
        (dict(rows=0), "rows=0 must be at least 1"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(n=[1.5]), r"n=\[1.5\] must be a whole number"),
        (dict(rows=1.5), "rows=1.5 must be a whole number"),
        (dict(max_new_tokens=1.5), "max_new_tokens=1.5 must be a whole number"),
        (dict(prompts=[[256]]), r"prompts\[0\] holds 256, which is no token"),
        (dict(prompts=[[5.5]]), r"prompts\[0\] holds something else"),
    ],
)
def test_bad_input(change, words):
    r, args = rollouts(), dict(prompts=prompts(9), n=2, max_new_tokens=4) | change
    with pytest.raises((ValueError, TypeError), match=words):
        r.sample(args.pop("prompts"), args.pop("n"), **args)


def test_rows_of_others_are_left_alone():
    r = rollouts()
    r.prefill(prompts(9))
    with pytest.raises(ValueError, match="there are rows already"):
        r.sample(prompts(9), 2, max_new_tokens=4)
    assert r.rows == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.prefill(prompts(9)),
        lambda r: r.gather(range(r.rows)),
        lambda r: r.append([[5]], [0]),
        lambda r: r.step(),
        lambda r: r.gather([]),
    ],
    ids=["prefill", "gather", "append", "step", "none"],
)
def test_rows_that_others_change_are_not_drawn_from(change):
    r = rollouts()
    drawn = r.sample(prompts(20), 9, rows=2, max_new_tokens=NEW)
    next(drawn)
    change(r)
    with pytest.raises(RuntimeError, match="rows were changed while sample"):
        list(drawn)
    assert r.rows == 0


def test_two_iterators():
    texts, r = prompts(20, 9), rollouts()
    first, second = (r.sample([x], 5, rows=2, max_new_tokens=NEW) for x in texts)
    got = [next(first)]
    with pytest.raises(RuntimeError, match="Rollouts of its own"):
        next(second)
    got += first
    want = plain(texts[:1], 5)
    assert len(got) == 5 and all(x.tokens == want[0, x.number][0] for x in got)


def test_tokens_of_dropped_samples_count():
    """They have been drawn, too: the budget ends what nothing else would."""
    got = rollouts(eos_token_id=()).sample(
        prompts(20, 9, 12, 15), 16, max_new_tokens=NEW, max_tokens=450, until=range(0, 256, 20),
        enough=lambda x: x.prompt < 3,
    )  # fmt: skip
    assert {x.why for x in got} == {"until", "budget"}


def test_a_forward_that_fails_leaves_no_rows():
    r = rollouts(pages=6)
    drawn = r.sample(prompts(20, 30), 9, rows=4, max_new_tokens=NEW)
    with pytest.raises(kvtools.PoolExhausted):
        torch.tensor([len(x.tokens) for x in drawn])
    assert r.rows == 0


class Kept:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.columns, self.ended = [], 0

    def put(self, x):
        self.columns.append(x.clone())

    def end(self):
        self.ended += 1


def by_number(number, ids):
    """What a row of the batch may say depends on which it is."""
    return list(range(3, 250)) if number % 2 else list(range(3, 250, 2))


def waves(rows, config=None, **how):
    """Nine rows of three prompts, at most `rows` of which grow at a time."""
    model, (ids, mask) = tiny_model(), padded_prompts((33, 20, 40))
    torch.manual_seed(3)
    how = dict(do_sample=True, num_return_sequences=3, max_new_tokens=12, eos_token_id=EOS) | how
    how |= dict(kv_config=CacheConfig(**config or {}), pad_token_id=0, rows=rows)
    return model.generate(ids, attention_mask=mask, custom_generate=kvtools.generate, **how)


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=1.3, top_k=40),
        dict(do_sample=False, num_return_sequences=1),
        dict(config=TIGHT),
        dict(repetition_penalty=1.4, prefix_allowed_tokens_fn=by_number),
        dict(eos_token_id=None),
        dict(stopping_criteria=[lambda ids, scores: ids[:, -1] % 9 == 0]),
    ],
    ids=["sampled", "greedy", "tight", "processed", "no end", "criteria"],
)
def test_generate_in_waves(how):
    how = dict(how)
    if "stopping_criteria" in how:
        how["stopping_criteria"] = StoppingCriteriaList(how["stopping_criteria"])
    want = waves(None, **how)
    assert len(set(map(tuple, want.tolist()))) > 2
    for rows in (2, 4, 50):
        assert torch.equal(waves(rows, **how), want)


def test_waves_bound_what_is_held(monkeypatch):
    seen, extend = [], Session.extend

    def watched(self, tokens, counts=None, *more, **how):
        seen.append((int((counts > 0).sum()), self.kv.rows))
        return extend(self, tokens, counts, *more, **how)

    monkeypatch.setattr(Session, "extend", watched)
    waves(2, num_return_sequences=6, eos_token_id=None, max_new_tokens=5)
    assert {x for x, _ in seen} == {2} and {x for _, x in seen} == {3 + 2}
    assert len(seen) == 9 * 4


def test_waves_with_all_that_can_be_asked_for():
    how = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    want, got = waves(None, **how), waves(2, **how)
    assert torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(got, name)) == len(getattr(want, name))
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    caches = [getattr(x, CACHE) for x in (got, want)]
    assert caches[0].texts == caches[1].texts and caches[0].kv.rows == 9
    runs = [kvtools.Rollouts(tiny_model(), seed=1, cache=x) for x in caches]
    assert runs[0].generate(5) == runs[1].generate(5)
    model, (ids, mask) = tiny_model(), padded_prompts((33, 20, 40))
    kept = Kept(), Kept()
    for streamer, rows in zip(kept, (None, 2), strict=True):
        torch.manual_seed(3)
        with kvtools.patch(model, rows=rows):
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, num_return_sequences=3, pad_token_id=0,
                max_new_tokens=12, eos_token_id=EOS, streamer=streamer,
            )  # fmt: skip
        assert torch.equal(out, want.sequences) and streamer.ended == 1
        assert torch.equal(torch.stack(streamer.columns[1:], 1), out[:, 40:])


def test_waves_go_on_from_a_cache():
    model, ids = tiny_model(), random_ids(1, 40)
    how = dict(do_sample=True, num_return_sequences=6, max_new_tokens=6, eos_token_id=EOS,
               pad_token_id=0, custom_generate=kvtools.generate)  # fmt: skip
    mask = torch.ones_like(ids)
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **how)
    torch.manual_seed(5)
    want = model.generate(ids, attention_mask=mask, **how)
    torch.manual_seed(5)
    given = {CACHE: getattr(first, CACHE)}
    assert torch.equal(model.generate(ids, attention_mask=mask, rows=4, **given, **how), want)


def test_waves_run_ahead(graphs):
    for how in (dict(temperature=1.3), dict(return_dict_in_generate=True)):
        want, got = (waves(x, max_new_tokens=6, **how) for x in (None, 5))
        if "return_dict_in_generate" in how:
            want, got = want.sequences, got.sequences
        assert torch.equal(got, want)
    assert graphs.replays > 2


@pytest.mark.parametrize("rows", [0, -1, 2.5, True, "4"])
def test_waves_of_no_rows(rows):
    with pytest.raises(ValueError, match=f"rows={rows!r} must be a whole number"):
        waves(rows)


def test_waves_that_would_run_on():
    how = dict(stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 9 == 0]))
    with pytest.raises(ValueError, match="rows=2 needs an EOS token"):
        waves(2, eos_token_id=None, **how)
