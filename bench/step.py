"""What a decode step costs the host, beside another build: python -m bench.step --json OUT.

Operators that kvtools adds to a model's own, by a dispatch mode; seconds of the host against the
model's bare forward; launches, copies and waits as a GPU would get them, without one: Triton's over
a stand-in for CUDA's driver, copies and waits on tensors without data. "Replayed" are steps ahead
of the host, of which a CUDA graph would do what is launched: here replaying does nothing, so its
time is what is left for Python, without the driver's own for a graph. Each build runs in processes
of its own with one thread, in turns, and seconds are those of the processor. Kernels of csrc/cuda
are not launched.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.targets import Targets
from bench.timing import attempt, keep
from kvtools.cli import demo
from kvtools.quality import Journal

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("step_worker.py")
BASE = "3741a58"  # the last with an attention call for every kind of node
CONFIGS, DTYPES = ("16-bit", "balanced", "max"), ("float32", "bfloat16")

Ask = Callable[..., Any]  # a method of `step_worker.Build`, by name, and its arguments


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    layers: int = 28
    rows: int = 32
    own: int = 256  # tokens of a row at the end
    rounds: int = 11
    steps: int = 4  # of a round
    few: tuple[int, int] = (2, 4)  # layers of the models whose operators are counted
    counted: int = 16  # steps, of which one takes pages
    device_rows: int = 16
    batches: int = 12


class Worker:
    """A process that measures the build in the folder `root`."""

    def __init__(self, root: Path, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER], cwd=root, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "0", **env},
        )  # fmt: skip
        ran = Path(self("where")).resolve()
        if ran != root.resolve():
            raise RuntimeError(f"kvtools was imported from {ran}, not {root}")

    def __call__(self, name: str, *args: Any) -> Any:
        try:
            print(json.dumps([name, *args]), file=self._process.stdin, flush=True)
            said = self._process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if not said:
            raise RuntimeError(f"{name}: its process ended with {self._process.wait()}")
        answer = json.loads(said)
        if "failed" in answer:
            raise RuntimeError(f"{name}: {answer['failed']}")
        return answer["answer"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


Start = Callable[[str], Any]  # a context that gives a new `Ask` of the build of this name


def operators(scale: Scale, builds: list[str], start: Start) -> dict:
    """Calls that a layer, and a step besides, has more than those of the model with its own cache.
    `added` is kvtools' and others; views, which compute nothing, are apart."""
    found: dict[str, dict] = {}
    for build in builds:
        with start(build) as ask:
            for dtype in DTYPES:
                for name in CONFIGS:
                    run = partial(more, ask, name, dtype, scale.few, scale.counted)
                    found.setdefault(dtype, {}).setdefault(name, {})[build] = attempt(run)
    return found


def more(ask: Ask, *case: Any) -> dict:
    """What a build calls more often than the model by itself."""
    found = {}
    for where, calls in ask("operators", *case).items():
        row = {kind: n - calls["model"][kind] for kind, n in calls["ours"].items()}
        row["added"] = row["kvtools"] + row["others"]
        names = calls["names"]["ours"], calls["names"]["model"]
        by_name = {x: names[0].get(x, 0) - names[1].get(x, 0) for x in {*names[0], *names[1]}}
        order = sorted(by_name, key=lambda x: (-by_name[x], x))
        found[where] = row | {"by name": {x: by_name[x] for x in order if by_name[x]}}
    return found


def host(scale: Scale, builds: list[str], start: Start) -> dict:
    """Milliseconds of a step with few and tiny products; `share` is what of a step is no forward,
    over the other build's, and `host share` the same without kvtools' operators."""
    found: dict[str, Any] = {}
    where = scale.layers, scale.rows
    with ExitStack() as stack:
        asks = {build: stack.enter_context(start(build)) for build in builds}
        for name in CONFIGS:
            for ask in asks.values():
                ask("start", name, *where, scale.own - scale.rounds * scale.steps)
            rounds = [
                {build: ask("round", name, *where, scale.steps) for build, ask in asks.items()}
                for _ in range(scale.rounds + 1)
            ][1:]
            whole = {b: ask("generate", name, *where, scale.own) for b, ask in asks.items()}
            found[name] = {"rollouts": judged(rounds), "generate": judged([whole])}
    return found


def judged(rounds: list[dict]) -> dict:
    """Medians over the rounds: of each build, and of one against the other."""
    found, own = {}, {"share": {}, "host share": {}}
    for build in rounds[0]:
        times = {k: np.array([x[build][k] for x in rounds]) for k in rounds[0][build]}
        own["share"][build] = times["step"] - times["forward"]
        if "operators" in times:  # arithmetic for the most part
            times["host"] = own["share"][build] - times["operators"]
            own["host share"][build] = times["host"]
        found[build] = {f"{k} ms": 1e3 * float(np.median(x)) for k, x in times.items()}
        found[build]["ratio"] = float(np.median(times["step"] / times["forward"]))
    for name, x in own.items():
        if "base" in x:
            found[name] = float(np.median(x["ours"] / x["base"]))
    return found


def device(scale: Scale, builds: list[str], start: Start) -> dict:
    """What a GPU would get in a step, and the host's milliseconds of it without any arithmetic but
    the model's."""
    found: dict[str, Any] = {}
    where = scale.layers, scale.device_rows, scale.counted
    for name in CONFIGS[:2]:  # what a budget for prompts keeps would have to be computed
        found[name] = {}
        for build in builds:
            row = found[name][build] = {}
            with start(build) as ask:  # after launches it computes nothing any more
                row["copies"] = attempt(partial(ask, "copies", name, *where, False))
                run = partial(ask, "launches", name, *where, scale.batches)
                row["launches"] = attempt(run)
        with start("ours") as ask:  # of the base there are none
            row = found[name]["replayed"] = {}
            row["copies"] = attempt(partial(ask, "copies", name, *where, True))
            row["launches"] = attempt(partial(ask, "replayed", name, *where, scale.batches))
    return found


def compiled(scale: Scale, builds: list[str], start: Start) -> dict:
    """A step of few layers, eager and given to torch.compile, of this build alone."""
    found = {}
    for name in CONFIGS[:2]:
        with start("ours") as ask:
            case = name, scale.few[1], scale.device_rows, scale.steps, scale.batches
            found[name] = attempt(partial(ask, "compiled", *case))
    return found


PARTS = {"operators": operators, "host": host, "device": device, "compiled": compiled}


@dataclass(frozen=True)
class Figure:
    """None is what was not measured, or does not run."""

    what: str
    cache: str
    now: float | None
    before: float | None = None
    most: float | None = None  # what the project wants

    def __str__(self) -> str:
        before, now = ("-" if x is None else f"{x:.3g}" for x in (self.before, self.now))
        missed = None not in (self.now, self.most) and self.now > self.most
        return (f"{before} → {now}" if self.before is not None else now) + " missed" * missed


def figures(cells: dict[str, dict]) -> list[Figure]:
    """By kind of cache, one after the other."""
    found = []

    def add(what: str, cache: str, row: dict, *path: str, most: float | None = None) -> None:
        now, before = (at(row.get(build), *path) for build in ("ours", "base"))
        found.append(Figure(what, cache, now, before, most))

    for dtype, rows in cells.get("operators", {}).items():
        for name, row in rows.items():
            add(f"operators added in a layer, {dtype}", name, row, "layer", "added", most=2)
    for name, kinds in cells.get("host", {}).items():
        for kind, row in kinds.items():
            add(f"{kind}: ms of a step", name, row, "step ms")
            add(f"{kind}: step over forward", name, row, "ratio", most=1.15)
            share = row.get("share")
            found.append(Figure(f"{kind}: own share over the base's", name, share, most=0.2))
    for name, row in cells.get("device", {}).items():
        add("launches in a step", name, row, "launches", "launches", most=90)
        again = {"ours": row.get("replayed"), "base": row.get("base")}
        for prefix, both in (("", row), ("replayed: ", again)):
            add(f"{prefix}uploads in a step", name, both, "copies", "uploads", most=1)
            add(f"{prefix}waits in a step", name, both, "copies", "waits", most=1)
            add(f"{prefix}host's ms of a step", name, both, "launches", "ms")
            last = found[-1]
            if name == "balanced":
                share = last.now / last.before if last.now and last.before else None
                found.append(Figure(f"{prefix}host over the base's", name, share, most=1 / 3))
    for name, row in cells.get("compiled", {}).items():
        what = f"{Scale().few[1]} layers: ms of a step, eager → given to torch.compile"
        found.append(Figure(what, name, at(row, "compiled ms"), at(row, "eager ms")))
    return found


def at(row: dict | None, *path: str) -> float | None:
    for name in path:
        row = (row or {}).get(name)
    return row


def targets(cells: dict[str, dict]) -> Targets:
    """The figures the project set itself; no figure where something does not run."""
    found = Targets()
    for x in figures(cells):
        if x.most is not None:
            found.add(f"{x.what}, {x.cache}", x.now, x.most)
    return found


def table(cells: dict[str, dict]) -> list[list[str]]:
    """For people: the base's figures, an arrow, and those of this build."""
    found = figures(cells)
    rows = [["", *CONFIGS, "at most"]]
    for what in dict.fromkeys(x.what for x in found):
        of = {x.cache: x for x in found if x.what == what}
        most = next(iter(of.values())).most
        cells_of = [str(of.get(name, "")) for name in CONFIGS]
        rows.append([what, *cells_of, "" if most is None else f"{most:.3g}"])
    return rows


def caption(result: dict) -> str:
    where, scale = result["where"], Scale()
    dirty = ", with uncommitted changes" if where["dirty"] else ""
    return (
        f"Commit {where['base']} → {where['commit']}{dirty}; a Llama of {scale.layers} layers and "
        f"width 64, {scale.rows} rows of up to {scale.own} tokens; launches, copies, waits and the "
        f"host's ms of {scale.device_rows} rows. {where['device']}, 1 thread, torch "
        f"{where['torch']}, transformers {where['transformers']}."
    )


def built(commit: str, parts: Path | None) -> Path:
    """The tree of a commit with its compiled parts, which are those in the folder `parts` or are
    compiled; it is kept for the next run."""
    root = ROOT / "build" / f"base-{commit}"
    if not root.exists():
        fresh = root.with_name(f"{root.name}.part")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True,
                                     stdout=subprocess.PIPE)  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"--base {commit}: git has no such commit here: fetch it") from error
        subprocess.run(["tar", "-x"], cwd=fresh, input=archive.stdout, check=True)
        if parts is None:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, cwd=fresh, check=True)
        else:
            found = list(parts.glob("_*.so"))
            if not found:
                raise SystemExit(f"--base-build {parts}: has no _*.so: name its kvtools folder")
            for part in found:
                shutil.copy2(part, fresh / "kvtools")
        fresh.rename(root)
    return root


def run(
    parts: list[str], scale: Scale, builds: list[str], start: Start, journal: Journal,
    console: Console,
) -> None:  # fmt: skip
    """Measure, print and keep these parts."""
    for name in parts:
        keep(journal, name, partial(PARTS[name], scale, builds, start), console)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", required=True, help="results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--base", metavar="COMMIT", default=BASE,
                        help=f"build to compare with; default {BASE}, '' for none")  # fmt: skip
    parser.add_argument("--base-build", type=Path, metavar="FOLDER",
                        help="its compiled parts; default: they are compiled")  # fmt: skip
    parser.add_argument("--readme", type=Path, metavar="PATH", help="file whose table to rewrite")
    args = parser.parse_args(argv)
    console = Console()
    where = demo.where("cpu") | demo.commit()  # before results are written, which is a change too
    where |= {"threads": 1, "base": args.base or None}
    journal = Journal(args.json, {"commit": where["commit"]}, stale=["commit"])
    roots = {"ours": ROOT}
    if args.base:
        roots["base"] = built(args.base, args.base_build)
    run(args.only, Scale(), list(roots), lambda build: Worker(roots[build]), journal, console)
    reached = targets(journal.cells)
    journal.save(where=where, targets=reached)
    reached.show(console)
    if args.readme:
        result = {"where": where}
        demo.rewrite(args.readme, "step", table(journal.cells), caption(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
