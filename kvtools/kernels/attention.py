"""Attention over a forest of nodes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import block_d


def merge_states(
    a_bhd: Tensor, a_lse_bh: Tensor, b_bhd: Tensor, b_lse_bh: Tensor
) -> tuple[Tensor, Tensor]:
    b, h, d = a_bhd.shape
    out_bhd = torch.empty_like(a_bhd)
    lse_bh = torch.empty_like(a_lse_bh, dtype=torch.float32)
    if b * h:
        _merge_states_kernel[(triton.cdiv(b * h, 16),)](
            a_bhd, *a_bhd.stride(), a_lse_bh, *a_lse_bh.stride(),
            b_bhd, *b_bhd.stride(), b_lse_bh, *b_lse_bh.stride(),
            out_bhd, *out_bhd.stride(), lse_bh, *lse_bh.stride(), b * h, h,
            D=d, BLOCK_D=block_d(d), BLOCK_B=16,
        )  # fmt: skip
    return out_bhd, lse_bh


@triton.jit
def _merge_states_kernel(
    a_ptr, stride_ab, stride_ah, stride_ad, a_lse_ptr, stride_alb, stride_alh,
    b_ptr, stride_bb, stride_bh, stride_bd, b_lse_ptr, stride_blb, stride_blh,
    out_ptr, stride_ob, stride_oh, stride_od, lse_ptr, stride_lb, stride_lh, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """BLOCK_B rows of (b, h): both outputs weighted, and their lse."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < rows
    b, h = row // heads, row % heads
    a_lse = tl.load(a_lse_ptr + b * stride_alb + h * stride_alh, mask=live, other=float("-inf"))
    b_lse = tl.load(b_lse_ptr + b * stride_blb + h * stride_blh, mask=live, other=float("-inf"))
    lse, a_weight, b_weight = merge_weights(a_lse, b_lse)
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (column < D)[None, :]
    a_start = (b * stride_ab + h * stride_ah)[:, None] + column[None, :] * stride_ad
    b_start = (b * stride_bb + h * stride_bh)[:, None] + column[None, :] * stride_bd
    # What an empty state holds must not show, be it NaN.
    x = tl.load(a_ptr + a_start, mask=mask & (a_weight > 0)[:, None], other=0).to(tl.float32)
    y = tl.load(b_ptr + b_start, mask=mask & (b_weight > 0)[:, None], other=0).to(tl.float32)
    out = a_weight[:, None] * x + b_weight[:, None] * y
    out_start = (b * stride_ob + h * stride_oh)[:, None] + column[None, :] * stride_od
    tl.store(out_ptr + out_start, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + b * stride_lb + h * stride_lh, lse, mask=live)


@triton.jit
def merge_weights(a_lse, b_lse):
    """The lse of two states together, and the weight of each; 0 for what is empty."""
    peak = tl.maximum(a_lse, b_lse)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    a, b = tl.exp(a_lse - safe), tl.exp(b_lse - safe)
    total = a + b
    lse = safe + tl.log(total)
    total = tl.where(total == 0, 1.0, total)
    return lse, a / total, b / total
