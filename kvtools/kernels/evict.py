"""Importance from a window of queries, who goes, and closing the gaps."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import Paged, architecture, block_d, dot, log2, paged, slot_start, tanh

EMPTY = tl.constexpr(2**31 - 1)
PROGRAMS = 264  # enough to fill a GPU
MAX_SPLITS = 16  # of the keys, to get so many
TILE, STEP = 256, 16  # candidates ranked together, against so many at once
MOVED = 16  # tokens of a program
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Heads(NamedTuple):
    """A tensor [b, h, t, d]."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_t: int
    stride_d: int


class Window(NamedTuple):
    """The last w queries of a sequence of s keys, and what of these they see."""

    heads: int
    group: int
    w: int
    s: int
    sinks: int
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
    # A tile has the heads of a query in consecutive rows, padded to a power of two.
    wide = torch.float32 in (q_bhwd.dtype, k_bhsd.dtype)
    rows, keys, columns, warps = (16, 32, 64, 4) if wide else (64, 64, 128, 8)
    block_g = triton.next_power_of_2(hq // heads)
    rows = max(16, block_g, min(rows, triton.next_power_of_2(w) * block_g))
    tiles = triton.cdiv(w * block_g, rows)
    splits = min(MAX_SPLITS, triton.cdiv(s, keys), triton.cdiv(PROGRAMS, b * heads * max(tiles, 1)))
    state = empty(b * heads, splits, 3, tiles * rows)
    args = (
        Heads(q_bhwd, *q_bhwd.stride()), Heads(k_bhsd, *k_bhsd.stride()),
        Window(heads, hq // heads, w, s, sinks, sliding or 2**31 - 1), scale, softcap or None,
    )  # fmt: skip
    # Both kernels must see the same scores, lest equal keys differ: no product is fused in one.
    stages = 1 if architecture() == "gfx942" and d > 128 else 2  # it has 64 KiB shared
    options = dict(D=d, BLOCK_D=min(block_d(d), columns), BLOCK_G=block_g, ROWS=rows, KEYS=keys,
                   num_warps=warps, num_stages=stages, enable_fp_fusion=False)  # fmt: skip
    if tiles:
        _window_kernel[(b * heads, tiles, splits)](*args, state, **options)
    _key_scores_kernel[(b * heads, triton.cdiv(s, keys))](
        *args, state, None if sink_h is None else sink_h.contiguous(), mass_bhs, low_bhs, tiles,
        splits, **options, ALL=group == "all", BLOCK_SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return mass_bhs, low_bhs


@triton.jit
def _window_kernel(
    q: Heads, k: Heads, window: Window, scale, softcap, state_ptr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """For each row of a tile, over a split of the keys: the peak of the scores x, the sum of
    e^(x - peak), and the part of it that is beyond the sinks."""
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, splits = tl.num_programs(1), tl.num_programs(2)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total, beyond = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    share = tl.cdiv(tl.cdiv(window.s, KEYS), splits) * KEYS
    for start in range(split * share, tl.minimum((split + 1) * share, window.s), KEYS):
        x, _, key = _score(
            q, k, window, scale, softcap, head, tile, start, D, BLOCK_D, BLOCK_G, ROWS, KEYS
        )
        before, peak = peak, tl.maximum(peak, tl.max(x, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        keep, e = tl.exp(before - safe), tl.exp(x - safe[:, None])
        total = total * keep + tl.sum(e, 1)
        beyond = beyond * keep + tl.sum(tl.where((key >= window.sinks)[None, :], e, 0.0), 1)
    at = _state(state_ptr, head, split, splits, tile, tiles, ROWS)
    tl.store(at, peak)
    tl.store(at + tiles * ROWS, total)
    tl.store(at + 2 * tiles * ROWS, beyond)


@triton.jit
def _key_scores_kernel(
    q: Heads, k: Heads, window: Window, scale, softcap, state_ptr, sink_ptr, mass_ptr, low_ptr,
    tiles, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ALL: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Mass and low counts of KEYS keys of a KV head."""
    QUERIES: tl.constexpr = ROWS // BLOCK_G
    head, start = tl.program_id(0), tl.program_id(1) * KEYS
    mass, low = tl.zeros([KEYS], tl.float32), tl.zeros([KEYS], tl.int32)
    for tile in range(tiles):
        x, now, key = _score(
            q, k, window, scale, softcap, head, tile, start, D, BLOCK_D, BLOCK_G, ROWS, KEYS
        )
        live = now >= 0
        split = tl.arange(0, BLOCK_SPLITS)[:, None]
        at = _state(state_ptr, head, split, splits, tile, tiles, ROWS)
        peak, total, beyond = _merge(at, tiles * ROWS, split < splits)
        if sink_ptr is not None:
            g = head % window.heads * window.group + tl.arange(0, ROWS) % BLOCK_G
            sink = tl.load(sink_ptr + g, mask=live, other=0).to(tl.float32)
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
            # To a NaN nothing is low.
            other = tl.where(live, float("inf"), float("-inf"))
            above = tl.where((live & (total == total))[:, None], above, other[:, None])
            above = tl.max(tl.reshape(above, [QUERIES, BLOCK_G, KEYS]), 1)
        else:
            above = tl.sum(tl.reshape(above * share[:, None], [QUERIES, BLOCK_G, KEYS]), 1)
        query = tile * QUERIES + tl.arange(0, QUERIES)
        past = key[None, :] <= (window.s - window.w + query)[:, None]
        past &= (query < window.w)[:, None]
        low += tl.sum((past & (above < 0)).to(tl.int32), 0)
    key = start + tl.arange(0, KEYS)
    out = head.to(tl.int64) * window.s + key
    tl.store(mass_ptr + out, mass / window.group, mask=key < window.s)
    tl.store(low_ptr + out, low, mask=key < window.s)


@triton.jit
def _score(
    q: Heads, k: Heads, window: Window, scale, softcap, head, tile, start, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries and KEYS keys, -inf where a key is not seen; positions of the
    queries, -1 where there is none, and of the keys."""
    row, key = tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    query, g = tile * (ROWS // BLOCK_G) + row // BLOCK_G, row % BLOCK_G
    live = (query < window.w) & (g < window.group)
    b, h = (head // window.heads).to(tl.int64), (head % window.heads).to(tl.int64)
    q_start = q.ptr + b * q.stride_b + (h * window.group + g) * q.stride_h
    q_start += query.to(tl.int64) * q.stride_t
    k_start = k.ptr + b * k.stride_b + h * k.stride_h + key.to(tl.int64) * k.stride_t
    x = tl.zeros([ROWS, KEYS], tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)[None, :]
        q_mask, k_mask = live[:, None] & (column < D), (key < window.s)[:, None] & (column < D)
        x_q = tl.load(q_start[:, None] + column * q.stride_d, mask=q_mask, other=0.0)
        x_k = tl.load(k_start[:, None] + column * k.stride_d, mask=k_mask, other=0.0)
        if x_q.dtype != x_k.dtype:
            x_q, x_k = x_q.to(tl.float32), x_k.to(tl.float32)
        x = dot(x_q, tl.trans(x_k), x)
    x *= scale
    if softcap is not None:
        x = tanh(x / softcap) * softcap
    now = tl.where(live, window.s - window.w + query, -1)
    visible = key[None, :] <= now[:, None]
    visible &= now[:, None] - key[None, :] < window.sliding
    return tl.where(visible, x, float("-inf")), now, key


@triton.jit
def _state(state_ptr, head, split, splits, tile, tiles, ROWS: tl.constexpr):
    """Where the states of the rows of a tile begin: [head, split, 3, tile, ROWS]."""
    start = (head.to(tl.int64) * splits + split) * 3 * tiles + tile
    return state_ptr + start * ROWS + tl.arange(0, ROWS)


@triton.jit
def _merge(at, stride, mask):
    """The states of all splits as one: peak, total, beyond."""
    peaks = tl.load(at, mask=mask, other=float("-inf"))
    peak = tl.max(peaks, 0)
    keep = tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
    total = tl.sum(tl.load(at + stride, mask=mask, other=0.0) * keep, 0)
    return peak, total, tl.sum(tl.load(at + 2 * stride, mask=mask, other=0.0) * keep, 0)


class Candidates(NamedTuple):
    """Tokens [n, heads, s], and what protects those of each row."""

    below: Any
    start: Any
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
    # Tiles are sorted by counting who comes before whom; a token's rank is the sum of its ranks in
    # the tiles, found by bisection.
    n, h, s = position_nhs.shape
    index_nhm = torch.empty(n, h, count, dtype=torch.int32, device=position_nhs.device)
    if index_nhm.numel() == 0:
        return index_nhm
    args = (
        paged(score_nhs), paged(tie_nhs), paged(position_nhs),
        Candidates(protect_below_n.contiguous(), protect_from_n.contiguous(), h, s),
    )  # fmt: skip
    words = 4 if 8 in (score_nhs.itemsize, tie_nhs.itemsize) else 2
    key = torch.empty(n * h, words, s, dtype=torch.int64, device=index_nhm.device)
    order = torch.empty(n * h, s, dtype=torch.int32, device=index_nhm.device)
    tile = min(TILE, max(STEP, triton.next_power_of_2(s)))
    grid = n * h, triton.cdiv(s, tile)
    options = dict(WORDS=words, TILE=tile, enable_fp_fusion=False)
    _sort_tile_kernel[grid](*args, key, order, **options, STEP=STEP, num_warps=8)
    _merge_tiles_kernel[grid](key, order, index_nhm, s, count, **options)
    return index_nhm


@triton.jit
def _sort_tile_kernel(
    score: Paged, tie: Paged, position: Paged, candidates: Candidates, key_ptr, order_ptr,
    WORDS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The keys of a tile of candidates in order, and where they were."""
    head, begin = tl.program_id(0), tl.program_id(1) * TILE
    end = tl.minimum(begin + TILE, candidates.s)
    i = begin + tl.arange(0, TILE)
    key = _key(score, tie, position, candidates, head, i[:, None], WORDS)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(begin, end, STEP):
        j = start + tl.arange(0, STEP)
        other = _key(score, tie, position, candidates, head, j[None, :], WORDS)
        before = _precede(other, key, j[None, :] < i[:, None]) & (j < end)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
    key = _key(score, tie, position, candidates, head, i, WORDS)
    for word in tl.static_range(WORDS):
        start = (head.to(tl.int64) * WORDS + word) * candidates.s + begin
        tl.store(key_ptr + start + rank, key[word], mask=i < end)
    tl.store(order_ptr + head.to(tl.int64) * candidates.s + begin + rank, i, mask=i < end)


@triton.jit
def _merge_tiles_kernel(
    key_ptr, order_ptr, index_ptr, s, count, WORDS: tl.constexpr, TILE: tl.constexpr
):
    """The ranks of a sorted tile among all, and who is among the first `count`."""
    head = tl.program_id(0).to(tl.int64)
    key_ptr += head * WORDS * s
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    key = _load_key(key_ptr, slot, s, slot < s, WORDS)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, s, TILE):
        # The last that comes before, plus one.
        at = tl.zeros([TILE], tl.int32) + start
        for halving in tl.static_range(log2(TILE) + 1):
            there = at + (TILE >> halving)
            mask = there <= tl.minimum(start + TILE, s)
            other = _load_key(key_ptr, there - 1, s, mask, WORDS)
            at = tl.where(mask & _precede(other, key, there <= slot), there, at)
        rank += at - start
    order = tl.load(order_ptr + head * s + slot, mask=slot < s)
    tl.store(index_ptr + head * count + rank, order, mask=(slot < s) & (rank < count))


@triton.jit
def _load_key(key_ptr, slot, s, mask, WORDS: tl.constexpr):
    a, b = tl.load(key_ptr + slot, mask=mask), tl.load(key_ptr + s + slot, mask=mask)
    if WORDS == 2:
        return a, b
    else:
        key_ptr += 2 * s
        return a, b, tl.load(key_ptr + slot, mask=mask), tl.load(key_ptr + s + slot, mask=mask)


@triton.jit
def _precede(a, b, equal):
    """a < b for keys of several words, the first of which counts most; `equal` if they are."""
    for i in tl.static_range(1, len(a) + 1):
        equal = (a[len(a) - i] < b[len(a) - i]) | ((a[len(a) - i] == b[len(a) - i]) & equal)
    return equal


@triton.jit
def _key(
    score: Paged, tie: Paged, position: Paged, candidates: Candidates, head, s, WORDS: tl.constexpr
):
    """What candidates are compared by, in int64: words, the first of which counts most."""
    n, h = (head // candidates.heads).to(tl.int64), head % candidates.heads
    mask = s < candidates.s
    at = _ordered(position, n, h, s, mask)
    empty = at == EMPTY
    protected = (at >= tl.load(candidates.start + n)) & ~empty
    protected |= at < tl.load(candidates.below + n)
    first = protected.to(tl.int64) - empty.to(tl.int64)
    second, third = _ordered(score, n, h, s, mask), _ordered(tie, n, h, s, mask)
    if WORDS == 2:
        return (first << 32) + second, (third << 32) + at
    else:
        return first, second, third, at


@triton.jit
def _ordered(x: Paged, n, h, s, mask):
    """Numbers as int64 in their order: zeros are equal, and NaN comes last."""
    x = tl.load(x.ptr + slot_start(x, n, h, s.to(tl.int64)), mask=mask, other=0)
    if x.dtype.is_floating():
        x = x.to(tl.float32)
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        x = tl.where(x == x, bits, 0x7FFFFFFF)
    return x.to(tl.int64)


class Moved(NamedTuple):
    """A page tensor, as integers, and room for what moves: [n, heads, width]."""

    x: Paged
    width: int
    staged: Any


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
    moved = []
    for x in (k, v, k_scale, v_scale, position, importance, history):
        if x is not None:
            x, width = x.view(INTEGERS[x.itemsize]), x.shape[3] if x.dim() == 4 else 1
            staged = torch.empty(n, heads, width, dtype=x.dtype, device=x.device)
            moved.append(Moved(paged(x), width, staged))
    blocks = tuple(triton.next_power_of_2(x.width) for x in moved)
    for staging in (True, False):
        _compact_kv_kernel[(triton.cdiv(n, MOVED), heads)](
            source_nh, *source_nh.stride(), target_nh, *target_nh.stride(), n, k.shape[2],
            k.shape[0] * k.shape[2], tuple(moved), BLOCKS=blocks, STAGING=staging, MOVED=MOVED,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _compact_kv_kernel(
    source_ptr, stride_sn, stride_sh, target_ptr, stride_tn, stride_th, n, page_size, slots, moved,
    BLOCKS: tl.constexpr, STAGING: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """MOVED tokens of a head, with all that belongs to them: staged, or put where they go."""
    i = tl.program_id(0).to(tl.int64) * MOVED + tl.arange(0, MOVED)
    head, heads = tl.program_id(1), tl.num_programs(1)
    source_ptr += i * stride_sn + head * stride_sh
    target_ptr += i * stride_tn + head * stride_th
    source = tl.load(source_ptr, mask=i < n, other=-1).to(tl.int64)
    target = tl.load(target_ptr, mask=i < n, other=-1).to(tl.int64)
    live = (source >= 0) & (source < slots) & (target >= 0) & (target < slots)
    slot = source if STAGING else target
    for tensor in tl.static_range(len(BLOCKS)):
        x, width, staged_ptr = moved[tensor]
        column = tl.arange(0, BLOCKS[tensor])[None, :]
        mask = live[:, None] & (column < width)
        page = x.ptr + slot_start(x, slot // page_size, head, slot % page_size)[:, None] + column
        staged = staged_ptr + ((i * heads + head) * width)[:, None] + column
        if STAGING:
            tl.store(staged, tl.load(page, mask=mask), mask=mask)
        else:
            tl.store(page, tl.load(staged, mask=mask), mask=mask)
