"""What verifiers, votes and tests are worth: when to stop sampling, when not to answer."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .result import Candidate, Result
from .run import whole, within

CONFIDENCE = ("share", "margin", "both")
Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Rate:
    """A share that was estimated: NaN, from 0 to 1, where there was nothing to count.

    Attributes:
        value: the share seen.
        low, high: a 95 % interval, Wilson's.
        n: what it was counted among.
    """

    value: float
    low: float
    high: float
    n: int


def error_rates(right: Sequence[bool], passed: Sequence[bool]) -> tuple[Rate, Rate]:
    """How often a verifier passes wrong solutions, and how often right ones.

    Args:
        right: of labelled solutions, whether each is right.
        passed: whether the verifier passes it.

    Returns:
        The false-positive and the true-positive rate.

    Raises:
        ValueError: there is not one label for each solution, or none at all.
    """
    labels, verdicts = _flags("right", right), _flags("passed", passed)
    if len(labels) != len(verdicts):
        raise ValueError(f"right has {len(labels)} entries and passed {len(verdicts)}")
    if not len(labels):
        raise ValueError("right is empty: a verifier is judged by at least one labelled solution")
    return _rate(verdicts[~labels]), _rate(verdicts[labels])


def best_n(
    pass_rates: Sequence[float],
    *,
    false_positive: float,
    true_positive: float = 1.0,
    loss: float = 1.0,
    price: float = 0.0,
    weights: Sequence[float] | None = None,
    most: int = 1000,
) -> int:
    """How many samples to draw until one passes the verifier, before more do harm.

    A sample of a problem with pass rate p passes with a = p * tpr + (1 - p) * fpr. At most K draws
    are worth, on average over problems,

        (p * tpr - loss * (1 - p) * fpr - price) * (1 - (1 - a)^K) / a

    Hard problems pass late, and then mostly what is wrong: where that weighs more, the sum falls.

    Args:
        pass_rates: of each problem, the share of right samples.
        false_positive, true_positive: of the verifier, see `error_rates`.
        loss: what a wrong answer costs, where a right one earns 1 and none 0.
        price: of a draw.
        weights: of the problems; default equal ones.
        most: draws at most.

    Returns:
        The least K from 0 to `most` that is worth most, to rounding.

    Raises:
        ValueError: a number is out of range.

    Reference: arXiv:2411.17501.
    """
    rates = _numbers("pass_rates", pass_rates)
    if not len(rates) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("pass_rates must hold at least one number, each from 0 to 1")
    within("false_positive", false_positive, 0, 1)
    within("true_positive", true_positive, 0, 1)
    within("loss", loss, 0, 1e12)
    within("price", price, 0, 1e12)
    whole("most", most, 0)
    share = np.ones(len(rates)) if weights is None else _numbers("weights", weights)
    if len(share) != len(rates) or not (share >= 0).all() or not np.isfinite(share).all():
        raise ValueError(f"weights must hold {len(rates)} numbers, none negative")
    share = share / (share.max() or 1.0)  # units of weights must not decide
    passes = rates * true_positive + (1 - rates) * false_positive
    gain, harm = rates * true_positive, loss * (1 - rates) * false_positive + price
    # What a draw adds where none before it has passed; rounding is no gain.
    left, worth, total, best, top = share, gain - harm, 0.0, 0, 0.0
    least = 1e-15 * float(share @ (gain + harm))
    for n in range(1, most + 1):
        total += float(left @ worth)
        if total > top + max(least, 1e-15 * top):
            best, top = n, total
        left = left * (1 - passes)
    return best


def confidence(
    answers: Sequence[Hashable | None],
    how: str = "both",
    *,
    weights: Sequence[float] | None = None,
) -> float:
    """How sure a vote is, from 0 to 1.

    Args:
        answers: of each candidate; None is a vote for nobody, which makes a vote less sure.
        how: "share" of the first among all; "margin", its lead over the second among all; "both",
            their mean, which tells apart what one of them does not.
        weights: of the votes; default equal ones.

    Returns:
        The confidence; 0 without votes.

    Raises:
        TypeError: an answer is not hashable.
        ValueError: `how` is none of these, or the weights do not fit.
    """
    if how not in CONFIDENCE:
        raise ValueError(f"how={how!r}: one of {', '.join(CONFIDENCE)}")
    heavy = np.ones(len(answers)) if weights is None else _numbers("weights", weights)
    if len(heavy) != len(answers) or not (heavy >= 0).all() or not np.isfinite(heavy).all():
        raise ValueError(f"weights must hold {len(answers)} numbers, none negative")
    votes: dict[Hashable, list[float]] = {}
    for i, (answer, weight) in enumerate(zip(answers, heavy.tolist(), strict=True)):
        if answer is not None:
            try:
                votes.setdefault(answer, []).append(weight)
            except TypeError as error:
                raise TypeError(f"answers[{i}]={answer!r}: votes must be hashable") from error
    # Rounded once, so that a part is never more than the whole.
    total = math.fsum(heavy)
    if not votes or not total:
        return 0.0
    first, second = (*sorted(map(math.fsum, votes.values()), reverse=True), 0.0)[:2]
    share, margin = first / total, (first - second) / total
    return {"share": share, "margin": margin, "both": (share + margin) / 2}[how]


def threshold(
    confidences: Sequence[float],
    right: Sequence[bool] | None = None,
    *,
    coverage: float | None = None,
    precision: float | None = None,
) -> float:
    """The confidence under which to abstain, from labelled problems.

    Args:
        confidences: of their answers.
        right: whether each answer is right; for `precision`.
        coverage: share of problems to be answered at least. The highest such threshold is taken.
        precision: share of the answers to be right at least. The lowest such threshold is taken:
            of few problems it promises too much.

    Returns:
        The threshold, one of the confidences: those from it on are answered. inf where no threshold
        is that precise.

    Raises:
        ValueError: not one of `coverage` and `precision` is given, or numbers do not fit.
    """
    sure = _numbers("confidences", confidences)
    if not len(sure) or not np.isfinite(sure).all():
        raise ValueError("confidences must hold at least one number, all finite")
    if (coverage is None) == (precision is None):
        raise ValueError("give one of coverage and precision")
    levels = np.unique(sure)  # ascending
    if coverage is not None:
        within("coverage", coverage, 0, 1)
        answered = [(sure >= x).mean() >= coverage - 1e-12 for x in levels]
        return float(levels[np.flatnonzero(answered)[-1]])
    within("precision", precision, 0, 1)
    labels = _flags("right", () if right is None else right)
    if len(labels) != len(sure):
        raise ValueError(f"right must hold a label for each of {len(sure)} confidences")
    good = (x for x in levels if labels[sure >= x].mean() >= precision - 1e-12)
    return float(next(good, math.inf))


@dataclass(frozen=True)
class Consensus:
    """Solutions that pass the same tests, and those tests.

    Attributes:
        solutions, tests: their numbers, ascending.
        posterior: probability that these are the right solutions and the right tests.
    """

    solutions: tuple[int, ...]
    tests: tuple[int, ...]
    posterior: float


def vote_by_tests(
    passes: Any,
    *,
    wrong_test: tuple[float, float] = (1.0, 10.0),
    right_test: tuple[float, float] = (1.0, 1.0),
    solutions: tuple[float, float] = (1.0, 1.0),
    tests: tuple[float, float] = (1.0, 1.0),
) -> list[Consensus]:
    """Which solutions and which tests are right, where both may be wrong.

    A right solution passes exactly the right tests. A wrong one passes a wrong test with
    probability theta0 and a right one with theta1. With Beta priors on these and on the shares of
    right solutions and right tests, the posterior of a consensus set is a product of four Beta
    functions, normalised over the sets of the table: the paper's score, as a probability.

    The default priors are ours. The paper's code takes wrong_test=(1, 1e4) to (1, 1e6) and
    solutions = tests = (1e3, 1), by which next to no wrong solution passes a wrong test. That asks
    for many solutions and tests: of simulated tables of 16 solutions and 8 tests, where a wrong
    solution passes a wrong test in one case of five, its priors find a right solution in 0.71 or
    0.65, the defaults in 0.87 (in one case of fifty: all in 0.85; of tables of 100 x 100: in all).

    Args:
        passes: bool [solutions, tests], whether each solution passes each test.
        wrong_test, right_test: priors (a, b) of theta0 and theta1. That a wrong solution seldom
            passes a wrong test is what tells the two apart.
        solutions, tests: priors of the shares of right ones.

    Returns:
        The consensus sets, the likeliest first, of equals that with the first solution.

    Raises:
        ValueError: the table is none, or a prior is not two positive numbers up to 1e9.

    Reference: arXiv:2409.08692.
    """
    try:
        table = np.asarray(passes)
    except ValueError:  # rows of several lengths
        table = np.zeros(0)
    if table.ndim != 2 or not np.isin(table, (0, 1)).all():
        raise ValueError("passes must be a table [solutions, tests] of True and False")
    table = table.astype(bool)
    given = dict(wrong_test=wrong_test, right_test=right_test, solutions=solutions, tests=tests)
    for name, prior in given.items():
        pair = _numbers(name, prior)
        # Logs of gamma functions of more have lost what tells sets apart.
        if len(pair) != 2 or not ((pair > 0) & (pair <= 1e9)).all():
            raise ValueError(f"{name}={prior!r}: two positive numbers of a Beta distribution, "
                             "1e9 at most")  # fmt: skip
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(table):
        groups.setdefault(row.tobytes(), []).append(i)
    found, logs = [], []
    for group in groups.values():
        good = table[group[0]]
        others = np.delete(table, group, axis=0)
        logs.append(
            _gain(solutions, len(group), len(others))
            + _gain(tests, good.sum(), (~good).sum())
            + _gain(right_test, others[:, good].sum(), (~others[:, good]).sum())
            + _gain(wrong_test, others[:, ~good].sum(), (~others[:, ~good]).sum())
        )
        found.append((tuple(group), tuple(np.flatnonzero(good).tolist())))
    chances = np.exp(np.array(logs) - max(logs, default=0.0))
    chances = chances / chances.sum()
    sets = [Consensus(*x, float(p)) for x, p in zip(found, chances, strict=True)]
    return sorted(sets, key=lambda x: -x.posterior)


def by_tests(
    result: Result, execute: Callable[[str, list[str]], Any], *, reduce: str = "last", **priors: Any
) -> list[Candidate | None]:
    """Of each question the candidate that a vote by tests takes.

    Args:
        execute: (question, texts) -> table [texts, tests], whether each passes each test. It runs
            what there is to run; nothing is run here.
        reduce: within the likeliest set the best score is taken, see `Candidate.score`.
        priors: as for `vote_by_tests`.

    Raises:
        ValueError: a table has not one row for each candidate.
    """
    found: list[Candidate | None] = []
    for question, candidates in zip(result.questions, result.candidates, strict=True):
        if not candidates:
            found.append(None)
            continue
        table = np.asarray(execute(question, [c.text for c in candidates]))
        if table.ndim != 2 or len(table) != len(candidates):
            raise ValueError(
                f"execute returned a table of shape {table.shape} for {len(candidates)} texts of "
                f"{question!r}: one row for each is needed"
            )
        best = vote_by_tests(table, **priors)[0]
        found.append(max((candidates[i] for i in best.solutions), key=lambda c: c.score(reduce)))
    return found


def _gain(prior: tuple[float, float], yes: int, no: int) -> float:
    """Log of B(a + yes, b + no) / B(a, b)."""
    a, b = prior
    return _log_beta(a + float(yes), b + float(no)) - _log_beta(a, b)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _rate(passed: np.ndarray) -> Rate:
    n = len(passed)
    if not n:
        return Rate(math.nan, 0.0, 1.0, 0)
    p = float(passed.mean())
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Rate(p, max(0.0, middle - half), min(1.0, middle + half), n)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r}: numbers are needed") from error
    if found.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers")
    return found


def _flags(name: str, values: Sequence[bool]) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1 or not np.isin(found, (0, 1)).all():
        raise ValueError(f"{name} must be a list of True and False")
    return found.astype(bool)
