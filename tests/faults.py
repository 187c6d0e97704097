"""Faults that the tests must catch: each is planted in a copy of the tree, and its tests must fail.

python tests/faults.py [--only REGEX]

Entry: what is wrong, the file, the text there and what stands in its place, tests that must turn
red. The text must occur once, so that an entry which no longer fits the code is an error, too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TREE = (
    "kvtools",
    "csrc",
    "tests",
    "bench",
    "docs",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "build",
)


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments


DOOR = "tests/test_door.py -k "
FAULTS = [
    Fault("frequencies of the calls before are kept", "kvtools/hf/door.py",
          "        for module in self.dynamic:", "        for module in ():",
          DOOR + "'dynamic and alone'"),
    Fault("rows of all lengths share frequencies", "kvtools/hf/door.py",
          "        if not keys or not len(rows):", "        if True:",
          DOOR + "'rope and alone'"),
    Fault("a text that outgrows its frequencies is not encoded again", "kvtools/hf/door.py",
          "        return (counts > 0) & (self.past_switch(after) != switched)",
          "        return (counts > 0) & False", DOOR + "switch"),
    Fault("windows of masks are not seen", "kvtools/hf/plug.py",
          "        window = forward.door.mask_window(kwargs)", "        window = 0",
          DOOR + "'window or causal'"),
    Fault("positions are always believed in", "kvtools/hf/session.py",
          "    for counted in [False, True] if door.positions else [True]:",
          "    for counted in [False]:", DOOR + "counted"),
    Fault("the probe believes everything", "kvtools/hf/session.py",
          "    return int(wrong.min()) if len(wrong) else None", "    return None",
          DOOR + "probe"),
    Fault("values smaller than keys", "kvtools/hf/plug.py",
          "[..., :d], None", "[..., :wide], None", DOOR + "smaller"),
    Fault("autocast is not seen", "kvtools/hf/plug.py",
          "    if torch.is_autocast_enabled(q.device.type):", "    if False:",
          DOOR + "'autocast or mixed'"),
    Fault("masks are left out for all threads", "kvtools/hf/plug.py",
          "_here = threading.local()", "_here = type('Here', (), {})()",
          DOOR + "beside"),
    Fault("the first to leave unplugs", "kvtools/hf/plug.py",
          "                if uses > 1:", "                if False:", DOOR + "beside"),
    Fault("layers keep their cache alive", "kvtools/hf/plug.py",
          "        self.kv = kv\n        self.timing", "        self._flow.cache = self\n"
          "        self.kv = kv\n        self.timing", DOOR + "behind"),
    Fault("greedy draws a seed", "kvtools/hf/generate.py",
          "    if config.do_sample:\n        seed_b", "    if True:\n        seed_b",
          DOOR + "behind"),
    Fault("copies inside patch are of our class", "kvtools/hf/generate.py",
          "        if reduced[0] is copyreg.__newobj__:", "        if False:",
          DOOR + "inside_patch"),
    Fault("patches end in order only", "kvtools/hf/generate.py",
          "            del patches[next(i for i, x in enumerate(patches) if x is entry)]",
          "            patches.pop()", DOOR + "overlapping"),
    Fault("NaN wins a greedy step", "kvtools/hf/generate.py",
          "                chosen = torch.where(best.isfinite(), chosen, -1)\n", "",
          DOOR + "bad_logits"),
    Fault("no look at what could not be drawn", "kvtools/hf/generate.py",
          "        drawn(chosen.cpu(), input_ids.shape[1] - prompt_length, active.cpu())\n", "",
          DOOR + "bad_logits"),
    Fault("another's attention function", "kvtools/hf/door.py",
          "        if (stock != \"eager\" and function is None) or not own:",
          "        if False:", DOOR + "refused"),
    Fault("own prepare_inputs_for_generation is not asked", "kvtools/hf/door.py",
          "            if not same:", "            if False:", DOOR + "refused"),
    Fault(
        "windows of the cache are not seen",
        "kvtools/hf/door.py",
        "        window = window or held or 0",
        "        window = window or 0",
        DOOR + "'cache and alone'",
    ),
]  # fmt: skip


def plant(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its text occurs {text.count(fault.old)} times in {path}")
    path.write_text(text.replace(fault.old, fault.new))


def run(fault: Fault, tree: Path) -> bool:
    """Whether the tests fail with the fault, by themselves and not for a lack of tests."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    if fault.file.startswith("csrc"):
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True, capture_output=True, env=env)
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {fault.tests}"
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True, env=env)
    if done.returncode not in (0, 1):
        raise SystemExit(
            f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
        )
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file matches")
    only = parser.parse_args().only
    chosen = [x for x in FAULTS if re.search(only, f"{x.name} {x.file}")]
    missed = []
    for i, fault in enumerate(chosen, 1):
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            for name in TREE:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, tree / name, symlinks=True)
                elif source.exists():
                    shutil.copy2(source, tree / name)
            plant(fault, tree)
            caught = run(fault, tree)
        if not caught:
            missed.append(fault.name)
        state = "caught" if caught else "MISSED"
        seconds = time.perf_counter() - begin
        print(f"[{i}/{len(chosen)}] {state}: {fault.name} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
