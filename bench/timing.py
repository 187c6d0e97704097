"""What the benchmarks share: clocks, rows of times, and their share of what the machine can do."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

if TYPE_CHECKING:  # it loads transformers
    from kvtools.quality import Journal

# Runs something; what it returns gives the seconds once they are asked for.
Clock = Callable[[Callable[[], Any]], Callable[[], float]]


class Skip(Exception):
    """Why there is no figure where nothing went wrong."""


def host_clock(run: Callable[[], Any]) -> Callable[[], float]:
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    return lambda: seconds


class DeviceClock:
    """Times runs between two events, with a cold L2."""

    def __init__(self) -> None:
        # Read, not written: what is dirty would have to leave the cache while a run is timed.
        self._others = torch.zeros(2**26, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> Callable[[], float]:
        self._others.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return seconds


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Replays `run` as a CUDA graph; and where the replays leave their output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what is allocated or compiled at first must be so before
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def interleave(
    runs: dict[str, Callable[[], Any]], rounds: int, clock: Clock = host_clock
) -> dict[str, np.ndarray]:
    """Seconds of each round of each; one round before goes uncounted."""
    seconds = {name: np.empty(rounds + 1) for name in runs}
    for i in range(rounds + 1):
        for name, elapsed in [(name, clock(run)) for name, run in runs.items()]:
            seconds[name][i] = elapsed()
    return {name: x[1:] for name, x in seconds.items()}


def summary(seconds: dict[str, np.ndarray], per: int = 1) -> dict[str, dict]:
    """Median, p20 and p80 in milliseconds, divided by `per`; and how many times the first one's
    time each takes, the median over rounds."""
    first = next(iter(seconds.values()), None)
    rows = {}
    for name, x in seconds.items():
        low, middle, high = np.quantile(x, (0.2, 0.5, 0.8)) * 1e3 / per
        ratio = float(np.median(x / first))
        rows[name] = {"ms": middle, "p20": low, "p80": high, "ratio": ratio}
    return rows


def against_floor(row: dict, copy: float, product: float, nbytes: int, flops: int = 0) -> None:
    """Add rates to a row, and how much of its time the floor would take: its bytes at the rate of a
    copy (GB/s), or its operations at that of a matrix product (TFLOP/s)."""
    seconds = row["ms"] / 1e3
    least = max(nbytes / copy / 1e9, flops / product / 1e12)
    row |= {"bytes": nbytes, "GB/s": nbytes / seconds / 1e9, "TFLOP/s": flops / seconds / 1e12}
    row["of_floor"] = least / seconds


def attempt(run: Callable[[], dict]) -> dict:
    """The row of a rival, or why there is none."""
    try:
        return run()
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # whatever other people's code raises
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def keep(journal: "Journal", name: str, measure: Callable[[], Any], console: Console) -> None:
    """Measure a part, save it, and print it with the time that it took."""
    begin = time.perf_counter()
    journal.cells[name] = measure()
    journal.save()
    console.rule(f"{name}: {time.perf_counter() - begin:.0f} s")
    print_rows(console, name, journal.cells[name])


def print_rows(console: Console, path: str, cell: Any) -> None:
    """A line per row, under the names that lead to it."""
    if not isinstance(cell, dict):
        return
    figures = [f"{name} {x:.4g}" for name, x in cell.items() if isinstance(x, (int, float))]
    figures += [x for x in cell.values() if isinstance(x, str)]
    if figures:
        console.print(f"{path:44} {'  '.join(figures)}", highlight=False, soft_wrap=True)
    for name, inner in cell.items():
        print_rows(console, f"{path} / {name}", inner)
