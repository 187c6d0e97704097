"""What kvtools gains on a GPU, beside other people's kernels: python -m bench.gpu --out DIR.

Each part runs in a process of its own, takes less than nine minutes, and writes its JSON after
every cell: what was measured of the same commit on the same device is not measured again.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import gpu_parts, gpu_rivals
from bench.gpu_parts import DRY, Entry, Scale
from bench.gpu_report import report, targets
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

SECONDS = 480  # of a part
GRACE = 60  # more, then its process is killed
NEEDS = {"tests": 240, "end_to_end": 120}  # seconds that must be left for a cell to begin
TRIES = 4  # of a part whose process dies
AGAIN = 3  # exit status of a part that has to go on in a fresh process


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

    def __init__(self, folder: Path, dry: bool = False, seconds: float = SECONDS) -> None:
        self.folder, self.device = folder, "cpu" if dry else "cuda"
        self.scale: Scale = DRY if dry else Scale()
        self.deadline = time.monotonic() + seconds

    # What a process that only asks for the names of the cells must not make.
    @cached_property
    def _clock(self) -> Clock:
        return DeviceClock() if self.device == "cuda" else host_clock

    @cached_property
    def _crashes(self) -> Crashes:
        return Crashes(self.folder)

    def impls(self, op: str) -> list[tuple[str, str]]:
        """What to add to the names of our contenders, and their implementations of `op`."""
        return [("", gpu_parts.IMPL), *[(gpu_parts.IN_CPP, "cuda")] * (op in ops.IN_CUDA)]

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
            against_floor(row, *self.rates, entries[name].nbytes, entries[name].flops)
        return rows

    def _prepare(self, cell: str, name: str, entry: Entry, runs: dict, graphs: dict) -> dict:
        """Make, check and note a contender. Its output is checked before anything is timed."""
        row = {"version": gpu_rivals.version(entry.package)} if entry.package else {}
        if name.endswith(gpu_parts.IN_CPP) and ops.CUDA != "cuda":
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

    @property
    def rates(self) -> tuple[float, float]:
        """GB/s of a copy, TFLOP/s of a bfloat16 product."""
        found = json.loads((self.folder / "rates.json").read_text())["cells"]["rates"]
        return found["copy GB/s"], found["bfloat16 TFLOP/s"]


def peak(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def missing(part: str, bench: Bench, journal: Journal) -> list[tuple[str, Callable[[], dict]]]:
    return [cell for cell in gpu_parts.PARTS[part](bench) if cell[0] not in journal.cells]


def journal_of(part: str, folder: Path, where: dict) -> Journal:
    header = {x: where[x] for x in ("commit", "device")}
    return Journal(folder / f"{part}.json", header, stale=list(header))


def run_part(part: str, folder: Path, where: dict, dry: bool, seconds: float) -> None:
    """Measure the cells that are missing; SystemExit if another process must go on."""
    console, bench = Console(), Bench(folder, dry, seconds)
    journal = journal_of(part, folder, where)
    for cell, measure in missing(part, bench, journal):
        if time.monotonic() + NEEDS.get(part, 30) > bench.deadline:
            console.print(f"{part}: out of time; the same command goes on at {cell}")
            break
        with torch.inference_mode():
            journal.cells[cell] = attempt(measure)
        journal.save(where=where, targets=targets(part, journal.cells))
        print_rows(console, f"{part} / {cell}", journal.cells[cell])
        gc.collect()
        if not alive():
            raise SystemExit(AGAIN)
        if not dry:
            torch.cuda.empty_cache()


def in_process(part: str, folder: Path, where: dict, dry: bool, end: float) -> None:
    """Run a part where it cannot hurt the others, again if its process died."""
    for _ in range(TRIES):
        seconds = min(SECONDS, end - time.monotonic())
        process = multiprocessing.get_context("spawn").Process(
            target=run_part, args=(part, folder, where, dry, seconds)
        )
        process.start()
        process.join(seconds + GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode not in (AGAIN, -signal.SIGSEGV, -signal.SIGABRT):
            break
    if process.exitcode:
        journal = journal_of(part, folder, where)
        why = f"its process ended with {process.exitcode}"
        journal.save(where=where, targets=targets(part, journal.cells), failed=why)


def environment(dry: bool, commit: str | None) -> dict:
    """What ran where; `commit` names the sources where git cannot."""
    where = demo.where("cpu" if dry else "cuda") | demo.commit()
    if commit:
        where["commit"] = commit
    if not dry:
        where["cuda"], where["triton"] = torch.version.cuda, gpu_rivals.version("triton")
    return where


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="results")
    parser.add_argument("--part", nargs="+", choices=gpu_parts.PARTS, metavar="PART",
                        default=list(gpu_parts.PARTS),
                        help=f"of {', '.join(gpu_parts.PARTS)}")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="measure again what was measured")
    parser.add_argument("--commit", help="name of the sources, where there is no git")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="stop after so many; the same command then goes on")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, once")
    args = parser.parse_args(argv)
    console, end = Console(), time.monotonic() + args.seconds
    if args.dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif not torch.cuda.is_available():
        console.print("bench.gpu needs a CUDA device; --dry runs its code without one")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    where = environment(args.dry, args.commit)
    if args.force:
        for name in (*args.part, "crashes", "trying"):
            (args.out / f"{name}.json").unlink(missing_ok=True)
    for part in gpu_parts.PARTS:
        if part not in (*args.part, "rates"):  # all others are held against the rates
            continue
        begin, journal = time.monotonic(), journal_of(part, args.out, where)
        if not missing(part, Bench(args.out, args.dry), journal):
            continue
        if end - begin < NEEDS.get(part, 30):
            console.print(f"{part}: out of time; the same command goes on here")
            continue
        in_process(part, args.out, where, args.dry, end)
        console.rule(f"{part}: {time.monotonic() - begin:.0f} s")
    report(args.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
