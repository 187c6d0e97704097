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

KINDS = {
    "plain": (torch.bfloat16, "none"),
    "coded": (torch.bfloat16, "int4"),
    "planes": (torch.bfloat16, "int6"),
    "wide": (torch.float32, "none"),
}
CANDIDATES = [
    dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
    for m, n in itertools.product((16, 32, 64, 128), repeat=2)
    for warps, stages in itertools.product((4, 8), (2, 3, 5))
    if m * n <= 64 * 128
]  # fmt: skip


def problem(kind: str, d: int, prompt: int, own: int, rows: int, device: torch.device) -> tuple:
    """Arguments of `tree_attention`: rows over a prompt, with the heads of Llama 3 8B."""
    import kvtools
    from kvtools._host import Forest
    from kvtools.ops.attention import Plan, limits

    (dtype, format), heads, group, page = KINDS[kind], 8, 4, 16
    forest = Forest(-(-prompt // page) + rows * (-(-own // page) + 1), page)
    forest.insert(prompt, 0, rows)
    forest.append(np.full(rows, own, np.int32))
    cut = limits(device, heads, group)
    plan = Plan.from_host(forest.plan(np.ones(rows, np.int32), **cut), device)
    pages = kvtools.KVPages.empty(
        forest.num_pages, heads, page, d, k_format=format, v_format=format, dtype=dtype,
        device=device,
    )  # fmt: skip
    slot = torch.arange(forest.num_pages * page, device=device)
    kvtools.append_kv(*torch.randn(2, len(slot), heads, d, device=device).to(dtype), slot, pages)
    q = torch.randn(rows, heads * group, d, device=device).to(dtype)
    position = torch.full((rows,), prompt + own - 1, dtype=torch.int32, device=device)
    return q, position, pages, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="where the table goes, JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.tune needs a CUDA device")
    import triton

    import kvtools
    from kvtools.kernels import attention, format

    device, table = torch.device("cuda"), {}
    for kind, d in itertools.product(KINDS, (64, 128, 256)):
        key = f"sm_{format.capability()} {kind} {d}"
        shapes = (8192, 256, 64), (64, 4096, 64)  # much shared, and next to nothing
        cases = [problem(kind, d, *shape, device) for shape in shapes]
        best = None
        for sizes in track(CANDIDATES, f"{kind} {d}"):
            attention.TUNED[key] = sizes
            try:  # the geometric mean counts
                ms = np.prod([
                    triton.testing.do_bench(
                        lambda x=x: kvtools.tree_attention(*x), return_mode="median"
                    )
                    for x in cases
                ]) ** 0.5  # fmt: skip
            except triton.runtime.errors.OutOfResources:
                continue
            if best is None or ms < best:
                best, table[key] = ms, sizes
        print(key, table[key], f"{best:.3f} ms")
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
