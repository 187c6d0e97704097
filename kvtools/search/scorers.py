"""What can score steps: a PRM, a callable on texts, an exact verifier; all of them as sessions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import sums

# (question, solutions as steps) -> probability of each step of each solution.
TextScorer = Callable[[str, list[list[str]]], Sequence[Sequence[float]]]
EPS = float(np.finfo(np.float64).eps)  # nearest to 0 and 1 that a probability is taken for


class Session(Protocol):
    """Scores of rows that grow step by step, fork, and are rewound.

    Attributes:
        rows: number of rows.
        tokens: tokens encoded so far.
    """

    rows: int
    tokens: int

    def append(self, steps: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Give each row a step, or None; returns log-odds and probability of each row's newest
        step [rows], fp32."""

    def gather(self, index: Sequence[int]) -> None:
        """Make the rows rows[index]."""

    def crop(self, steps: Sequence[int]) -> None:
        """Rewind each row to its own number of steps."""


class TextSession:
    """A callable on texts as a session: it sees whole solutions anew whenever they grow.

    Tokens are counted if the callable counts them, as an attribute `tokens`.
    """

    def __init__(self, scorer: TextScorer, question: str, rows: int) -> None:
        self.scorer, self.question, self.tokens = scorer, question, 0
        self.solutions: list[list[str]] = [[] for _ in range(rows)]
        self.scores: list[list[float]] = [[] for _ in range(rows)]

    @property
    def rows(self) -> int:
        return len(self.solutions)

    def append(self, steps: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        if isinstance(steps, str):
            raise TypeError("steps is a text: pass a list of one step, or None, for each row")
        self.extend([[] if step is None else [step] for step in steps])
        newest = [scores[-1] if scores else 0.5 for scores in self.scores]
        return log_odds(newest), torch.tensor(newest, dtype=torch.float32)

    def extend(self, steps: Sequence[Sequence[str]]) -> list[list[float]]:
        """Give each row any number of steps; returns their probabilities."""
        if isinstance(steps, str) or any(isinstance(new, str) for new in steps):
            raise TypeError("steps holds a text where a list of steps is needed: [[text], ...]")
        if len(steps) != self.rows:
            raise ValueError(f"steps has {len(steps)} entries; there are {self.rows} rows")
        for step in (step for new in steps for step in new):
            if not isinstance(step, str):
                raise TypeError(f"{step!r} is no step: a step is a text")
        solutions = [[*old, *new] for old, new in zip(self.solutions, steps, strict=True)]
        grown = [row for row, new in enumerate(steps) if new]
        before = getattr(self.scorer, "tokens", 0)
        found = self.scorer(self.question, [solutions[row] for row in grown]) if grown else []
        for row, scores in zip(grown, found, strict=True):
            scores = [float(score) for score in scores]
            if len(scores) != len(solutions[row]) or not all(0 <= x <= 1 for x in scores):
                raise ValueError(
                    f"the scorer returned {scores} for {len(solutions[row])} steps: one "
                    "probability for each is needed"
                )
            self.scores[row] = scores
        self.solutions = solutions
        self.tokens += getattr(self.scorer, "tokens", 0) - before
        return [x[len(x) - len(new) :] for x, new in zip(self.scores, steps, strict=True)]

    def gather(self, index: Sequence[int]) -> None:
        self.solutions = [self.solutions[i] for i in index]
        self.scores = [self.scores[i] for i in index]

    def crop(self, steps: Sequence[int]) -> None:
        self.solutions = [x[:n] for x, n in zip(self.solutions, steps, strict=True)]
        self.scores = [x[:n] for x, n in zip(self.scores, steps, strict=True)]


@dataclass(frozen=True)
class Verifier:
    """An exact check as a scorer: every step up to the first mistake is certain.

    Args:
        check: (question, text so far) -> whether that may still become, or is, a right solution;
            None where nothing can be told of it, which scores 0.5, a margin of 0.
    """

    check: Callable[[str, str], bool | None]

    def session(self, question: str, rows: int) -> TextSession:
        return TextSession(self._score, question, rows)

    def _score(self, question: str, solutions: list[list[str]]) -> list[list[float]]:
        found = [
            [self.check(question, "".join(steps[: i + 1])) for i in range(len(steps))]
            for steps in solutions
        ]
        return [[0.5 if x is None else float(x) for x in row] for row in found]


def arithmetic(answers: Mapping[str, float] | None = None) -> Verifier:
    """A verifier of sums: all equations of a text hold, and its final number is right.

    What counts as an equation is told in `kvtools.search.sums`; what it cannot read is not judged.
    A final number follows "answer is", "answer:", "####" or "\\boxed{"; it must be the one known,
    or else what the last equation before it comes to. Decimals may be rounded. A text with nothing
    to check, neither an equation nor a final number to compare, scores 0.5.

    Args:
        answers: final numbers by question, as far as known.

    Raises:
        ValueError: an answer is no finite number.
    """
    known = {}
    for question, answer in dict(answers or {}).items():
        try:
            known[question] = Fraction(str(answer))
        except ValueError as error:
            raise ValueError(f"answers[{question!r}]={answer!r}: no finite number") from error

    def check(question: str, text: str) -> bool | None:
        found = sums.final(text)
        right, before = None, None
        for equation in sums.equations(text):
            holds = equation.holds()
            if holds is False:
                return False
            right = right or holds
            if holds and found and equation.start <= found[0]:
                before = equation.sides[-1]
        if found is None:
            return right
        numbers = sums.readings(found[1]) if found[1] else set()
        if question in known:
            return known[question] in numbers
        if before is None or not numbers:
            return right
        return sums.agree(before, found[1]) is not False

    return Verifier(check)


def final_number(text: str) -> Fraction | None:
    """The number that `arithmetic` takes for a text's answer."""
    found = sums.final(text)
    return None if found is None or found[1] is None else min(sums.readings(found[1]))


def log_odds(probabilities: Sequence[float]) -> Tensor:
    """Log-odds in fp32, at most 36 in size."""
    p = np.clip(np.asarray(probabilities, np.float64), EPS, 1 - EPS)
    return torch.from_numpy(np.log(p) - np.log1p(-p)).float()


def scores(scorer: Any) -> None:
    """Raise TypeError unless that is a scorer."""
    if not hasattr(scorer, "session") and not callable(scorer):
        raise TypeError(
            f"{type(scorer).__name__} scores nothing: pass a PRM, a callable on texts, or a "
            "Verifier"
        )


def session(scorer: Any, question: str, rows: int) -> Session:
    """A session of a scorer: its own, or one over a callable on texts."""
    if hasattr(scorer, "session"):
        return scorer.session(question, rows)
    return TextSession(scorer, question, rows)


def append(session: Session, steps: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
    """Give each row any number of steps; returns their log-odds and probabilities."""
    if isinstance(session, TextSession):
        return [
            list(zip(log_odds(scores).tolist(), scores, strict=True))
            for scores in session.extend(steps)
        ]
    found: list[list[tuple[float, float]]] = [[] for _ in steps]
    for i in range(max(map(len, steps), default=0)):
        margin, probability = session.append([x[i] if i < len(x) else None for x in steps])
        for row, (m, p) in enumerate(zip(margin.tolist(), probability.tolist(), strict=True)):
            if i < len(steps[row]):
                # The same number with more digits: all margins above 17 are 1 in float32.
                exact = sigmoid(m)
                found[row].append((m, exact if abs(exact - p) < 1e-6 else p))
    return found


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)) if x >= 0 else np.exp(x) / (1 + np.exp(x)))
