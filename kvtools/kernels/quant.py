"""Rotate, quantise and store keys and values.

Bits must not depend on the batch, on strides, or on which kernel computes them. So products are
fused with sums only where it is said, and sums have an order of their own.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import (
    FORMATS,
    Content,
    Frame,
    Paged,
    Rows,
    bend,
    block_d,
    content,
    format_of,
    frame_start,
    framed,
    from_columns,
    load_scale,
    load_tile,
    log2,
    paged,
    parts,
    planes,
    rotate,
    rotate_back,
    slot_start,
    to_columns,
    top,
)

TINY = tl.constexpr(2.0**-24)  # the least scale in fp16


class Slots(NamedTuple):
    """Flat slots [tokens, heads] with any strides."""

    ptr: Any
    stride_t: int
    stride_h: int


def quantize_kv(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    *lead, d = x.shape
    dtype, bits = (torch.float8_e4m3fn, 8) if format == "fp8" else (torch.uint8, FORMATS[format])
    codes = torch.empty(*lead, d * bits // 8, dtype=dtype, device=x.device)
    scale = torch.empty(lead, dtype=torch.float16, device=x.device)
    if scale.numel():
        x = x.reshape(-1, 1, d)
        _quantize_kv_kernel[lambda meta: (triton.cdiv(len(x), meta["BLOCK_N"]),)](
            Rows(x, *x.stride()), _one_page(codes, scale), len(x), FORMAT=FORMATS[format],
            **_constants(d),
        )  # fmt: skip
    return codes, scale


def dequantize_kv(codes: Tensor, scale: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(*scale.shape, d, dtype=dtype, device=codes.device)
    rows = scale.numel()
    if rows:
        _dequantize_kv_kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_N"]),)](
            _one_page(codes.contiguous(), scale.contiguous()), out, rows,
            FORMAT=format_of(codes.dtype, codes.shape[-1], d), **_constants(d),
        )  # fmt: skip
    return out


def append_kv(
    k_thd: Tensor, v_thd: Tensor, slot_th: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, position_t: Tensor | None, position: Tensor | None,
    importance: Tensor | None, history: Tensor | None, also_th: Tensor | None,
    also_k: Tensor | None, also_v: Tensor | None, also_k_scale: Tensor | None,
    also_v_scale: Tensor | None, frame: Tensor | None, frame_t: Tensor | None,
) -> None:  # fmt: skip
    t, h, d = k_thd.shape
    if t * h == 0:
        return
    second, also = (None, None, None, 0), ()
    if also_th is not None:
        also = (also_k.dtype, also_k.shape[2:], also_v.dtype, also_v.shape[3])
        second = (
            Slots(also_th, *also_th.stride()), content(also_k, also_k_scale),
            content(also_v, also_v_scale), also_k.shape[0] * also_k.shape[2],
        )  # fmt: skip
    words = 0 if history is None else history.shape[3]
    constants = _append_constants(d, words, k.dtype, k.shape[2:], v.dtype, v.shape[3], *also)
    _append_kv_kernel[(triton.cdiv(t * h, constants["BLOCK_N"]), 2)](
        Rows(k_thd, *k_thd.stride()), Rows(v_thd, *v_thd.stride()),
        Slots(slot_th, *slot_th.stride()), content(k, k_scale), content(v, v_scale),
        None if position is None else position_t.contiguous(), paged(position),
        paged(importance), paged(history), t * h, h, k.shape[0] * k.shape[2], *second,
        *framed(frame, frame_t), **constants,
    )  # fmt: skip


@cache
def _append_constants(
    d: int, words: int, k: torch.dtype, k_shape: torch.Size, v: torch.dtype, v_width: int,
    also_k: torch.dtype | None = None, also_k_shape: torch.Size = (0, 0),
    also_v: torch.dtype | None = None, also_v_width: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Of both places dtypes of keys and values, slots of a page and last axes."""
    return dict(
        K_FORMAT=format_of(k, k_shape[1], d), V_FORMAT=format_of(v, v_width, d),
        PAGE_SIZE=k_shape[0], WORDS=words, ALSO_K_FORMAT=format_of(also_k, also_k_shape[1], d),
        ALSO_V_FORMAT=format_of(also_v, also_v_width, d), ALSO_PAGE_SIZE=also_k_shape[0],
        **_constants(d),
    )  # fmt: skip


def _constants(d: int) -> dict[str, Any]:
    # 8 elements per thread, so that a step of few rollouts fills the device.
    n = max(1, 1024 // block_d(d))
    return dict(D=d, BLOCK_D=block_d(d), BLOCK_N=n, num_warps=4, enable_fp_fusion=False)


def _one_page(codes: Tensor, scale: Tensor) -> Content:
    """Without strides of the page and the head, which change with the number of rows."""
    page = content(codes.view(1, 1, -1, codes.shape[-1]), scale.view(1, 1, -1))
    return Content(*(x._replace(stride_p=0, stride_h=0) for x in page))


@triton.constexpr_function
def tries(FORMAT):
    """The i of ranges (17 - i) / 16 max|x| that are tried: RANGES of the reference."""
    return {8: (1, 2), 6: (0, 3), 4: (0, 7), 3: (0, 10), 2: (0, 12)}[FORMAT]


@triton.constexpr_function
def greatest(FORMAT):
    return top(FORMAT) * (1 + bend(FORMAT))


@triton.jit
def _nearest(v, FORMAT: tl.constexpr):
    """The c of the nearest levels to v >= 0, 1/2 or more: of two as near the lower, so that it is
    -1/2 for v = 0. Products are fused with sums: nothing here is held to the last bit."""
    GREATEST: tl.constexpr = greatest(FORMAT)
    SCALE: tl.constexpr = top(FORMAT) / greatest(FORMAT)
    SQUARE: tl.constexpr = 1 / greatest(FORMAT) / greatest(FORMAT)
    CUBIC: tl.constexpr = bend(FORMAT) / top(FORMAT) / top(FORMAT)
    ROUND: tl.constexpr = 1.5 * 2**23
    v = tl.minimum(v, GREATEST)
    # The border below c = r + 1/2 lies at r (1 + 3/4 CUBIC + CUBIC r²). A polynomial inverts this
    # to less than half a step; then one comparison decides.
    if bend(FORMAT) != 0:
        square = v * v
        slope = tl.fma(square, 0.3477 * SCALE * SQUARE * SQUARE, -0.7805 * SCALE * SQUARE)
        slope = tl.fma(square, slope, 1.4393 * SCALE)
        r = tl.fma(v, slope, ROUND) - ROUND
        over = tl.fma(tl.fma(r * r, CUBIC, 1 + 0.75 * CUBIC), r, -v)
    else:
        r = (v + ROUND) - ROUND
        over = r - v
    # Where v lies above the border `over` is negative, and the half is added.
    half = (over.to(tl.int32, bitcast=True) & -0x80000000) | 0x3F000000
    return r - half.to(tl.float32, bitcast=True)


@triton.jit
def _sum(x):
    """Sums of the rows of x, in the same order whatever the layout."""
    for _ in tl.static_range(log2(x.shape[1])):
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), 2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def _to_scale(x):
    return tl.minimum(tl.maximum(x, TINY), 65504.0).to(tl.float16)


@triton.jit
def _encode(x, FORMAT: tl.constexpr, D: tl.constexpr):
    """Codes and scales of rotated x [N, BLOCK_D]: of a few ranges, that with the least error."""
    BLOCK_D: tl.constexpr = x.shape[1]
    BEGIN: tl.constexpr = tries(FORMAT)[0]
    END: tl.constexpr = tries(FORMAT)[1]
    CUBIC: tl.constexpr = bend(FORMAT) / top(FORMAT) / top(FORMAT)
    magnitude = tl.abs(x)  # will do: levels lie symmetrically
    peak = tl.max(magnitude, 1)
    least, best_inverse, best_scale = peak, peak, peak
    first = tl.div_rn(1.0, peak * ((17 - BEGIN) / 16 / greatest(FORMAT)) + TINY)
    for i in range(BEGIN, END):
        reach = peak * ((17 - i) / 16 / greatest(FORMAT)) + TINY
        inverse = tl.div_rn(1.0, reach)
        v = magnitude * inverse[:, None]
        y = _nearest(v, FORMAT)
        if bend(FORMAT) != 0:
            y = y * tl.fma(y * y, CUBIC, 1.0)
        left = v - y  # of x, in units of the range
        if D != BLOCK_D:
            real = (tl.arange(0, BLOCK_D) < D)[None, :]
            y, left = tl.where(real, y, 0.0), tl.where(real, left, 0.0)
        rest, both, square = _sum(left * left), _sum(left * y), _sum(y * y)
        # For these codes, the best scale; as it is stored, `more` of the range is added to it.
        scale = _to_scale(tl.div_rn(1 + tl.div_rn(both, square), inverse)).to(tl.float32)
        more = tl.fma(scale, inverse, -1.0)
        of_first = reach * first  # as the square of `reach` might overflow
        error = tl.fma(more, tl.fma(more, square, -2 * both), rest) * (of_first * of_first)
        better = (error < least) | (i == BEGIN)
        least = tl.where(better, error, least)
        best_inverse = tl.where(better, inverse, best_inverse)
        best_scale = tl.where(better, scale, best_scale)
    c = _nearest(magnitude * best_inverse[:, None], FORMAT)
    return (tl.where(x < 0, -c, c) + top(FORMAT)).to(tl.int32), best_scale.to(tl.float16)


@triton.jit
def _encode_fp8(x):
    """Codes and scales of rotated x [N, BLOCK_D]: bytes of e4m3, in int32."""
    scale = _to_scale(tl.div_rn(tl.max(tl.abs(x), 1), 448.0))
    x = tl.div_rn(x, scale.to(tl.float32)[:, None])
    magnitude = tl.minimum(tl.abs(x), 448.0)
    # To the nearest, of two as near the even: three bits of mantissa, or below 2^-6 units of 2^-9.
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude + 2.0**14).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 2.0**-6, subnormal, normal)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80), scale


@triton.jit
def _store_plane(
    codes, x: Paged, start, live, BYTE: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """The lowest BITS of codes [N, BLOCK_D] as the plane that begins at BYTE of a slot."""
    W: tl.constexpr = D // PARTS
    BLOCK_W: tl.constexpr = codes.shape[1] // PARTS
    COLUMNS: tl.constexpr = BITS * PARTS // 8 * BLOCK_W
    codes = tl.reshape(codes & ((1 << BITS) - 1), [codes.shape[0], 8 // BITS, COLUMNS])
    packed = tl.sum(codes << (tl.arange(0, 8 // BITS) * BITS)[None, :, None], 1)
    column = tl.arange(0, COLUMNS)
    within = column % BLOCK_W
    byte = BYTE + column // BLOCK_W * W + within
    mask = live[:, None] & (within < W)[None, :]
    tl.store(x.ptr + start[:, None] + byte[None, :], packed.to(tl.uint8), mask=mask)


@triton.jit
def _load_heads(x: Rows, t, h, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads (t, h) of x, 0 where not `live`."""
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (column < D)[None, :]
    at = (t * x.stride_t + h * x.stride_h)[:, None] + column[None, :] * x.stride_d
    return tl.load(x.ptr + at, mask=mask, other=0)


@triton.jit
def _put(tile, h, to: Content, page, offset, live, FORMAT: tl.constexpr, D: tl.constexpr):
    """Store a tile of heads in slots [N]."""
    BLOCK_D: tl.constexpr = tile.shape[1]
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (column < D)[None, :]
    start = slot_start(to.x, page, h, offset)
    if FORMAT != 0:
        tile = rotate(tile.to(tl.float32), D)
        # As integers, infinity and NaN are the greatest. Codes cannot hold them, so the scale does.
        finite = tl.max(tl.abs(tile).to(tl.int32, bitcast=True), 1) < 0x7F800000
        tile = tl.where(finite[:, None], tile, 0.0)
    if FORMAT <= 1:
        if FORMAT == 1:
            tile, scale = _encode_fp8(tile)
        tile = tile.to(to.x.ptr.dtype.element_ty)
        tl.store(to.x.ptr + start[:, None] + column[None, :], tile, mask=mask)
    else:
        PARTS: tl.constexpr = parts(FORMAT)
        LOW: tl.constexpr = planes(FORMAT)[0]
        HIGH: tl.constexpr = planes(FORMAT)[1]
        codes, scale = _encode(tile, FORMAT, D)
        codes = to_columns(codes, D, PARTS)
        _store_plane(codes, to.x, start, live, 0, LOW, PARTS, D)
        if HIGH > 0:
            _store_plane(codes >> LOW, to.x, start, live, D * LOW // 8, HIGH, PARTS, D)
    if FORMAT != 0:
        scale = tl.where(finite, scale, float("nan"))
        tl.store(to.scale.ptr + slot_start(to.scale, page, h, offset), scale, mask=live)


@triton.jit(do_not_specialize=["rows"])
def _quantize_kv_kernel(
    x: Rows, to: Content, rows, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes and scales of BLOCK_N rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    zero = tl.zeros_like(row)
    live = row < rows
    _put(_load_heads(x, row, zero, live, D, BLOCK_D), zero, to, zero, row, live, FORMAT, D)


@triton.jit(do_not_specialize=["rows"])
def _dequantize_kv_kernel(
    x: Content, out_ptr, rows, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of out [rows, D]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, zero = row < rows, tl.zeros_like(row)
    tile = load_tile(x.x, zero, zero, row, live, FORMAT, D, BLOCK_D, tl.float32)
    tile *= load_scale(x.scale, zero, zero, row, live)[:, None]
    tile = rotate_back(from_columns(tile, D, parts(FORMAT)), D)
    column = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + row[:, None] * D + column[None, :], tile.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (column < D)[None, :],
    )  # fmt: skip


@triton.jit
def _find(slot: Slots, t, h, real, slots, PAGE_SIZE: tl.constexpr):
    """Page, offset in it, and whether there is one, of the slots of heads (t, h)."""
    i = tl.load(slot.ptr + t * slot.stride_t + h * slot.stride_h, mask=real, other=-1)
    live = (i >= 0) & (i < slots)
    return (i // PAGE_SIZE).to(tl.int64), (i % PAGE_SIZE).to(tl.int64), live


@triton.jit(do_not_specialize=["rows", "slots", "also_slots", "frames"])
def _append_kv_kernel(
    k_thd: Rows, v_thd: Rows, slot: Slots, k: Content, v: Content, position_ptr, position: Paged,
    importance: Paged, history: Paged, rows, heads, slots, also: Slots, also_k: Content,
    also_v: Content, also_slots, frame: Frame, frames, K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr, WORDS: tl.constexpr,
    ALSO_K_FORMAT: tl.constexpr, ALSO_V_FORMAT: tl.constexpr, ALSO_PAGE_SIZE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N heads of tokens: the keys and what else belongs to their slots, or the values; and
    the same in the second place, if there is one."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < rows
    t, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    page, offset, live = _find(slot, t, h, real, slots, PAGE_SIZE)
    used = live
    if also is not None:
        also_page, also_offset, also_live = _find(also, t, h, real, also_slots, ALSO_PAGE_SIZE)
        used = live | also_live
    if tl.program_id(1) == 1:
        values = _load_heads(v_thd, t, h, used, D, BLOCK_D)
        _put(values, h, v, page, offset, live, V_FORMAT, D)
        if also is not None:
            _put(values, h, also_v, also_page, also_offset, also_live, ALSO_V_FORMAT, D)
    else:
        keys = _load_heads(k_thd, t, h, used, D, BLOCK_D)
        if frame is not None:
            i = tl.load(frame.of + t, mask=used, other=0)
            column = tl.arange(0, BLOCK_D)
            mask = used[:, None] & (column < D)[None, :]
            at = frame.ptr + column[None, :]
            center = frame_start(i, frames, 0, h, heads, D)[:, None]
            gain = frame_start(i, frames, 1, h, heads, D)[:, None]
            center = tl.load(at + center, mask=mask, other=0).to(tl.float32)
            gain = tl.load(at + gain, mask=mask, other=0).to(tl.float32)
            keys = (keys.to(tl.float32) - center) * gain
        _put(keys, h, k, page, offset, live, K_FORMAT, D)
        if also is not None:
            _put(keys, h, also_k, also_page, also_offset, also_live, ALSO_K_FORMAT, D)
        zero = tl.zeros([BLOCK_N], tl.int32)
        if position is not None:
            x = tl.load(position_ptr + t, mask=live, other=0).to(tl.int32)
            tl.store(position.ptr + slot_start(position, page, h, offset), x, mask=live)
        if importance is not None:
            start = slot_start(importance, page, h, offset)
            tl.store(importance.ptr + start, zero.to(tl.float32), mask=live)
        if history is not None:
            start = slot_start(history, page, h, offset)
            for word in range(WORDS):
                tl.store(history.ptr + start + word, zero, mask=live)
