"""Reasoning steps by a head of few rows; given tokens by a log-sum-exp over vocabulary tiles."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import dot, tanh, triton_dtype

IGNORED = tl.constexpr(-100)
# A program takes TILE_T tokens by SPLIT_V ids, whatever the batch, so that a token's bits depend on
# it alone. GROUP tiles of tokens run side by side: their hidden states stay in L2.
TILE_T, SPLIT_V, GROUP = 128, 512, 16
STEPS = 2  # that a program scores


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
    s, r, m = len(step_s), len(cu_steps) - 1, hidden_tm.shape[1]
    margin_s, prob_s, score_r = (
        torch.empty(size, dtype=torch.float32, device=hidden_tm.device) for size in (s, s, r)
    )
    if s:
        # Few steps a program, so that 256 fill a GPU, and as many whatever s, on which bits may not
        # depend. 8 KB a tile: with the stages in flight enough for one SM's share of bandwidth.
        block_m = min(triton.next_power_of_2(max(m, 1)), 4096 // hidden_tm.itemsize)
        _step_margins_kernel[(triton.cdiv(s, STEPS),)](
            hidden_tm, *hidden_tm.stride(), step_s, step_s.stride(0),
            weight_km, *weight_km.stride(), bias_k, 0 if bias_k is None else bias_k.stride(0),
            margin_s, prob_s, s, len(hidden_tm), m, K=len(weight_km), LINK=link, BLOCK_S=STEPS,
            BLOCK_M=block_m, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if r:
        _step_scores_kernel[(r,)](
            cu_steps, cu_steps.stride(0), margin_s, prob_s, score_r, s, temperature, REDUCE=reduce,
            BLOCK_S=128, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return margin_s, prob_s, score_r


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
    if entropies:
        raise RuntimeError("impl='triton' of token_logprobs has no entropies: use impl='auto'")
    t, device = len(target_t), target_t.device
    segments = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    logprob_t = torch.empty(t, dtype=torch.float32, device=device)
    sum_x = torch.empty(segments, dtype=torch.float32, device=device)
    policy = _partial(hidden_tm, weight_vm, target_t, bias_v, softcap)
    reference = None
    if ref_hidden_tm is not None:
        reference = _partial(ref_hidden_tm, ref_weight_vm, target_t, ref_bias_v, softcap)
    block_t = 64
    programs = triton.cdiv(t, block_t) if cu_seqlens is None else segments
    if programs:
        _merge_logprobs_kernel[(programs,)](
            policy, reference, target_t, target_t.stride(0),
            cu_seqlens, 0 if cu_seqlens is None else cu_seqlens.stride(0),
            logprob_t, sum_x, t, BLOCK_T=block_t, BLOCK_X=64, enable_fp_fusion=True,
        )  # fmt: skip
    return logprob_t, sum_x, logprob_t.new_empty(0), target_t.new_empty(0, dtype=torch.bool)


class Partial(NamedTuple):
    """Of the logits: in each split of the vocabulary the peak and sum e^(logit - peak), both
    [splits, t]; the target's own, [t], undefined where it is ignored."""

    peak: Any
    sum: Any
    chosen: Any
    splits: int


def _partial(
    hidden_tm: Tensor, weight_vm: Tensor, target_t: Tensor, bias_v: Tensor | None, softcap: float
) -> Partial:
    (t, m), v = hidden_tm.shape, len(weight_vm)
    splits = triton.cdiv(v, SPLIT_V)
    peak_xt, sum_xt = torch.empty(2, splits, t, dtype=torch.float32, device=hidden_tm.device)
    # NaN stays where the target is no token.
    chosen_t = torch.full((t,), torch.nan, dtype=torch.float32, device=hidden_tm.device)
    partial = Partial(peak_xt, sum_xt, chosen_t, splits)
    dtype = torch.promote_types(hidden_tm.dtype, weight_vm.dtype)
    if t:
        _token_logprobs_kernel[(triton.cdiv(t, TILE_T) * splits,)](
            hidden_tm, *hidden_tm.stride(), weight_vm, *weight_vm.stride(),
            target_t, target_t.stride(0), bias_v, 0 if bias_v is None else bias_v.stride(0),
            partial, t, m, v, softcap or None,
            DTYPE=triton_dtype(dtype), SPLIT_V=SPLIT_V, GROUP=GROUP,
            BLOCK_T=TILE_T, BLOCK_V=256 // dtype.itemsize, BLOCK_M=128 // dtype.itemsize,
            num_warps=8, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return partial


@triton.jit(do_not_specialize=["S", "T"])
def _step_margins_kernel(
    hidden_ptr, stride_ht, stride_hm, step_ptr, stride_s, weight_ptr, stride_wk, stride_wm,
    bias_ptr, stride_b, margin_ptr, prob_ptr, S, T, M, K: tl.constexpr, LINK: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The margin and the linked score of BLOCK_S steps."""
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    live = offs_s < S
    # Nobody has read the indices: what they say must not lead outside.
    row = tl.load(step_ptr + offs_s * stride_s, mask=live, other=0).to(tl.int64)
    there = (row >= 0) & (row < T)
    start = tl.where(there, 0.0, float("nan"))
    margin = _margin(
        hidden_ptr + row * stride_ht, live & there, start, stride_hm, weight_ptr, stride_wk,
        stride_wm, bias_ptr, stride_b, M, K, BLOCK_S, BLOCK_M,
    )  # fmt: skip
    prob = margin
    if LINK == "sigmoid":
        prob = tl.sigmoid(margin)
    elif LINK == "difference":
        prob = tanh(margin / 2)
    elif LINK == "tanh":
        prob = tanh(margin)
    tl.store(margin_ptr + offs_s, margin, mask=live)
    tl.store(prob_ptr + offs_s, prob, mask=live)


@triton.jit(do_not_specialize=["S"])
def _step_scores_kernel(
    cu_steps_ptr, stride_c, margin_ptr, prob_ptr, score_ptr, S, temperature, REDUCE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The score of one rollout."""
    pid = tl.program_id(0)
    begin = tl.maximum(tl.load(cu_steps_ptr + pid.to(tl.int64) * stride_c), 0)
    end = tl.minimum(tl.load(cu_steps_ptr + (pid + 1).to(tl.int64) * stride_c), S)
    if begin >= end:
        tl.store(score_ptr + pid, float("nan"))
        return
    best, total, weight = float("inf"), 0.0, 0.0
    for s in range(begin, end, BLOCK_S):
        offs_s = (s + tl.arange(0, BLOCK_S)).to(tl.int64)
        live = offs_s < end
        margin = tl.load(margin_ptr + offs_s, mask=live, other=0)
        prob = tl.load(prob_ptr + offs_s, mask=live, other=0)
        x = prob
        if REDUCE == "prod" or REDUCE == "gmean":
            # From margins: log(sigmoid(margin)) keeps what a probability rounded to 1 has lost.
            x = tl.minimum(margin, 0.0) - _log1p(tl.exp(-tl.abs(margin)))
        elif REDUCE == "sum_logit":
            x = margin
        elif REDUCE == "max":
            x = -prob
        if REDUCE == "softmin":
            least = tl.minimum(best, tl.min(tl.where(live, x, float("inf"))))
            decay = tl.exp((least - best) / temperature)
            weights = tl.exp((least - x) / temperature)
            total = total * decay + tl.sum(tl.where(live, weights * x, 0.0))
            weight = weight * decay + tl.sum(tl.where(live, weights, 0.0))
            best = least
        elif REDUCE == "min" or REDUCE == "max":
            best = tl.minimum(best, tl.min(tl.where(live, x, float("inf"))))
            total += tl.sum(tl.where(live & (x != x), x, 0.0))  # a NaN, once met, stays
        elif REDUCE == "last":
            total += tl.sum(tl.where(offs_s == end - 1, x, 0.0))
        else:
            total += tl.sum(tl.where(live, x, 0.0))

    score = total
    if REDUCE == "min":
        score = best + total
    elif REDUCE == "max":
        score = total - best
    elif REDUCE == "softmin":
        score = total / weight
    elif REDUCE == "mean":
        score = total / (end - begin)
    elif REDUCE == "gmean":
        score = tl.exp(total / (end - begin))
    elif REDUCE == "prod":
        score = tl.exp(total)
    tl.store(score_ptr + pid, score)


@triton.jit
def _margin(
    hidden_ptrs, live, start, stride_hm, weight_ptr, stride_wk, stride_wm, bias_ptr, stride_b,
    M, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Log-odds of the rows at `hidden_ptrs`, and `start`: logits differ by rows' differences."""
    a = tl.zeros([BLOCK_S, BLOCK_M], tl.float32) + start[:, None]
    b = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    # Unlike those of a launch, the stages of a loop also hold loads that feed no product.
    for m in tl.range(0, M, BLOCK_M, num_stages=4):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = live[:, None] & mask_m[None, :]
        ptrs = hidden_ptrs[:, None] + offs_m[None, :] * stride_hm
        hidden = tl.load(ptrs, mask=mask, other=0).to(tl.float32)  # [BLOCK_S, BLOCK_M]
        weight_ptrs = weight_ptr + offs_m * stride_wm
        first = tl.load(weight_ptrs, mask=mask_m, other=0).to(tl.float32)
        if K == 1:
            a += hidden * first[None, :]
        else:
            second = tl.load(weight_ptrs + stride_wk, mask=mask_m, other=0).to(tl.float32)
            if K == 2:
                a += hidden * (first - second)[None, :]
            else:
                third = tl.load(weight_ptrs + 2 * stride_wk, mask=mask_m, other=0).to(tl.float32)
                a += hidden * (second - first)[None, :]
                b += hidden * (third - first)[None, :]
    margin, other = tl.sum(a, axis=1), tl.sum(b, axis=1)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(tl.float32)
        if K == 1:
            margin += bias
        else:
            second = tl.load(bias_ptr + stride_b).to(tl.float32)
            if K == 2:
                margin += bias - second
            else:
                margin += second - bias
                other += tl.load(bias_ptr + 2 * stride_b).to(tl.float32) - bias
    if K == 3:
        margin = tl.maximum(margin, other) + _log1p(tl.exp(-tl.abs(margin - other)))
    return margin


@triton.jit
def _log1p(x):
    """log(1 + x) of x >= 0: the rounding of 1 + x is undone to first order."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit(do_not_specialize=["T"])
def _token_logprobs_kernel(
    hidden_ptr, stride_ht, stride_hm, weight_ptr, stride_wv, stride_wm,
    target_ptr, stride_t, bias_ptr, stride_b, partial: Partial, T, M, V, softcap,
    DTYPE: tl.constexpr, SPLIT_V: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of tokens by a split of the vocabulary: peak, sum, and the targets' own logits."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_T)
    first = pid // (GROUP * partial.splits) * GROUP
    within = pid - first * partial.splits
    size = tl.minimum(tiles - first, GROUP)
    tile, split = first + within % size, within // size
    offs_t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live = offs_t < T
    target = tl.load(target_ptr + offs_t * stride_t, mask=live, other=IGNORED)
    if tl.max(target) == IGNORED:
        return
    hidden_ptrs = hidden_ptr + offs_t[:, None] * stride_ht
    m_i = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_T], tl.float32)
    chosen = tl.zeros([BLOCK_T], tl.float32)
    begin = split * SPLIT_V
    for v in range(begin, tl.minimum(begin + SPLIT_V, V), BLOCK_V):
        offs_v = (v + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask_v = offs_v < V
        weight_ptrs = weight_ptr + offs_v[None, :] * stride_wv
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for m in range(0, M, BLOCK_M):
            offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = offs_m < M
            hidden = tl.load(
                hidden_ptrs + offs_m[None, :] * stride_hm,
                mask=live[:, None] & mask_m[None, :], other=0,
            )  # fmt: skip
            weight = tl.load(
                weight_ptrs + offs_m[:, None] * stride_wm,
                mask=mask_m[:, None] & mask_v[None, :], other=0,
            )  # fmt: skip
            acc = dot(hidden.to(DTYPE), weight.to(DTYPE), acc)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_v * stride_b, mask=mask_v, other=0).to(tl.float32)
            acc += bias[None, :]
        if softcap is not None:
            acc = softcap * tanh(acc / softcap)
        acc = tl.where(mask_v[None, :], acc, float("-inf"))
        chosen += tl.sum(tl.where(offs_v[None, :] == target[:, None], acc, 0.0), axis=1)
        m_new = tl.maximum(m_i, tl.max(acc, axis=1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - safe) + tl.sum(tl.exp(acc - safe[:, None]), axis=1)
        m_i = m_new
    start = split.to(tl.int64) * T + offs_t
    tl.store(partial.peak + start, m_i, mask=live)
    tl.store(partial.sum + start, l_i, mask=live)
    here = (target >= begin) & (target < tl.minimum(begin + SPLIT_V, V))
    tl.store(partial.chosen + offs_t, chosen, mask=live & here)


@triton.jit(do_not_specialize=["T"])
def _merge_logprobs_kernel(
    policy: Partial, reference: Partial | None, target_ptr, stride_t, cu_seqlens_ptr, stride_c,
    logprob_ptr, sum_ptr, T, BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """A segment, or BLOCK_T tokens where there are none: log-probabilities and their sum."""
    pid = tl.program_id(0)
    if cu_seqlens_ptr is None:
        begin = pid * BLOCK_T
        end = tl.minimum(begin + BLOCK_T, T)
    else:
        begin = tl.maximum(tl.load(cu_seqlens_ptr + pid.to(tl.int64) * stride_c), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + (pid + 1).to(tl.int64) * stride_c), T)
    total = tl.zeros([BLOCK_T], tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = offs_t < end
        target = tl.load(target_ptr + offs_t * stride_t, mask=live, other=IGNORED)
        counts = target != IGNORED
        logprob = _merged(policy, offs_t, counts, T, BLOCK_T, BLOCK_X)
        if reference is not None:
            logprob -= _merged(reference, offs_t, counts, T, BLOCK_T, BLOCK_X)
        logprob = tl.where(counts, logprob, 0.0)
        tl.store(logprob_ptr + offs_t, logprob, mask=live)
        total += logprob
    if cu_seqlens_ptr is not None:
        tl.store(sum_ptr + pid, tl.sum(total))


@triton.jit
def _merged(partial: Partial, offs_t, counts, T, BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr):
    """Log-probabilities of the tokens that count, from the splits of the vocabulary."""
    m_i = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_T], tl.float32)
    for x in range(0, partial.splits, BLOCK_X):
        offs_x = (x + tl.arange(0, BLOCK_X)).to(tl.int64)
        mask = (offs_x < partial.splits)[:, None] & counts[None, :]
        start = offs_x[:, None] * T + offs_t[None, :]
        peak = tl.load(partial.peak + start, mask=mask, other=float("-inf"))
        sums = tl.load(partial.sum + start, mask=mask, other=0)
        m_new = tl.maximum(m_i, tl.max(peak, axis=0))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        sums = tl.sum(sums * tl.exp(peak - safe[None, :]), axis=0)
        l_i = l_i * tl.exp(m_i - safe) + sums
        m_i = m_new
    chosen = tl.load(partial.chosen + offs_t, mask=counts, other=0)
    return chosen - m_i - tl.log(l_i)
