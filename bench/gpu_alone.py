"""One of our contenders, run and checked in a process of its own, which may die:
python -m bench.gpu_alone PART CELL NAME.

Imports little, since bench.gpu starts it often.
"""

import argparse
import json
import os
import sys
import time
from functools import partial

import torch

from bench.gpu_kernels import IN_CPP, Entry
from bench.gpu_parts import PARTS
from bench.gpu_scale import DRY, SMALL
from bench.timing import Skip, attempt
from kvtools import ops


class Names:
    """A bench that tells our contenders in each cell, and runs nothing."""

    device = "cpu"

    def __init__(self, dry: bool) -> None:
        self.scale = DRY if dry else SMALL

    def race(self, cell: str, entries: dict[str, Entry]) -> list[str]:
        return [name for name in entries if name.startswith("kvtools")]


class Alone(Names):
    """A bench that runs and checks one contender."""

    def __init__(self, dry: bool, name: str) -> None:
        super().__init__(dry)
        self.device, self.name = "cpu" if dry else "cuda", name

    def race(self, cell: str, entries: dict[str, Entry]) -> dict:
        entry, begin = entries[self.name], time.monotonic()
        if self.name.endswith(IN_CPP) and ops.CUDA != "cuda":
            raise Skip("kvtools was built without csrc/cuda")
        entry.check(entry.make()())
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.monotonic() - begin}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_alone", description=__doc__.split(":")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("cell")
    parser.add_argument("name")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    args = parser.parse_args(argv)
    if args.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    cells = dict(PARTS[args.part](Alone(args.rehearse, args.name)))
    with torch.inference_mode():
        print(json.dumps(attempt(partial(cells[args.cell]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
