"""What kvtools gains on a GPU, beside other people's kernels: python -m bench.gpu --out DIR.

Each part runs in a process of its own, takes less than nine minutes, and writes its JSON after
every cell: what was measured of the same commit on the same device is not measured again.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import gpu_parts, gpu_rivals
from bench.gpu_parts import DRY, Entry, Scale
from bench.targets import WORDS, Targets
from bench.timing import (
    DeviceClock,
    against_floor,
    attempt,
    captured,
    host_clock,
    interleave,
    print_rows,
    summary,
)
from kvtools import demo
from kvtools.quality import Journal

SECONDS = 480  # after which a part begins no other cell
KILL = 540
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

    def __init__(self, folder: Path, dry: bool = False) -> None:
        self.folder, self.device = folder, "cpu" if dry else "cuda"
        self.scale: Scale = DRY if dry else Scale()
        self.deadline = time.monotonic() + SECONDS
        self._clock = host_clock if dry else DeviceClock()
        self._crashes = Crashes(folder)

    @property
    def impl(self) -> str:
        return gpu_parts.IMPL[self.device]

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


def run_part(part: str, folder: Path, dry: bool, where: dict) -> None:
    """Measure the cells that are missing; SystemExit if another process must go on."""
    console = Console()
    bench = Bench(folder, dry)
    journal = Journal(folder / f"{part}.json", header(where))
    for cell, measure in gpu_parts.PARTS[part](bench):
        if cell in journal.cells:
            continue
        if time.monotonic() > bench.deadline:
            console.print(f"{part}: out of time; the next run goes on at {cell}")
            break
        with torch.inference_mode():
            journal.cells[cell] = attempt(measure)
        journal.save(where=where, targets=gpu_parts.targets(part, journal.cells))
        print_rows(console, f"{part} / {cell}", journal.cells[cell])
        gc.collect()
        if not alive():
            raise SystemExit(AGAIN)
        if not dry:
            torch.cuda.empty_cache()


def header(where: dict) -> dict:
    return {x: where[x] for x in ("commit", "device")}


def in_process(part: str, folder: Path, where: dict, console: Console) -> None:
    """Run a part where it cannot hurt the others, again if its process died."""
    for _ in range(TRIES):
        args = part, folder, False, where
        process = multiprocessing.get_context("spawn").Process(target=run_part, args=args)
        process.start()
        process.join(KILL)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            return
        console.print(f"{part}: its process ended with {process.exitcode}")
        if process.exitcode not in (AGAIN, -11, -6):
            break
    journal = Journal(folder / f"{part}.json", header(where))
    journal.save(where=where, targets=gpu_parts.targets(part, journal.cells),
                 failed=f"its process ended with {process.exitcode}")  # fmt: skip


def report(folder: Path, console: Console) -> None:
    """Write all rows of all parts to report.md, and print targets and ratios."""
    results = {}
    for part in gpu_parts.PARTS:
        path = folder / f"{part}.json"
        results[part] = json.loads(path.read_text()) if path.exists() else {}
    where = next((x["where"] for x in results.values() if "where" in x), {})
    lines = ["# kvtools on a GPU", "", ", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += ["| target | value | wanted | |", "| --- | ---: | ---: | --- |"]
    for result in results.values():
        lines += [
            f"| {x['name']} | {figure(x['value'])} | {figure(x['target'])} | {WORDS[x['ok']]} |"
            for x in result.get("targets", [])
        ]
    for part, result in results.items():
        lines += ["", f"## {part}", "", result.get("failed", "" if result else "not run")]
        for cell, rows in result.get("cells", {}).items():
            lines += ["", f"**{cell}**", "", *table(rows)]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    for part, result in results.items():
        for cell, rows in result.get("cells", {}).items():
            console.print(f"{part} / {cell}: {brief(rows)}", highlight=False, soft_wrap=True)
    for part, result in results.items():
        if "failed" in result or not result:
            console.print(f"{part}: {result.get('failed', 'not run')}", highlight=False)
        found = Targets()
        found.extend(result.get("targets", []))
        found.show(console)


COLUMNS = ("ms", "p20", "p80", "event ms", "graph ms", "ratio", "bytes", "GB/s", "TFLOP/s",
           "of_floor", "peak MiB")  # fmt: skip


def table(rows: dict) -> list[str]:
    if not all(isinstance(row, dict) for row in rows.values()):
        return [f"{name}: {figure(x)}  " for name, x in rows.items()]
    lines = [f"| | {' | '.join(COLUMNS)} | |", "| --- |" + " ---: |" * len(COLUMNS) + " --- |"]
    for name, row in rows.items():
        words = "; ".join(f"{k}: {x}" for k, x in row.items() if isinstance(x, str))
        figures = " | ".join(figure(row.get(x)) for x in COLUMNS)
        lines.append(f"| {name} | {figures} | {words.replace('|', '/')} |")
    return lines


def brief(rows: dict) -> str:
    """Our time and share of the floor, then others' times as multiples of ours (ms, where we have
    none); - for those without."""
    words = []
    for name, row in rows.items():
        if not isinstance(row, dict):
            words.append(f"{name} {figure(row)}")
        elif not words and "ms" in row:
            words.append(f"{row['ms']:.4g} ms, {row['of_floor']:.2f} of the floor")
        else:
            unit = "ratio" if "ratio" in row else "ms"
            words.append(f"{name} {row[unit]:.3g}" if unit in row else f"{name} -")
    return ", ".join(words)


def figure(x: Any) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


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
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, once")
    args = parser.parse_args(argv)
    console = Console()
    if args.dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif not torch.cuda.is_available():
        console.print("bench.gpu needs a CUDA device; --dry runs its code without one")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    where = environment(args.dry, args.commit)
    parts = [part for part in gpu_parts.PARTS if part in args.part]
    if args.force:
        for name in (*parts, "crashes", "trying"):
            (args.out / f"{name}.json").unlink(missing_ok=True)
    if "rates" not in parts and not Journal(args.out / "rates.json", header(where)).cells:
        parts.insert(0, "rates")
    for part in parts:
        begin = time.monotonic()
        if args.dry:
            run_part(part, args.out, True, where)
        else:
            in_process(part, args.out, where, console)
        console.rule(f"{part}: {time.monotonic() - begin:.0f} s")
    report(args.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
