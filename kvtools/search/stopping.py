"""When a row is given up, and when a problem needs no more of them."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .result import Candidate, Rows, reduction
from .run import Run, Steps, whole, within


@dataclass(frozen=True)
class SelfEvaluation:
    """A question to the policy about its own solution so far, answered by one token.

    Args:
        ask: text that is appended, read and forgotten.
        good, bad: answers; the first token of each counts.
    """

    ask: str = "\nIs this solution right so far? Answer yes or no:"
    good: str = " yes"
    bad: str = " no"

    def tokens(self, steps: Steps) -> tuple[list[int], int, int]:
        """What is appended, and the two answers."""
        found = {name: list(steps.tokenizer.encode(text)) for name, text in vars(self).items()}
        for name, tokens in found.items():
            if not tokens:
                raise ValueError(f"evaluation.{name}={getattr(self, name)!r} gives no token")
        good, bad = found["good"][0], found["bad"][0]
        if good == bad:
            raise ValueError(
                f"evaluation: {self.good!r} and {self.bad!r} begin with the same token, which "
                "alone is read: choose other answers"
            )
        return found["ask"], good, bad


@dataclass(frozen=True)
class Stopping:
    """Rules after each step of `best_of_n`; those not given do nothing.

    A row that stops is no candidate; where nothing else is left of its problem, the best one goes
    on. After `Steps.depth` steps a row is no longer judged.

    Args:
        margin: a row stops where the line through its last `window` log-odds, continued by `ahead`
            steps, is below this.
        window, ahead: of that trend; a window of 1 takes the last step's log-odds alone.
        evaluation: a row stops where the policy's probability of `good` is under `least`.
        least: for `evaluation`.
        longer: a row stops once it has more than so many times the mean tokens of the rows of its
            problem that have finished.
        answer: reads a text's answer, or None: a problem stops when the rows that grow or wait
            could no longer change the first of a majority.
        sure: with `answer`, a problem stops as well once the first answer is more frequent than the
            second with at least this probability: of v and w votes, that of a share over a half
            under Beta(v + 1, w + 1). The majority may then be another than that of all rows.
        enough: a problem stops with so many finished rows of a score of at least `verified`.
        verified, reduce: for `enough`; see `Candidate.score`.
        wave: rows of a problem that grow at a time; others wait for those to end. None is all. It
            takes longer, and more is saved where a problem stops.

    Raises:
        ValueError, TypeError: a value is out of range or of another kind, or `sure` is given
            without `answer`; says which.

    Reference: `sure` is the stopping of arXiv:2305.11860.
    """

    margin: float | None = None
    window: int = 3
    ahead: int = 1
    evaluation: SelfEvaluation | None = None
    least: float = 0.5
    longer: float | None = None
    answer: Callable[[str], Hashable | None] | None = None
    sure: float | None = None
    enough: int | None = None
    verified: float = 0.9
    reduce: str = "last"
    wave: int | None = None

    def __post_init__(self) -> None:
        if self.margin is not None:
            within("margin", self.margin, -1e6, 1e6)
        whole("window", self.window, 1)
        whole("ahead", self.ahead, 0)
        if self.evaluation is not None and not isinstance(self.evaluation, SelfEvaluation):
            raise TypeError(f"evaluation={self.evaluation!r}: a SelfEvaluation is needed")
        within("least", self.least, 0, 1)
        if self.longer is not None:
            within("longer", self.longer, 0, 1e6)
        if self.answer is not None and not callable(self.answer):
            raise TypeError(f"answer={self.answer!r}: a function is needed")
        if self.sure is not None:
            within("sure", self.sure, 0, 1)
            if self.answer is None:
                raise ValueError(f"sure={self.sure!r} needs answer=, which reads a text's answer")
        if self.enough is not None:
            whole("enough", self.enough, 1)
        within("verified", self.verified, 0, 1)
        reduction(self.reduce)
        if self.wave is not None:
            whole("wave", self.wave, 1)

    def hopeless(self, c: Candidate, opinion: float, mean: float | None) -> bool:
        """Whether a row stops.

        Args:
            opinion: the policy's own of it, where that is asked.
            mean: tokens of finished rows of its problem, None before there is one.
        """
        trend = self.margin is not None and bool(c.margins)
        return (
            (trend and _continued(c.margins[-self.window :], self.ahead) < self.margin)
            or (self.evaluation is not None and opinion < self.least)
            or (self.longer is not None and mean is not None and len(c.tokens) > self.longer * mean)
        )

    def settled(self, finished: Sequence[Candidate], open_rows: int) -> str:
        """Why a problem stops; "" if it goes on."""
        if self.enough is not None:
            good = sum(c.score(self.reduce) >= self.verified for c in finished)
            if good >= self.enough:
                return f"{good} verified"
        if self.answer is not None:
            votes: defaultdict[Hashable, int] = defaultdict(int)
            for c in finished:
                answer = self.answer(c.text)
                if answer is not None:
                    votes[answer] += 1
            first, second = (*sorted(votes.values(), reverse=True), 0, 0)[:2]
            if first - second > open_rows:
                return f"{first} votes to {second}, {open_rows} open"
            if self.sure is not None and first and leads(first, second) >= self.sure:
                return f"{first} votes to {second}, ahead by {leads(first, second):.3f}"
        return ""


def leads(first: int, second: int) -> float:
    """Probability that a share drawn from Beta(first + 1, second + 1) is over a half."""
    tosses = first + second + 1  # it is that of so many tosses of a coin with `first` heads at most
    return sum(math.comb(tosses, k) for k in range(first + 1)) / 2**tosses


def grow_until(run: Run, stop: Stopping) -> tuple[Rows, Rows]:
    """Grow a run's rows under such rules; returns, of each question, the finished ones and those
    that were stopped."""
    asked = None if stop.evaluation is None else stop.evaluation.tokens(run.steps)
    rows = run.start()
    found: Rows = [[] for _ in rows]
    stopped: Rows = [[] for _ in rows]
    while any(rows):
        for some in rows:
            for i, c in enumerate(some):
                c.waits = stop.wave is not None and i >= stop.wave
        run.grow(rows)
        opinions = (
            [[1.0] * len(some) for some in rows] if asked is None else run.probe(rows, *asked)
        )
        kept, why = [], []
        for question, some in enumerate(rows):
            index, reason = _judge(stop, run.steps.depth, some, opinions[question], found[question])
            stopped[question] += [
                c for i, c in enumerate(some) if i not in index and not c.finished
            ]
            kept.append(index)
            why.append(reason)
        rows = run.select(rows, kept, [[c.score(stop.reduce) for c in x] for x in rows], why)
    for some in (*found, *stopped):
        some.sort(key=lambda c: c.origin)
    return found, stopped


def _judge(
    stop: Stopping, depth: int, rows: list[Candidate], opinions: list[float], found: list[Candidate]
) -> tuple[list[int], str]:
    """The rows of a question that go on, and why; those that have finished are added to `found`."""
    ended = [c for c in rows if c.finished]
    found += ended
    live = [i for i, c in enumerate(rows) if not c.finished]
    reason = stop.settled(found, len(live))
    if reason:
        return [], reason
    mean = float(np.mean([len(c.tokens) for c in found])) if found else None
    judged = [i for i in live if not rows[i].waits and len(rows[i].steps) <= depth]
    lost = [i for i in judged if stop.hopeless(rows[i], opinions[i], mean)]
    if lost and len(lost) == len(live) and not found:
        lost.remove(max(lost, key=lambda i: rows[i].score(stop.reduce)))
    # Fewer votes to come may settle a problem as well.
    reason = stop.settled(found, len(live) - len(lost)) if lost else ""
    if reason:
        return [], reason
    said = [f"{len(lost)} hopeless"] * bool(lost) + [f"{len(ended)} finished"] * bool(ended)
    return [i for i in live if i not in lost], ", ".join(said)


def _continued(values: Sequence[float], ahead: int) -> float:
    """The line of least squares through values at 0, 1, ..., read `ahead` after the last."""
    y, x = np.array(values), np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ y / (x @ x)) if len(y) > 1 else 0.0
    return float(y.mean() + slope * (x[-1] + ahead))
