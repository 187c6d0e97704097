"""Allocation: brute force on problems of known pass rates, tables as files, results joined."""

import itertools
import math

import numpy as np
import pytest
from test_search import QUESTIONS, STEPS, TOKENS, Script, by_text, chance, policy, told

from kvtools import search
from kvtools.search import Entry, Table


def brute(tokens, success, budget):
    """The most that any combination within the budget is worth."""
    best = 0.0
    for chosen in itertools.product(*(range(len(x)) for x in tokens)):
        spent = sum(x[i] for x, i in zip(tokens, chosen, strict=True))
        if spent <= budget + 1e-9:
            best = max(best, sum(x[i] for x, i in zip(success, chosen, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_spend_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        counts = rng.integers(1, 5, 6)
        tokens = [[0.0, *(100 * rng.random(n - 1))] for n in counts]
        success = [rng.random(n).tolist() for n in counts]
        budget = rng.random() * 300
        chosen = search.spend(tokens, success, budget)
        assert sum(x[i] for x, i in zip(tokens, chosen, strict=True)) <= budget + 1e-6
        found = sum(x[i] for x, i in zip(success, chosen, strict=True))
        assert found == pytest.approx(brute(tokens, success, budget))


def test_spend_with_many_states_is_near_the_bound(monkeypatch):
    """Where not all states are kept; the bound is that of fractions of options."""
    monkeypatch.setitem(search.spend.__globals__, "STATES", 200)
    rng, widths = np.random.default_rng(0), np.array([0, 1, 2, 4, 8, 16])
    rates, lengths = rng.beta(0.4, 0.6, 60), rng.uniform(50, 500, 60)
    tokens, success = lengths[:, None] * widths, 1 - (1 - rates[:, None]) ** widths
    budget = 0.2 * tokens[:, -1].sum()
    chosen = search.spend(tokens, success, budget)
    rows = np.arange(60)
    assert tokens[rows, chosen].sum() <= budget * (1 + 1e-9)
    # Gains per token fall with width, so a greedy filling with the last step cut is the bound.
    slopes = np.diff(success) / np.diff(tokens)
    left, bound = budget, 0.0
    for i in np.argsort(-slopes, axis=None):
        step = min(left, np.diff(tokens).flat[i])
        bound, left = bound + step * slopes.flat[i], left - step
    assert bound * 0.98 <= success[rows, chosen].sum() <= bound + 1e-9
    tokens, success = np.c_[np.zeros(30), 0.1 * rng.random(30)], rng.random((30, 2)).cumsum(1)
    last = [*tokens.tolist(), [100.0]], [*success.tolist(), [1.0]]
    assert not any(search.spend(*last, 100.0)), "a budget that the cheapest just fit"


def passing(rates, words=5):
    """A policy whose samples of question "i" are right with rates[i]; all have `words` steps."""

    def say(call, row, text, seed):
        return "s", False

    class Policy(Script):
        def generate(self, limit, until, progress):
            start = [len(tokens) for tokens in self.tokens]
            for i in np.flatnonzero(~self.finished):
                question = chr(self.tokens[i][0])
                right = chance(question, int(self.seeds[i])) < rates[ord(question) - ord("a")]
                text = ("right" if right else "wrong")[:words] + "\n\n"
                self.tokens[i] += [*map(ord, text), 0]
                self.finished[i] = True
            return [t[begin:] for t, begin in zip(self.tokens, start, strict=True)]

    return Policy(say)


def verified(question, solutions):
    return [[0.99 if x.startswith("right") else 0.01 for x in steps] for steps in solutions]


def on_known_rates(rates, budget, widths=(1, 2, 4, 8), probes=2, length=8):
    """What `allocate` gave, the successes expected of it, and the most of any choice."""
    table = Table.samples(widths, probes=probes, bins=200)
    found = search.allocate(
        passing(rates), [chr(ord("a") + i) for i in range(len(rates))], verified, STEPS,
        budget=budget, table=table, probes=probes,
        difficulty=lambda question, some: 1 - rates[ord(question) - ord("a")],
    )  # fmt: skip
    drawn = [len(some) for some in found.candidates]
    assert found.spent == [length * n for n in drawn]
    reached = sum(1 - (1 - p) ** n for p, n in zip(rates, drawn, strict=True))
    tokens = [[0.0, *(length * n for n in widths)]] * len(rates)
    success = [[1 - (1 - p) ** (probes + n) for n in (0, *widths)] for p in rates]
    left = max(0, budget - len(rates) * probes * length)
    return found, reached, brute(tokens, success, left)


@pytest.mark.parametrize("budget", [260, 400, 700])
def test_allocate_reaches_brute_force_on_known_pass_rates(budget):
    """Expected successes of what it chose, against the best choice by the true rates."""
    found, reached, best = on_known_rates([0.95, 0.6, 0.35, 0.15, 0.05, 0.0], budget)
    assert found.generated <= budget
    assert 0.98 * best <= reached <= best + 1e-9
    drawn = [len(some) for some in found.candidates]
    assert drawn[0] <= drawn[3], "easy ones have enough"


@pytest.mark.parametrize("rates,budget", [
    ([0.0] * 4, 200), ([1.0] * 4, 200), ([0.3], 100), ([1.0, 0.0], 70), ([0.5, 0.2, 0.9], 48),
    ([0.5, 0.2, 0.9], 47), ([0.3], 0), ([], 10),
], ids=["hopeless", "easy", "one", "both", "probes", "less", "nothing", "no problem"])  # fmt: skip
def test_allocate_at_the_edges(rates, budget):
    found, reached, best = on_known_rates(rates, budget)
    assert reached == pytest.approx(best, abs=1e-9)
    assert found.generated <= max(budget, 16 * len(rates)), "probes are drawn whatever they take"


def test_allocate_reaches_brute_force_on_random_problems():
    rng = np.random.default_rng(5)
    for _ in range(5):
        rates = rng.beta(0.4, 0.6, rng.integers(1, 6)).tolist()
        budget = 16 * len(rates) + int(rng.integers(300))
        found, reached, best = on_known_rates(rates, budget)
        assert found.generated <= budget and 0.98 * best <= reached <= best + 1e-9


def test_difficulty_is_estimated_from_probes():
    rates = [1.0, 0.0, 0.5]
    found = search.allocate(passing(rates), ["a", "b", "c"], verified, STEPS, budget=400, probes=8)
    said = {e.question: e.why for e in found.trace if e.run == 0}
    hard = [float(said[i].split()[1].rstrip(",")) for i in range(3)]
    assert hard[0] < 0.02 and hard[1] > 0.98 and 0.2 < hard[2] < 0.8
    votes = search.allocate(
        passing(rates), ["a", "b", "c"], verified, STEPS, budget=400, probes=8, difficulty="votes",
        answer=str.strip,
    )  # fmt: skip
    hard = {e.question: e.why for e in votes.trace if e.run == 0}
    assert hard[0].startswith("difficulty 0.000") and hard[1].startswith("difficulty 0.000")
    assert not hard[2].startswith("difficulty 0.000")


def mixed():
    """Each of three strategies is best in one bin."""
    return Table([0.5, 0.6], [
        Entry("none", {}, [0, 0, 0], [0.3, 0.2, 0.1]),
        Entry("beam", {"n": 4, "beam": 2}, [4, 4, 4], [0.3, 0.9, 0.1]),
        Entry("best_of_n", {"n": 3}, [3, 3, 3], [0.9, 0.2, 0.1]),
    ])  # fmt: skip


def test_results_are_joined():
    """Each part is what its strategy gives alone, with the question's own number."""
    hard = dict(zip(QUESTIONS, (0.9, 0.55, 0.2), strict=True))
    how = dict(budget=10_000, table=mixed(), probes=2, difficulty=lambda q, some: hard[q])
    found = search.allocate(policy(), QUESTIONS, by_text, TOKENS, **how, seed=3)
    probes = search.best_of_n(policy(), QUESTIONS, by_text, TOKENS, n=2, seed=3)
    for i in range(3):
        assert [c.tokens for c in found.candidates[i][:2]] == [
            c.tokens for c in probes.candidates[i]
        ]
    assert len(found.candidates[0]) == 2 and len(found.candidates[2]) == 5
    beamed = [e for e in found.trace if e.run == 1]
    assert beamed and {e.question for e in beamed} == {1}
    decided = {e.question: e.why for e in found.trace if e.run == 0}
    assert decided[1].endswith("bin 1: beam(n=4, beam=2)") and decided[0].endswith("bin 2: none")
    assert decided[2].endswith("bin 0: best_of_n(n=3)")
    assert sum(found.spent) == found.generated > probes.generated
    assert found.spent[0] == probes.spent[0]
    assert len({tuple(c.tokens) for c in found.candidates[2]}) == 5, "other draws than the probes'"
    rollouts = policy()
    again = search.allocate(rollouts, QUESTIONS, by_text, TOKENS, **how, seed=3)
    assert told(again) == told(found) and rollouts.rows == 0


def test_too_little_leaves_it_at_the_probes():
    found = search.allocate(policy(), QUESTIONS, by_text, TOKENS, budget=1, probes=2)
    assert [len(some) for some in found.candidates] == [2, 2, 2]


def test_strategies_of_ones_own():
    def mine(rollouts, questions, scorer, steps, *, n, seed):
        return search.best_of_n(rollouts, questions, scorer, steps, n=n, seed=seed)

    table = Table([], [Entry("mine", {"n": 2}, [2], [1.0])])
    with pytest.raises(ValueError, match="has a strategy 'mine': pass strategies="):
        search.allocate(policy(), QUESTIONS, by_text, TOKENS, budget=999, table=table)
    found = search.allocate(policy(), QUESTIONS, by_text, TOKENS, budget=999, table=table,
                            strategies={"mine": mine})  # fmt: skip
    assert [len(some) for some in found.candidates] == [6, 6, 6]


def test_a_table_is_fitted_saved_and_read(tmp_path):
    rates = [0.9] * 6 + [0.3] * 6 + [0.02] * 6
    questions = [chr(ord("a") + i) for i in range(18)]
    table = Table.fit(
        passing(rates), questions, verified, STEPS, probes=4,
        right=lambda question, some: any("right" in c.text for c in some),
        tried=[("best_of_n", {"n": 8}), ("dvts", {"n": 4, "beam": 2})],
        difficulty=lambda question, some: 1 - rates[ord(question) - ord("a")],
    )  # fmt: skip
    assert [str(x) for x in table.entries] == ["none", "best_of_n(n=8)", "dvts(n=4, beam=2)"]
    assert [list(x.tokens) for x in table.entries] == [[0] * 3, [8] * 3, [4] * 3]
    none, more, _ = table.entries
    assert none.success[0] > 0.8 and more.success[2] < 0.4
    assert all(a <= b for a, b in zip(none.success, more.success, strict=True))
    assert [table.bin(1 - p) for p in (0.9, 0.3, 0.02)] == [0, 1, 2]
    table.save(tmp_path / "table.json")
    again = Table.load(tmp_path / "table.json")
    assert again == Table(table.edges, table.entries)


def test_what_json_does_not_hold(tmp_path):
    """Arrays are numbers; of a function the entry is named, and the file is as before."""
    path, entry = tmp_path / "table.json", Entry("best_of_n", {"n": 2}, np.ones(2), (0.5, 0.6))
    Table(np.array([0.5]), [entry]).save(path)
    assert Table.load(path) == Table([0.5], [Entry("best_of_n", {"n": 2}, [1, 1], [0.5, 0.6])])
    held = path.read_text()
    stop = Entry("best_of_n", {"stop": search.Stopping(answer=len)}, [1], [1])
    with pytest.raises(ValueError, match=r"entries\[0\].options=.*not JSON"):
        Table([], [stop]).save(path)
    assert path.read_text() == held


@pytest.mark.parametrize("name,options", [
    ("beam", {"m": 3}), ("best_of_n", {"seed": 1}), ("mine", {"n": 2}),
    ("beam", {"n": 8, "beam": 3}), ("best_of_n", {"n": "x"}), ("best_of_n", {"stop": {}}),
    ("deepen", {"depths": [2, 1]}), ("particle_filter", {"ess": 2}),
])  # fmt: skip
def test_options_are_looked_at_before_anything_is_generated(name, options):
    def mine(rollouts, questions, scorer, steps, *, seed):
        return search.best_of_n(rollouts, questions, scorer, steps, n=1, seed=seed)

    def say(*_):
        raise AssertionError("it generates")

    how = dict(strategies={"mine": mine})
    with pytest.raises(ValueError, match=f"{name} cannot be called with options="):
        table = Table([], [Entry(name, options, [1], [1])])
        search.allocate(Script(say), ["Q"], by_text, STEPS, budget=99, table=table, **how)
    with pytest.raises(ValueError, match=f"{name} cannot be called with options="):
        Table.fit(Script(say), ["Q"], by_text, STEPS, right=bool, tried=[(name, options)], **how)
    try:
        raise RuntimeError("handled")
    except RuntimeError:  # in which Python may raise otherwise
        with pytest.raises(ValueError, match=f"{name} cannot be called with options="):
            search.allocate(Script(say), ["Q"], by_text, STEPS, budget=99, table=table, **how)


@pytest.mark.parametrize("result", [
    None, search.Result(["Q"], [[]], [], 0, 0, {}), search.Result([], [], [], 0, 0, {}),
], ids=["None", "no spent", "no question"])  # fmt: skip
def test_what_strategies_of_ones_own_return(result):
    table = Table([], [Entry("mine", {}, [1], [1])])
    with pytest.raises(ValueError, match="strategies\\['mine'\\] returned no Result"):
        search.allocate(policy(), QUESTIONS, by_text, TOKENS, budget=99, table=table,
                        strategies={"mine": lambda *args, seed: result})  # fmt: skip


def test_trials_of_equal_difficulty_share_a_bin():
    table = Table.of_trials([0.5] * 4, [("none", {}, [0] * 4, [1, 1, 0, 0])])
    assert list(table.edges) == [0.5] and table.bin(0.5) == 1
    assert table.entries[0].success == [0.5, 0.5]


@pytest.mark.parametrize("text", [
    "", "[]", "{", '{"edges": [], "entries": []}', '{"edges": [1], "entries": [{"strategy": "x"}]}',
    '{"edges": [0.5], "entries": [{"strategy": "none", "options": {}, "tokens": [0], '
    '"success": [1]}]}', "[" * 100_000,
])  # fmt: skip
def test_bad_tables_by_name(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is no table"):
        Table.load(path)


ONE = dict(strategy="none", options={}, tokens=[0.0], success=[0.5])


@pytest.mark.parametrize("edges,entry,message", [
    ([0.5, 0.5], {}, "edges="), ([math.nan], {}, "edges="), ("x", {}, "edges="),
    ([], dict(tokens=[-1]), r"entries\[0\].tokens"), ([], dict(tokens=[1, 2]), "tokens"),
    ([], dict(success=[1.1]), "success"), ([], dict(success=["x"]), "success"),
    ([], dict(options=[1]), "options"), ([], dict(strategy=3), "strategy"),
])  # fmt: skip
def test_table_refuses(edges, entry, message):
    with pytest.raises(ValueError, match=message):
        Table(edges, [Entry(**(ONE | entry))])


@pytest.mark.parametrize("how,message", [
    (dict(budget=-1), "budget=-1"), (dict(probes=0), "probes=0"), (dict(table={}), "table="),
    (dict(difficulty="size"), "difficulty='size'"), (dict(difficulty="votes"), "needs answer="),
    (dict(difficulty=lambda q, some: 2.0), "difficulty of 'one"), (dict(reduce="x"), "reduce='x'"),
    (dict(strategies={"none": print}), "none"), (dict(strategies={"x": 3}), "strategies"),
])  # fmt: skip
def test_allocate_refuses(how, message):
    rollouts = policy()
    with pytest.raises((ValueError, TypeError), match=message):
        search.allocate(rollouts, QUESTIONS, by_text, TOKENS, **(dict(budget=100) | how))
    assert rollouts.rows == 0


@pytest.mark.parametrize("tokens,success,budget,message", [
    ([[1.0]], [[1.0]], 0.5, "budget=0.5"), ([[1.0]], [], 1, "tokens has 1"), ([[]], [[]], 1, "0"),
    ([[-1.0]], [[1.0]], 1, r"tokens\[0\]"), ([[0, 1]], [[1]], 1, r"tokens\[0\] and"),
    ([[0]], [[1]], math.nan, "budget=nan"),
])  # fmt: skip
def test_spend_refuses(tokens, success, budget, message):
    with pytest.raises(ValueError, match=message):
        search.spend(tokens, success, budget)
