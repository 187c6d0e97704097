"""Doubt: best_n against closed forms, votes and thresholds by hand, tests against integration."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from kvtools import search


@pytest.mark.parametrize("p1,p2,w,fpr,tpr,loss", [
    (0.6, 0.02, 1.0, 0.05, 1.0, 1.0), (0.3, 0.001, 2.0, 0.2, 0.9, 0.5),
    (0.5, 0.0, 0.1, 0.02, 0.8, 2.0), (0.6, 0.05, 0.5, 0.1, 0.95, 4.0),
])  # fmt: skip
def test_best_n_of_two_kinds_is_the_closed_form(p1, p2, w, fpr, tpr, loss):
    """Where what a further draw adds changes its sign; and of the continuous utility, nearby."""
    p = np.array([p1, p2])
    a, u = p * tpr + (1 - p) * fpr, p * tpr - loss * (1 - p) * fpr
    between = math.log((1 - a[1]) / (1 - a[0]))
    zero = math.log(u[0] / (-w * u[1])) / between
    found = search.best_n(
        p, false_positive=fpr, true_positive=tpr, loss=loss, weights=[1, w], most=2000
    )
    assert found == max(0, math.ceil(zero)) > 0
    u /= a
    smooth = math.log(u[0] * math.log(1 - a[0]) / (-w * u[1] * math.log(1 - a[1]))) / between
    assert abs(found - smooth) <= 1


def test_best_n_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, fpr, tpr = rng.beta(0.3, 0.7, 30), rng.random() / 5, 0.5 + rng.random() / 2
        loss, price = 2 * rng.random(), rng.random() / 50
        a = p * tpr + (1 - p) * fpr
        worth = [((p * tpr - loss * (1 - p) * fpr - price) * (1 - (1 - a) ** k) / a).sum()
                 for k in range(201)]  # fmt: skip
        found = search.best_n(p, false_positive=fpr, true_positive=tpr, loss=loss, price=price,
                              most=200)  # fmt: skip
        assert worth[found] == pytest.approx(max(worth), abs=1e-12)
    assert search.best_n([0.0, 0.5], false_positive=0, most=30) == 30, "more never hurts"
    assert search.best_n([0.0, 0.0], false_positive=0, price=0.1) == 0
    assert search.best_n([0.5], false_positive=0.5, true_positive=0.5) == 0, "as much harm as good"


def test_error_rates():
    false, true = search.error_rates([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0])
    assert (false.value, true.value, false.n, true.n) == (0, pytest.approx(2 / 3), 5, 3)
    assert false.low == 0 and 0.4 < false.high < 0.5 and true.low < 2 / 3 < true.high
    false, true = search.error_rates([True], [True])
    assert math.isnan(false.value) and (false.low, false.high, false.n) == (0, 1, 0)
    covered, rng = 0, np.random.default_rng(1)
    for _ in range(400):
        rate, _ = search.error_rates([False] * 40, rng.random(40) < 0.1)
        covered += rate.low <= 0.1 <= rate.high
    assert 0.92 < covered / 400 < 0.99


def test_best_n_has_no_units():
    """Weights, or rates, of any size: the least gain counts, if it is one."""
    for unit in (1e-20, 1.0, 1e300):
        assert search.best_n([0.5, 0.02], false_positive=0.1, weights=[unit, unit]) == 3
    assert search.best_n([1e-18], false_positive=0, most=5) == 5
    assert search.best_n([0.5], false_positive=0.5, weights=[0.0]) == 0


def test_confidence_is_no_more_than_one():
    """Whatever the weights are rounded to: one less it is a difficulty."""
    for n in range(1, 40):
        weights = np.random.default_rng(n).random(n)
        assert search.confidence("a" * n, weights=weights) == 1.0


@pytest.mark.parametrize("answers,share,margin", [
    ("aaab", 0.75, 0.5), ("aabb", 0.5, 0.0), ("aaaa", 1.0, 1.0), ([None, "a"], 0.5, 0.5),
    ([None], 0.0, 0.0), ([], 0.0, 0.0),
])  # fmt: skip
def test_confidence(answers, share, margin):
    assert search.confidence(answers, "share") == share
    assert search.confidence(answers, "margin") == margin
    assert search.confidence(answers) == (share + margin) / 2


def test_confidence_of_weighted_votes():
    assert search.confidence("ab", "share", weights=[3, 1]) == 0.75
    assert search.confidence("ab", "share", weights=[0, 0]) == 0


def test_threshold():
    sure, right = [0.1, 0.2, 0.5, 0.5, 0.9, 0.8], [0, 1, 0, 1, 1, 1]
    assert search.threshold(sure, coverage=0.5) == 0.5, "ties are answered together"
    assert search.threshold(sure, coverage=0.3) == 0.8
    assert search.threshold(sure, coverage=1) == 0.1
    assert search.threshold(sure, coverage=0) == 0.9
    assert search.threshold(sure, right, precision=1.0) == 0.8
    assert search.threshold(sure, right, precision=0.8) == 0.2
    assert search.threshold(sure, [0] * 6, precision=0.5) == math.inf


def integrated(table, good, tests, priors):
    """Posterior weight of right solutions and tests, by quadrature over the four rates."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x, weights = (nodes + 1) / 2, weights / 2

    def mean(prior, likelihood):
        a, b = prior
        density = x ** (a - 1) * (1 - x) ** (b - 1)
        return (weights * density * likelihood).sum() / (weights * density).sum()

    def rate(prior, outcomes):
        likelihood = np.ones_like(x)
        for outcome in outcomes:
            likelihood = likelihood * (x if outcome else 1 - x)
        return mean(prior, likelihood)

    rows, columns = range(len(table)), range(len(table[0]))
    wrong = [i for i in rows if i not in good]
    return (
        rate(priors["solutions"], [i in good for i in rows])
        * rate(priors["tests"], [j in tests for j in columns])
        * rate(priors["right_test"], [table[i][j] for i in wrong for j in tests])
        * rate(priors["wrong_test"],
               [table[i][j] for i in wrong for j in columns if j not in tests])
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_votes_by_tests_are_the_integral(seed):
    rng = np.random.default_rng(seed)
    table = rng.random((5, 4)) < 0.5
    table[1] = table[0]
    priors = {"wrong_test": (1, 6), "right_test": (2, 1), "solutions": (2, 3), "tests": (1, 2)}
    found = search.vote_by_tests(table, **priors)
    weights = np.array([integrated(table, x.solutions, x.tests, priors) for x in found])
    np.testing.assert_allclose([x.posterior for x in found], weights / weights.sum(), rtol=1e-9)
    assert sorted(itertools.chain(*(x.solutions for x in found))) == [0, 1, 2, 3, 4]
    for x in found:
        assert all(tuple(np.flatnonzero(table[i])) == x.tests for i in x.solutions)


@pytest.mark.parametrize("beta", [10**4, 10**6])
def test_votes_by_tests_with_the_papers_priors(beta):
    """Its score, a product of B(a + yes, b + no), in exact arithmetic."""
    a = 10**3

    def gain(yes, no, a, b):  # B(a + yes, b + no) / B(a, b)
        up = math.prod(range(a, a + yes)) * math.prod(range(b, b + no))
        return Fraction(up, math.prod(range(a + b, a + b + yes + no)))

    rng = np.random.default_rng(beta)
    table = np.concatenate([rng.random((5, 4)) < 0.4, [[1, 1, 0, 1]] * 2]).astype(bool)
    found = search.vote_by_tests(table, wrong_test=(1, beta), solutions=(a, 1), tests=(a, 1))
    scores = []
    for x in found:
        good = np.isin(np.arange(4), x.tests)
        wrong = np.delete(table, x.solutions, axis=0)
        right, other = wrong[:, good], wrong[:, ~good]
        scores.append(
            gain(len(x.solutions), len(wrong), a, 1)
            * gain(int(good.sum()), int((~good).sum()), a, 1)
            * gain(int(right.sum()), int((~right).sum()), 1, 1)
            * gain(int(other.sum()), int((~other).sum()), 1, beta)
        )
    assert scores == sorted(scores, reverse=True)
    want = [float(x / sum(scores)) for x in scores]
    np.testing.assert_allclose([x.posterior for x in found], want, rtol=1e-6)


def test_votes_by_tests_are_not_led_by_crowds():
    """Many that crash against few that agree; and a wrong test that only wrong solutions pass."""
    crash, agree = [[0, 0, 0, 0]] * 6, [[1, 1, 1, 0]] * 3
    best, *_ = search.vote_by_tests([*crash, *agree])
    assert best.solutions == (6, 7, 8) and best.tests == (0, 1, 2) and best.posterior > 0.9
    assert search.vote_by_tests(np.zeros((0, 3), bool)) == []


def test_candidates_by_tests():
    rows = [search.Candidate(text=x, steps=[x], scores=[p], margins=[0.0])
            for x, p in (("a", 0.9), ("bb", 0.2), ("bc", 0.3))]  # fmt: skip
    result = search.Result(["Q", "R"], [rows, []], [], 0, 0, {})
    asked = []

    def execute(question, texts):
        asked.append((question, texts))
        return [[x.startswith(prefix) for prefix in "bcb"] for x in texts]

    assert search.by_tests(result, execute) == [rows[2], None]
    assert asked == [("Q", ["a", "bb", "bc"])]
    with pytest.raises(ValueError, match="execute returned a table of shape"):
        search.by_tests(result, lambda question, texts: [[True]])


@pytest.mark.parametrize("call,message", [
    (lambda: search.best_n([], false_positive=0), "pass_rates must hold at least one"),
    (lambda: search.best_n([1.5], false_positive=0), "pass_rates must hold"),
    (lambda: search.best_n([math.nan], false_positive=0), "pass_rates must hold"),
    (lambda: search.best_n([0.5], false_positive=2), "false_positive=2"),
    (lambda: search.best_n([0.5], false_positive=0, price=-1), "price=-1"),
    (lambda: search.best_n([0.5], false_positive=0, weights=[1, 2]), "weights must hold 1"),
    (lambda: search.best_n(["x"], false_positive=0), "pass_rates="),
    (lambda: search.error_rates([], []), "right is empty"),
    (lambda: search.error_rates([1], []), "right has 1 entries"),
    (lambda: search.error_rates([0.5], [1]), "right must be a list of True"),
    (lambda: search.confidence("ab", "mode"), "how='mode'"),
    (lambda: search.confidence("ab", weights=[1, -1]), "weights must hold 2"),
    (lambda: search.threshold([0.5]), "one of coverage and precision"),
    (lambda: search.threshold([], coverage=0.5), "confidences must hold"),
    (lambda: search.threshold([0.5], precision=0.5), "right must hold a label"),
    (lambda: search.threshold([0.5], coverage=1.5), "coverage=1.5"),
    (lambda: search.vote_by_tests([True]), "passes must be a table"),
    (lambda: search.vote_by_tests([[2]]), "passes must be a table"),
    (lambda: search.vote_by_tests([[1]], tests=(0, 1)), "tests=(0, 1)"),
    (lambda: search.vote_by_tests([[1]], tests=(1e15, 1)), "tests=(1000000000000000.0, 1)"),
    (lambda: search.vote_by_tests([[1, 0], [1]]), "passes must be a table"),
])  # fmt: skip
def test_doubt_refuses(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_votes_are_hashable():
    with pytest.raises(TypeError, match=r"answers\[1\]=\[2\]: votes must be hashable"):
        search.confidence(["a", [2]])
