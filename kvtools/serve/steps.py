"""What one step of an engine reads: its metadata as a plan and positions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ops.attention import Plan, block_table_arrays, pages_needed
from ..ops.upload import Fixed, at_once


@dataclass(frozen=True)
class Step:
    """One step for all layers.

    Attributes:
        plan: who reads what.
        position_t: true positions of the query tokens, int32, on the plan's device.
    """

    plan: Plan
    position_t: Tensor

    @property
    def tokens(self) -> int:
        """Query tokens; what an engine adds behind them to fill up a batch is none."""
        return self.position_t.shape[0]


class Graphs:
    """Decode steps whose tensors stay where they are: what CUDA graphs are captured with.

    For each number of rows that a graph has there is one `Step` of as many tokens; those that fill
    up a batch are its last, and get zeros. One graph runs at a time, so all lie in the same memory.

    Args:
        width: of the block tables: each row may read as many blocks.
        page_size: slots per block.
        blocks: how many the cache has.
        device: where the steps are.
        **limits: as of `plan_from_block_table`; what does not fit a graph is cut less.
    """

    def __init__(
        self, width: int, page_size: int, blocks: int, device: torch.device, **limits: int
    ) -> None:
        self._width, self._page_size, self._blocks = width, page_size, blocks
        self._device, self._limits = device, limits
        self._held: dict[int, tuple[Fixed, Step]] = {}
        self._whole: Tensor | None = None

    def hold(self, rows: int) -> None:
        """Make a step for graphs of so many rows, unless there is one."""
        if rows in self._held:
            return
        fixed = Fixed(self._shapes(rows), self._device, self._whole)
        self._whole = fixed.whole
        tensors = tuple(fixed.tensors[name] for name in Plan.TENSORS)
        plan = Plan.of(tensors, self._page_size, (self._blocks,))
        self._held[rows] = fixed, Step(plan, fixed.tensors["position_t"])

    def __contains__(self, rows: int) -> bool:
        return rows in self._held

    def put(self, batch: "_Batch", position: np.ndarray) -> Step:
        """The step of as many rows, which now is that of this batch; raises before it changes."""
        fixed, step = self._held[len(batch.lens)]
        tile = {name: x for name, x in self._limits.items() if name == "tile"}
        # The last always fits, if its blocks do: an item and a partial result for each row.
        for how in (self._limits, tile, {}, dict(share=False)):
            arrays = batch.arrays(self._page_size, **how) | {"position_t": position}
            if fixed.fits(arrays):
                break
        else:
            longest, most = int(batch.lens.max()), self._width * self._page_size
            raise ValueError(
                f"seq_lens: a row has {longest} tokens, a step of a graph holds {most} of each"
            )
        batch.check(arrays, self._page_size, self._blocks)
        fixed.put(arrays)
        return step

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        # Each item costs a launched block, used or not. Samples, groups, trees and unlike requests
        # have at most 2.5 times as many as run at once, besides one for each node.
        tile, items = self._limits.get("tile") or rows, 3 * self._limits.get("items", 0)
        nodes, parts = 2 * rows, 4 * rows + items * min(tile, rows)
        shapes = dict.fromkeys(("first", "length", "base", "own", "store"), (nodes,))
        shapes |= dict.fromkeys(("page_indptr", "token_indptr"), (nodes + 1,))
        shapes |= {"item": (nodes + items, 6), "token": (parts,), "part": (parts,)}
        shapes |= {"part_indptr": (rows + 1,), "position_t": (rows,), "leaf": (rows,)}
        return shapes | {"page": (rows * self._width,)}


def step_from_block_table(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    page_size: int,
    *,
    blocks: int | None = None,
    graphs: Graphs | None = None,
    index: Tensor | None = None,
    **limits: int,
) -> Step:
    """The step that an engine's batch describes: decoding, chunks of prompts, or both.

    Args:
        block_table: [rows, blocks] page ids, int32 or int64; entries past a row's end may hold
            anything.
        seq_lens: [rows] tokens per row, those of this step included, int32 or int64. The last of
            them are the row's query tokens.
        query_start: [rows + 1] offsets of the rows' query tokens, from 0 on, int32 or int64; on the
            CPU, or they are waited for.
        page_size: slots per block.
        blocks: how many the cache has; None if not known yet.
        graphs: where it has a step of as many rows, and none of them has several query tokens, the
            batch becomes that one.
        index: [rows] which row of the table each row is; by default all are, in order.
        **limits: as of `plan_from_block_table`.

    Raises:
        ValueError: the offsets descend or do not start at 0; a row has more query tokens than
            tokens, or more tokens than its blocks hold.
        IndexError: a row reads a block that the cache does not have.
    """
    start = query_start.cpu().numpy().astype(np.int64)
    counts = start[1:] - start[:-1]
    if len(start) != len(seq_lens) + 1 or start[0] != 0 or (counts < 0).any():
        raise ValueError(
            f"query_start: expected {len(seq_lens) + 1} offsets from 0 on that do not descend"
        )
    lens = seq_lens.cpu()
    position = np.arange(start[-1]) + np.repeat(lens.numpy() - start[1:], counts)
    batch = _Batch(block_table.cpu(), lens, torch.from_numpy(counts), index)
    if graphs is not None and len(lens) in graphs and counts.max(initial=0) <= 1:
        return graphs.put(batch, position)
    arrays = batch.arrays(page_size, **limits)
    pages = batch.check(arrays, page_size, blocks)
    arrays = [*(arrays[name] for name in Plan.TENSORS), position]
    *tensors, position_t = at_once(arrays, block_table.device, given=True)
    return Step(Plan.of(tuple(tensors), page_size, pages), position_t)


@dataclass(frozen=True)
class _Batch:
    """Of an engine, on the CPU."""

    table: Tensor
    lens: Tensor
    counts: Tensor
    index: Tensor | None

    def arrays(self, page_size: int, **how: int) -> dict:
        """Those of its plan."""
        return block_table_arrays(self.table, self.lens, page_size, self.counts, self.index, **how)

    def check(self, arrays: dict, page_size: int, blocks: int | None) -> tuple[int, ...]:
        """How many pages the plan needs; raises if that is more than there are `blocks`."""
        pages = pages_needed(arrays, page_size)
        if blocks is not None and pages[0] > blocks:
            table = (self.table if self.index is None else self.table[self.index]).numpy()
            used = np.arange(table.shape[1]) < -(-self.lens.numpy()[:, None] // page_size)
            row, column = np.argwhere(used & (table >= blocks))[0]
            raise IndexError(
                f"block_table: row {row} reads block {table[row, column]}, the cache has {blocks}"
            )
        return pages
