"""Truth for scoring: step scores from few head rows, log-probabilities from tiles of the head."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.special import entr

# A tile of logits has at most this many rows and columns, whatever the number of tokens.
TILE_T, TILE_V = 1024, 8192

IGNORED = -100


def step_scores(
    hidden_tm: Tensor,
    step_s: Tensor,
    cu_steps: Tensor,
    weight_km: Tensor,
    bias_k: Tensor | None,
    link: str,
    reduce: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, linked score and per-rollout score; nothing larger than the gathered rows is made."""
    dtype = _accumulator(hidden_tm)
    logits_sk = _head(hidden_tm.index_select(0, step_s).to(dtype), weight_km, bias_k)
    if len(weight_km) == 1:
        margin_s = logits_sk[:, 0].contiguous()
    elif len(weight_km) == 2:
        margin_s = logits_sk[:, 0] - logits_sk[:, 1]
    else:
        margin_s = torch.logaddexp(logits_sk[:, 1], logits_sk[:, 2]) - logits_sk[:, 0]

    if link == "sigmoid":
        linked_s = margin_s.sigmoid()
    elif link == "difference":
        linked_s = (margin_s / 2).tanh()
    elif link == "tanh":
        linked_s = margin_s.tanh()
    else:
        linked_s = margin_s.clone()
    return margin_s, linked_s, _reduce(margin_s, linked_s, cu_steps, reduce, temperature)


def _reduce(
    margin_s: Tensor, linked_s: Tensor, cu_steps: Tensor, reduce: str, temperature: float
) -> Tensor:
    if reduce == "last":
        # An absent score stands at the end, for rollouts without steps.
        padded_s = torch.cat([linked_s, linked_s.new_full((1,), torch.nan)])
        last_r = torch.where(cu_steps.diff() > 0, cu_steps[1:] - 1, len(linked_s))
        return padded_s.index_select(0, last_r)
    if reduce in ("prod", "gmean"):
        # From margins: log(sigmoid(margin)) keeps what a probability rounded to 1 has lost.
        over = "sum" if reduce == "prod" else "mean"
        score_r = _segments(logsigmoid(margin_s), over, cu_steps).exp()
    elif reduce == "sum_logit":
        score_r = _segments(margin_s, "sum", cu_steps)
    elif reduce == "softmin":
        rollout_s = torch.arange(len(cu_steps) - 1, device=cu_steps.device).repeat_interleave(
            cu_steps.diff(), output_size=len(linked_s)
        )
        least_s = _segments(linked_s, "min", cu_steps).index_select(0, rollout_s)
        weight_s = ((least_s - linked_s) / temperature).exp()
        score_r = _segments(weight_s * linked_s, "sum", cu_steps)
        score_r = score_r / _segments(weight_s, "sum", cu_steps)
    else:
        score_r = _segments(linked_s, reduce, cu_steps)
    return score_r.masked_fill(cu_steps.diff() == 0, torch.nan)


def token_logprobs(
    hidden_tm: Tensor,
    weight_vm: Tensor,
    target_t: Tensor,
    bias_v: Tensor | None,
    softcap: float,
    cu_seqlens: Tensor | None,
    ref_hidden_tm: Tensor | None,
    ref_weight_vm: Tensor | None,
    ref_bias_v: Tensor | None,
    entropies: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each target, less the reference model's where given, and segment sums;
    entropies, and whether the target is the most likely id, or neither."""
    logprob_t, entropy_t, best_t = _token_logprobs(
        hidden_tm, weight_vm, target_t, bias_v, softcap, entropies
    )
    if ref_hidden_tm is not None:
        ref = _token_logprobs(ref_hidden_tm, ref_weight_vm, target_t, ref_bias_v, softcap, False)
        logprob_t -= ref[0]
    ignored_t = target_t == IGNORED
    logprob_t.masked_fill_(ignored_t, 0)
    sum_x = logprob_t.new_zeros(0)
    if cu_seqlens is not None:
        sum_x = _segments(logprob_t, "sum", cu_seqlens)
    if not entropies:
        return logprob_t, sum_x, entropy_t, best_t.bool()
    return logprob_t, sum_x, entropy_t.masked_fill_(ignored_t, 0), best_t == target_t


def _token_logprobs(
    hidden_tm: Tensor,
    weight_vm: Tensor,
    target_t: Tensor,
    bias_v: Tensor | None,
    softcap: float,
    entropies: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities; and entropies and the most likely ids, or two empty tensors."""
    dtype = _accumulator(hidden_tm)
    told = len(hidden_tm) if entropies else 0
    entropy_t = torch.zeros(told, dtype=dtype, device=hidden_tm.device)
    peak_t, best_t = torch.full_like(entropy_t, -torch.inf), torch.zeros_like(entropy_t).long()
    lse_t = torch.full((len(hidden_tm),), -torch.inf, dtype=dtype, device=hidden_tm.device)
    chosen_t = torch.zeros_like(lse_t)
    # Rows inside columns, so that a tile of the head is read and widened once.
    for v in range(0, len(weight_vm), TILE_V):
        tile_vm = weight_vm[v : v + TILE_V].to(dtype)
        bias_tile_v = None if bias_v is None else bias_v[v : v + TILE_V]
        for t in range(0, len(hidden_tm), TILE_T):
            rows = slice(t, t + TILE_T)
            logits_tv = _head(hidden_tm[rows].to(dtype), tile_vm, bias_tile_v)
            if softcap > 0:
                logits_tv.div_(softcap).tanh_().mul_(softcap)
            tile_lse_t, before_t = logits_tv.logsumexp(-1), lse_t[rows].clone()
            lse_t[rows] = torch.logaddexp(before_t, tile_lse_t)
            if entropies:  # of a mixture: of its parts, and of which part it is
                # By their difference: lse is rounded, and they are to be one together.
                new_t = (tile_lse_t - before_t).sigmoid()
                new_t = torch.where(tile_lse_t == -torch.inf, 0, new_t)
                old_t = 1 - new_t
                own_t = entr(logits_tv.softmax(-1)).sum(-1).where(new_t > 0, 0)  # not of -inf alone
                mixed_t = entr(old_t) + entr(new_t)
                entropy_t[rows] = mixed_t + old_t * entropy_t[rows] + new_t * own_t
                tile_peak_t, tile_best_t = logits_tv.max(-1)
                best_t[rows] = torch.where(
                    tile_peak_t > peak_t[rows], v + tile_best_t, best_t[rows]
                )
                peak_t[rows] = torch.maximum(peak_t[rows], tile_peak_t)
            column_t = target_t[rows].long() - v
            here_t = (column_t >= 0) & (column_t < len(tile_vm))
            column_t1 = torch.where(here_t, column_t, 0).unsqueeze(1)
            chosen_t[rows] += logits_tv.gather(1, column_t1).squeeze(1).where(here_t, 0)
    if entropies:
        entropy_t.masked_fill_(lse_t == -torch.inf, torch.nan)  # of no distribution
    return chosen_t - lse_t, entropy_t, best_t


def _accumulator(hidden_tm: Tensor) -> torch.dtype:
    return torch.float64 if hidden_tm.dtype == torch.float64 else torch.float32


def _head(hidden_tm: Tensor, weight_km: Tensor, bias_k: Tensor | None) -> Tensor:
    bias_k = None if bias_k is None else bias_k.to(hidden_tm.dtype)
    return torch.nn.functional.linear(hidden_tm, weight_km.to(hidden_tm.dtype), bias_k)


def _segments(x_s: Tensor, reduce: str, cu_steps: Tensor) -> Tensor:
    return torch.segment_reduce(x_s, reduce, offsets=cu_steps.long())
