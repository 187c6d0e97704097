"""Deepening and revision: what policy and scorer see, and that the better one stays."""

import pytest
from models import tiny_model
from test_search import (
    QUESTIONS,
    STEPS,
    TOKENS,
    Characters,
    Script,
    Stateful,
    by_text,
    policy,
    scorer_of,
)

from kvtools import Rollouts, search

TEXTS = ["a\n\n", "b\n\n", "c\n\n"]


def listed(call, row, text, seed):
    """Three steps; after a trigger one, which ends."""
    n = text.count("\n\n")
    return ("z\n\n", True) if "NO " in text else (TEXTS[n], n == 2)


def likes(worth):
    """A text is worth what its last listed piece is."""
    return lambda text: [
        next((v for k, v in reversed(worth.items()) if k in step), 0.5)
        for step in text.split("\n\n") if step.strip()
    ]  # fmt: skip


@pytest.mark.parametrize("worth,want", [
    ({"c": 0.4, "z": 0.9}, ["a\n\n", "b\n\n", "NO z\n\n"]), ({"c": 0.4, "z": 0.3}, TEXTS),
    ({"c": 0.4, "z": 0.4}, TEXTS), ({"c": 0.97, "z": 0.99}, TEXTS),
])  # fmt: skip
def test_deepen_keeps_the_better(worth, want):
    prm = Stateful(likes(worth))
    found = search.deepen(Script(listed), ["Q"], prm, STEPS, n=2, trigger="NO ", depths=[1],
                          enough=0.95)  # fmt: skip
    assert [c.steps for c in found.candidates[0]] == [want] * 2
    assert all(c.text == "".join(want) and c.finished == "eos" for c in found.candidates[0])
    tried = worth["c"] < 0.95
    assert [e.kept for e in found.trace] == (
        [(0, 0, 1, 1), (1, 3) if worth["z"] > worth["c"] else (0, 2)] if tried else []
    )
    assert found.generated == 2 * (10 + 4 * tried), "the trigger is given, not generated"


def test_depths_go_further_back_each_time():
    seen = []

    def spy(question, solutions):
        seen.extend(list(x) for x in solutions)
        return [[0.5] * len(x) for x in solutions]

    search.deepen(Script(listed), ["Q"], spy, STEPS, n=1, trigger="NO ", depths=[1, 2, 9])
    tried = [x for x in seen if "NO " in x[-1]]
    assert tried == [["a\n\n", "b\n\n", "NO z\n\n"], ["a\n\n", "NO z\n\n"], ["NO z\n\n"]]


@pytest.mark.parametrize("tokens", [12, 13, 14])
def test_a_trigger_is_no_solution(tokens):
    """Real rows of at most so many tokens; a trigger of six that would be worth most."""
    steps = search.Steps(Characters(), ["\n"], 4, tokens)

    def likes_triggers(question, solutions):
        return [[0.99 if "!" in x else 0.1 for x in steps] for steps in solutions]

    rollouts = Rollouts(tiny_model(), temperature=0.9)
    found = search.deepen(
        rollouts, ["one", "two"], likes_triggers, steps, n=2, trigger="!!!!!!", depths=[1, 2]
    )
    for c in found.candidates[0] + found.candidates[1]:
        assert len(c.tokens) <= tokens and not c.text.endswith("!!!!!!")


def test_deepen_draws_anew_and_never_gets_worse():
    how = dict(n=4, seed=2)
    first = search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, **how)
    found = search.deepen(policy(), QUESTIONS, by_text, TOKENS, **how, trigger="", depths=[1, 2])
    better = 0
    for a, b in zip(first.candidates, found.candidates, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.score() >= x.score()
            better += y.score() > x.score()
    assert better > 3


def turns(call, row, text, seed):
    if text.endswith("CRIT "):
        return "bad", True
    return ("y\n\n", True) if "REV " in text else ("x\n\n", True)


@pytest.mark.parametrize("revised", [0.9, 0.1])
def test_revise_scores_the_solution_alone(revised):
    prm = Stateful(likes({"x": 0.5, "y": revised, "bad": 0.01}))
    script, asked = Script(turns), []

    def revision(question, critique):
        asked.append((question, critique))
        return [ord(x) for x in "REV "]

    found = search.revise(script, ["Q"], prm, STEPS, n=2, critique="CRIT ", revision=revision)
    assert asked == [("Q", "bad")] * 2
    for c in found.candidates[0]:
        assert c.steps == (["y\n\n"] if revised > 0.5 else ["x\n\n"])
        said = "".join(chr(t) for t in c.tokens if t)
        assert said == ("x\n\nCRIT badREV y\n\n" if revised > 0.5 else "x\n\n")
        assert c.text == "".join(chr(t) for t in c.tokens[c.start :] if t)
        assert c.scores == pytest.approx([max(revised, 0.5)])
    assert found.generated == 2 * (4 + 4 + 4) and script.rows == 0


def test_a_solution_that_is_enough_is_left():
    scorer = scorer_of(likes({"x": 1.0}))
    found = search.revise(Script(turns), ["Q"], scorer, STEPS, n=2, enough=0.9)
    assert found.generated == 2 * 4 and not found.trace


@pytest.mark.parametrize("strategy,how,message", [
    ("deepen", dict(depths=[0]), "depths=0"), ("deepen", dict(depths=[2, 1]), "depths="),
    ("deepen", dict(enough=2), "enough=2"), ("deepen", dict(trigger=3), "trigger=3"),
    ("deepen", dict(reduce="x"), "reduce='x'"), ("revise", dict(rounds=0), "rounds=0"),
    ("revise", dict(critique_tokens=0), "critique_tokens=0"),
    ("revise", dict(critique=None), "critique=None"), ("revise", dict(revision=1), "revision=1"),
])  # fmt: skip
def test_retries_refuse(strategy, how, message):
    rollouts = policy()
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(search, strategy)(rollouts, QUESTIONS, by_text, TOKENS, **how)
    assert rollouts.rows == 0


@pytest.mark.parametrize("said", [None, 3, b"x", [0.5], {"input_ids": [5]}, [[5]], [5, 10**6]],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["trigger", "critique", "revision"])
def test_prompts_that_say_something_else(name, said):
    """What a function returns is known only when it is called."""
    rollouts = policy()
    strategy = search.deepen if name == "trigger" else search.revise
    with pytest.raises((ValueError, TypeError), match=f"{name} returned "):
        strategy(rollouts, QUESTIONS[:1], by_text, TOKENS, n=1, **{name: lambda *_: said})
    assert rollouts.rows == 0
