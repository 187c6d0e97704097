"""Search strategies at equal tokens, on problems that a program checks: python -m bench.search.

Two policies: SmolLM2-135M-Instruct on two-step word problems, and a byte-level model, heated, on
worked sums. Three scorers: the exact check of each step, a head on the policy's own hidden states
trained on other problems, and chance. JSON is written after every cell; at the same commit a run
resumes from it.
"""

import argparse
import base64
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import kvtools
from bench.probe import Probe, area, first_layers
from bench.problems import TASKS, Task, chance
from bench.targets import Targets
from kvtools import Rollouts, cli, search
from kvtools.cli import demo
from kvtools.quality import Journal, interval

SEED = 7
HELD_OUT = 100  # problems that nothing is trained on
WIDTH = 8  # rows of the table's searches, and samples beside them
REDUCE = "prod"  # a step's score is the chance that it is right if those before it are
STRATEGIES = {
    "beam": partial(search.beam, reduce=REDUCE),
    "DVTS": partial(search.dvts, reduce=REDUCE),
    "particles": search.particle_filter,
}
SCORERS = ("exact", "trained", "chance")
VOTES = [("majority", "chance"), *((how, x) for how in ("max", "weighted") for x in SCORERS)]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    problems: int = HELD_OUT
    pool: int = 16  # samples of each problem
    trained_on: int = 150  # problems, 8 samples of each
    batch: int = 20  # problems at a time
    widths: tuple[int, ...] = (4, WIDTH)  # rows of a search; but for the exact check the last alone


QUICK = Scale(problems=6, pool=8, trained_on=16, batch=6, widths=(4,))


class Bench:
    """One task, measured cell by cell."""

    def __init__(self, task: Task, scale: Scale, journal: Journal) -> None:
        self.task, self.scale, self.journal = task, scale, journal
        self.cells = journal.cells.setdefault(task.name, {})
        self.tested = task.questions(scale.problems, SEED)

    def todo(self) -> dict[str, Any]:
        """How each cell is measured, from its title."""
        todo = {"probe": self.train, "greedy": self.greedy, "samples": self.samples}
        for width in self.scale.widths:
            for name in STRATEGIES:
                for scorer in SCORERS:
                    if scorer == "exact" or width == self.scale.widths[-1]:
                        cell = f"{name}, {scorer}, {width}"
                        todo[cell] = partial(self.search, name, scorer, width)
        return todo

    def run(self, console: Console) -> None:
        for name, measure in self.todo().items():
            if name not in self.cells:
                self.open()
                begin = time.perf_counter()
                self.cells[name] = measure(f"{self.task.name}: {name}")
                self.cells[name]["wall_s"] = round(time.perf_counter() - begin, 2)
                self.journal.save()
            line = f"{self.task.name}: {name}: {self.told(self.cells[name])}"
            console.print(line, highlight=False, soft_wrap=True)

    def open(self) -> None:
        """Load the policy and the trained scorer, unless they are there."""
        if hasattr(self, "model"):
            return
        self.model, self.tokenizer = self.task.load()
        self.steps = self.task.steps(self.tokenizer)
        short = first_layers(self.model, self.task.layers)
        whole = self.task.layers == self.model.config.num_hidden_layers
        self.probe = Probe(short, self.tokenizer.encode, ",", self.task.opening, whole)
        if "probe" in self.cells:
            self.probe.head = base64.b64decode(self.cells["probe"]["head"])

    def rollouts(self, temperature: float) -> Rollouts:
        eos = None if self.model.generation_config.eos_token_id is not None else ()
        return Rollouts(self.model, temperature=temperature, eos_token_id=eos)

    def batches(self, questions: Sequence[str], title: str) -> Iterator[Sequence[str]]:
        with cli.progress() as bar:
            line = bar.add_task(title, total=len(questions))
            for start in range(0, len(questions), self.scale.batch):
                some = questions[start : start + self.scale.batch]
                yield some
                bar.advance(line, len(some))

    def trained(self) -> list[str]:
        """Problems that the scorer is trained on."""
        return self.others(self.task.questions(HELD_OUT, SEED), self.scale.trained_on, SEED + 1000)

    def others(self, used: Sequence[str], count: int, seed: int) -> list[str]:
        """Problems that are not among those used."""
        known = {self.task.numbers(question) for question in used}
        drawn = self.task.questions(4 * count, seed)
        return [x for x in drawn if self.task.numbers(x) not in known][:count]

    def train(self, title: str) -> dict:
        """The trained scorer, on samples of problems that are not tested."""
        others, ends, hidden, right = self.trained(), "".join(self.task.delimiters), [], []
        for some in self.batches(others, title):
            found = search.best_of_n(
                self.rollouts(self.task.temperature), some, None, self.steps, n=8, seed=SEED
            )
            for question, candidates in zip(some, found.candidates, strict=True):
                solutions = [c.steps for c in candidates if c.steps]
                bare = [[step.rstrip(ends) or step for step in steps] for steps in solutions]
                exact = [until_wrong(x) for x in self.exact(question, solutions)]
                for states, scores in zip(self.probe.features(question, bare), exact, strict=True):
                    hidden.append(states[: len(scores)])
                    right += scores
        self.probe.fit(torch.cat(hidden), right)
        head = base64.b64encode(self.probe.head).decode()
        return {"problems": len(others), "steps": len(right), "ok": np.mean(right), "head": head}

    def exact(self, question: str, solutions: Sequence[Sequence[str]]) -> list[list[float]]:
        """The exact check of each step."""
        return [
            [float(self.task.check(question, "".join(x[: i + 1]))) for i in range(len(x))]
            for x in solutions
        ]

    def greedy(self, title: str) -> dict:
        right, generated, seconds = [], 0, 0.0
        for some in self.batches(self.tested, title):
            found = search.best_of_n(self.rollouts(0.0), some, None, self.steps, n=1)
            right += self.judge(some, [x[0] for x in found.candidates])
            generated, seconds = generated + found.generated, seconds + found.seconds["all"]
        n = len(self.tested)
        return {"right": flags(right), "tokens": generated / n, "seconds": seconds / n}

    def samples(self, title: str) -> dict:
        """What votes and best-of-N make of the first 1, 2, ... samples of each problem."""
        pool = range(1, self.scale.pool + 1)
        right: dict[str, list[list[bool]]] = {"any": [[] for _ in pool]}
        tokens, seconds, encoded, judged = np.zeros(len(pool)), 0.0, 0, []
        for some in self.batches(self.tested, title):
            found = search.best_of_n(
                self.rollouts(self.task.temperature), some, self.probe, self.steps,
                n=self.scale.pool, seed=SEED,
            )  # fmt: skip
            seconds, encoded = seconds + found.seconds["all"], encoded + found.encoded
            for question, candidates in zip(some, found.candidates, strict=True):
                solutions = [c.steps for c in candidates]
                scores = {
                    "exact": self.exact(question, solutions),
                    "trained": [list(c.scores) for c in candidates],
                    "chance": chance(question, solutions),
                }
                for c, exact in zip(candidates, map(until_wrong, scores["exact"]), strict=True):
                    judged += list(zip(c.margins, exact, strict=False))
                tokens += np.cumsum([len(c.tokens) for c in candidates])
                whether = self.judge([question] * len(candidates), candidates)
                for n in pool:
                    right["any"][n - 1].append(any(whether[:n]))
                for how, scorer in VOTES:
                    rows = right.setdefault(f"{how}, {scorer}", [[] for _ in pool])
                    for c, x in zip(candidates, scores[scorer], strict=True):
                        c.scores = x
                    for n in pool:
                        best = search.choose(
                            candidates[:n], how, answer=self.task.answer, reduce=REDUCE
                        )
                        rows[n - 1] += self.judge([question], [best])
        n = len(self.tested)
        return {
            "tokens": (tokens / n).round(2).tolist(),
            "seconds": seconds / n / len(pool),
            "encoded": encoded / n / len(pool),
            "auc": area(*zip(*judged, strict=True)),
            "right": {name: [flags(x) for x in rows] for name, rows in right.items()},
        }

    def search(self, strategy: str, scorer: str, width: int, title: str) -> dict:
        scorers = {"exact": search.Verifier(self.task.check), "trained": self.probe}
        right: dict[str, list[bool]] = {"max": [], "weighted": []}
        generated, encoded, seconds = 0, 0, dict.fromkeys(("policy", "scorer", "all"), 0.0)
        for some in self.batches(self.tested, title):
            found = STRATEGIES[strategy](
                self.rollouts(self.task.temperature), some, scorers.get(scorer, chance), self.steps,
                n=width, seed=SEED,
            )  # fmt: skip
            for how, row in right.items():
                best = found.best(how, answer=self.task.answer, reduce=REDUCE)
                row += self.judge(some, best)
            generated, encoded = generated + found.generated, encoded + found.encoded
            seconds = {part: x + found.seconds[part] for part, x in seconds.items()}
        n = len(self.tested)
        return {
            "right": {how: flags(row) for how, row in right.items()},
            "tokens": generated / n,
            "encoded": encoded / n,
            "seconds": {part: x / n for part, x in seconds.items()},
        }

    def judge(self, questions: Sequence[str], chosen: Sequence[Any]) -> list[bool]:
        return [
            c is not None and self.task.answer(c.text) == self.task.truth(question)
            for question, c in zip(questions, chosen, strict=True)
        ]

    def told(self, cell: dict) -> str:
        """A cell in a few words."""
        if "head" in cell:
            found = f"{cell['steps']} steps of {cell['problems']} problems, {cell['ok']:.2f} right"
        elif "auc" in cell:
            first, *_, last = map(share, cell["right"]["any"])
            found = f"pass@1 {first:.3f}, in any of {len(cell['tokens'])} {last:.3f}, AUC of the "
            found += f"trained scorer {cell['auc']:.3f}"
        else:
            right = cell["right"] if isinstance(cell["right"], str) else cell["right"]["max"]
            found = f"right {share(right):.3f}, {cell['tokens']:.0f} tokens"
        return f"{found}, {cell['wall_s']:.0f} s"


def until_wrong(scores: list[float]) -> list[float]:
    """Steps up to the first mistake: what a step is worth is asked of those."""
    return scores[: scores.index(0.0) + 1] if 0.0 in scores else scores


def flags(right: Sequence[bool]) -> str:
    """A character per problem, which keeps results short."""
    return "".join("01"[bool(x)] for x in right)


def share(right: str) -> float:
    return right.count("1") / len(right)


def beside(samples: dict, tokens: float) -> int:
    """Number of samples that cost about so many tokens."""
    return int(np.argmin(np.abs(np.array(samples["tokens"]) - tokens))) + 1


def rows(cells: dict[str, dict], width: int) -> Iterator[dict]:
    """Rows of the table: independent samples, then searches, each beside best-of-N at its cost."""
    samples, greedy = cells["samples"], cells["greedy"]
    yield {"name": "greedy", "right": greedy["right"], "tokens": greedy["tokens"],
           "seconds": greedy["seconds"]}  # fmt: skip
    for how, scorer in VOTES:
        name = {"max": "best of N", "weighted": "weighted vote"}.get(how, how)
        yield {
            "name": f"{name}, {width}", "scorer": "" if how == "majority" else scorer,
            "right": samples["right"][f"{how}, {scorer}"][width - 1],
            "tokens": samples["tokens"][width - 1], "seconds": width * samples["seconds"],
            "encoded": width * samples["encoded"] if scorer == "trained" else 0,
        }  # fmt: skip
    for name in STRATEGIES:
        for scorer in SCORERS:
            cell = cells.get(f"{name}, {scorer}, {width}")
            if cell:
                n = beside(samples, cell["tokens"])
                yield {
                    "name": f"{name}, {width}", "scorer": scorer, "right": cell["right"]["max"],
                    "tokens": cell["tokens"], "seconds": cell["seconds"]["all"],
                    "encoded": cell["encoded"], "n": n, "cost": samples["tokens"][n - 1],
                    "rival": samples["right"][f"max, {scorer}"][n - 1],
                }  # fmt: skip


HEADS = ("", "scorer", "right", "95 %", "tokens", "best of N at as many", "encoded", "s")


def table(cells: dict[str, dict], width: int) -> list[Sequence[str]]:
    found: list[Sequence[str]] = [HEADS]
    for task in TASKS:
        for row in rows(cells[task.name], width) if task.name in cells else ():
            low, high = interval([int(x) for x in row["right"]])
            rival = f"{share(row['rival']):.2f} (N = {row['n']})" if "n" in row else ""
            found.append([
                f"{task.name}: {row['name']}", row.get("scorer", ""), f"{share(row['right']):.2f}",
                f"{low:.2f}-{high:.2f}", f"{row['tokens']:.0f}", rival,
                f"{row.get('encoded', 0):.0f}", f"{row['seconds']:.2f}",
            ])  # fmt: skip
    return found


def caption(result: dict) -> str:
    cells, where = result["cells"], result["where"]
    kinds = []
    for task in TASKS:
        samples, probe = cells[task.name]["samples"], cells[task.name]["probe"]
        kinds.append(
            f"{task.name}: n = {len(samples['right']['any'][0])}, pass@1 "
            f"{share(samples['right']['any'][0]):.2f}, right in any of {len(samples['tokens'])} "
            f"samples {share(samples['right']['any'][-1]):.2f}, AUC of the trained scorer on steps "
            f"up to the first mistake {samples['auc']:.2f} (trained on {probe['steps']:,} steps of "
            f"{probe['problems']} other problems)"
        )
    return " ".join([
        "Word problems: SmolLM2-135M-Instruct, float32, temperature 0.8; worked sums: the "
        "byte-level model, float32, temperature 1.9. Answers that are right, tokens generated and "
        "encoded by the scorer per problem, seconds per problem for all of it. The trained scorer "
        "is a logistic head on the policy's hidden states; that of worked sums sees "
        "log-probabilities too.",
        "; ".join(kinds) + ".",
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {result['commit']}.",
    ])  # fmt: skip


def targets(cells: dict[str, dict], width: int) -> Targets:
    """The figures the project set itself: how many problems, and whether tokens are equal."""
    found = Targets()
    for name, measured in cells.items():
        if "samples" not in measured:
            continue
        problems = len(measured["samples"]["right"]["any"][0])
        found.add(f"{name}: problems", problems, 100, least=True)
        for row in rows(measured, width):
            if "n" in row:
                gap = abs(row["cost"] / row["tokens"] - 1)
                found.add(f"{name}: {row['name']}, {row['scorer']}: tokens of best of N are off by",
                          gap, 0.05)  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--adaptive" in argv:
        from bench import adaptive

        return adaptive.main([x for x in argv if x != "--adaptive"])
    parser = argparse.ArgumentParser(prog="bench.search", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--adaptive", action="store_true",
        help="allocation, stopping, abstention and deepening instead; has its own --help",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few problems, to see it work")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results; what it has is kept")
    parser.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite its table, and search.svg beside it"
    )
    parser.add_argument("--only", choices=[task.name for task in TASKS], help="only this task")
    args = parser.parse_args(argv)
    console, scale = Console(), QUICK if args.quick else Scale()
    width = scale.widths[-1]
    header = {"seed": SEED, "scale": json.loads(json.dumps(vars(scale)))}
    header |= {"commit": demo.commit()["commit"]}  # other sources, other results
    journal = Journal(args.json, header, stale=["commit"])
    for task in TASKS:
        if args.only in (None, task.name):
            Bench(task, scale, journal).run(console)
    reached = targets(journal.cells, width)
    where = demo.where("cpu")
    where |= {"kvtools": kvtools.__version__, "dirty": demo.commit()["dirty"]}
    journal.save(where=where, targets=reached)
    for row in table(journal.cells, width):
        console.print("{:34} {:8} {:>5} {:>10} {:>7} {:>20} {:>8} {:>7}".format(*row),
                      highlight=False, soft_wrap=True)  # fmt: skip
    reached.show(console)
    missing = [task.name for task in TASKS if task.name not in journal.cells]
    if args.readme and missing:
        print(f"{args.readme} waits for {', '.join(missing)}", file=sys.stderr)
    elif args.readme:
        from bench import plots

        result = header | {"cells": journal.cells, "where": where}
        demo.rewrite(args.readme, "search", table(journal.cells, width), caption(result))
        plots.draw_search(result, args.readme.parent / "search.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
