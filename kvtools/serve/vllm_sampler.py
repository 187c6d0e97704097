"""kvtools' sampling in vLLM: a seeded request draws the same tokens in any batch."""

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from ..ops.sampling import sample

# What of a request decides its tokens; its prompt's length, and its tokens so far, a list of vLLM's
# that grows.
Row = tuple[SamplingParams, int, list[int]]


class Sampler(LogitsProcessor):
    """Draws the tokens of requests that have a seed, by `kvtools.sample`.

    Noise is a function of (seed, position, token id): a request's tokens depend neither on its
    batch nor on preemption, nor on who finished. Those of `n` continuations have the seeds seed,
    seed + 1, ..., which vLLM gives them. Requests without a seed and greedy ones are vLLM's.

    vLLM draws last, so what it gets is a row in which one token is left.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        return True  # so it comes after penalties, biases and the temperature; greedy rows skip it

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: Tensor) -> Tensor:
        """Leave the token drawn in each row [v] of a seeded request; a row that none can be drawn
        from (NaN) stays as it is."""
        if not self._rows:
            return logits
        at, rows = zip(*self._rows.items(), strict=True)
        params = [x[0] for x in rows]
        at_b = self._to(at, torch.int64)
        some_bv = logits[at_b]
        token_b, _, _ = sample(
            some_bv,
            self._to([_signed(x.seed) for x in params], torch.int64),
            self._to([prompt + len(new) for _, prompt, new in rows], torch.int32),
            top_k=self._to([max(x.top_k, 0) for x in params], torch.int32),
            top_p=self._to([x.top_p for x in params], torch.float32),
            min_p=self._to([x.min_p for x in params], torch.float32),
        )
        one_bv = torch.full_like(some_bv, -torch.inf)
        one_bv.scatter_(1, token_b.clamp(min=0)[:, None], 0.0)
        logits[at_b] = torch.where(token_b[:, None] < 0, some_bv, one_bv)
        return logits

    def _to(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)


def _row(params: SamplingParams, prompt: list[int] | None, new: list[int]) -> Row | None:
    if params.seed is None:
        return None
    return params, len(prompt or ()), new


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
