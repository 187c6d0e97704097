"""What a search returns: candidates, the trace of its selections, and what it cost."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# One number for the steps of a solution, from probabilities and log-odds: see `step_scores`.
REDUCE: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "last": lambda p, margin: p[-1],
    "min": lambda p, margin: p.min(),
    "max": lambda p, margin: p.max(),
    "mean": lambda p, margin: p.mean(),
    "sum": lambda p, margin: p.sum(),
    "prod": lambda p, margin: p.prod(),
    "gmean": lambda p, margin: np.exp(np.log(np.maximum(p, 1e-300)).mean()),
    "sum_logit": lambda p, margin: margin.sum(),
    "softmin": lambda p, margin: np.average(p, weights=np.exp(10 * (p.min() - p))),
}
NOTHING = -36.0  # log-odds of a solution without steps


def reduction(reduce: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """The one of `REDUCE` that an argument names; ValueError if there is none."""
    if reduce not in REDUCE:
        raise ValueError(f"reduce={reduce!r}: one of {', '.join(REDUCE)}")
    return REDUCE[reduce]


@dataclass
class Candidate:
    """A solution as far as it has got.

    Attributes:
        steps: texts of its steps, delimiters included; blank ones are left out.
        text: all of its text.
        margins: log-odds of each step, as the scorer gave them when it came.
        scores: probability of each step, likewise.
        tokens: its tokens without the prompt, those of turns before it included.
        finished: why it ended: "eos", "done" or "length"; "" if it may go on.
        origin: which of the first rows it descends from.
        log_weight: of a particle, at the end.
        start: where in `tokens` it begins, behind earlier turns.
    """

    steps: list[str] = field(default_factory=list)
    text: str = ""
    margins: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: str = ""
    origin: int = 0
    log_weight: float = 0.0
    start: int = 0
    ends: list[int] = field(default_factory=list, repr=False)  # tokens at the end of each step
    row: int | None = field(default=None, repr=False)  # among its question's rows in the caches
    waits: bool = field(default=False, repr=False)  # does not grow for the time being

    def score(self, reduce: str = "last") -> float:
        """One number for all steps; `reduce` as for `kvtools.step_scores`."""
        reduced = reduction(reduce)
        scores, margins = self.scores or [0.0], self.margins or [NOTHING]
        return float(reduced(np.array(scores), np.array(margins)))

    def copy(self) -> "Candidate":
        lists = ("steps", "margins", "scores", "tokens", "ends")
        return replace(self, **{name: list(getattr(self, name)) for name in lists})


Rows = list[list[Candidate]]  # of each question


@dataclass(frozen=True)
class Event:
    """A selection among the rows of one question.

    Attributes:
        step: how many steps had been grown.
        question: its number.
        values: what the rows were judged by.
        kept: rows that went on, as indices into those before. Repeats are forks; what is missing
            was pruned, unless it finished.
        finished: rows that ended, and stay candidates where the strategy keeps them.
        why: the rule, in words.
        run: which search of those that a strategy makes in turn.
    """

    step: int
    question: int
    values: tuple[float, ...]
    kept: tuple[int, ...]
    finished: tuple[int, ...]
    why: str
    run: int = 0


@dataclass
class Result:
    """What a search found.

    Attributes:
        questions: as given.
        candidates: of each question.
        trace: every selection, in order.
        generated: tokens that the policy generated, lookahead included.
        encoded: tokens that the scorer encoded, as far as it counts them.
        seconds: by part: "policy", "scorer", "caches" (forks and rewinds), and "all".
        log_evidence: of particle methods, by question: log of the estimated mean over solutions of
            the product of step weights.
        spent: tokens that the policy generated for each question.
        stopped: of each question, rows that `Stopping` ended before they finished.
    """

    questions: list[str]
    candidates: Rows
    trace: list[Event]
    generated: int
    encoded: int
    seconds: dict[str, float]
    log_evidence: list[float] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    stopped: Rows = field(default_factory=list)

    @property
    def saved(self) -> float:
        """Tokens that stopping saved, estimated: each row would have become as long as those that
        finished and are longer are on average, of its question, or else of all; where there is none
        it counts for nothing."""
        every = [len(c.tokens) for some in self.candidates for c in some if c.finished]
        total = 0.0
        for some, rows in zip(self.candidates, self.stopped, strict=bool(self.stopped)):
            own = [len(c.tokens) for c in some if c.finished]
            for length in (len(c.tokens) for c in rows):
                longer = [x for x in own if x > length] or [x for x in every if x > length]
                total += float(np.mean(longer)) - length if longer else 0.0
        return total

    def best(self, how: str = "max", **options: Any) -> list[Candidate | None]:
        """Of each question the candidate that `choose` takes."""
        return [choose(candidates, how, **options) for candidates in self.candidates]


def choose(
    candidates: Sequence[Candidate],
    how: str = "max",
    *,
    answer: Callable[[str], Hashable | None] | None = None,
    reduce: str = "last",
) -> Candidate | None:
    """One candidate of those of a question.

    Args:
        how: "max" takes the best score; "weighted" the answer whose scores sum up to most, and
            "majority" the most frequent one, each with its best candidate. Of equals the first.
        answer: canonical answer of a text, or None. Candidates without one count only where no
            candidate has one.
        reduce: as for `Candidate.score`.
    """
    if how not in ("max", "weighted", "majority"):
        raise ValueError(f"how={how!r}: one of max, weighted, majority")
    if answer is None and how != "max":
        raise ValueError(f"how={how!r} needs answer=, which reads the answer off a text")
    named = [(answer(c.text) if answer else None, c) for c in candidates]
    if any(x is not None for x, _ in named):
        named = [(x, c) for x, c in named if x is not None]
    if how != "max":
        votes: dict[Hashable, float] = {}
        for x, c in named:
            votes[x] = votes.get(x, 0.0) + (c.score(reduce) if how == "weighted" else 1.0)
        winner = max(votes, key=votes.__getitem__, default=None)
        named = [(x, c) for x, c in named if x == winner]
    return max((c for _, c in named), key=lambda c: c.score(reduce), default=None)


def growing(rows: Rows) -> bool:
    return any(not c.finished for some in rows for c in some)
