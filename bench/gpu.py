"""What kvtools gains on a GPU, beside other people's kernels: python -m bench.gpu --out DIR.

A plan is a list of stages: cells of a part, in a process of its own that is ended when the stage's
time is over. After every cell its JSON is written, and an archive of all that was found so far;
after every stage a report. What was measured of the same commit on the same device is not measured
again. `--first` is the plan for a device that is at hand for nine minutes.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import gpu_rivals
from bench.gpu_checks import ROOT
from bench.gpu_kernels import IN_CPP, Entry
from bench.gpu_parts import PARTS
from bench.gpu_report import report, targets
from bench.gpu_scale import DRY, Scale
from bench.timing import (
    Clock,
    DeviceClock,
    Skip,
    against_floor,
    attempt,
    captured,
    host_clock,
    interleave,
    print_rows,
    summary,
)
from kvtools import ops
from kvtools.cli import demo
from kvtools.quality import Journal

FOREVER = 1e6  # seconds
GRACE = 10  # seconds after a stage's, then its process is killed
TRIES = 4  # of a stage whose process dies
AGAIN = 3  # exit status of a stage that has to go on in a fresh process


@dataclass(frozen=True)
class Stage:
    """Cells of a part whose names begin with a match of `cells`, and the seconds they are given."""

    part: str
    cells: str
    seconds: float
    dry: str | None = None  # cells of a rehearsal, if others

    def __str__(self) -> str:
        return " ".join([self.part, self.cells]).strip()


FULL = [Stage(part, "", 480) for part in PARTS]
# In this order a run that is cut short has told the most: whether anything is wrong, then the
# figures that the project set itself. Stages that need less leave the others more.
FIRST = [
    Stage("smoke", "", 65),
    Stage("tests", "triton", 110),
    Stage("tests", "cuda", 45),
    Stage("tests", "end to end", 35),
    Stage("rates", "", 15),
    Stage("attention", r"llama (64 x 8192 \+ 256|64 x 4096|16 x 16384)", 65, "llama 2"),
    Stage("end_to_end", "decode 64 x 2048", 70, "decode"),
    Stage("sampling", "b=64", 30, ""),
    Stage("attention", r"(qwen 64|llama 1) x 8192 \+ 256", 30, "llama 1"),
    Stage("quant", "append_kv t=64", 10, "append_kv"),
    Stage("evict", "select_victims", 10),
    Stage("scoring", "step_scores", 10),
    Stage("tune", "", 20),
    Stage("sanitizers", "memcheck", 25),
]


@dataclass
class Crashes:
    """Contenders that took the device or the process down: left out where they did, and everywhere
    once they did so twice."""

    folder: Path

    def __post_init__(self) -> None:
        self._path, self._trying = self.folder / "crashes.json", self.folder / "trying.json"
        self.found = json.loads(self._path.read_text()) if self._path.exists() else []
        if self._trying.exists():
            self.found.append(json.loads(self._trying.read_text()))
            self._path.write_text(json.dumps(self.found))
            self._trying.unlink()

    @contextmanager
    def watch(self, cell: str, name: str) -> Iterator[None]:
        if [cell, name] in self.found or sum(x[1] == name for x in self.found) > 1:
            raise RuntimeError("took the process or the device down when it was tried before")
        self._trying.write_text(json.dumps([cell, name]))
        try:
            yield
        except Exception:
            if not alive():
                raise SystemExit(AGAIN) from None
            self._trying.unlink()
            raise
        self._trying.unlink()


def alive() -> bool:
    """Whether the device still answers: after some errors none of its memory can be used."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Bench:
    """Where and how much is measured."""

    def __init__(
        self, folder: Path, dry: bool = False, seconds: float = FOREVER, **scale: Any
    ) -> None:
        self.folder, self.dry, self.device = folder, dry, "cpu" if dry else "cuda"
        self.scale: Scale = replace(DRY if dry else Scale(), **scale)
        self.deadline = time.monotonic() + seconds
        self.keep: Callable[[], None] = lambda: None  # for what takes long: see Run.keep

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    # What a process that only asks for the names of the cells must not make.
    @cached_property
    def _clock(self) -> Clock:
        return DeviceClock() if self.device == "cuda" else host_clock

    @cached_property
    def _crashes(self) -> Crashes:
        return Crashes(self.folder)

    def alone(self, case: Sequence[str], watch: Sequence[str] = ()) -> dict:
        """The row of one contender in a cell of a part that is run and checked, not timed, in a
        process of its own."""
        command = [*watch, sys.executable, "-m", "bench.gpu_alone", *case]
        process = subprocess.Popen(
            [*command, *["--rehearse"] * self.dry], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=max(1, self.left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise Skip("no time was left") from None
        if process.returncode:
            said = " ".join(said.split())[-250:]
            raise RuntimeError(f"its process ended with {process.returncode}: {said}")
        return json.loads(next(x for x in said.splitlines() if x.startswith("{")))

    def times(self, runs: dict[str, Callable[[], Any]]) -> dict[str, dict]:
        return summary(interleave(runs, self.scale.rounds, self._clock))

    def race(self, cell: str, entries: dict[str, Entry]) -> dict[str, dict]:
        """A row per contender, the first one ours: the better of its times by events and by graph
        replays, ratios to the first, peak memory beyond its inputs, and its share of the floor."""
        rows, runs, graphs = {}, {}, {}
        for name, entry in entries.items():
            rows[name] = attempt(partial(self._prepare, cell, name, entry, runs, graphs))
        events, replays = self.times(runs), self.times(graphs)
        first = None
        for name, event in events.items():
            row, per = rows[name], entries[name].per
            best = min(event, replays.get(name, event), key=lambda x: x["ms"])
            row |= {x: best[x] / per for x in ("ms", "p20", "p80")}
            row["event ms"] = event["ms"] / per
            if name in replays:
                row["graph ms"] = replays[name]["ms"] / per
            first = row["ms"] if name == next(iter(entries)) else first
            if first is not None:
                row["ratio"] = row["ms"] / first
            if self.rates is not None:
                against_floor(row, *self.rates, entries[name].nbytes, entries[name].flops)
        return rows

    def _prepare(self, cell: str, name: str, entry: Entry, runs: dict, graphs: dict) -> dict:
        """Make, check and note a contender. Its output is checked before anything is timed."""
        row = {"version": gpu_rivals.version(entry.package)} if entry.package else {}
        if name.endswith(IN_CPP) and ops.CUDA != "cuda":
            raise Skip("kvtools was built without csrc/cuda")
        with self._crashes.watch(cell, name):
            run = entry.make()
            entry.check(run())
            if self.device == "cuda":
                row["peak MiB"] = peak(run)
                if entry.graph:
                    row |= self._capture(name, run, entry.check, graphs)
            runs[name] = run
        return row

    def _capture(self, name: str, run: Callable, check: Callable, graphs: dict) -> dict:
        def capture() -> dict:
            replay, out = captured(run)
            replay()
            if out is not None:
                check(out)
            graphs[name] = replay
            return {}

        row = attempt(capture)
        torch.cuda.synchronize()
        return {"no graph": row["failed"]} if row else {}

    @cached_property
    def rates(self) -> tuple[float, float] | None:
        """GB/s of a copy, TFLOP/s of a bfloat16 product; None if they were not measured."""
        path = self.folder / "rates.json"
        found = json.loads(path.read_text())["cells"].get("rates", {}) if path.exists() else {}
        if "copy GB/s" not in found:
            return None
        return found["copy GB/s"], found["bfloat16 TFLOP/s"]


def peak(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def journal_of(part: str, folder: Path, where: dict) -> Journal:
    header = {x: where[x] for x in ("commit", "device")}
    return Journal(folder / f"{part}.json", header, stale=list(header))


@dataclass(frozen=True)
class Run:
    """Where results go, what is run, and how."""

    folder: Path
    archive: Path
    where: dict
    dry: bool = False
    scale: dict = field(default_factory=dict)  # what to change of it
    cells: str = ""  # of every stage only those in whose names it is found

    def missing(self, stage: Stage, bench: Bench) -> list[tuple[str, Callable[[], dict]]]:
        done = journal_of(stage.part, self.folder, self.where).cells
        wanted = stage.dry if self.dry and stage.dry is not None else stage.cells
        return [
            (cell, measure)
            for cell, measure in PARTS[stage.part](bench)
            if re.match(wanted, cell) and re.search(self.cells, cell) and cell not in done
        ]

    def save(self, part: str, journal: Journal, **more: Any) -> None:
        journal.save(where=self.where, targets=targets(part, journal.cells), **more)
        self.keep()

    def keep(self) -> None:
        """Pack all that was found so far into the archive."""
        scratch = self.archive.with_name(f"{self.archive.name}.part")
        with tarfile.open(scratch, "w:gz", compresslevel=1) as tar:
            for path in sorted(self.folder.iterdir()):
                if path.suffix in (".json", ".log", ".md"):
                    tar.add(path, path.name)
        scratch.replace(self.archive)

    def measure(self, stage: Stage, seconds: float) -> None:
        """Measure what is missing; SystemExit if another process must go on."""
        console, bench = Console(), Bench(self.folder, self.dry, seconds, **self.scale)
        bench.keep = self.keep
        journal = journal_of(stage.part, self.folder, self.where)
        for cell, measure in self.missing(stage, bench):
            if bench.left <= 0:
                console.print(f"{stage}: out of time; the same command goes on at {cell}")
                break
            with torch.inference_mode():
                journal.cells[cell] = attempt(measure)
            self.save(stage.part, journal)
            print_rows(console, f"{stage.part} / {cell}", journal.cells[cell])
            gc.collect()
            if not alive():
                raise SystemExit(AGAIN)
            if not self.dry:
                torch.cuda.empty_cache()

    def in_process(self, stage: Stage, seconds: float) -> None:
        """Run a stage where it cannot hurt the others, again if its process died."""
        end = time.monotonic() + seconds
        # From a server that has imported everything once, and knows no device.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.gpu"])
        for _ in range(TRIES):
            left = max(1.0, end - time.monotonic())
            process = context.Process(target=self.measure, args=(stage, left))
            process.start()
            process.join(left + GRACE)
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
                # It was not the contender that took the process down.
                (self.folder / "trying.json").unlink(missing_ok=True)
            if process.exitcode not in (AGAIN, -signal.SIGSEGV, -signal.SIGABRT):
                break
        if process.exitcode:
            journal = journal_of(stage.part, self.folder, self.where)
            why = "ran out of time" if late else f"its process ended with {process.exitcode}"
            self.save(stage.part, journal, failed=f"{stage}: {why}")


def environment(dry: bool, commit: str | None) -> dict:
    """What ran where; `commit` names the sources where git cannot."""
    where = demo.where("cpu" if dry else "cuda") | demo.commit()
    if commit:
        where["commit"] = commit
    where["triton"] = gpu_rivals.version("triton").removeprefix("triton ")
    if not dry:
        where["cuda"] = torch.version.cuda
    return where


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="results")
    parser.add_argument("--archive", type=Path, metavar="PATH",
                        help="all results so far, .tar.gz; default gpu.tar.gz in DIR")  # fmt: skip
    parser.add_argument("--first", action="store_true",
                        help="the plan for a device that is at hand for nine minutes")  # fmt: skip
    parser.add_argument("--part", nargs="+", choices=PARTS, metavar="PART",
                        default=list(PARTS),
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--cell", metavar="REGEX", default="",
                        help="only cells in whose names it is found")  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N",
                        help="timed runs of each contender; 25, or 8 with --first")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="measure again what was measured")
    parser.add_argument("--commit", help="name of the sources, where there is no git")
    parser.add_argument("--seconds", type=float, metavar="N",
                        help="stop after so many; the same command then goes on")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true",
                        help="the plan of --first on a CPU, with tiny shapes")  # fmt: skip
    args = parser.parse_args(argv)
    console, begin = Console(), time.monotonic()
    if args.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif not torch.cuda.is_available():
        console.print("bench.gpu needs a CUDA device; --rehearse runs its code without one")
        return 2
    first = args.first or args.rehearse
    end = begin + (args.seconds or (540 if args.first else FOREVER))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.force:
        for name in (*args.part, "crashes", "trying"):
            (args.out / f"{name}.json").unlink(missing_ok=True)
    # Compiled by torch for each shape, which takes longer than all else of a cell.
    scale = {"flex": (), "rounds": 8} if args.first else {}
    if args.rounds:
        scale["rounds"] = args.rounds
    run = Run(
        args.out, args.archive or args.out / "gpu.tar.gz", environment(args.rehearse, args.commit),
        args.rehearse, scale, args.cell,
    )  # fmt: skip
    for stage in FIRST if first else FULL:
        if stage.part not in args.part and stage.part != "rates":  # all are held against the rates
            continue
        stage_run = replace(run, cells="") if stage.part == "rates" else run
        now = time.monotonic()
        # A CPU's seconds are no device's.
        seconds = min(FOREVER if args.rehearse else stage.seconds, end - now)
        if not stage_run.missing(stage, Bench(args.out, args.rehearse)):
            continue
        if seconds <= 0:
            console.print(f"{stage}: out of time; the same command goes on here", highlight=False)
            continue
        stage_run.in_process(stage, seconds)
        report(args.out, Console(quiet=True))
        run.keep()
        console.rule(f"{stage}: {time.monotonic() - now:.0f} s, of {stage.seconds:.0f} given")
    report(args.out, console)
    run.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
