"""Rotate, quantise and store keys and values: the specification."""

from functools import lru_cache

import torch
from torch import Tensor

LEVELS = {"int8": 256, "int4": 16, "int2": 4}
CODES_PER_BYTE = {"fp8": 1, "int8": 1, "int4": 2, "int2": 4}
# Fractions of max|x| tried as clipping range. An 8-bit grid is fine enough not to clip.
CLIPS = {"int8": 1, "int4": 8, "int2": 12}
FP8_MAX = 448.0


@lru_cache(maxsize=64)
def rotation(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal [d, d]: random signs, then Walsh-Hadamard in blocks of a power of two."""
    block = d & -d
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < block:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    hadamard = torch.block_diag(*[hadamard / block**0.5] * (d // block))
    sign = 1 - 2 * ((torch.arange(d) * 0x9E3779B1 >> 16) & 1)
    return (sign[:, None] * hadamard).to(device, dtype)


def format_of(pages: Tensor, d: int) -> str:
    """The format of a page tensor for head size `d`, read off its dtype and last axis."""
    if pages.dtype == torch.float8_e4m3fn:
        return "fp8"
    if pages.dtype == torch.uint8:
        return {d: "int8", d // 2: "int4", d // 4: "int2"}[pages.shape[-1]]
    return "none"


def encode(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes and fp16 scales of rotated `x` [..., d]: the clipping range with the least error."""
    peak = x.abs().amax(-1, keepdim=True)
    if format == "fp8":
        scale = (peak / FP8_MAX).clamp(2.0**-24, 65504).to(torch.float16)
        codes = (x / scale.to(x.dtype)).clamp(-FP8_MAX, FP8_MAX)
        return codes.to(torch.float8_e4m3fn), scale[..., 0]
    half = (LEVELS[format] - 1) / 2
    best = best_scale = best_codes = None
    for clip in range(CLIPS[format]):
        scale = (peak * (1 - clip / 16) / half).clamp(2.0**-24, 65504).to(torch.float16)
        step = scale.to(x.dtype)
        codes = torch.round(x / step + half).clamp(0, 2 * half)
        error = ((codes - half) * step - x).square().sum(-1, keepdim=True)
        if best is None:
            best, best_scale, best_codes = error, scale, codes
        else:
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_codes = torch.where(better, codes, best_codes)
    return pack(best_codes.to(torch.uint8), CODES_PER_BYTE[format]), best_scale[..., 0]


def decode(codes: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """Values in `dtype` of what `encode` returned, still rotated; "none" is a cast."""
    if format == "none":
        return codes.to(dtype)
    if format == "fp8":
        return codes.to(dtype) * scale[..., None].to(dtype)
    levels = unpack(codes, CODES_PER_BYTE[format]).to(dtype) - (LEVELS[format] - 1) / 2
    return levels * scale[..., None].to(dtype)


def pack(codes: Tensor, per_byte: int) -> Tensor:
    """Byte j holds the codes j, j + d/n, ...: each bit plane is a contiguous run of the head."""
    bits = 8 // per_byte
    planes = codes.chunk(per_byte, -1)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], 1):
        packed |= plane << (bits * i)
    return packed


def unpack(packed: Tensor, per_byte: int) -> Tensor:
    bits = 8 // per_byte
    return torch.cat([(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(per_byte)], -1)


def quantize_kv(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return encode(x.to(dtype) @ rotation(x.shape[-1], dtype, x.device), format)


def dequantize_kv(codes: Tensor, scale: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    x = decode(codes, scale, format_of(codes, d), compute)
    return (x @ rotation(d, compute, codes.device).T).to(dtype)


def append_kv(
    k_thd: Tensor,
    v_thd: Tensor,
    slot_th: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position_t: Tensor | None,
    position: Tensor | None,
    importance: Tensor | None,
    history: Tensor | None,
) -> None:
    kept = slot_th[:, 0] >= 0
    slot_th = slot_th[kept].long()
    page_size = k.shape[2]
    head_h = torch.arange(k.shape[1], device=k.device)
    where = (slot_th // page_size, head_h.expand(slot_th.shape[0], -1), slot_th % page_size)
    for x_thd, pages, scale in ((k_thd, k, k_scale), (v_thd, v, v_scale)):
        format = format_of(pages, x_thd.shape[-1])
        if format == "none":
            pages[where] = x_thd[kept].to(pages.dtype)
        else:
            pages[where], scale[where] = quantize_kv(x_thd[kept], format)
    if position is not None:
        position[where] = (
            position_t[kept].to(torch.int32)[:, None].expand(where[0].shape[0], k.shape[1])
        )
    if importance is not None:
        importance[where] = 0
    if history is not None:
        history[where] = 0
