"""kvtools' sampling in SGLang: a request draws the same tokens in any batch."""

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
from sglang.srt.layers import sampler
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

from ..ops.sampling import sample
from .interface import check_sglang_sampler

# This file is imported when it is chosen, after all plugins were.
_adjusted = SamplingBatchInfo.adjusted_from_schedule_batch


class Sampler(sampler.Sampler):
    """Draws all tokens by `kvtools.sample`.

    Noise is a function of (seed, position, token id): a request's tokens depend neither on its
    batch nor on retraction, nor on who finished. The seed is the request's `sampling_seed`; without
    one it is made of the server's random seed and the request's id, the same on all ranks. Greedy
    requests are SGLang's, in batches with others, too. A row from which none can be drawn (NaN,
    +inf, all -inf) gives what is greatest in it.

    Sampling masks (`return_sampling_mask`) are not made: SGLang ends such a request with an error,
    unless it is greedy in a batch of greedy ones.

    Raises:
        RuntimeError: this SGLang's interface is not the one that kvtools was written for.
    """

    def __init__(self) -> None:
        check_sglang_sampler()
        super().__init__()
        SamplingBatchInfo.adjusted_from_schedule_batch = _with_seeds
        self._draws = False
        self._logits_bv: Tensor | None = None

    def forward(
        self, logits_output: Any, sampling_info: SamplingBatchInfo, *args: Any, **kwargs: Any
    ) -> Tensor:
        self._draws, self._logits_bv = not sampling_info.is_all_greedy, None
        if self._draws and sampling_info.sampling_mask_batch_indices is not None:
            sampling_info = replace(sampling_info, sampling_mask_batch_indices=None)
        try:
            return super().forward(logits_output, sampling_info, *args, **kwargs)
        finally:
            self._draws, self._logits_bv = False, None

    def _preprocess_logits(self, logits: Tensor, sampling_info: SamplingBatchInfo) -> Tensor:
        logits = super()._preprocess_logits(logits, sampling_info)
        if self._draws and self._logits_bv is None:
            self._logits_bv = logits.clone()  # SGLang will write probabilities over them
        return logits

    def _sample_from_probs(
        self,
        probs: Tensor,
        sampling_info: SamplingBatchInfo,
        positions: Tensor,
        simple_sampling_case: bool,
    ) -> tuple[Tensor, None]:
        logits_bv, info = self._logits_bv, sampling_info
        token_b, _, _ = sample(
            logits_bv,
            info.sampling_seed,
            positions + 1,  # of the token that is drawn; SGLang's is that of the last one before it
            temperature=torch.where(info.top_ks == 1, 0.0, info.temperatures[:, 0]),
            top_k=info.top_ks,
            top_p=info.top_ps,
            min_p=info.min_ps,
        )
        return torch.where(token_b < 0, logits_bv.argmax(-1), token_b).int(), None


def _with_seeds(info: SamplingBatchInfo, batch: Any, vocab_size: int) -> None:
    """What SGLang leaves room for: `info`, of a new batch, gets seeds for all its requests."""
    _adjusted(info, batch, vocab_size)
    seeds = [_seed(x.sampling_params.sampling_seed, x.rid) for x in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(info.device, non_blocking=True)


def _seed(given: int | None, request: str) -> int:
    if given is not None:
        return given
    words = blake2b(f"{get_server_args().random_seed} {request}".encode(), digest_size=8).digest()
    return int.from_bytes(words, "little", signed=True)
