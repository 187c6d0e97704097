"""What one step of an engine reads: its metadata as a plan and positions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ops.attention import Plan, plan_from_block_table


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


def step_from_block_table(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    page_size: int,
    *,
    blocks: int | None = None,
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
        **limits: as of `plan_from_block_table`.

    Raises:
        ValueError: the offsets descend or do not start at 0; a row has more query tokens than
            tokens, or more tokens than its blocks hold.
        IndexError: a row reads a block that the cache does not have.
    """
    start = query_start.cpu().numpy().astype(np.int64)
    counts = np.diff(start)
    if len(start) != len(seq_lens) + 1 or start[0] != 0 or (counts < 0).any():
        raise ValueError(
            f"query_start: expected {len(seq_lens) + 1} offsets from 0 on that do not descend"
        )
    plan = plan_from_block_table(
        block_table, seq_lens, page_size, query_lens=torch.from_numpy(counts), **limits
    )
    lens = seq_lens.cpu().numpy()
    if blocks is not None and plan.pages[0] > blocks:
        used = np.arange(block_table.shape[1]) < -(-lens[:, None] // page_size)
        table = block_table.cpu().numpy()
        row, column = np.argwhere(used & (table >= blocks))[0]
        raise IndexError(
            f"block_table: row {row} reads block {table[row, column]}, the cache has {blocks}"
        )
    position = np.arange(start[-1]) + np.repeat(lens - start[1:], counts)
    position_t = torch.from_numpy(position.astype(np.int32))
    return Step(plan, position_t.to(block_table.device))
