"""What can score steps: a PRM, a callable on texts, an exact verifier; all of them as sessions."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

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
        self.extend([[] if step is None else [step] for step in steps])
        newest = [scores[-1] if scores else 0.5 for scores in self.scores]
        return log_odds(newest), torch.tensor(newest, dtype=torch.float32)

    def extend(self, steps: Sequence[Sequence[str]]) -> list[list[float]]:
        """Give each row any number of steps; returns their probabilities."""
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
        check: (question, text so far) -> whether that may still become, or is, a right solution.
    """

    check: Callable[[str, str], bool]

    def session(self, question: str, rows: int) -> TextSession:
        return TextSession(self._score, question, rows)

    def _score(self, question: str, solutions: list[list[str]]) -> list[list[float]]:
        return [
            [float(self.check(question, "".join(steps[: i + 1]))) for i in range(len(steps))]
            for steps in solutions
        ]


NUMBER = r"\$?\d+(?:\.\d+)?"
OPERATION = rf"\s*[-+*/×÷]\s*-?{NUMBER}"
EQUATION = re.compile(
    rf"(?<![\w.])-?{NUMBER}(?:{OPERATION})+(?:\s*=\s*-?{NUMBER}(?:{OPERATION})*)+"
)
FINAL = re.compile(rf"(?:answer is|answer:|####|\\boxed{{)\s*(-?{NUMBER})", re.IGNORECASE)


def arithmetic(answers: Mapping[str, float] | None = None) -> Verifier:
    """A verifier of sums: all equations of a text hold, and its final number is right.

    A final number follows "answer is", "answer:", "####" or "\\boxed{"; it must be the one known,
    or else what the last equation before it comes to. Quotients may be rounded.

    Args:
        answers: final numbers by question, as far as known.
    """
    known = dict(answers or {})

    def check(question: str, text: str) -> bool:
        result = None
        for equation in EQUATION.finditer(text):
            sides = equation[0].split("=")
            result = sides[-1]
            if any(not equal(left, right) for left, right in zip(sides, sides[1:], strict=False)):
                return False
        final = FINAL.search(text)
        if final is None:
            return True
        if question in known:
            return value(final[1]) == Fraction(str(known[question]))
        return result is None or equal(result, final[1])

    return Verifier(check)


def final_number(text: str) -> Fraction | None:
    """The number that `arithmetic` takes for a text's answer."""
    final = FINAL.search(text)
    return None if final is None else value(final[1])


def equal(left: str, right: str) -> bool:
    """Whether two expressions are equal, up to the decimals that are written on the right."""
    try:
        a, b = value(left), value(right)
    except ZeroDivisionError:
        return False
    decimals = right.rpartition(".")[2].strip() if "." in right else ""
    return a == b or (decimals.isdigit() and round(a, len(decimals)) == b)


def value(text: str) -> Fraction:
    """What an expression of +, -, * and / comes to."""
    text = re.sub(r"[\s$]", "", text).replace("×", "*").replace("÷", "/")
    total = Fraction(0)
    for term in re.findall(r"(?:^-?|[-+]-?)\d[\d.]*(?:[*/]-?\d[\d.]*)*", text):
        sign = -1 if term.count("-", 0, len(term) - len(term.lstrip("+-"))) % 2 else 1
        first, *rest = re.findall(r"[*/]?-?\d[\d.]*", term.lstrip("+-"))
        product = Fraction(first)
        for factor in rest:
            number = Fraction(factor[1:])
            product = product * number if factor[0] == "*" else product / number
        total += sign * product
    return total


def log_odds(probabilities: Sequence[float]) -> Tensor:
    """Log-odds in fp32, at most 36 in size."""
    p = np.clip(np.asarray(probabilities, np.float64), EPS, 1 - EPS)
    return torch.from_numpy(np.log(p) - np.log1p(-p)).float()


def session(scorer: Any, question: str, rows: int) -> Session:
    """A session of a scorer: its own, or one over a callable on texts."""
    if hasattr(scorer, "session"):
        return scorer.session(question, rows)
    if callable(scorer):
        return TextSession(scorer, question, rows)
    raise TypeError(
        f"{type(scorer).__name__} scores nothing: pass a PRM, a callable on texts, or a Verifier"
    )


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
