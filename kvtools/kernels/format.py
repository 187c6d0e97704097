"""What the rows share: page tensors as kernels see them, packed codes, the rotation, tanh.

Along the head dimension a tile has BLOCK_D columns, a power of two of at least 16. A format packs
`8 / bits` elements per byte of each plane, so the head is cut into `parts(FORMAT)` runs of W
elements that are padded to a power of two each: `column_element` tells which element a column is.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq, is_cuda

# How a page tensor is stored; integers of n bits are n.
FLOAT, FP8 = 0, 1
FORMATS = {"none": FLOAT, "fp8": FP8, "int8": 8, "int6": 6, "int4": 4, "int3": 3, "int2": 2}

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Paged(NamedTuple):
    """A tensor [pages, heads, slots, ...], its last axis contiguous."""

    ptr: Any
    stride_p: int
    stride_h: int
    stride_s: int


class Rows(NamedTuple):
    """A tensor [tokens, heads, d] with any strides."""

    ptr: Any
    stride_t: int
    stride_h: int
    stride_d: int


class Content(NamedTuple):
    """Keys or values: codes or floats, and scales [pages, heads, slots] unless they are floats."""

    x: Paged
    scale: Paged | None


class Frame(NamedTuple):
    """Centers and gains of keys [frames, 2, heads, d], and the frame of each token."""

    ptr: Any
    of: Any


def paged(x: Tensor | None) -> Paged | None:
    return None if x is None else Paged(x, *x.stride()[:3])


def framed(frame: Tensor | None, frame_t: Tensor | None) -> tuple[Frame | None, int]:
    """Frames as kernels see them, and how many there are."""
    if frame is None:
        return None, 0
    return Frame(frame.contiguous(), frame_t.contiguous()), frame.shape[0]


def content(x: Tensor, scale: Tensor | None) -> Content:
    if x.dtype == torch.float8_e4m3fn:  # sm_80 cannot read it
        x = x.view(torch.uint8)
    return Content(paged(x), paged(scale))


def format_of(dtype: torch.dtype, width: int, d: int) -> int:
    """The format of a page tensor for head size `d`, read off its dtype and last axis."""
    if dtype == torch.uint8:
        return width * 8 // d
    return FP8 if dtype == torch.float8_e4m3fn else FLOAT


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def architecture() -> str:
    """Of the current device: sm_90, gfx942. The interpreter counts as sm_90."""
    if INTERPRETED.value:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def block_d(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


@triton.constexpr_function
def parts(FORMAT):
    """Runs of elements that share bytes, or neighbour in them."""
    return {0: 1, 1: 1, 8: 1, 6: 4, 4: 2, 3: 8, 2: 4}[FORMAT]


@triton.constexpr_function
def planes(FORMAT):
    """Bits of the low plane, and of the high one or 0: PLANES of the reference."""
    return {6: (4, 2), 3: (2, 1)}.get(FORMAT, (FORMAT, 0))


@triton.constexpr_function
def bend(FORMAT):
    """BEND of the reference."""
    return {6: 0.5, 4: 0.5, 3: 0.4}.get(FORMAT, 0.0)


@triton.constexpr_function
def top(FORMAT):
    """Distance of the last code from the middle."""
    return (2**FORMAT - 1) / 2


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def rsqrt(n):
    return n**-0.5


@triton.constexpr_function
def lowest_bit(n):
    return n & -n


@triton.jit
def slot_start(x: Paged, page, head, offset):
    """Where slots begin in x. `page` is int64."""
    return page * x.stride_p + head.to(tl.int64) * x.stride_h + offset * x.stride_s


@triton.jit
def frame_start(i, frames, WHICH: tl.constexpr, head, heads, D: tl.constexpr):
    """Where centers (0) or gains (1) of frames i begin; of none that does not exist."""
    i = tl.minimum(tl.maximum(i, 0), frames - 1).to(tl.int64)
    return ((i * 2 + WHICH) * heads + head) * D


@triton.jit
def column_element(D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Element of each column, D where there is none."""
    W: tl.constexpr = D // PARTS
    BLOCK_W: tl.constexpr = BLOCK_D // PARTS
    column = tl.arange(0, BLOCK_D)
    within = column % BLOCK_W
    return tl.where(within < W, column // BLOCK_W * W + within, D)


@triton.jit
def to_columns(x, D: tl.constexpr, PARTS: tl.constexpr):
    """Elements in order, [N, BLOCK_D], in the columns of `column_element`."""
    if PARTS > 1 and x.shape[1] != D:
        element = column_element(D, x.shape[1], PARTS)
        x = tl.gather(x, tl.broadcast_to(element[None, :], x.shape), 1)
    return x


@triton.jit
def from_columns(x, D: tl.constexpr, PARTS: tl.constexpr):
    """The columns [N, BLOCK_D] of `column_element` as elements in order."""
    if PARTS > 1 and x.shape[1] != D:
        W: tl.constexpr = D // PARTS
        element = tl.arange(0, x.shape[1]) % D
        column = element // W * (x.shape[1] // PARTS) + element % W
        x = tl.gather(x, tl.broadcast_to(column[None, :], x.shape), 1)
    return x


@triton.jit
def _load_plane(
    x: Paged, start, live, BYTE: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Codes of one bit plane, which begins at BYTE of a slot. uint16 [N, BLOCK_D]."""
    W: tl.constexpr = D // PARTS
    BLOCK_W: tl.constexpr = BLOCK_D // PARTS
    N: tl.constexpr = start.shape[0]
    column = tl.arange(0, BITS * PARTS // 8 * BLOCK_W)
    within = column % BLOCK_W
    byte = BYTE + column // BLOCK_W * W + within
    mask = live[:, None] & (within < W)[None, :]
    packed = tl.load(x.ptr + start[:, None] + byte[None, :], mask=mask, other=0).to(tl.uint16)
    shift = (tl.arange(0, 8 // BITS) * BITS).to(tl.uint16)
    codes = (packed[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [N, BLOCK_D])


@triton.jit
def level(c, FORMAT: tl.constexpr):
    """What codes stand for in units of the scale, given their distance from the middle code."""
    if bend(FORMAT) != 0:
        c = c * (c * c * (bend(FORMAT) / top(FORMAT) / top(FORMAT)) + 1)
    return c


@triton.jit
def distance(codes, FORMAT: tl.constexpr):
    """Of uint16 codes from the middle code, in fp16."""
    # 512 + code is exact in fp16, to halves: no slow integer conversion.
    return ((codes << 1) | 0x6000).to(tl.float16, bitcast=True) - (512 + top(FORMAT))


@triton.jit
def decode(codes, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of uint16 codes."""
    return level(distance(codes, FORMAT).to(DTYPE), FORMAT)


@triton.jit
def e4m3(bits):
    """fp16 of what uint16 holds."""
    # e4m3 has fp16's layout with an exponent less by 8.
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    x = half.to(tl.float16, bitcast=True) * 256
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), x)


@triton.jit
def load_tile(
    x: Paged, page, head, offset, live, FORMAT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Slots [N] of a head as DTYPE [N, BLOCK_D], scales left out; 0 where not `live`.

    Columns are those of `column_element`. `page` is int64.
    """
    PARTS: tl.constexpr = parts(FORMAT)
    start = slot_start(x, page, head, offset)
    if FORMAT <= 1:
        column = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (column < D)[None, :]
        tile = tl.load(x.ptr + start[:, None] + column[None, :], mask=mask, other=0)
        if FORMAT == 1:
            tile = e4m3(tile.to(tl.uint16))
        return tile.to(DTYPE)
    else:
        LOW: tl.constexpr = planes(FORMAT)[0]
        HIGH: tl.constexpr = planes(FORMAT)[1]
        codes = _load_plane(x, start, live, 0, LOW, PARTS, D, BLOCK_D)
        if HIGH > 0:
            high = _load_plane(x, start, live, D * LOW // 8, HIGH, PARTS, D, BLOCK_D)
            codes = codes | (high << LOW)
        return decode(codes, FORMAT, DTYPE)


@triton.constexpr_function
def fields(FORMAT):
    """Elements of a 16-bit word of codes, and so tiles that `load_words` gives."""
    return 2 if FORMAT == FP8 else 16 // FORMAT


@triton.constexpr_function
def word_columns(FORMAT, D):
    """Words of a head, padded."""
    return max(16, triton.next_power_of_2(D // fields(FORMAT)))


@triton.constexpr_function
def word_unit(FORMAT):
    """What levels of `load_words` are multiplied with to be in units of the scale."""
    return 1.0 if FORMAT == FP8 or bend(FORMAT) == 0 else bend(FORMAT) / top(FORMAT) ** 2


@triton.jit
def word_element(column, FORMAT: tl.constexpr, D: tl.constexpr):
    """Elements that are the columns of `load_words`, its tiles side by side; D for none."""
    HALF: tl.constexpr = fields(FORMAT) // 2  # the elements of a byte
    field = column // word_columns(FORMAT, D)
    word = column % word_columns(FORMAT, D)
    element = word * 2 + field // HALF + field % HALF * (D // HALF)
    return tl.where(word < D // fields(FORMAT), element, D)


@triton.constexpr_function
def shifts(FORMAT):
    """Of formats of n bits how each field of a word is shifted to the left, and where it begins
    then. In fp16 a field from bit p on, under the exponent of 2^(10 - p), adds its code to that
    power. Less the middle code, too, it must be exact, so p > 0. Shifts that serve several cost
    less."""
    return {
        8: ((2, 2), (-6, 2)),
        4: ((4, 4), (0, 4), (-6, 2), (-6, 6)),
        2: ((2, 2), (0, 2), (0, 4), (0, 6), (0, 8), (-8, 2), (-8, 4), (-8, 6)),
    }[FORMAT]


@triton.constexpr_function
def pair(x):
    """Twice the same number of at least 1 in fp16, exactly, as PTX has it."""
    power = int(abs(x)).bit_length() - 1
    bits = int(x < 0) << 15 | (power + 15) << 10 | int((abs(x) / 2**power - 1) * 1024)
    return hex(bits << 16 | bits)


@triton.constexpr_function
def unpacking(FORMAT):
    """PTX that makes pairs of levels, one for each field, of two words of codes."""
    n = fields(FORMAT)
    if FORMAT == FP8:
        lines = ["prmt.b32 t, $2, 0, 0x3120", "mov.b32 {a, b}, t"]
        lines += ["cvt.rn.f16x2.e4m3x2 $0, a", "cvt.rn.f16x2.e4m3x2 $1, b"]
    else:
        lines, shifted = [], 0
        for i in range(n):
            shift, at = shifts(FORMAT)[i]
            if shift not in (0, shifted):
                how = "shl.b32" if shift > 0 else "shr.u32"
                lines.append(f"{how} t, ${n}, {abs(shift)}")
                shifted = shift
            word, mask, power = "t" if shift else f"${n}", (2**FORMAT - 1) << at, (25 - at) << 10
            lines.append(f"lop3.b32 c, {word}, {mask * 65537:#x}, {power * 65537:#x}, 0xea")
            lines.append(f"mov.b32 d, {pair(-(2 ** (10 - at)) - top(FORMAT))}")
            if bend(FORMAT) == 0:
                lines.append(f"add.rn.f16x2 ${i}, c, d")
                continue
            lines += ["add.rn.f16x2 c, c, d", f"mov.b32 d, {pair(1 / word_unit(FORMAT))}"]
            lines += ["fma.rn.f16x2 d, c, c, d", f"mul.rn.f16x2 ${i}, c, d"]
    return "{ .reg .b32 t, c, d; .reg .b16 a, b; " + "; ".join(lines) + "; }"


@triton.constexpr_function
def unpacks(FORMAT):
    """Whether the device runs `unpacking`."""
    return not INTERPRETED.value and (cuda_capability_geq(8, 9) if FORMAT == FP8 else is_cuda())


@triton.constexpr_function
def constraints(FORMAT):
    return "=r," * fields(FORMAT) + "r"


@triton.constexpr_function
def half_types(FORMAT):
    return (tl.float16,) * fields(FORMAT)


@triton.jit
def load_words(
    x: Paged, page, head, offset, live, FORMAT: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr
):
    """Slots [N] of a head as `fields` tiles [N, word_columns] of DTYPE, whose columns are those of
    `word_element`; scales and `word_unit` are left out. What is not there has the code 0.

    Codes must lie at even addresses. Tiles apart leave each pair of codes where its product wants
    it: none is moved."""
    column = tl.arange(0, word_columns(FORMAT, D))
    start = slot_start(x, page, head, offset)
    ptr = (x.ptr + start).to(tl.pointer_type(tl.uint16))
    mask = live[:, None] & (column < D // fields(FORMAT))[None, :]
    words = tl.load(ptr[:, None] + column[None, :], mask=mask, other=0)
    tiles = ()
    if unpacks(FORMAT) and (tl.float16 == DTYPE or bend(FORMAT) == 0):
        levels = tl.inline_asm_elementwise(
            unpacking(FORMAT), constraints(FORMAT), [words], half_types(FORMAT), True, 2
        )
        for i in tl.static_range(fields(FORMAT)):
            tiles = tiles + (levels[i].to(DTYPE),)
    elif FORMAT == 1:
        for i in tl.static_range(2):
            tiles = tiles + (e4m3((words >> (8 * i)) & 0xFF).to(DTYPE),)
    else:
        for i in tl.static_range(fields(FORMAT)):
            c = distance((words >> (FORMAT * i)) & ((1 << FORMAT) - 1), FORMAT).to(DTYPE)
            if bend(FORMAT) != 0:
                c = c * (c * c + 1 / word_unit(FORMAT))
            tiles = tiles + (c,)
    return tiles


@triton.jit
def side_by_side(tiles, N: tl.constexpr):
    """2, 4 or 8 tiles as one, their columns in this order. Nothing is moved."""
    x = tl.join(tiles[0], tiles[1])
    if N == 2:
        x = tl.permute(x, 0, 2, 1)
    else:
        x = tl.join(x, tl.join(tiles[2], tiles[3]))
        if N == 4:
            x = tl.permute(x, 0, 3, 2, 1)
        else:
            y = tl.join(tl.join(tiles[4], tiles[5]), tl.join(tiles[6], tiles[7]))
            x = tl.permute(tl.join(x, y), 0, 4, 3, 2, 1)
    return tl.reshape(x, [tiles[0].shape[0], N * tiles[0].shape[1]])


@triton.jit
def load_scales(k: Paged, page, head, offset, live):
    """Scales of keys and of values in fp32, of slots [N] whose two are one word."""
    ptr = (k.ptr + slot_start(k, page, head, offset)).to(tl.pointer_type(tl.uint32))
    both = tl.load(ptr, mask=live, other=0)
    k_scale = both.to(tl.uint16).to(tl.float16, bitcast=True)
    v_scale = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return k_scale.to(tl.float32), v_scale.to(tl.float32)


@triton.jit
def load_scale(x: Paged, page, head, offset, live):
    """Scales of slots [N] in fp32, 0 where not `live`."""
    return tl.load(x.ptr + slot_start(x, page, head, offset), mask=live, other=0).to(tl.float32)


@triton.jit
def _hadamard(x, D: tl.constexpr):
    """Walsh-Hadamard transform of the rows of x [M, BLOCK_D], in blocks of a power of two."""
    BLOCK: tl.constexpr = lowest_bit(D)
    M: tl.constexpr = x.shape[0]
    BLOCK_D: tl.constexpr = x.shape[1]
    second = tl.arange(0, 2)[None, :, None] == 1
    for stage in tl.static_range(log2(BLOCK)):
        # A sum of bits, unlike an exchange, leaves a tile in the layout that it has, and less what
        # is one's own it is the other's: one shuffle.
        pairs = tl.reshape(x, [M * BLOCK_D >> (stage + 1), 2, 1 << stage])
        bits = pairs.to(tl.int32, bitcast=True)
        total = tl.sum(bits, 1).to(tl.int64).to(tl.int32)  # the interpreter sums in 64 bits
        other = (total[:, None, :] - bits).to(tl.float32, bitcast=True)
        x = tl.reshape(other + tl.where(second, -pairs, pairs), [M, BLOCK_D])
    return x * rsqrt(BLOCK)


@triton.jit
def _sign(BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D).to(tl.uint32)
    return 1.0 - 2.0 * (((column * 0x9E3779B1) >> 16) & 1).to(tl.float32)


@triton.jit
def rotate(x, D: tl.constexpr):
    """x @ rotation, of fp32 x [M, BLOCK_D] in order, with zeros in columns from D on."""
    return _hadamard(x * _sign(x.shape[1])[None, :], D)


@triton.jit
def rotate_back(x, D: tl.constexpr):
    """x @ rotation.T"""
    return _hadamard(x, D) * _sign(x.shape[1])[None, :]


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in fp32, of operands in one dtype."""
    if INTERPRETED:  # the interpreter multiplies the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    # AMD's matrix cores take fp32 as it is, NVIDIA's as three products of parts.
    return tl.dot(a, b, acc, input_precision="tf32x3" if is_cuda() else "ieee")


@triton.jit
def exp2(x):
    """2^x in fp32; on NVIDIA one instruction, which takes what is below 2^-126 for 0."""
    if is_cuda() and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return tl.exp2(x)


@triton.jit
def tanh(x):
    """To a few ulp in fp32: odd, so that small x keep their relative precision."""
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    shrunk = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * shrunk / (1.0 + shrunk)
    return tl.where(square < 0.390625, small, tl.where(x < 0, -large, large))
