"""Rows that are given tokens between those that they sample."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models import Counter, fresh_model, random_ids, tiny_model
from test_door import MODELS

import kvtools
from kvtools import CacheConfig
from kvtools.hf import check_model
from kvtools.hf import session as sessions

CONFIGS = {
    "exact": {},
    "balanced": dict(bits=4, recent=8),
    "evicts": dict(bits=8, budget=14, recent=4, window=8, drop=4, sinks=2, prompt_budget=20),
}
SAID = [random_ids(n, seed=40 + n).tolist() for n in (5, 1, 12)]


@pytest.fixture(scope="module")
def wide():
    return fresh_model("qwen3").double()


def naive(model, tokens, temperature=1.0):
    """Log-probabilities of a row's tokens but the first, and those of what comes next [v]."""
    with torch.no_grad():
        logits = (model(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist(), logits[-1]


def check(r, model, rel):
    for tokens, logprobs, n in zip(r.tokens, r.logprobs, r.prompt_lengths, strict=True):
        want = naive(model, tokens, r.filters["temperature"] or 1.0)[0][n - 1 :]
        known = [i for i, x in enumerate(logprobs) if not math.isnan(x)]
        got = np.array(logprobs)[known]
        assert got == pytest.approx(np.array(want)[known], rel=rel, abs=rel)


def rollouts(model, **options):
    """Noise is for fp32 alone."""
    options = dict(eos_token_id=(), seed=3) | options
    return kvtools.Rollouts(model, processor=lambda _, logits: logits.float(), **options)


def turns(r, logprobs=True):
    """Three, with four copies of each row after each, and something said between them."""
    for said in SAID:
        r.generate(6)
        r.gather(np.repeat(np.arange(r.rows), 4))
        r.append([[*said, row % 7 + 3] for row in range(r.rows)], logprobs=logprobs)
    r.generate(4)


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_tree_of_turns_is_as_the_model_row_by_row(wide, logprobs):
    r = rollouts(wide, temperature=0.0)
    r.prefill([random_ids(20), random_ids(9, seed=2)])
    turns(r, logprobs)
    assert r.rows == 128
    for tokens, n, given in zip(r.tokens, r.prompt_lengths, r.given, strict=True):
        spans = np.cumsum([0, 6, 6, 6, 2, 6, 13, 4]) + n
        assert given == tuple(zip(spans[1:-1:2].tolist(), spans[2::2].tolist(), strict=True))
        for at in range(n, len(tokens)):
            if not any(a <= at < b for a, b in given):
                assert tokens[at] == int(naive(wide, tokens[:at])[1].argmax())
        break  # the others by their log-probabilities
    check(r, wide, 1e-5)
    missing = sum(map(math.isnan, r.logprobs[0]))
    assert missing == (0 if logprobs else 21)


def test_turns_of_layers_that_run_for_last_tokens_alone():
    model = tiny_model("gemma4")
    r = rollouts(model, temperature=0.0)
    r.prefill([random_ids(20), random_ids(9, seed=2)])
    turns(r, logprobs=False)
    r.append([[5] * (row % 3) for row in range(r.rows)])
    r.generate(2)
    check(r, model, 1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tree_of_turns_is_as_each_row_alone(name):
    """Log-probabilities of rows that nobody else shares a cache with, given token by token."""
    model, config = tiny_model(), CacheConfig(**CONFIGS[name])
    r = kvtools.Rollouts(model, config, eos_token_id=(), seed=3)
    r.prefill([random_ids(25)])
    turns(r)
    for row in (0, 21, 63):
        alone = kvtools.Rollouts(model, config, eos_token_id=(), seed=3)
        alone.prefill([random_ids(25)])
        at = 25
        for begin, end in (*r.given[row], (len(r.tokens[row]),) * 2):
            for token in r.tokens[row][at:begin]:  # as if it had been sampled, one by one
                alone.append([[token]], logprobs=True)
            if end > begin:
                alone.append([r.tokens[row][begin:end]], logprobs=True)
            at = end
        assert alone.tokens[0] == r.tokens[row]
        bound = 1e-4 if name == "exact" else 0.25
        assert alone.logprobs[0] == pytest.approx(r.logprobs[row], abs=bound)


class Machine(RuleBasedStateMachine):
    """Random calls on rows of a model in float64, against the model without a cache."""

    model: torch.nn.Module
    pages: int | None = None

    def __init__(self):
        super().__init__()
        self.r = rollouts(self.model, temperature=0.8, eos_token_id=(7, 9))
        self.texts = []

    def draw_rows(self, data):
        return data.draw(st.lists(st.sampled_from(range(self.r.rows)), unique=True, max_size=3))

    @precondition(lambda self: self.r.rows < 5)
    @rule(sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=2))
    def prefill(self, sizes):
        prompts = [torch.cat([random_ids(40)[:n], random_ids(m, seed=m)]) for n, m in sizes]
        self.r.prefill(prompts)
        self.texts += [x.tolist() for x in prompts]

    @precondition(lambda self: self.r.rows)
    @rule(data=st.data(), logprobs=st.booleans())
    def append(self, data, logprobs):
        rows = self.draw_rows(data)
        texts = [data.draw(st.lists(st.integers(3, 250), max_size=5)) for _ in rows]
        self.r.append(texts, rows, logprobs=logprobs)
        for row, text in zip(rows, texts, strict=True):
            self.texts[row] += text
            assert not (text and self.r.finished[row])

    @precondition(lambda self: self.r.rows)
    @rule(data=st.data())
    def step(self, data):
        self.grown(lambda: self.r.step(self.draw_rows(data)), 1)

    @precondition(lambda self: self.r.rows)
    @rule(n=st.integers(0, 4))
    def generate(self, n):
        self.grown(lambda: self.r.generate(n), n)

    def grown(self, call, most):
        call()
        for text, tokens in zip(self.texts, self.r.tokens, strict=True):
            assert tokens[: len(text)] == text and len(tokens) <= len(text) + most
            text += tokens[len(text) :]

    @precondition(lambda self: self.r.rows)
    @rule(data=st.data())
    def fork(self, data):
        row, n = data.draw(st.integers(0, self.r.rows - 1)), data.draw(st.integers(0, 2))
        assert self.r.fork(row, n).tolist() == [len(self.texts) + i for i in range(n)]
        self.texts += [list(self.texts[row]) for _ in range(n)]

    @precondition(lambda self: self.r.rows)
    @rule(data=st.data())
    def gather(self, data):
        index = data.draw(st.lists(st.integers(0, self.r.rows - 1), max_size=5))
        self.r.gather(index)
        self.texts = [list(self.texts[i]) for i in index]

    @precondition(lambda self: self.r.rows)
    @rule(data=st.data())
    def crop(self, data):
        lengths = [
            data.draw(st.integers(int(n), len(text)))
            for n, text in zip(self.r.prompt_lengths, self.texts, strict=True)
        ]
        self.r.crop(lengths)
        self.texts = [text[:n] for text, n in zip(self.texts, lengths, strict=True)]

    @invariant()
    def rows_are_what_they_say(self):
        assert self.r.tokens == self.texts
        for tokens, given, n in zip(self.texts, self.r.given, self.r.prompt_lengths, strict=True):
            ends = [n, *(x for span in given for x in span), len(tokens)]
            assert ends == sorted(ends) and all(a < b for a, b in given)

    def teardown(self):
        check(self.r, self.model, 1e-5)


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.long)])
def test_random_turns(wide, examples):
    run_state_machine_as_test(
        type("Machine", (Machine,), {"model": wide}),
        settings=settings(
            max_examples=examples, stateful_step_count=14, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("apart, most", [(None, 7), (False, 3)])
def test_long_texts_hold_few_logits(monkeypatch, apart, most):
    monkeypatch.setattr(sessions, "LOGITS", 256 * 3)
    monkeypatch.setattr(sessions, "AT_ONCE", 7)
    model = tiny_model()
    monkeypatch.setattr(check_model(model), "apart", apart)
    r = kvtools.Rollouts(model, temperature=0.0, eos_token_id=())
    r.prefill([random_ids(20)], 5)
    r.generate(2)
    said = [random_ids(n, seed=n).tolist() for n in (9, 1, 17, 0, 4)]
    r.append(said, logprobs=True)
    r.crop([22] * 5)
    with Counter(model) as count:
        r.append(said, logprobs=True)
    assert max(count.forwards[1:]) <= most and sum(count.forwards) == 4 + sum(map(len, said)) - 4
    check(r, model, 1e-4)
    assert r.given == [((22, 22 + len(x)),) if x else () for x in said]


def test_encoded_again_in_the_middle_of_a_text(monkeypatch):
    """longrope: a text that passes the switch while it is looked at piece by piece."""
    monkeypatch.setattr(sessions, "LOGITS", 256 * 2)
    monkeypatch.setattr(sessions, "AT_ONCE", 3)
    model = MODELS["longrope past its switch"]()
    r = kvtools.Rollouts(model, temperature=0.0, eos_token_id=())
    r.prefill([random_ids(40)], 2)
    r.append([random_ids(20, seed=5).tolist(), random_ids(4, seed=6).tolist()], logprobs=True)
    r.generate(8)
    for tokens, logprobs in zip(r.tokens, r.logprobs, strict=True):
        want = []  # as one would sample: each from a forward over all before it
        for at in range(40, len(tokens)):
            want.append(float(naive(model, tokens[:at])[1][tokens[at]]))
        assert logprobs == pytest.approx(want, abs=2e-3)


def test_finished_rows_go_on():
    model = tiny_model()
    probe = kvtools.Rollouts(model, temperature=0.0, eos_token_id=())
    probe.prefill([random_ids(20)])
    eos = probe.generate(3)[0][2]
    r = kvtools.Rollouts(model, temperature=0.0, eos_token_id=eos)
    r.prefill([random_ids(20)], 2)
    assert [len(x) for x in r.generate(10)] == [3, 3] and r.finished.all()
    r.append([[5, 6]], [1])
    assert r.finished.tolist() == [True, False]
    new = r.generate(4)
    assert new[0] == [] and new[1]
    assert r.tokens[1][-len(new[1]) :] == new[1]


@pytest.mark.parametrize(
    "args, error, words",
    [
        (([[5]],), ValueError, "tokens has 1 entries for 2 rows"),
        (([[5], [6]], [1, 1]), ValueError, "rows holds a row twice"),
        (([[5], [256]],), ValueError, r"tokens\[1\] holds 256, which is no token of the model's"),
        (([[5], [-1]],), ValueError, r"tokens\[1\] holds -1"),
        (([[5], [2.5]],), TypeError, r"tokens\[1\] holds something else than token ids"),
        (([[5], "66"],), TypeError, r"tokens\[1\]='66': expected a list of token ids"),
        (([5, 6],), TypeError, r"tokens\[0\]=5: expected a list"),
        (([[5]], [2]), IndexError, "rows holds 2; there are rows 0 to 1"),
    ],
)
def test_bad_turns_change_nothing(args, error, words):
    r = kvtools.Rollouts(tiny_model(), temperature=0.0, eos_token_id=())
    r.prefill([random_ids(20)], 2)
    with pytest.raises(error, match=words):
        r.append(*args)
    assert r.tokens == [random_ids(20).tolist()] * 2 and r.given == [(), ()]
    with pytest.raises(IndexError):
        r.fork(2, 1)
    with pytest.raises(ValueError, match="n=-1"):
        r.fork(0, -1)
    assert r.rows == 2


def test_a_text_that_fails_changes_nothing(monkeypatch):
    monkeypatch.setattr(sessions, "LOGITS", 256 * 3)
    model = tiny_model()
    r = kvtools.Rollouts(model, temperature=0.0, eos_token_id=(), pages=4)
    r.prefill([random_ids(20)], 2)
    r.generate(2)
    before = [list(x) for x in r.tokens], r.kv.lengths.tolist()
    with pytest.raises(kvtools.PoolExhausted):
        r.append([[5] * 30, [6] * 30], logprobs=True)
    assert (r.tokens, r.kv.lengths.tolist()) == before
    assert [len(x) for x in r.logprobs] == [2, 2]
    check(r, model, 1e-4)
