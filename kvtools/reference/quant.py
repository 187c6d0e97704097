"""Rotate, quantise and store keys and values: the specification."""

from functools import lru_cache

import torch
from torch import Tensor

# Bit planes of a code, lowest bits first: each is packed on its own.
PLANES = {"int8": (8,), "int6": (4, 2), "int4": (4,), "int3": (2, 1), "int2": (2,)}
# Levels lie at c (1 + bend (c / c_max)²): denser in the middle, as rotated values are. Nearly the
# least squared error for a normal distribution (Lloyd-Max), without a table.
BEND = {"int8": 0.0, "int6": 0.5, "int4": 0.5, "int3": 0.4, "int2": 0.0}
# Ranges tried, as multiples of max|x|. An 8-bit grid is fine enough not to clip.
RANGES = {"int8": [1.0]} | {
    format: [(17 - i) / 16 for i in range(tries)]
    for format, tries in {"int6": 3, "int4": 7, "int3": 10, "int2": 12}.items()
}
FP8_MAX = 448.0
TINY = 2.0**-24  # the least scale in fp16


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


def width(format: str, d: int) -> int:
    """Last axis of a page tensor."""
    return d * sum(PLANES[format]) // 8 if format in PLANES else d


def format_of(pages: Tensor, d: int) -> str:
    """The format of a page tensor for head size `d`, read off its dtype and last axis."""
    if pages.dtype == torch.float8_e4m3fn:
        return "fp8"
    if pages.dtype == torch.uint8:
        return {width(format, d): format for format in PLANES}[pages.shape[-1]]
    return "none"


def level(codes: Tensor, format: str) -> Tensor:
    """What codes, in a floating point dtype, stand for in units of the scale."""
    top = (2 ** sum(PLANES[format]) - 1) / 2
    c = codes - top
    return c * (1 + BEND[format] * (c / top) ** 2) if BEND[format] else c


def encode(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes and fp16 scales of rotated `x` [..., d]: the range with the least error."""
    finite = x.isfinite().all(-1, keepdim=True)
    if not finite.all():  # codes cannot hold it, so the scale does
        codes, scale = encode(x.masked_fill(~finite, 0), format)
        return codes, scale.masked_fill(~finite[..., 0], torch.nan)
    peak = x.abs().amax(-1, keepdim=True)
    if format == "fp8":
        scale = to_scale(peak / FP8_MAX)
        codes = (x / scale.to(x.dtype)).clamp(-FP8_MAX, FP8_MAX)
        return codes.to(torch.float8_e4m3fn), scale[..., 0]
    grid = level(torch.arange(2 ** sum(PLANES[format]), dtype=x.dtype, device=x.device), format)
    border = (grid[1:] + grid[:-1]) / 2
    best = best_scale = best_codes = None
    for reach in RANGES[format]:
        step = peak * (reach / grid[-1]) + TINY
        codes = torch.bucketize(x / step, border)
        y = grid[codes]
        # For these codes, the best scale.
        scale = to_scale((x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True))
        error = (y * scale.to(x.dtype) - x).square().sum(-1, keepdim=True)
        if best is None:
            best, best_scale, best_codes = error, scale, codes
        else:
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_codes = torch.where(better, codes, best_codes)
    return pack(best_codes.to(torch.uint8), PLANES[format]), best_scale[..., 0]


def to_scale(x: Tensor) -> Tensor:
    return x.clamp(TINY, 65504).to(torch.float16)


def decode(codes: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """Values in `dtype` of what `encode` returned, still rotated; "none" is a cast."""
    if format == "none":
        return codes.to(dtype)
    if format == "fp8":
        return codes.to(dtype) * scale[..., None].to(dtype)
    codes = unpack(codes, PLANES[format]).to(dtype)
    return level(codes, format) * scale[..., None].to(dtype)


def pack(codes: Tensor, planes: tuple[int, ...]) -> Tensor:
    """A run of w bytes per plane: byte j has those bits of elements j, j + w, ..., lowest first."""
    runs = []
    for bits in planes:
        parts = (codes & ((1 << bits) - 1)).chunk(8 // bits, -1)
        run = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            run |= part << (bits * i)
        runs.append(run)
        codes = codes >> bits if bits < 8 else codes
    return torch.cat(runs, -1)


def unpack(packed: Tensor, planes: tuple[int, ...]) -> Tensor:
    d = packed.shape[-1] * 8 // sum(planes)
    codes, low = None, 0
    for bits, run in zip(planes, packed.split([d * bits // 8 for bits in planes], -1), strict=True):
        mask = (1 << bits) - 1
        part = torch.cat([(run >> (bits * i)) & mask for i in range(8 // bits)], -1)
        codes = part if codes is None else codes | part << low
        low += bits
    return codes


def quantize_kv(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return encode(x.to(dtype) @ rotation(x.shape[-1], dtype, x.device), format)


def dequantize_kv(codes: Tensor, scale: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    x = decode(codes, scale, format_of(codes, d), compute)
    return (x @ rotation(d, compute, codes.device).T).to(dtype)


def in_pages(name: str, slot: Tensor, k: Tensor) -> Tensor:
    """Which flat slots the pages have. On a CPU, one that lies beyond them is an error."""
    slots = k.shape[0] * k.shape[2]
    if slot.device.type == "cpu" and (slot >= slots).any():
        raise IndexError(
            f"{name} holds slot {int(slot.max())}, which is not among the {slots} of the pages"
        )
    return (slot >= 0) & (slot < slots)


def as_bytes(x: Tensor) -> Tensor:
    """`x`, or its bytes where it is fp8: indexing is not implemented for every float8 type."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


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
    also_th: Tensor | None,
    also_k: Tensor | None,
    also_v: Tensor | None,
    also_k_scale: Tensor | None,
    also_v_scale: Tensor | None,
    frame: Tensor | None,
    frame_t: Tensor | None,
) -> None:
    places = [("slot", slot_th, (k, k_scale), (v, v_scale))]
    if also_th is not None:
        places.append(("also", also_th, (also_k, also_k_scale), (also_v, also_v_scale)))
    inside = [in_pages(name, slot, pages) for name, slot, (pages, _), _ in places]
    if frame is not None:
        dtype = torch.promote_types(k_thd.dtype, torch.float32)
        center, gain = frame[frames_of(frame, frame_t)].to(dtype).unbind(1)
        k_thd = (k_thd.to(dtype) - center) * gain
    for (_, slot, *contents), which in zip(places, inside, strict=True):
        token, head = which.nonzero(as_tuple=True)
        page_size = contents[0][0].shape[2]
        where = slot[token, head].long() // page_size, head, slot[token, head].long() % page_size
        for x_thd, (pages, scale) in zip((k_thd, v_thd), contents, strict=True):
            format = format_of(pages, x_thd.shape[-1])
            if format == "none":
                pages[where] = x_thd[token, head].to(pages.dtype)
            else:
                codes, scale[where] = quantize_kv(x_thd[token, head], format)
                as_bytes(pages)[where] = as_bytes(codes)
        if pages is v:
            if position is not None:
                position[where] = position_t[token].to(torch.int32)
            for signal in (importance, history):
                if signal is not None:
                    signal[where] = 0


def frames_of(frame: Tensor, frame_t: Tensor) -> Tensor:
    """The index of each token's frame. On a CPU, one that does not exist is an error."""
    if frame_t.device.type == "cpu" and ((frame_t < 0) | (frame_t >= frame.shape[0])).any():
        raise IndexError(f"frame_t holds an id that is not among the {frame.shape[0]} frames")
    return frame_t.long().clamp(0, frame.shape[0] - 1)
