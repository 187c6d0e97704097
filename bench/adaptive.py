"""Search that spends where it pays, at equal tokens: python -m bench.search --adaptive.

On the problems and policies of `bench.search`: allocation by difficulty against best-of-N, beam
search and DVTS; tokens that stopping saves; what abstention leaves; deepening against independent
samples. Differences are paired by problem. Best-of-N at as many tokens as another strategy is a
mixture of the two N around it, so that tokens are equal to the letter.

Samples and searches are drawn once, and JSON is written after each few problems; what is made of
them, allocation and stopping too, is played back, with the very tokens that it would have drawn.
"""

import argparse
import base64
import json
import math
import sys
import zlib
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import kvtools
from bench.adaptive_report import SCORERS, SEARCHES, caption, ones, rows, table, taken, targets
from bench.playback import Kept, Recorded
from bench.problems import TASKS, Task
from bench.search import HELD_OUT, REDUCE, SEED, WIDTH, Bench, Scale, flags
from kvtools import search
from kvtools.cli import demo
from kvtools.quality import Journal

WORDS, SUMS = (task.name for task in TASKS)
TESTED, FITTED = "tested", "fitted"
PROBES = 4
TRIED = (
    ("best_of_n", {"n": 4}),
    ("best_of_n", {"n": 12}),
    ("beam", {"n": WIDTH, "beam": 4, "reduce": REDUCE}),
    ("dvts", {"n": WIDTH, "beam": 4, "reduce": REDUCE}),
)
# What is taken, and rules by which rows and problems stop: of several that which does best on the
# fitted problems.
FIRM = {"wave": 1, "window": 1, "ahead": 0}  # row by row; the newest step decides
STOPS: dict[str, tuple[str, list[dict]]] = {
    "settled votes": ("majority", [FIRM]),
    "likely votes": ("majority", [FIRM | {"sure": x} for x in (0.7, 0.8, 0.9, 0.95)]),
    "one verified": ("max, exact", [FIRM | {"enough": 1, "verified": 1.0}]),
    "one verified, mistakes cut": (
        "max, exact", [FIRM | {"enough": 1, "verified": 1.0, "margin": 0.0}],
    ),
    "by trained scores": ("max, trained", [
        FIRM | {"margin": margin, "enough": 1, "verified": verified}
        for margin in (None, -4.0, -2.0, 0.0)
        for verified in (0.7, 0.9, 0.98, 1.0)
    ]),
}  # fmt: skip
TRIGGER = {WORDS: " Wait, that is wrong.", SUMS: ""}
# Nearly all of the time goes into word problems.
SCALES = {
    WORDS: Scale(problems=50, batch=10),
    SUMS: Scale(problems=100, batch=50),
}
FITTED_ON = {WORDS: 30, SUMS: 100}
QUICK = Scale(problems=6, trained_on=16, batch=6)


class Adaptive(Bench):
    """One task: draws of two sets of problems, batch by batch, and what is made of them.

    Rules and tables are fitted on the one set and measured on the other.
    """

    def __init__(
        self, task: Task, scale: Scale, journal: Journal, fitted: int, heads: dict | None = None
    ) -> None:
        super().__init__(task, scale, journal)
        used = [*task.questions(HELD_OUT, SEED), *self.trained()]
        self.sets = {TESTED: self.tested, FITTED: self.others(used, fitted, SEED + 2000)}
        self.heads = heads or {}

    def todo(self) -> dict[str, Any]:
        cells: dict[str, Any] = {"probe": self.train}
        batches = []
        for name, questions in self.sets.items():
            for i, start in enumerate(range(0, len(questions), self.scale.batch)):
                some = questions[start : start + self.scale.batch]
                batches.append((start / len(questions), f"{name} {i}", some))
        for _, title, some in sorted(batches):  # both sets grow side by side
            cells[title] = partial(self.draw, some, deep=title.startswith(TESTED))
        return cells

    def train(self, title: str) -> dict:
        """The trained scorer: that of `bench.search`, where its results are given."""
        found = self.heads.get(self.task.name)
        if found is None:
            return super().train(title)
        self.probe.head = base64.b64decode(found["head"])
        return {name: found[name] for name in ("problems", "steps", "ok", "head")}

    def draw(self, some: Sequence[str], title: str, deep: bool) -> dict:
        """All that needs the policy, of some problems: samples, and the best of each search."""
        policy = Kept(self.rollouts(self.task.temperature))
        found: dict[str, Any] = {"questions": some}
        result = search.best_of_n(
            policy, some, self.probe, self.steps, n=self.scale.pool, seed=SEED
        )  # fmt: skip
        found["tokens"] = [[c.tokens for c in x] for x in result.candidates]
        found["margins"] = [
            [[round(m, 5) for m in c.margins] for c in x] for x in result.candidates
        ]
        for scorer in SCORERS:
            for name in SEARCHES:
                found[f"{name}, {scorer}"] = self.best(getattr(search, name)(
                    policy, some, self.scorer(scorer), self.steps, n=WIDTH, beam=4, reduce=REDUCE,
                    seed=SEED + 1,
                ))  # fmt: skip
            if deep:
                found[f"deepen, {scorer}"] = self.best(search.deepen(
                    policy, some, self.scorer(scorer), self.steps, n=WIDTH // 2,
                    trigger=TRIGGER[self.task.name], depths=(1, 2), enough=0.99, reduce=REDUCE,
                    seed=SEED + 1,
                ))  # fmt: skip
        return {"draws": pack(found), "problems": len(some), "commit": demo.commit()["commit"]}

    def best(self, result: search.Result) -> dict:
        """Of each problem the candidate that is taken, and the tokens that all took."""
        found = result.best(answer=self.task.answer, reduce=REDUCE)
        return {
            "text": [c.text for c in found],
            "score": [round(c.score(REDUCE), 6) for c in found],
            "spent": result.spent,
        }

    def scorer(self, name: str) -> Any:
        return search.Verifier(self.task.check) if name == "exact" else self.probe

    def played(self, name: str) -> "Played":
        """The draws of a set, as far as they are there."""
        found = [cell["draws"] for title, cell in self.cells.items() if title.startswith(name)]
        if not found:
            raise ValueError(f"there are no draws of {self.task.name}, {name}: leave out --kept")
        self.open()
        return Played(self, [unpack(x) for x in found])

    def told(self, cell: dict) -> str:
        if "draws" in cell:
            return f"{cell['problems']} problems, {cell['wall_s']:.0f} s"
        return super().told(cell)


def pack(found: dict) -> str:
    return base64.b64encode(zlib.compress(json.dumps(found).encode(), 9)).decode()


def unpack(packed: str) -> dict:
    return json.loads(zlib.decompress(base64.b64decode(packed)))


class Played:
    """Draws of a set of problems, played back: what a search would find, without the policy."""

    def __init__(self, bench: Adaptive, draws: Sequence[dict]) -> None:
        self.task, self.steps = bench.task, bench.steps
        self.eos = bench.rollouts(0.0).eos
        self.draws = {name: [x for found in draws for x in found[name]]
                      for name in ("questions", "tokens", "margins")}  # fmt: skip
        self.questions: list[str] = self.draws["questions"]
        self.found = {
            name: {key: [x for found in draws for x in found[name][key]] for key in draws[0][name]}
            for name in draws[0] if name not in self.draws
        }  # fmt: skip
        encoded = (tuple(bench.tokenizer.encode(question)) for question in self.questions)
        self.said = dict(zip(encoded, self.draws["tokens"], strict=True))

    def policy(self, first: int = 0) -> Any:
        return Recorded(self.said, self.eos, first)

    @cached_property
    def samples(self) -> dict:
        """Of each problem and sample: tokens, the answer's number, whether right, and scores."""
        found: dict[str, list] = {"tokens": [], "answers": [], "right": [], "trained": [],
                                  "exact": []}  # fmt: skip
        n = len(self.draws["tokens"][0])
        results = {
            scorer: search.best_of_n(
                self.policy(), self.questions, self.scorer(scorer), self.steps, n=n
            )
            for scorer in SCORERS
        }
        for i, question in enumerate(self.questions):
            candidates = results["trained"].candidates[i]
            texts = [self.task.answer(c.text) for c in candidates]
            names = {x: j for j, x in enumerate(dict.fromkeys(texts)) if x is not None}
            found["tokens"].append([len(c.tokens) for c in candidates])
            found["answers"].append([names.get(x, -1) for x in texts])
            found["right"].append(flags(x == self.task.truth(question) for x in texts))
            for scorer, result in results.items():
                scores = [c.score(REDUCE) for c in result.candidates[i]]
                found[scorer].append([round(x, 6) for x in scores])
        return found

    def scorer(self, name: str) -> Any:
        return search.Verifier(self.task.check) if name == "exact" else self._trained

    def _trained(self, question: str, solutions: list[list[str]]) -> list[list[float]]:
        known = self._scores[question]
        return [[known["".join(x[: i + 1])] for i in range(len(x))] for x in solutions]

    @cached_property
    def _scores(self) -> dict[str, dict[str, float]]:
        """The trained scorer's probability of each text that a sample has been."""
        n = len(self.draws["tokens"][0])
        whole = search.best_of_n(self.policy(), self.questions, None, self.steps, n=n)
        found: dict[str, dict[str, float]] = {question: {} for question in self.questions}
        for question, some, margins in zip(
            self.questions, whole.candidates, self.draws["margins"], strict=True
        ):
            for c, own in zip(some, margins, strict=True):
                for i, margin in enumerate(own):
                    found[question]["".join(c.steps[: i + 1])] = 1 / (1 + math.exp(-margin))
        return found

    def strategies(self, scorer: str) -> dict[str, Any]:
        """What a table's entries are run by: other samples than the probes, and the searches that
        were drawn, of which the best candidate is known."""

        def best_of_n(rollouts: Any, some: Any, scorer: Any, steps: Any, *, n: int, seed: int):
            return search.best_of_n(self.policy(PROBES), some, scorer, steps, n=n)

        def again(name: str, _: Any, some: Sequence[str], *__: Any, **___: Any) -> search.Result:
            found = self.found[f"{name}, {scorer}"]
            index = [self.questions.index(question) for question in some]
            rows = [[search.Candidate(text=found["text"][i], scores=[found["score"][i]])]
                    for i in index]  # fmt: skip
            spent = [found["spent"][i] for i in index]
            return search.Result(list(some), rows, [], sum(spent), 0, {}, spent=spent)

        return {"best_of_n": best_of_n} | {name: partial(again, name) for name in SEARCHES}

    def right(self, texts: Sequence[str]) -> str:
        return flags(self.task.answer(text) == self.task.truth(question)
                     for question, text in zip(self.questions, texts, strict=True))  # fmt: skip

    def drawn(self, name: str) -> dict:
        """A search as it was drawn."""
        found = self.found[name]
        return cell(self.right(found["text"]), found["spent"])

    def stop(self, how: str, rule: dict) -> dict:
        kind, _, scorer = how.partition(", ")
        rule = rule | ({"answer": self.task.answer} if kind == "majority" else {})
        result = search.best_of_n(
            self.policy(), self.questions, self.scorer(scorer or "exact"), self.steps, n=WIDTH,
            stop=search.Stopping(reduce=REDUCE, **rule),
        )  # fmt: skip
        best = result.best(kind, answer=self.task.answer, reduce=REDUCE)
        return cell(self.right([c.text for c in best]), result.spent)

    def table(self, scorer: str) -> search.Table:
        def right(question: str, candidates: list) -> bool:
            best = search.choose(candidates, answer=self.task.answer, reduce=REDUCE)
            return self.task.answer(best.text) == self.task.truth(question)

        return search.Table.fit(
            self.policy(), self.questions, self.scorer(scorer), self.steps, right=right,
            tried=TRIED, probes=PROBES, reduce=REDUCE, strategies=self.strategies(scorer),
            seed=SEED,
        )  # fmt: skip

    def allocate(self, scorer: str, table: search.Table, budget: float) -> dict:
        """All problems at once."""
        result = search.allocate(
            self.policy(), self.questions, self.scorer(scorer), self.steps, budget=budget,
            table=table, probes=PROBES, reduce=REDUCE, strategies=self.strategies(scorer),
            seed=SEED,
        )  # fmt: skip
        best = result.best(answer=self.task.answer, reduce=REDUCE)
        chosen = [e.why.split(": ")[1] for e in sorted(result.trace, key=lambda e: e.question)
                  if e.run == 0]  # fmt: skip
        found = cell(self.right([c.text for c in best]), result.spent)
        return found | {"budget": budget, "chosen": chosen}


def cell(right: str, spent: Sequence[int]) -> dict:
    return {"right": right, "spent": list(spent), "tokens": float(np.mean(spent))}


def fitted_rule(fitted: Played, how: str, rules: Sequence[dict]) -> dict:
    """Of rules that lose no right answer of the fitted problems, that which takes least tokens;
    or, if all do, of those that lose least."""
    if len(rules) == 1:
        return rules[0]
    whole = taken(fitted.samples, how, WIDTH).sum()
    trials = [fitted.stop(how, rule) for rule in rules]
    worth = [(max(0.0, whole - ones(x["right"]).sum()), x["tokens"]) for x in trials]
    return rules[worth.index(min(worth))]


def measured(fitted: Played, tested: Played) -> dict[str, dict]:
    """All cells of the table, from the draws."""
    cells: dict[str, dict] = {"samples": tested.samples}
    for name, (how, rules) in STOPS.items():
        rule = fitted_rule(fitted, how, rules)
        cells[f"stop, {name}"] = tested.stop(how, rule) | {"how": how, "rule": rule}
    for scorer in SCORERS:
        table = fitted.table(scorer)
        entries = [vars(x) for x in table.entries]
        cells[f"table, {scorer}"] = {
            "edges": list(table.edges), "entries": entries, "problems": len(fitted.questions),
        }  # fmt: skip
        for rival in SEARCHES:
            cells[f"{rival}, {scorer}"] = found = tested.drawn(f"{rival}, {scorer}")
            cells[f"allocate as {rival}, {scorer}"] = tested.allocate(
                scorer, table, sum(found["spent"])
            )
        cells[f"deepen, {scorer}"] = tested.drawn(f"deepen, {scorer}")
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.search --adaptive", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few problems, to see it work")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results; what it has is kept")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="rewrite its table there")
    parser.add_argument(
        "--heads", type=Path, metavar="PATH",
        help="results of bench.search: their trained scorers are taken, which are the same",
    )  # fmt: skip
    parser.add_argument(
        "--kept", action="store_true", help="draw nothing: what PATH has is played back"
    )
    parser.add_argument("--only", choices=[task.name for task in TASKS], help="only this task")
    args = parser.parse_args(argv)
    if args.kept and not (args.json and args.json.is_file()):
        parser.error("--kept needs --json PATH, a file that is there")
    console = Console()
    scales = dict.fromkeys(SCALES, QUICK) if args.quick else SCALES
    fitted = dict.fromkeys(SCALES, QUICK.problems) if args.quick else FITTED_ON
    how = {task: {"pool": x.pool, "trained_on": x.trained_on, "batch": x.batch}
           for task, x in scales.items()}  # fmt: skip
    # Draws stay when other sources change; each says which drew it.
    journal = Journal(args.json, {"seed": SEED, "draws": how})
    found = {}
    for task in TASKS:
        if args.only in (None, task.name):
            heads = heads_of(args.heads, scales[task.name]) if args.heads else None
            bench = Adaptive(task, scales[task.name], journal, fitted[task.name], heads)
            if not args.kept:
                bench.run(console)
            found[task.name] = measured(*map(bench.played, (FITTED, TESTED)))
    reached = targets(found)
    where = demo.where("cpu") | {"kvtools": kvtools.__version__} | demo.commit()
    # What each problem took and its samples are in the draws.
    short = {task: {name: {key: x for key, x in cell.items() if key != "spent"}
                    for name, cell in cells.items() if name != "samples"}
             for task, cells in found.items()}  # fmt: skip
    beside = {task: rows(cells) for task, cells in found.items()}
    journal.save(where=where, measured=short, rows=beside, targets=reached)
    lines = table(found)
    for row in lines:
        console.print("{:46} {:>5} {:12} {:>5} {:24} {:>6} {:>6}".format(*row), highlight=False,
                      soft_wrap=True)  # fmt: skip
    reached.show(console)
    if args.readme:
        drew = sorted({x["commit"] for cells in journal.cells.values() for x in cells.values()
                       if "draws" in x})  # fmt: skip
        demo.rewrite(args.readme, "adaptive", lines, caption(found, where, drew))
    return 0


def heads_of(path: Path, scale: Scale) -> dict[str, dict]:
    """The trained scorers of `bench.search`, by task.

    Raises:
        ValueError: they were trained otherwise than with this seed and on so many problems.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("seed") != SEED or found.get("scale", {}).get("trained_on") != scale.trained_on:
        raise ValueError(f"--heads {path}: not results of bench.search with seed {SEED} and "
                         f"{scale.trained_on} problems to train on")  # fmt: skip
    return {task: cells["probe"] for task, cells in found["cells"].items()}


if __name__ == "__main__":
    sys.exit(main())
