"""Search that spends where it pays, at equal tokens: python -m bench.search --adaptive.

On the problems and policies of `bench.search`: allocation by difficulty against best-of-N, beam
search and DVTS; tokens that stopping saves; what abstention leaves; deepening against independent
samples. Differences are paired by problem. Best-of-N at as many tokens as another strategy is a
mixture of the two N around it, so that tokens are equal to the letter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import kvtools
from bench.problems import TASKS
from bench.search import REDUCE, SEED, Bench, Scale, flags
from bench.targets import Targets
from kvtools import search
from kvtools.cli import demo
from kvtools.quality import Journal, interval

WORDS, SUMS = (task.name for task in TASKS)
SCORERS = ("exact", "trained")
WIDTH = 8
PROBES = 4
TRIED = (
    ("best_of_n", {"n": 4}),
    ("best_of_n", {"n": 8}),
    ("beam", {"n": WIDTH, "beam": 4, "reduce": REDUCE}),
    ("dvts", {"n": WIDTH, "beam": 4, "reduce": REDUCE}),
)
STOPS = {
    "settled votes": ("majority", {"wave": 2}),
    "one verified": ("max, exact", {"wave": 2, "enough": 1, "verified": 1.0}),
    "trend of the trained scorer": ("max, trained", {"margin": -3.0, "window": 2, "ahead": 0}),
}
TRIGGER = {WORDS: " Wait, that is wrong.", SUMS: ""}
# Nearly all of the time goes into word problems.
SCALES = {
    WORDS: Scale(problems=20, pool=16, trained_on=40, batch=10),
    SUMS: Scale(problems=100, pool=16, trained_on=100, batch=50),
}
FITTED_ON = {WORDS: 12, SUMS: 100}
QUICK = Scale(problems=6, pool=12, trained_on=16, batch=6)


class Adaptive(Bench):
    """One task, measured cell by cell; `fitted_on` problems are for the tables."""

    def __init__(self, task: Any, scale: Scale, journal: Journal, fitted_on: int) -> None:
        super().__init__(task, scale, journal)
        self.fitted_on = fitted_on

    def todo(self) -> dict[str, Any]:
        cells: dict[str, Any] = {"probe": self.train, "samples": self.samples}
        for name in STOPS:
            cells[f"stop, {name}"] = partial(self.stop, name)
        for scorer in SCORERS:
            cells[f"beam, {scorer}"] = partial(self.strategy, search.beam, scorer)
            cells[f"dvts, {scorer}"] = partial(self.strategy, search.dvts, scorer)
            cells[f"table, {scorer}"] = partial(self.table, scorer)
            for rival in ("beam", "dvts"):
                cells[f"allocate as {rival}, {scorer}"] = partial(self.allocate, scorer, rival)
            cells[f"deepen, {scorer}"] = partial(self.deepen, scorer)
        return cells

    def scorer(self, name: str) -> Any:
        return search.Verifier(self.task.check) if name == "exact" else self.probe

    def samples(self, title: str) -> dict:
        """Of each problem and sample: tokens, the answer's number, whether right, and scores."""
        found: dict[str, list] = {"tokens": [], "answers": [], "right": [], "trained": [],
                                  "exact": []}  # fmt: skip
        for some in self.batches(self.tested, title):
            result = search.best_of_n(
                self.rollouts(self.task.temperature), some, self.probe, self.steps,
                n=self.scale.pool, seed=SEED,
            )  # fmt: skip
            for question, candidates in zip(some, result.candidates, strict=True):
                texts = [self.task.answer(c.text) for c in candidates]
                names = {x: i for i, x in enumerate(dict.fromkeys(texts)) if x is not None}
                exact = [min(x, default=0.0) for x in
                         self.exact(question, [c.steps for c in candidates])]  # fmt: skip
                found["tokens"].append([len(c.tokens) for c in candidates])
                found["answers"].append([names.get(x, -1) for x in texts])
                found["right"].append(flags(self.judge([question] * len(texts), candidates)))
                found["trained"].append([round(c.score(REDUCE), 6) for c in candidates])
                found["exact"].append(exact)
        return found

    def taken(self, some: Sequence[str], result: search.Result, how: str = "max") -> dict:
        best = result.best(how, answer=self.task.answer, reduce=REDUCE)
        return {"right": flags(self.judge(some, best)), "spent": result.spent}

    def over(self, title: str, find: Any, how: str = "max") -> dict:
        """What find(questions) gives, batch by batch."""
        right, spent = "", []
        for some in self.batches(self.tested, title):
            cell = self.taken(some, find(some), how)
            right, spent = right + cell["right"], spent + cell["spent"]
        return {"right": right, "spent": spent, "tokens": float(np.mean(spent))}

    def strategy(self, strategy: Any, scorer: str, title: str) -> dict:
        return self.over(title, lambda some: strategy(
            self.rollouts(self.task.temperature), some, self.scorer(scorer), self.steps,
            n=WIDTH, beam=4, reduce=REDUCE, seed=SEED,
        ))  # fmt: skip

    def stop(self, name: str, title: str) -> dict:
        kind, rules = STOPS[name]
        if kind == "majority":
            rules = rules | {"answer": self.task.answer}
        scorer = self.scorer("exact") if "exact" in kind else self.probe
        stop = search.Stopping(reduce=REDUCE, **rules)
        saved = []

        def find(some: Sequence[str]) -> search.Result:
            result = search.best_of_n(
                self.rollouts(self.task.temperature), some, scorer, self.steps, n=WIDTH, seed=SEED,
                stop=stop,
            )  # fmt: skip
            saved.append(result.saved)
            return result

        cell = self.over(title, find, kind.split(",")[0])
        return cell | {"saved": sum(saved) / len(self.tested)}

    def table(self, scorer: str, title: str) -> dict:
        """Fitted on problems that are neither tested nor trained on."""
        used = {self.task.numbers(x) for x in self.tested}
        used |= {
            self.task.numbers(x)
            for x in self.task.questions(4 * self.scale.trained_on, SEED + 1000)
        }
        drawn = self.task.questions(20 * self.fitted_on, SEED + 2000)
        others = [x for x in drawn if self.task.numbers(x) not in used][: self.fitted_on]

        def right(question: str, candidates: list) -> bool:
            best = search.choose(candidates, answer=self.task.answer, reduce=REDUCE)
            return self.judge([question], [best])[0]

        table = search.Table.fit(
            self.rollouts(self.task.temperature), others, self.scorer(scorer), self.steps,
            right=right, tried=TRIED, probes=PROBES, reduce=REDUCE, seed=SEED,
        )  # fmt: skip
        entries = [vars(x) for x in table.entries]
        return {"edges": list(table.edges), "entries": entries, "problems": len(others)}

    def allocate(self, scorer: str, rival: str, title: str) -> dict:
        """All problems at once, with as many tokens as a rival."""
        saved = self.cells[f"table, {scorer}"]
        table = search.Table(saved["edges"], [search.Entry(**x) for x in saved["entries"]])
        budget = sum(self.cells[f"{rival}, {scorer}"]["spent"])
        result = search.allocate(
            self.rollouts(self.task.temperature), self.tested, self.scorer(scorer), self.steps,
            budget=budget, table=table, probes=PROBES, reduce=REDUCE, seed=SEED,
        )  # fmt: skip
        cell = self.taken(self.tested, result)
        chosen = [e.why.split(": ")[1] for e in sorted(result.trace, key=lambda e: e.question)
                  if e.run == 0]  # fmt: skip
        return cell | {"tokens": float(np.mean(cell["spent"])), "budget": budget, "chosen": chosen}

    def deepen(self, scorer: str, title: str) -> dict:
        return self.over(title, lambda some: search.deepen(
            self.rollouts(self.task.temperature), some, self.scorer(scorer), self.steps,
            n=WIDTH // 2, trigger=TRIGGER[self.task.name], depths=(1, 2), enough=0.99,
            reduce=REDUCE, seed=SEED,
        ))  # fmt: skip

    def told(self, cell: dict) -> str:
        if "spent" in cell:
            found = f"right {np.mean([x == '1' for x in cell['right']]):.3f}, "
            return f"{found}{cell['tokens']:.0f} tokens, {cell['wall_s']:.0f} s"
        return f"{cell['wall_s']:.0f} s"


def ones(right: str) -> np.ndarray:
    return np.array([x == "1" for x in right], float)


def taken(samples: dict, how: str, n: int) -> np.ndarray:
    """Whether best-of-N of the first n samples of each problem is right; or their majority."""
    found = []
    for i, right in enumerate(samples["right"]):
        answers = np.array(samples["answers"][i][:n])
        named = np.flatnonzero(answers >= 0)
        rows = named if len(named) else np.arange(n)
        scores = np.array(samples["exact" if "exact" in how else "trained"][i][:n])
        if how == "majority" and len(named):
            counts = np.bincount(answers[named])
            # Of equals that which is there first, as `choose` has it.
            first = max(dict.fromkeys(answers[named].tolist()), key=counts.__getitem__)
            rows = np.flatnonzero(answers == first)
        found.append(right[rows[np.argmax(scores[rows])]] == "1")
    return np.array(found, float)


def at_tokens(samples: dict, how: str, tokens: float) -> np.ndarray:
    """Chance of each problem to be right by N samples of so many tokens on average: a mixture of
    the two N around it."""
    cost = np.array(samples["tokens"]).cumsum(1).mean(0)
    if tokens <= cost[0]:
        return taken(samples, how, 1)
    n = int(np.searchsorted(cost, tokens))
    if n >= len(cost):
        return taken(samples, how, len(cost))
    share = (tokens - cost[n - 1]) / (cost[n] - cost[n - 1])
    return (1 - share) * taken(samples, how, n) + share * taken(samples, how, n + 1)


def abstained(samples: dict, n: int) -> tuple[float, float, float]:
    """Right of all, right of those answered, and share answered, for half of the problems: the
    threshold comes from the other half, and the other way round."""
    sure = np.array([search.confidence([None if x < 0 else x for x in answers[:n]])
                     for answers in samples["answers"]])  # fmt: skip
    right, half = taken(samples, "majority", n), np.arange(len(sure)) % 2 == 0
    answered = np.zeros(len(sure), bool)
    for here in (half, ~half):
        answered[here] = sure[here] >= search.threshold(sure[~here], coverage=0.5)
    of_those = right[answered].mean() if answered.any() else float("nan")
    return float(right.mean()), float(of_those), float(answered.mean())


def paired(differences: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of their mean; not narrower where wins and losses change places."""
    (low, high), (other_high, other_low) = interval(differences), interval(-differences)
    return min(low, -other_low), max(high, -other_high)


HEADS = ("", "right", "rival", "rival right", "difference, 95 %", "tokens", "rival tokens")


def rows(cells: dict[str, dict]) -> list[dict]:
    """Each strategy beside a rival at equal tokens; of stopping, beside the same samples whole."""
    samples, found = cells["samples"], []
    cost = np.array(samples["tokens"]).cumsum(1).mean(0)

    def add(name: str, cell: dict, rival: str, right: np.ndarray, tokens: float) -> None:
        own = ones(cell["right"])
        low, high = paired(own - right)
        found.append({
            "name": name, "right": own.mean(), "rival": rival, "rival_right": right.mean(),
            "difference": (own - right).mean(), "low": low, "high": high,
            "tokens": cell["tokens"], "rival_tokens": tokens,
        })  # fmt: skip

    for scorer in SCORERS:
        for rival in ("beam", "dvts"):
            cell, other = cells[f"allocate as {rival}, {scorer}"], cells[f"{rival}, {scorer}"]
            name = f"allocate as {rival}, {scorer}"
            add(name, cell, rival, ones(other["right"]), other["tokens"])
            independent = at_tokens(samples, f"max, {scorer}", cell["tokens"])
            add(name, cell, "best of N", independent, min(cell["tokens"], cost[-1]))
        cell = cells[f"deepen, {scorer}"]
        independent = at_tokens(samples, f"max, {scorer}", cell["tokens"])
        add(f"deepen, {scorer}", cell, "best of N", independent, min(cell["tokens"], cost[-1]))
    for name, (how, _) in STOPS.items():
        whole = taken(samples, how, WIDTH)
        add(f"stop: {name}", cells[f"stop, {name}"], "all samples", whole, cost[WIDTH - 1])
    return found


def table(cells: dict[str, dict]) -> list[Sequence[str]]:
    found: list[Sequence[str]] = [HEADS]
    for task, measured in cells.items():
        for row in rows(measured):
            found.append([
                f"{task}: {row['name']}", f"{row['right']:.2f}", row["rival"],
                f"{row['rival_right']:.2f}",
                f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})",
                f"{row['tokens']:.0f}", f"{row['rival_tokens']:.0f}",
            ])  # fmt: skip
        every, answered, share = abstained(measured["samples"], WIDTH)
        found.append(
            [
                f"{task}: majority, {WIDTH}; {share:.2f} answered",
                f"{answered:.2f}",
                "all answered",
                f"{every:.2f}",
                f"{answered - every:+.2f}",
                "",
                "",
            ]
        )
    return found


def targets(cells: dict[str, dict]) -> Targets:
    """What the strategies are for: not to be worse at equal tokens, and to save tokens."""
    found = Targets()
    for task, measured in cells.items():
        for row in rows(measured):
            name = f"{task}: {row['name']}"
            if row["name"].startswith("stop"):
                saved = 1 - row["tokens"] / row["rival_tokens"]
                found.add(f"{name}: tokens saved", saved, 0.3, least=True)
                found.add(f"{name}: right answers lost", 0.0 - row["difference"], 0.0)
            else:
                what = f"{name}: right more than {row['rival']}"
                found.add(what, row["difference"], 0.0, least=True)
                gap = row["tokens"] / row["rival_tokens"] - 1
                found.add(f"{name}: tokens over {row['rival']}'s", gap, 0.05)
        every, answered, share = abstained(measured["samples"], WIDTH)
        found.add(f"{task}: right more where half is answered", answered - every, 0.0, least=True)
        found.add(f"{task}: share answered is off by", abs(share - 0.5), 0.1)
    return found


def caption(result: dict) -> str:
    counts = ", ".join(
        f"{task}: {len(cells['samples']['right'])} problems, tables fitted on "
        f"{cells['table, exact']['problems']} others" for task, cells in result["cells"].items()
    )  # fmt: skip
    where = result["where"]
    return (
        f"{counts}. Paired by problem; best of N at as many tokens is a mixture of two N. "
        "Thresholds of abstention come from the other half of the problems. "
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit "
        f"{result['commit']}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.search --adaptive", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few problems, to see it work")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results; what it has is kept")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="rewrite its table there")
    parser.add_argument("--only", choices=[task.name for task in TASKS], help="only this task")
    args = parser.parse_args(argv)
    console = Console()
    scales = dict.fromkeys(SCALES, QUICK) if args.quick else SCALES
    fitted_on = dict.fromkeys(SCALES, QUICK.problems) if args.quick else FITTED_ON
    adaptive = {task: vars(scale) | {"fitted_on": fitted_on[task]}
                for task, scale in scales.items()}  # fmt: skip
    header = {"seed": SEED, "adaptive": json.loads(json.dumps(adaptive))}
    header |= {"commit": demo.commit()["commit"]}
    journal = Journal(args.json, header, stale=["commit"])
    for task in TASKS:
        if args.only in (None, task.name):
            Adaptive(task, scales[task.name], journal, fitted_on[task.name]).run(console)
    reached = targets(journal.cells)
    where = demo.where("cpu")
    where |= {"kvtools": kvtools.__version__, "dirty": demo.commit()["dirty"]}
    journal.save(where=where, targets=reached)
    for row in table(journal.cells):
        console.print("{:52} {:>6} {:12} {:>6} {:24} {:>6} {:>6}".format(*row), highlight=False,
                      soft_wrap=True)  # fmt: skip
    reached.show(console)
    if args.readme:
        result = header | {"cells": journal.cells, "where": where}
        demo.rewrite(args.readme, "adaptive", table(journal.cells), caption(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
