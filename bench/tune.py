"""Find the tile sizes of the attention kernel on this GPU: python -m bench.tune --out TABLE.

Writes a table of the fastest per kind of product and head size. kvtools takes it only where asked:
kvtools.kernels.attention.TUNED.update(json.loads(Path(TABLE).read_text())).
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from bench import bench_attention
from kvtools import results
from kvtools.ops.attention import tree_attention

KINDS = {
    "plain": (torch.bfloat16, "none"),
    "coded": (torch.bfloat16, "int4"),
    "planes": (torch.bfloat16, "int6"),
    "wide": (torch.float32, "none"),
}
CANDIDATES = [
    dict(BLOCK_M=m, BLOCK_N=n, SMALL_N=2 * n, num_warps=warps, num_stages=stages)
    for m, n in itertools.product((16, 32, 64, 128), repeat=2)
    for warps, stages in itertools.product((4, 8), (2, 3, 5))
    if m * n <= 64 * 128
]  # fmt: skip
# Those that the compiled code promises most of: three or four programs on an SM, more in flight.
FEW = [
    dict(BLOCK_M=m, BLOCK_N=n, SMALL_N=2 * n, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in (
        (32, 64, 4, 4), (64, 32, 4, 5), (32, 32, 4, 4), (64, 64, 8, 3), (64, 64, 4, 3)
    )
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="where the table goes, JSON")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists: name a new file")
    if not torch.cuda.is_available():
        sys.exit("bench.tune needs a CUDA device")
    import triton

    from kvtools.kernels import attention, format

    table = {}
    for kind, d in itertools.product(KINDS, (64, 128, 256)):
        key = f"{format.architecture()} {kind} {d}"
        dtype, code = KINDS[kind]
        cases = []
        for prompt, own in ((8192, 256), (0, 4096)):  # much shared, and nothing
            shape = bench_attention.Shape(64, prompt, own, 8, 4, d)  # the heads of Llama 3 8B
            step = bench_attention.inputs(shape, dtype, "cuda")
            position, *pages = step.pages(code)
            cases.append((step.q.squeeze(2), position, *pages))
        best = None
        for sizes in track(CANDIDATES, f"{kind} {d}"):
            attention.TUNED[key] = sizes
            try:  # the geometric mean counts
                ms = np.prod([
                    triton.testing.do_bench(
                        lambda x=x: tree_attention(*x), return_mode="median"
                    )
                    for x in cases
                ]) ** 0.5  # fmt: skip
            except triton.runtime.errors.OutOfResources:
                continue
            if best is None or ms < best:
                best, table[key] = ms, sizes
        print(key, table[key], f"{best:.3f} ms")
        results.write(args.out, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
