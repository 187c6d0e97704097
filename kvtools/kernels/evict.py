"""Importance from a window of queries, who goes, and closing the gaps."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import Paged, block_d, dot, log2, paged, tanh

EMPTY = tl.constexpr(2**31 - 1)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROWS, KEYS = 64, 32  # of a tile of scores
MAX_SPLITS, PROGRAMS = 16, 264  # of the keys; enough to fill a GPU
TILE, STEP = 256, 16  # candidates that are ranked together, against so many at once


class Strided(NamedTuple):
    """A tensor of four axes."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_t: int
    stride_d: int


class Window(NamedTuple):
    """The last w queries of a sequence, and what they see: the sinks, the masks.

    A tile has ROWS of them, the group's heads of a query next to one another, padded to BLOCK_G.
    """

    q: Strided
    k: Strided
    heads: int
    group: int
    w: int
    s: int
    sinks: int
    scale: float
    softcap: float | None
    sliding: int


def key_scores(
    q_bhwd: Tensor,
    k_bhsd: Tensor,
    sink_h: Tensor | None,
    sinks: int,
    scale: float,
    softcap: float,
    sliding: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    (b, heads, s, d), (hq, w) = k_bhsd.shape, q_bhwd.shape[1:3]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k_bhsd.device)

    mass_bhs, low_bhs = empty(b, heads, s), empty(b, heads, s, dtype=torch.int32)
    if mass_bhs.numel() == 0:
        return mass_bhs, low_bhs
    block_g = triton.next_power_of_2(hq // heads)
    rows = max(16, block_g, min(ROWS, triton.next_power_of_2(w) * block_g))
    tiles = triton.cdiv(w, rows // block_g)
    # Partial sums of the softmax over splits of the keys, so that few heads fill a GPU.
    splits = triton.cdiv(PROGRAMS, max(1, b * heads * tiles))
    splits = max(1, min(splits, MAX_SPLITS, triton.cdiv(s, KEYS)))
    window = Window(
        Strided(q_bhwd, *q_bhwd.stride()), Strided(k_bhsd, *k_bhsd.stride()), heads, hq // heads,
        w, s, sinks, scale, softcap or None, sliding or 2**31 - 1,
    )  # fmt: skip
    state = empty(b * heads, splits, 3, tiles * rows)
    # Without fused products, so that equal keys score the same in both kernels.
    options = dict(D=d, BLOCK_D=min(block_d(d), 256 // q_bhwd.itemsize), BLOCK_G=block_g, ROWS=rows,
                   KEYS=KEYS, num_stages=2, enable_fp_fusion=False)  # fmt: skip
    if tiles:
        _window_kernel[(b * heads, tiles, splits)](window, state, **options)
    _key_scores_kernel[(b * heads, triton.cdiv(s, KEYS))](
        window, state, sink_h, sink_h.stride(0) if sink_h is not None else 0, mass_bhs, low_bhs,
        tiles, splits, **options, BLOCK_SPLITS=triton.next_power_of_2(splits), ALL=group == "all",
    )  # fmt: skip
    return mass_bhs, low_bhs


@triton.jit
def _window_kernel(
    window: Window, state_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Peak, sum of e^(x - peak), and that beyond the sinks, for a tile of queries and a split."""
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total, beyond = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    splits = tl.num_programs(2)
    share = tl.cdiv(tl.cdiv(window.s, KEYS), splits) * KEYS
    for start in range(split * share, tl.minimum((split + 1) * share, window.s), KEYS):
        x, _, key = _score(window, head, tile, start, D, BLOCK_D, BLOCK_G, ROWS, KEYS)
        before, peak = peak, tl.maximum(peak, tl.max(x, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        keep, e = tl.exp(before - safe), tl.exp(x - safe[:, None])
        total = total * keep + tl.sum(e, 1)
        beyond = beyond * keep + tl.sum(tl.where((key >= window.sinks)[None, :], e, 0.0), 1)
    rows = tl.num_programs(1) * ROWS
    state_ptr += (head.to(tl.int64) * splits + split) * 3 * rows + tile * ROWS
    row = tl.arange(0, ROWS)
    tl.store(state_ptr + row, peak)
    tl.store(state_ptr + rows + row, total)
    tl.store(state_ptr + 2 * rows + row, beyond)


@triton.jit
def _key_scores_kernel(
    window: Window, state_ptr, sink_ptr, stride_sink, mass_ptr, low_ptr, tiles, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Mass and low counts of KEYS keys of a KV head."""
    head, start = tl.program_id(0), tl.program_id(1) * KEYS
    mass, low = tl.zeros([KEYS], tl.float32), tl.zeros([KEYS], tl.int32)
    row = tl.arange(0, ROWS)
    for tile in range(tiles):
        x, now, key = _score(window, head, tile, start, D, BLOCK_D, BLOCK_G, ROWS, KEYS)
        peak, total, beyond = _merge_splits(
            state_ptr + head.to(tl.int64) * splits * 3 * tiles * ROWS + tile * ROWS + row,
            tiles * ROWS, splits, BLOCK_SPLITS,
        )  # fmt: skip
        live = now >= 0
        if sink_ptr is not None:
            g = head % window.heads * window.group + row % BLOCK_G
            sink = tl.load(sink_ptr + g * stride_sink, mask=live, other=0).to(tl.float32)
            before, peak = peak, tl.maximum(peak, sink)
            keep = tl.exp(before - peak)
            total, beyond = total * keep + tl.exp(sink - peak), beyond * keep
        seen = tl.minimum(now + 1 - window.sinks, tl.minimum(window.sliding, now + 1))
        mean = tl.div_rn(beyond, tl.maximum(seen, 1).to(tl.float32))
        e = tl.exp(x - tl.where(live, peak, 0.0)[:, None])
        share = 1 / tl.where(live, total, 1.0)
        mass += tl.sum(e * share[:, None], 0)
        # How far a group is above the mean: its highest head, or all together.
        above = e - mean[:, None]
        if ALL:
            above = tl.where(live[:, None], above, float("-inf"))
            above = tl.max(tl.reshape(above, [ROWS // BLOCK_G, BLOCK_G, KEYS]), 1)
        else:
            above = tl.reshape(above * share[:, None], [ROWS // BLOCK_G, BLOCK_G, KEYS])
            above = tl.sum(above, 1)
        query = tile * (ROWS // BLOCK_G) + tl.arange(0, ROWS // BLOCK_G)
        past = key[None, :] <= (window.s - window.w + query)[:, None]
        past &= (query < window.w)[:, None]
        low += tl.sum((past & (above < 0)).to(tl.int32), 0)
    key = start + tl.arange(0, KEYS)
    out = head.to(tl.int64) * window.s + key
    tl.store(mass_ptr + out, mass / window.group, mask=key < window.s)
    tl.store(low_ptr + out, low, mask=key < window.s)


@triton.jit
def _score(
    window: Window, head, tile, start, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Masked scores of a tile of queries and KEYS keys; positions of the queries, -1 where there is
    none, and of the keys."""
    row, key = tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    query, g = tile * (ROWS // BLOCK_G) + row // BLOCK_G, row % BLOCK_G
    live = (query < window.w) & (g < window.group)
    b, h = (head // window.heads).to(tl.int64), (head % window.heads).to(tl.int64)
    q_start = b * window.q.stride_b + (h * window.group + g) * window.q.stride_h
    q_start += query.to(tl.int64) * window.q.stride_t
    k_start = b * window.k.stride_b + h * window.k.stride_h
    k_start += key.to(tl.int64) * window.k.stride_t
    x = tl.zeros([ROWS, KEYS], tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D).to(tl.int64)
        q_at = window.q.ptr + q_start[:, None] + column[None, :] * window.q.stride_d
        k_at = window.k.ptr + k_start[:, None] + column[None, :] * window.k.stride_d
        q = tl.load(q_at, mask=live[:, None] & (column < D)[None, :], other=0.0)
        k = tl.load(k_at, mask=(key < window.s)[:, None] & (column < D)[None, :], other=0.0)
        if q.dtype != k.dtype:
            q, k = q.to(tl.float32), k.to(tl.float32)
        x = dot(q, tl.trans(k), x)
    x *= window.scale
    if window.softcap is not None:
        x = tanh(x / window.softcap) * window.softcap
    now = tl.where(live, window.s - window.w + query, -1)
    visible = key[None, :] <= now[:, None]
    visible &= key[None, :] > now[:, None] - window.sliding
    return tl.where(visible, x, float("-inf")), now, key


@triton.jit
def _merge_splits(state_ptr, rows, splits, BLOCK_SPLITS: tl.constexpr):
    """Peak, total and what is beyond the sinks of all splits, for pointers to rows."""
    split = tl.arange(0, BLOCK_SPLITS)
    at = state_ptr[None, :] + (split * 3 * rows)[:, None]
    mask = (split < splits)[:, None]
    peaks = tl.load(at, mask=mask, other=float("-inf"))
    peak = tl.max(peaks, 0)
    keep = tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
    total = tl.sum(tl.load(at + rows, mask=mask, other=0.0) * keep, 0)
    return peak, total, tl.sum(tl.load(at + 2 * rows, mask=mask, other=0.0) * keep, 0)


class Worth(NamedTuple):
    """A tensor [n, h, s] that decides who goes."""

    ptr: Any
    stride_n: int
    stride_h: int
    stride_s: int


class Victims(NamedTuple):
    """Candidates of each row and head, compared by these in this order, then by position."""

    below: Any  # [n]
    start: Any
    score: Worth
    tie: Worth
    position: Worth
    heads: int
    s: int


def select_victims(
    score_nhs: Tensor,
    tie_nhs: Tensor,
    position_nhs: Tensor,
    protect_below_n: Tensor,
    protect_from_n: Tensor,
    count: int,
) -> Tensor:
    n, h, s = position_nhs.shape
    out_nhm = torch.empty(n, h, count, dtype=torch.int32, device=position_nhs.device)
    if out_nhm.numel() == 0:
        return out_nhm
    victims = Victims(
        protect_below_n.contiguous(), protect_from_n.contiguous(),
        *(Worth(x, *x.stride()) for x in (score_nhs, tie_nhs, position_nhs)), h, s,
    )  # fmt: skip
    wide = max(score_nhs.itemsize, tie_nhs.itemsize) == 8
    key = torch.empty(n * h, 4 if wide else 2, s, dtype=torch.int64, device=out_nhm.device)
    index = torch.empty(n * h, s, dtype=torch.int32, device=out_nhm.device)
    tile = min(TILE, max(16, triton.next_power_of_2(s)))
    grid = n * h, triton.cdiv(s, tile)
    step = min(STEP, tile)
    _sort_tile_kernel[grid](victims, key, index, WIDE=wide, TILE=tile, STEP=step, num_warps=8)
    _merge_tiles_kernel[grid](key, index, out_nhm, s, count, WORDS=key.shape[1], TILE=tile)
    return out_nhm


@triton.jit
def _sort_tile_kernel(
    victims: Victims, key_ptr, index_ptr, WIDE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr
):
    """The keys of a tile of candidates, sorted, and where they were."""
    head, begin = tl.program_id(0), tl.program_id(1) * TILE
    i = begin + tl.arange(0, TILE)
    mine = _load_keys(victims, head, i[:, None], WIDE)
    rank = tl.zeros([TILE], tl.int32)
    end = tl.minimum(begin + TILE, victims.s)
    for start in range(begin, end, STEP):
        j = start + tl.arange(0, STEP)
        theirs = _load_keys(victims, head, j[None, :], WIDE)
        before = _precede(theirs, mine, j[None, :] < i[:, None])
        rank += tl.sum((before & (j < end)[None, :]).to(tl.int32), 1)
    slot = begin + rank
    mask = i < end
    tl.store(index_ptr + head.to(tl.int64) * victims.s + slot, i, mask=mask)
    mine = _load_keys(victims, head, i, WIDE)
    for word in tl.static_range(len(mine)):
        start = (head.to(tl.int64) * len(mine) + word) * victims.s
        tl.store(key_ptr + start + slot, mine[word], mask=mask)


@triton.jit
def _merge_tiles_kernel(
    key_ptr, index_ptr, out_ptr, s, count, WORDS: tl.constexpr, TILE: tl.constexpr
):
    """The ranks of a sorted tile among all candidates, and who is among the first `count`."""
    head, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    key_ptr += head * WORDS * s
    slot = begin + tl.arange(0, TILE)
    mask = slot < s
    mine = _load_words(key_ptr, slot, s, mask, WORDS)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, s, TILE):
        end = tl.minimum(start + TILE, s)
        at = tl.zeros([TILE], tl.int32) + start
        for level in tl.static_range(log2(TILE) + 1):
            there = at + (TILE >> level)
            theirs = _load_words(key_ptr, there - 1, s, there <= end, WORDS)
            before = _precede(theirs, mine, there - 1 < slot) & (there <= end)
            at = tl.where(before, there, at)
        rank += at - start
    index = tl.load(index_ptr + head * s + slot, mask=mask)
    tl.store(out_ptr + head * count + rank, index, mask=mask & (rank < count))


@triton.jit
def _load_words(key_ptr, slot, s, mask, WORDS: tl.constexpr):
    first = tl.load(key_ptr + slot, mask=mask, other=0)
    second = tl.load(key_ptr + s + slot, mask=mask, other=0)
    if WORDS == 2:
        return first, second
    else:
        third = tl.load(key_ptr + 2 * s + slot, mask=mask, other=0)
        return first, second, third, tl.load(key_ptr + 3 * s + slot, mask=mask, other=0)


@triton.jit
def _precede(a, b, equal):
    """a < b for keys of several words, the first of which counts most; `equal` if they are."""
    less = equal
    for i in tl.static_range(1, len(a) + 1):
        less = (a[len(a) - i] < b[len(a) - i]) | ((a[len(a) - i] == b[len(a) - i]) & less)
    return less


@triton.jit
def _load_keys(victims: Victims, head, s, WIDE: tl.constexpr):
    """What candidates are compared by, as words in int64."""
    n, h = (head // victims.heads).to(tl.int64), head % victims.heads
    mask = s < victims.s
    score = _order(_load_worth(victims.score, n, h, s, mask))
    tie = _order(_load_worth(victims.tie, n, h, s, mask))
    position = _load_worth(victims.position, n, h, s, mask).to(tl.int64)
    empty = position == EMPTY
    protected = position >= tl.load(victims.start + n)
    protected = (position < tl.load(victims.below + n)) | (protected & ~empty)
    rank = protected.to(tl.int64) - empty.to(tl.int64)
    if WIDE:
        return rank, score, tie, position
    else:
        return (rank << 32) + score, (tie << 32) + position


@triton.jit
def _load_worth(x: Worth, n, h, s, mask):
    start = n * x.stride_n + h.to(tl.int64) * x.stride_h
    return tl.load(x.ptr + start + s.to(tl.int64) * x.stride_s, mask=mask, other=0)


@triton.jit
def _order(x):
    """int64 in the order of x: zeros are equal, and NaN is last."""
    if x.dtype.is_floating():
        x = x.to(tl.float32)
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        x = tl.where(x == x, bits, 0x7FFFFFFF)
    return x.to(tl.int64)


class Moved(NamedTuple):
    """A page tensor as integers, and room for what moves, [n, heads, width]."""

    x: Paged
    width: int
    scratch: Any


def compact_kv(
    source_nh: Tensor,
    target_nh: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor | None,
    importance: Tensor | None,
    history: Tensor | None,
) -> None:
    n, heads = source_nh.shape
    if source_nh.numel() == 0:
        return
    moved, blocks = [], []
    for x in (k, v, k_scale, v_scale, position, importance, history):
        if x is not None:
            x = x.view(INTEGERS[x.itemsize])
            width = x[0, 0, 0].numel()
            scratch = torch.empty(n, heads, width, dtype=x.dtype, device=x.device)
            moved.append(Moved(paged(x), width, scratch))
            blocks.append(triton.next_power_of_2(width))
    for slot_nh, gather in ((source_nh, True), (target_nh, False)):
        _compact_kv_kernel[(triton.cdiv(n, 16), heads)](
            slot_nh, *slot_nh.stride(), n, k.shape[2], tuple(moved),
            BLOCKS=tuple(blocks), GATHER=gather, BLOCK_N=16,
        )  # fmt: skip


@triton.jit
def _compact_kv_kernel(
    slot_ptr, stride_n, stride_h, n, page_size, moved, BLOCKS: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N tokens of a head between their slots and the scratch, all that belongs to them."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    live = i < n
    slot = tl.load(slot_ptr + i.to(tl.int64) * stride_n + head * stride_h, mask=live, other=0)
    page, offset = (slot // page_size).to(tl.int64), slot % page_size
    for tensor in tl.static_range(len(BLOCKS)):
        x, width, scratch_ptr = moved[tensor]
        column = tl.arange(0, BLOCKS[tensor])
        mask = live[:, None] & (column < width)[None, :]
        there = x.ptr + page * x.stride_p + head * x.stride_h + offset * x.stride_s
        there = there[:, None] + column[None, :]
        here = scratch_ptr + (i.to(tl.int64) * heads + head) * width
        here = here[:, None] + column[None, :]
        if GATHER:
            tl.store(here, tl.load(there, mask=mask), mask=mask)
        else:
            tl.store(there, tl.load(here, mask=mask), mask=mask)
