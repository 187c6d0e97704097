"""The parts of bench.gpu that time nothing: kernels alone, under sanitizers, and their tests."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from bench.gpu_kernels import IN_CPP, Cells, attention, cell, evict, quant, sampling, scoring
from bench.timing import Skip, attempt
from kvtools import ops

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {
    "quant": quant, "attention": attention, "evict": evict, "sampling": sampling,
    "scoring": scoring,
}  # fmt: skip


def smoke(bench) -> Cells:
    """Each of our kernels, run and checked; they are compiled as those of the headlines."""
    for part in KERNELS:
        yield cell(part, all_alone, bench, part)


def sanitizers(bench) -> Cells:
    """A case of each kernel under each of NVIDIA's sanitizers; what they find fails the case."""
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for part in KERNELS:
            yield cell(f"{tool} {part}", sanitize, bench, tool, part)


def ours(bench, part: str) -> list[tuple[str, str, str]]:
    """Part, cell and name of our contenders in small cells."""
    from bench.gpu_alone import Names

    small = Names(bench.dry)
    return [
        (part, name, contender)
        for name, measure in KERNELS[part](small)
        if re.match(small.scale.smoked.get(part, ""), name)
        for contender in measure()
    ]


def all_alone(bench, name: str, part: str) -> dict:
    return run_alone(bench, ours(bench, part))


def run_alone(bench, cases: list[tuple[str, str, str]], watch: Sequence[str] = ()) -> dict:
    def run(case: tuple[str, str, str]) -> dict:
        if case[2].endswith(IN_CPP) and ops.CUDA != "cuda":
            return {"skipped": "kvtools was built without csrc/cuda"}
        return attempt(partial(bench.alone, case, watch))

    with ThreadPool(min(os.cpu_count(), 12)) as pool:
        rows = pool.map(run, cases, chunksize=1)
    return {
        f"{name}, {contender}": row for (_, name, contender), row in zip(cases, rows, strict=True)
    }


def sanitize(bench, name: str, tool: str, part: str) -> dict:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is missing")
    one = {}  # case of each operator and implementation
    for case in ours(bench, part):
        one[case[1].split()[0], case[2].endswith(IN_CPP)] = case
    return run_alone(bench, list(one.values()), [program, "--tool", tool, "--error-exitcode", "99"])


def tests(bench) -> Cells:
    """The tests of our kernels, on this device."""
    for name, args in bench.scale.tests.items():
        yield cell(name, run_tests, bench, args)


def run_tests(bench, name: str, args: list[str]) -> dict:
    """How many passed, and what failed. Read from pytest's log, which also tells of those before
    it had to be stopped."""
    log = bench.folder / f"tests {name}.log"
    spread = ["-n", str(min(os.cpu_count(), 12))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    begin, late = time.monotonic(), False
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *args, *(spread if bench.device == "cuda" else [])],
            cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"COLUMNS": "300"},
            # In the background of a shell it is ignored, and then pytest could not be stopped.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        while process.poll() is None:
            try:
                process.wait(min(5, max(0.5, bench.left)))
            except subprocess.TimeoutExpired:
                bench.keep()
                if bench.left <= -5:
                    process.kill()
                elif bench.left <= 0 and not late:
                    process.send_signal(signal.SIGINT)  # then it tells what has failed
                    late = True
    text = log.read_text(errors="replace")
    words = "PASSED|FAILED|SKIPPED|ERROR"  # at the ends of lines, or by xdist at their beginnings
    ends = Counter(
        word
        for line in re.findall(
            rf"^\S+::.* ({words})\b|^\[gw\d+\] \[ *\d+%\] ({words}) ", text, re.M
        )
        for word in line
    )
    found = {"passed": ends["PASSED"], "failures": ends["FAILED"] + ends["ERROR"],
             "skipped": ends["SKIPPED"], "seconds": time.monotonic() - begin}  # fmt: skip
    if late:
        found["stopped"] = "before its end: there was no time left"
    elif process.returncode not in (0, 1, 5):  # 5: there were none
        found["failures"] += 1
        found["pytest"] = f"ended with {process.returncode}: {text[-200:]}"
    for test, why in re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", text, re.M)[:20]:
        found[test] = why[:200]
    return found
