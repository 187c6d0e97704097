"""Stopping: what goes on is what it would have been; rules by hand; what is saved is told."""

import dataclasses
import math

import numpy as np
import pytest
from models import tiny_model
from test_search import QUESTIONS, TOKENS, by_text, chance, policy, told

from kvtools import Rollouts, search
from kvtools.search import Candidate, Stopping
from kvtools.search.stopping import leads

FULL = dict(n=8, seed=4)


class Letters:
    """A token per character of seven."""

    def encode(self, text):
        return [3 + ord(c) for c in text]

    def decode(self, tokens):
        return "".join("abcde \n"[x % 7] for x in tokens)


def answer(text):
    return len(text) % 3 or None


@pytest.fixture(scope="module")
def full():
    return search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, **FULL)


RULES = {
    "none": Stopping(),
    "margin": Stopping(margin=-0.5),
    "evaluation": Stopping(evaluation=search.SelfEvaluation("ok?", "y", "n"), least=0.5),
    "longer": Stopping(longer=1.0),
    "votes": Stopping(answer=answer),
    "enough": Stopping(enough=2, verified=0.5),
    "wave": Stopping(wave=3),
    "wave, votes": Stopping(wave=2, answer=answer, margin=-2.0),
    "wave, enough": Stopping(wave=1, enough=1, verified=0.3),
    "wave, sure": Stopping(wave=1, answer=answer, sure=0.7),
}


@pytest.mark.parametrize("name", RULES)
def test_rows_are_those_of_best_of_n(full, name):
    """Finished or stopped, each is a beginning of the row that it is without rules; and all that
    the policy generated is in one of them."""
    found = search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, **FULL, stop=RULES[name])
    generated = 0
    for want, some, stopped in zip(full.candidates, found.candidates, found.stopped, strict=True):
        assert some, "a problem always has a candidate"
        assert sorted(c.origin for c in [*some, *stopped]) == list(range(8))
        assert [c.origin for c in some] == sorted(c.origin for c in some)
        for c in some:
            assert c.finished and (c.tokens, c.scores) == (
                want[c.origin].tokens, want[c.origin].scores)  # fmt: skip
        for c in stopped:
            assert not c.finished
            assert c.tokens == want[c.origin].tokens[: len(c.tokens)]
        generated += sum(len(c.tokens) for c in [*some, *stopped])
    assert found.generated == generated <= full.generated
    if name in ("none", "wave"):
        assert found.generated == full.generated and not any(found.stopped) and not found.saved
    else:
        assert found.generated < full.generated
        assert found.saved > 0 or name == "longer"
    again = search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, **FULL, stop=RULES[name])
    assert told(again) == told(found)


@pytest.mark.parametrize("wave", [1, 3])
def test_a_wave_grows_at_a_time(wave):
    seen = []
    steps = dataclasses.replace(TOKENS, progress=seen.append)
    search.best_of_n(policy(), QUESTIONS, by_text, steps, **FULL, stop=Stopping(wave=wave))
    assert wave < max(seen) <= wave * len(QUESTIONS)


def test_votes_that_are_settled_stay(full):
    """The majority is that of all rows, whatever those not grown would have said."""
    stop = Stopping(answer=answer, wave=1)
    found = search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, **FULL, stop=stop)
    how = dict(how="majority", answer=answer)
    ours, want = found.best(**how), full.best(**how)
    assert [answer(c.text) for c in ours] == [answer(c.text) for c in want]
    assert any(found.stopped)


@pytest.mark.parametrize("step_tokens", [1, 4, 64])
@pytest.mark.parametrize("done", [lambda x: len(x) > 9, lambda x: "e" in x], ids=["long", "e"])
def test_solutions_are_complete_where_a_step_ends(step_tokens, done):
    """With rules and without, rows are the same: also where steps end by their length, and where
    what follows a step is complete before the next one ends."""
    steps = search.Steps(Letters(), ["\n"], step_tokens, 24, done=done)

    def found(**how):
        rollouts = Rollouts(tiny_model(), temperature=0.9)
        result = search.best_of_n(rollouts, ["ab", "cde"], by_text, steps, n=4, seed=3, **how)
        return [[(c.tokens, c.steps, c.finished) for c in some] for some in result.candidates]

    want = found()
    assert any(c[2] == "done" for some in want for c in some)
    assert found(stop=Stopping()) == want


def test_saved_is_near_the_truth():
    """Where whether a row is stopped tells nothing of its length."""
    questions = [f"question {i}" for i in range(12)]

    def doomed(question, solutions):
        return [[0.01 if chance(question, x[:1]) < 0.4 else 0.9] * len(x) for x in solutions]

    full = search.best_of_n(policy(), questions, doomed, TOKENS, n=8)
    stop = Stopping(margin=0.0, window=1)
    found = search.best_of_n(policy(), questions, doomed, TOKENS, n=8, stop=stop)
    truth = full.generated - found.generated
    assert 0.6 < found.saved / truth < 1.4


@pytest.mark.parametrize("margins,ahead,stops", [
    ([5.0, 3.0, 1.0], 1, True), ([5.0, 3.0, 1.0], 0, False), ([1.0, 3.0, 5.0], 1, False),
    ([0.1], 3, False), ([-0.1], 3, True), ([-9.0, 1.0, 1.0, 1.0], 2, False), ([], 1, False),
])  # fmt: skip
def test_trend(margins, ahead, stops):
    stop = Stopping(margin=0.0, window=3, ahead=ahead)
    assert stop.hopeless(Candidate(margins=margins), 1.0, None) == stops


@pytest.mark.parametrize("texts,open_rows,settled", [
    ("aab", 1, False), ("aab", 0, True), ("aaab", 1, True), ("aaaabb", 2, False), ("", 0, False),
    ("--aa", 1, True), ("--", 0, False),
])  # fmt: skip
def test_votes_settle(texts, open_rows, settled):
    stop = Stopping(answer=lambda text: None if text == "-" else text)
    assert bool(stop.settled([Candidate(text=x) for x in texts], open_rows)) == settled


@pytest.mark.parametrize("texts,sure,settled", [
    ("aaa", 0.95, False), ("aaaa", 0.95, True), ("aaaab", 0.95, False), ("aab", 0.6, True),
    ("ab", 0.6, False), ("", 0.0, False), ("--", 0.0, False), ("a", 0.75, True),
])  # fmt: skip
def test_votes_that_are_all_but_settled(texts, sure, settled):
    """With 99 rows to come, which could change anything."""
    stop = Stopping(answer=lambda text: None if text == "-" else text, sure=sure)
    assert bool(stop.settled([Candidate(text=x) for x in texts], 99)) == settled


@pytest.mark.parametrize("first,second", [(0, 0), (4, 0), (7, 3), (2, 2)])
def test_leads_is_the_integral(first, second):
    share = (np.arange(200_000) + 0.5) / 200_000
    density = share**first * (1 - share) ** second
    want = density[share > 0.5].sum() / density.sum()
    assert leads(first, second) == pytest.approx(want, abs=1e-9)
    assert leads(2000, 1000) == pytest.approx(1.0)


def test_depth_ends_the_judging():
    steps = search.Steps(TOKENS.tokenizer, TOKENS.delimiters, 5, 14, depth=1)
    stop = Stopping(margin=0.0, window=1)

    def late(question, solutions):
        return [[0.9, 0.9, *[0.1] * len(x)][: len(x)] for x in solutions]

    found = search.best_of_n(policy(), QUESTIONS, late, steps, n=4, stop=stop)
    assert not any(found.stopped)
    assert any(search.best_of_n(policy(), QUESTIONS, late, TOKENS, n=4, stop=stop).stopped)


@pytest.mark.parametrize("name,value,error", [
    ("margin", math.nan, ValueError), ("margin", "low", ValueError), ("window", 0, ValueError),
    ("ahead", -1, ValueError), ("evaluation", "ok?", TypeError), ("least", 2, ValueError),
    ("longer", -1, ValueError), ("answer", "x", TypeError), ("enough", 0, ValueError),
    ("sure", 1.5, ValueError), ("sure", 0.9, ValueError), ("sure", math.nan, ValueError),
    ("verified", 1.5, ValueError), ("reduce", "median", ValueError), ("wave", 0, ValueError),
])  # fmt: skip
def test_stopping_refuses(name, value, error):
    with pytest.raises(error, match=f"{name}="):
        Stopping(**{name: value})


def test_best_of_n_refuses_other_rules():
    with pytest.raises(TypeError, match="stop=3"):
        search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, stop=3)
