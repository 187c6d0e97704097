"""Which problem gets which strategy: tokens by difficulty, under a budget for all of them."""

import inspect
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..results import write
from ..rollouts import Rollouts
from .doubt import confidence
from .particles import particle_filter, particle_gibbs
from .result import Candidate, Event, Result, reduction
from .retries import deepen, revise
from .run import Steps, whole, within
from .trees import beam, best_of_n, dvts, prune, rebase

NONE = "none"  # the probes are all that a problem gets
STRATEGIES: dict[str, Callable[..., Result]] = {
    strategy.__name__: strategy
    for strategy in (
        best_of_n, beam, dvts, rebase, particle_filter, particle_gibbs, prune, deepen, revise
    )
}  # fmt: skip
TRIED = (
    ("best_of_n", {"n": 4}),
    ("best_of_n", {"n": 12}),
    ("beam", {"n": 8, "beam": 4}),
    ("dvts", {"n": 8, "beam": 4}),
)
STATES = 4000  # that `spend` keeps, from one problem to the next

# (question, its probes) -> difficulty, from 0 to 1.
Difficulty = Callable[[str, list[Candidate]], float]


@dataclass(frozen=True)
class Entry:
    """A strategy with its options, and what it does for problems of each bin of difficulty.

    Attributes:
        strategy: its name; "none" leaves it at the probes.
        options: that it is called with.
        tokens: by bin, tokens that it generates, in mean lengths of the problem's own probes.
        success: by bin, probability of a right answer by all candidates, probes included.
    """

    strategy: str
    options: Mapping[str, Any]
    tokens: Sequence[float]
    success: Sequence[float]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.strategy}({options})" if options else self.strategy


@dataclass(frozen=True)
class Table:
    """What strategies are worth, by difficulty. Add to `entries` what you like.

    Attributes:
        edges: between bins of difficulty, ascending: bin i holds those from edges[i - 1] on.
        entries: of which each problem gets one.

    Raises:
        ValueError: an entry has not one number for each bin, or they are out of range.
    """

    edges: Sequence[float]
    entries: Sequence[Entry]

    def __post_init__(self) -> None:
        edges = _floats("edges", self.edges)
        if (np.diff(edges) <= 0).any():
            raise ValueError(f"edges={self.edges!r}: ascending numbers are needed")
        if not self.entries:
            raise ValueError("entries is empty: a problem needs at least one to choose from")
        for i, entry in enumerate(self.entries):
            if not isinstance(entry, Entry) or not isinstance(entry.strategy, str):
                raise ValueError(f"entries[{i}]={entry!r} is no Entry of a strategy's name")
            if not isinstance(entry.options, Mapping):
                raise ValueError(f"entries[{i}].options={entry.options!r}: a dict is needed")
            for name, most in (("tokens", np.inf), ("success", 1.0)):
                values = _floats(f"entries[{i}].{name}", getattr(entry, name))
                if len(values) != len(edges) + 1 or (values < 0).any() or (values > most).any():
                    raise ValueError(
                        f"entries[{i}].{name}={getattr(entry, name)!r}: {len(edges) + 1} numbers "
                        f"are needed, one for each bin, from 0 to {most:g}"
                    )

    def bin(self, difficulty: float) -> int:
        return int(np.searchsorted(np.asarray(self.edges, float), difficulty, side="right"))

    @classmethod
    def samples(
        cls, widths: Sequence[int] = (1, 2, 4, 8, 16), *, probes: int = 4, bins: int = 10
    ) -> "Table":
        """Independent samples alone, where difficulty is the share of wrong ones and any right one
        is found: what can be said without a measurement."""
        whole("bins", bins, 1)
        whole("probes", probes, 1)
        wrong = (np.arange(bins) + 0.5) / bins
        entries = [Entry(NONE, {}, [0.0] * bins, (1 - wrong**probes).tolist())]
        for n in widths:
            whole("widths", n, 1)
            success = (1 - wrong ** (probes + n)).tolist()
            entries.append(Entry("best_of_n", {"n": n}, [float(n)] * bins, success))
        return cls((np.arange(1, bins) / bins).tolist(), entries)

    @classmethod
    def of_trials(
        cls,
        difficulties: Sequence[float],
        trials: Sequence[tuple[str, Mapping[str, Any], Sequence[float], Sequence[bool]]],
        *,
        bins: int = 3,
    ) -> "Table":
        """A table from measurements.

        Args:
            difficulties: of the problems.
            trials: strategy, options, and of each problem the tokens (as in `Entry`) and whether
                its answer was right.
            bins: of about as many problems each; fewer where difficulties are equal.

        Returns:
            Means by bin; of successes with one more problem that is like the mean of all.
        """
        whole("bins", bins, 1)
        hard = _floats("difficulties", difficulties)
        if not len(hard):
            raise ValueError("difficulties is empty: a table is fitted on at least one problem")
        edges = np.unique(np.quantile(hard, np.arange(1, bins) / bins))
        place = np.searchsorted(edges, hard, side="right")
        entries = []
        for strategy, options, tokens, right in trials:
            spent, good = _floats("tokens", tokens), _floats("right", right)
            if len(spent) != len(hard) or len(good) != len(hard):
                raise ValueError(f"trials: {strategy} has not one result for each problem")
            within_bin = [place == i for i in range(len(edges) + 1)]
            entries.append(Entry(
                strategy, dict(options),
                [float(spent[x].mean() if x.any() else spent.mean()) for x in within_bin],
                [float((good[x].sum() + good.mean()) / (x.sum() + 1)) for x in within_bin],
            ))  # fmt: skip
        return cls(edges.tolist(), entries)

    @classmethod
    def fit(
        cls,
        rollouts: Rollouts,
        questions: Sequence[str],
        scorer: Any,
        steps: Steps,
        *,
        right: Callable[[str, list[Candidate]], bool],
        tried: Sequence[tuple[str, Mapping[str, Any]]] = TRIED,
        bins: int = 3,
        probes: int = 4,
        difficulty: str | Difficulty = "score",
        answer: Callable[[str], Hashable | None] | None = None,
        reduce: str = "last",
        strategies: Mapping[str, Callable[..., Result]] | None = None,
        seed: int = 0,
    ) -> "Table":
        """A table measured on problems with known answers; others than those it will serve.

        Args:
            right: (question, candidates) -> whether the answer that you take from them is right.
            tried: strategies and options, beside "none".
            bins: see `of_trials`.
            probes, difficulty, answer, reduce, strategies: as for `allocate`, which must get the
                same.
        """
        known = _known(strategies)
        for name, options in tried:
            _named(known, name, options, rollouts, scorer, steps)
        if not callable(right):
            raise TypeError(f"right={right!r}: a function is needed")
        measure = _difficulty(difficulty, answer, reduce)
        whole("probes", probes, 1)
        first = best_of_n(rollouts, questions, scorer, steps, n=probes, seed=seed)
        lengths = _lengths(first)
        hard = [measure(q, some) for q, some in zip(questions, first.candidates, strict=True)]
        judged = [right(q, list(some)) for q, some in zip(questions, first.candidates, strict=True)]
        _floats("right", judged)
        trials: list[tuple[str, Mapping[str, Any], Sequence[float], Sequence[bool]]] = [
            (NONE, {}, [0.0] * len(questions), judged)
        ]
        for i, (name, options) in enumerate(tried):
            found = known[name](
                rollouts, questions, scorer, steps, seed=_other_seed(seed, i), **options
            )
            judged = [
                right(q, [*a, *b])
                for q, a, b in zip(questions, first.candidates, found.candidates, strict=True)
            ]
            trials.append((name, options, np.array(found.spent) / lengths, judged))
        return cls.of_trials(hard, trials, bins=bins)

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            ValueError: options of an entry, a function for one, that JSON does not hold.
        """
        entries = []
        for i, x in enumerate(self.entries):
            numbers = {name: [*map(float, getattr(x, name))] for name in ("tokens", "success")}
            entries.append({"strategy": x.strategy, "options": dict(x.options)} | numbers)
            try:
                json.dumps(entries[-1])
            except (TypeError, ValueError) as error:
                raise ValueError(f"entries[{i}].options={x.options!r}: {error}") from error
        held = {"edges": [*map(float, self.edges)], "entries": entries}
        write(Path(path), json.dumps(held, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else; says which file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(found["edges"], [Entry(**entry) for entry in found["entries"]])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is no table of `Table.save`: {error}") from error


def spend(
    tokens: Sequence[Sequence[float]], success: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One option for each problem, so that successes sum up to most within a budget.

    All combinations that may be best are followed from problem to problem; beyond 4,000 of them,
    the best of each 4,000th of the budget.

    Args:
        tokens, success: of each problem, of each of its options.

    Returns:
        The number of each problem's option; of equal successes the cheapest.

    Raises:
        ValueError: the cheapest options exceed the budget, a problem has none, or numbers do not
            fit.
    """
    if len(tokens) != len(success):
        raise ValueError(f"tokens has {len(tokens)} entries and success {len(success)}")
    options = []
    for i, (own, gains) in enumerate(zip(tokens, success, strict=True)):
        price, gain = _floats(f"tokens[{i}]", own), _floats(f"success[{i}]", gains)
        if len(price) != len(gain) or not len(price) or (price < 0).any():
            raise ValueError(f"tokens[{i}] and success[{i}] are not options of a problem")
        options.append((price, gain))
    # What the problems after each one need at least.
    rest = np.cumsum([0.0, *(price.min() for price, _ in reversed(options))])[::-1]
    if not rest[0] <= budget * (1 + 1e-12):
        raise ValueError(f"budget={budget!r}: the cheapest options need {rest[0]:g}")
    cost, value, paths = np.zeros(1), np.zeros(1), []
    for (price, gain), least in zip(options, rest[1:], strict=True):
        total = (cost[:, None] + price).ravel()
        worth = (value[:, None] + gain).ravel()
        order = np.lexsort((-worth, total))
        order = order[total[order] + least <= budget * (1 + 1e-9)]
        # Those that are worth more than all that cost no more.
        best = np.maximum.accumulate(worth[order])
        order = order[np.concatenate([[True], best[1:] > best[:-1] + 1e-12])]
        if len(order) > STATES:
            slot = np.floor(total[order] / max(budget, 1e-300) * (STATES - 1))
            order = order[np.concatenate([slot[1:] != slot[:-1], [True]])]
        paths.append((order // len(price), order % len(price)))
        cost, value = total[order], worth[order]
    chosen, state = [], len(value) - 1
    for before, option in reversed(paths):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]


def allocate(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    budget: float,
    table: Table | None = None,
    probes: int = 4,
    difficulty: str | Difficulty = "score",
    answer: Callable[[str], Hashable | None] | None = None,
    reduce: str = "last",
    strategies: Mapping[str, Callable[..., Result]] | None = None,
    seed: int = 0,
) -> Result:
    """Tokens by difficulty: probes tell how hard each problem is, and a table what to do then.

    Each problem gets one entry of the table so that the successes expected sum up to most under the
    budget. Entries are run from the cheapest to the dearest; after each, what is left is allocated
    anew by what was really spent.

    Args:
        budget: tokens for all questions, probes included. Probes are drawn whatever they take, and
            what strategies generate is an expectation: the last of them may exceed it.
        table: default `Table.samples(probes=probes)`; see `Table.fit`.
        probes: samples of each question at first; they stay candidates.
        difficulty: from 0 to 1: "score", one less the mean score of the probes; "votes", one less
            the confidence of their vote, by `answer`; or a function (question, probes) -> number.
        answer: reads a text's answer, or None.
        reduce: for "score", see `Candidate.score`.
        strategies: further ones by name, functions as those here, for entries of the table.

    Returns:
        Probes and what came after as candidates of each question. In the trace, run 0 is what was
        decided, and run 1 the selections of a strategy.

    Reference: arXiv:2408.03314.
    """
    whole("probes", probes, 1)
    whole("seed", seed, 0)
    within("budget", budget, 0, 1e15)
    measure, known = _difficulty(difficulty, answer, reduce), _known(strategies)
    table = Table.samples(probes=probes) if table is None else table
    if not isinstance(table, Table):
        raise TypeError(f"table={table!r}: a Table is needed, see Table.load")
    for entry in table.entries:
        _named(known, entry.strategy, entry.options, rollouts, scorer, steps)
    first = best_of_n(rollouts, questions, scorer, steps, n=probes, seed=seed)
    total = replace(first, candidates=[list(some) for some in first.candidates])
    total.trace, total.spent = [], list(first.spent)
    lengths = _lengths(first)
    places, decided = [], {}
    for question, some in zip(first.questions, first.candidates, strict=True):
        found = float(measure(question, some))
        within(f"difficulty of {question!r}", found, 0, 1)
        places.append(table.bin(found))
        decided[len(decided)] = f"difficulty {found:.3f}, bin {places[-1]}"
    waiting = list(range(len(questions)))
    while waiting:
        chosen = _plan(table, waiting, places, lengths, budget - total.generated)
        expected = {
            entry: np.mean([
                table.entries[entry].tokens[places[i]] * lengths[i]
                for i, x in zip(waiting, chosen, strict=True) if x == entry
            ])
            for entry in {*chosen}
        }  # fmt: skip
        entry = min(expected, key=lambda x: (expected[x], x))
        now = [i for i, x in zip(waiting, chosen, strict=True) if x == entry]
        waiting = [i for i in waiting if i not in now]
        for i in now:
            judged = tuple(c.score(reduce) for c in first.candidates[i])
            why = f"{decided[i]}: {table.entries[entry]}"
            total.trace.append(Event(0, i, judged, (), tuple(range(len(judged))), why))
        strategy, options = table.entries[entry].strategy, table.entries[entry].options
        if strategy != NONE:
            found = known[strategy](
                rollouts, [total.questions[i] for i in now], scorer, steps,
                seed=_other_seed(seed, entry), **options,
            )  # fmt: skip
            own = isinstance(found, Result) and len(found.candidates) == len(found.spent)
            if not own or len(found.spent) != len(now):
                raise ValueError(
                    f"strategies[{strategy!r}] returned no Result with candidates and tokens spent "
                    "for each question"
                )
            _add(total, found, now)
    return total


def _plan(
    table: Table, waiting: Sequence[int], places: Sequence[int], lengths: np.ndarray, left: float
) -> list[int]:
    """An entry for each of the problems that wait; the cheapest ones, where there is too little."""
    tokens = [[x.tokens[places[i]] * lengths[i] for x in table.entries] for i in waiting]
    success = [[x.success[places[i]] for x in table.entries] for i in waiting]
    least = sum(map(min, tokens))
    return spend(tokens, success, max(left, least))


def _add(total: Result, found: Result, numbers: Sequence[int]) -> None:
    """Join to a result that of a search for some of its questions."""
    for i, some in zip(numbers, found.candidates, strict=True):
        total.candidates[i] += some
    for i, rows in zip(numbers, found.stopped, strict=bool(found.stopped)):
        total.stopped = total.stopped or [[] for _ in total.questions]
        total.stopped[i] += rows
    for i, tokens in zip(numbers, found.spent, strict=True):
        total.spent[i] += tokens
    total.trace += [replace(e, question=numbers[e.question], run=e.run + 1) for e in found.trace]
    total.generated += found.generated
    total.encoded += found.encoded
    total.seconds = {part: x + found.seconds.get(part, 0.0) for part, x in total.seconds.items()}


def _lengths(probes: Result) -> np.ndarray:
    """Mean tokens of each question's probes."""
    return np.array([np.mean([len(c.tokens) for c in some]) for some in probes.candidates])


def _difficulty(
    how: str | Difficulty, answer: Callable[[str], Hashable | None] | None, reduce: str
) -> Difficulty:
    reduction(reduce)
    if how == "score":
        return lambda question, some: 1 - min(1.0, max(0.0, _mean_score(some, reduce)))
    if how == "votes":
        if answer is None:
            raise ValueError("difficulty='votes' needs answer=, which reads the answer off a text")
        return lambda question, some: 1 - confidence([answer(c.text) for c in some])
    if not callable(how):
        raise ValueError(f"difficulty={how!r}: score, votes, or a function")
    return how


def _mean_score(some: Sequence[Candidate], reduce: str) -> float:
    return float(np.mean([c.score(reduce) for c in some]))


def _known(more: Mapping[str, Callable[..., Result]] | None) -> dict[str, Callable[..., Result]]:
    known = STRATEGIES | dict(more or {})
    for name, strategy in known.items():
        if not callable(strategy) or name == NONE:
            raise ValueError(f"strategies[{name!r}]={strategy!r}: a function of another name")
    return known


def _named(known: Mapping[str, Any], name: str, options: Mapping[str, Any], *how: Any) -> None:
    """Raise ValueError unless there is such a strategy, with such options; of those here, with
    such values of them, which a run for no question tells.

    Args:
        how: rollouts, scorer and steps.
    """
    if name == NONE:
        return
    if name not in known:
        raise ValueError(
            f"the table has a strategy {name!r}: pass strategies={{{name!r}: function}}, or take "
            f"one of {', '.join(known)}"
        )
    rollouts, scorer, steps = how
    try:
        if "seed" in options:  # given twice it may be a KeyError, before Python 3.12
            raise TypeError("each run has a seed of its own")
        inspect.signature(known[name]).bind(None, [], None, None, **options, seed=0)
        if known[name] is STRATEGIES.get(name) and not rollouts.rows:
            known[name](rollouts, [], scorer, steps, **options, seed=0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be called with options={options!r}: {error}") from error


def _other_seed(seed: int, entry: int) -> int:
    """Strategies must not draw what the probes drew."""
    return int(np.random.SeedSequence((seed, entry, 1)).generate_state(1)[0])


def _floats(name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r}: numbers are needed") from error
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name}={values!r}: a list of finite numbers is needed")
    return found
