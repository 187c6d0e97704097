"""Strategies that select by score: best-of-N, beam search, DVTS, REBASE, pruning on the way."""

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np

from ..rollouts import Rollouts
from .result import Candidate, Result, Rows, growing, reduction
from .run import TEMPERATURES, Run, Steps, whole, within
from .stopping import SelfEvaluation, Stopping, grow_until

# (question, rows, what they are judged by) -> rows that go on, rows that become candidates, why.
Rule = Callable[[int, list[Candidate], Sequence[float]], tuple[list[int], list[int], str]]


def best_of_n(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    stop: Stopping | None = None,
    seed: int = 0,
) -> Result:
    """`n` independent solutions of each question, scored at the end.

    Args:
        rollouts: the policy, without rows; it samples.
        scorer: a PRM, a callable on texts, or a `Verifier`; with None every step scores 0.5.
        stop: rules by which rows and problems stop early; scores then come step by step. Rows that
            go on have the tokens that they have without.
        seed: of all draws.

    Returns:
        All candidates; `Result.best` takes the best, or a weighted or plain vote. Those that `stop`
        ended are in `Result.stopped`, with an estimate of what that saved in `Result.saved`.
    """
    scorer = _indifferent if scorer is None else scorer
    if stop is not None and not isinstance(stop, Stopping):
        raise TypeError(f"stop={stop!r}: a Stopping is needed")
    with Run(rollouts, questions, scorer, steps, n, seed) as run:
        if stop is not None:
            found, stopped = grow_until(run, stop)
            return run.result(found, stopped=stopped)
        rows = run.start()
        run.grow(rows, whole=True)
        return run.result(rows)


def beam(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    beam: int = 4,
    lookahead: int = 0,
    reduce: str = "last",
    seed: int = 0,
) -> Result:
    """Beam search over steps: of `n` rows the best n / beam go on, repeated in turn to `n`.

    Rows that finish become candidates and make room. Of equal scores the later row is kept, as a
    stable ascending sort has it.

    Args:
        n: rows that grow, of each question.
        beam: continuations of each row that is kept; divides `n`.
        lookahead: greedy steps that a row is judged with, and which are then forgotten.
        reduce: one number for all steps of a row, see `Candidate.score`.

    Returns:
        All candidates in the order in which they finished, at least one for each question.

    Reference: arXiv:2408.03314, as in search-and-learn.
    """
    width = _divided(n, beam)
    _judged(lookahead, reduce)

    def rule(
        question: int, rows: list[Candidate], values: Sequence[float]
    ) -> tuple[list[int], list[int], str]:
        live = [i for i, c in enumerate(rows) if not c.finished]
        best = np.argsort([values[i] for i in live], kind="stable")[-width:]
        kept = [live[i] for i in sorted(best)]
        ended = [i for i, c in enumerate(rows) if c.finished]
        return (kept * n)[:n], ended, f"best {width} of {len(live)} by {reduce}"

    with Run(rollouts, questions, scorer, steps, n, seed) as run:
        found = _descend(run, run.start(), rule, lambda rows: run.ahead(rows, lookahead, reduce))
        return run.result(found)


def dvts(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    beam: int = 4,
    lookahead: int = 0,
    reduce: str = "last",
    seed: int = 0,
) -> Result:
    """Diverse verifier tree search: n / beam independent subtrees, each keeps its best row.

    Args:
        n: rows that grow, of each question.
        beam: continuations of a subtree's row, of which the first best goes on; divides `n`.
        lookahead, reduce: as for `beam`.

    Returns:
        The continuations that each subtree ended with, `n` of each question; those beside a
        finished row may be unfinished.

    Reference: search-and-learn.
    """
    _divided(n, beam)
    _judged(lookahead, reduce)

    def rule(
        question: int, rows: list[Candidate], values: Sequence[float]
    ) -> tuple[list[int], list[int], str]:
        kept, ended = [], []
        for start in range(0, len(rows), beam):
            best = start + int(np.argmax(values[start : start + beam]))
            if rows[best].finished:
                ended += range(start, start + beam)
            else:
                kept += [best] * beam
        return kept, ended, f"best of each {beam} by {reduce}"

    with Run(rollouts, questions, scorer, steps, n, seed) as run:
        found = _descend(run, run.start(), rule, lambda rows: run.ahead(rows, lookahead, reduce))
        return run.result([sorted(some, key=lambda c: c.origin // beam) for some in found])


def rebase(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    temperature: float = 0.2,
    reduce: str = "last",
    seed: int = 0,
) -> Result:
    """Reward-balanced search: rows get continuations in proportion to softmax(score / temperature).

    From the best row down, each gets the share of the width that is left, rounded up; every
    finished row takes one off the width. Of equal scores the later row comes first.

    Args:
        n: width.
        temperature: of the softmax, from 1e-6, at which the best rows take all, to 1e6;
            probabilities are compared, not log-odds.
        reduce: as for `beam`.

    Returns:
        All candidates in the order in which they finished.

    Reference: arXiv:2408.00724.
    """
    within("temperature", temperature, *TEMPERATURES)
    _judged(0, reduce)
    left = [n] * len(questions)

    def rule(
        question: int, rows: list[Candidate], values: Sequence[float]
    ) -> tuple[list[int], list[int], str]:
        ended = [i for i, c in enumerate(rows) if c.finished]
        live = [i for i, c in enumerate(rows) if not c.finished]
        left[question] -= len(ended)
        order = sorted(live, key=lambda i: values[i])[::-1]
        top = max((values[i] for i in order), default=0.0)
        weights = np.exp([(values[i] - top) / temperature for i in order])
        width, kept = left[question], []
        for i, weight, rest in zip(order, weights, _rests(weights), strict=True):
            if width <= 0:  # what is left may weigh nothing at all
                break
            children = max(0, math.ceil(width * weight / rest))
            kept += [i] * children
            width -= children
        return kept, ended, f"{left[question]} shared out by {reduce}"

    with Run(rollouts, questions, scorer, steps, n, seed) as run:
        rows = run.start()
        return run.result(_descend(run, rows, rule, lambda rows: run.ahead(rows, 0, reduce)))


def prune(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    evaluation: SelfEvaluation | None = None,
    least: float = 0.5,
    reduce: str = "last",
    seed: int = 0,
) -> Result:
    """Best-of-N that drops rows on the way, by what the policy itself says of them.

    After each step the policy is asked once per row. Rows whose probability of `good` against `bad`
    is under `least` are dropped; where that leaves no row and no candidate, the best one stays.

    Args:
        n: rows at the start, of each question.
        evaluation: what is asked; default `SelfEvaluation()`.
        least: probability under which a row is dropped.

    Returns:
        The candidates that were not dropped.

    Reference: arXiv:2410.02725.
    """
    asked = evaluation or SelfEvaluation()
    within("least", least, 0, 1)
    _judged(0, reduce)
    ask, good, bad = asked.tokens(steps)
    finished = [False] * len(questions)

    def judge(rows: Rows) -> list[list[float]]:
        return run.probe(rows, ask, good, bad)

    def rule(
        question: int, rows: list[Candidate], values: Sequence[float]
    ) -> tuple[list[int], list[int], str]:
        ended = [i for i, c in enumerate(rows) if c.finished]
        live = [i for i, c in enumerate(rows) if not c.finished]
        finished[question] |= bool(ended)
        kept = [i for i in live if values[i] >= least]
        if not kept and not finished[question]:
            kept = [max(live, key=lambda i: values[i])]
        return kept, ended, f"self-evaluation at least {least}"

    with Run(rollouts, questions, scorer, steps, n, seed) as run:
        return run.result(_descend(run, run.start(), rule, judge))


def _descend(run: Run, rows: Rows, rule: Rule, judge: Callable[[Rows], list[list[float]]]) -> Rows:
    """Grow and select until no row is left; returns the candidates of each question."""
    found: Rows = [[] for _ in run.questions]
    for depth in count(1):
        run.grow(rows)
        while depth >= run.steps.depth and growing(rows):
            run.grow(rows)
        values = judge(rows)
        choices = [
            rule(question, some, x) if some else ([], [], "")
            for question, (some, x) in enumerate(zip(rows, values, strict=True))
        ]
        for candidates, some, (_, ended, _) in zip(found, rows, choices, strict=True):
            candidates += [some[i] for i in ended]
        rows = run.select(rows, [x[0] for x in choices], values, [x[2] for x in choices])
        if not any(rows):
            break
    return found


def _indifferent(question: str, solutions: list[list[str]]) -> list[list[float]]:
    return [[0.5] * len(steps) for steps in solutions]


def _judged(lookahead: int, reduce: str) -> None:
    whole("lookahead", lookahead, 0)
    reduction(reduce)


def _divided(n: int, beam: int) -> int:
    whole("n", n, 1)
    whole("beam", beam, 1)
    if n < beam or n % beam:
        raise ValueError(f"n={n} is not a positive multiple of beam={beam}")
    return n // beam


def _rests(weights: np.ndarray) -> list[float]:
    """Of each weight the sum from it on; of the last exactly it, so that no share is over one."""
    return np.cumsum(weights[::-1])[::-1].tolist()
