"""Attention over a forest of nodes.

A program takes a work item and a KV head: its query rows are (token, query head) pairs, so that
grouped heads share every load of keys. It divides them by their gains and rotates them where the
item's keys are. Partial results go to scratch, one per item and token, and a second kernel merges
each token's. A launch costs a host more than most kernels of a step run: there are these two, and
one that tracks importance, and what they are launched with is found once.
"""

from functools import cache
from math import e, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import (
    FLOAT,
    FP8,
    Frame,
    Paged,
    Rows,
    architecture,
    block_d,
    column_element,
    content,
    dot,
    exp2,
    fields,
    format_of,
    frame_start,
    framed,
    load_scale,
    load_scales,
    load_tile,
    load_words,
    paged,
    parts,
    rotate,
    rotate_back,
    side_by_side,
    slot_start,
    tanh,
    to_columns,
    word_columns,
    word_element,
    word_unit,
)

LOG2_E = tl.constexpr(log2(e))
SMALL_M = tl.constexpr(16)  # query rows of the least tile that tensor cores take

WORDS = (FP8, 8, 4, 2)  # formats that are read by 16 bits

PLANES = {FLOAT: 0, 3: 2, 6: 2}  # of codes, one for other formats

# Tile sizes found by `python -m bench.tune`, by architecture, kind of product and columns; empty
# unless its table is loaded.
TUNED: dict[str, dict[str, int]] = {}


class Sums(NamedTuple):
    """Log-sum-exps [tokens, heads] with any strides."""

    ptr: Any
    stride_t: int
    stride_h: int


class Work(NamedTuple):
    """Tensors of a plan: see Plan. `store` is None where there is one."""

    page_indptr: Any
    page: Any
    first: Any
    length: Any
    base: Any
    store: Any
    token: Any
    item: Any


class Mask(NamedTuple):
    """What a query sees: positions [t] of queries, and of what is kept elsewhere."""

    query: Any
    before: Any
    sliding: int | None


class Store(NamedTuple):
    """What constants a kernel needs of a store. `words`: codes are read by 16 bits; `paired`: the
    scales of a slot's key and value are one word of 32."""

    k_format: int
    v_format: int
    page_size: int
    recent: bool
    k_words: bool
    v_words: bool
    paired: bool


class Constants(NamedTuple):
    """What launches for some shapes and dtypes are given."""

    kind: str  # of TUNED
    sizes: dict[str, int]
    k_dtype: torch.dtype  # operands of products with keys of the first store
    attend: dict[str, Any]
    merge: dict[str, Any]
    track: dict[str, Any]


def tree_attention(
    q_thd: Tensor, position_t: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, position: Tensor | None, importance: Tensor | None,
    history: Tensor | None, more: list[Tensor], recent: int, page_indptr: Tensor, page: Tensor,
    first: Tensor, length: Tensor, base: Tensor, own: Tensor, store: Tensor, token_indptr: Tensor,
    token: Tensor, item: Tensor, part_indptr: Tensor, part: Tensor, before_t: Tensor | None,
    frame: Tensor | None, frame_t: Tensor | None, state_out: Tensor | None,
    state_lse: Tensor | None, sink_h: Tensor | None, scale: float, softcap: float, sliding: int,
    window: int, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    t, hq, d = q_thd.shape
    heads = k.shape[1]
    out_thd = torch.empty_like(q_thd)
    lse_th = q_thd.new_empty((t, hq), dtype=torch.float32)
    if q_thd.numel() == 0:
        return out_thd, lse_th
    tracks = importance is not None or history is not None
    contents = [(k, v, k_scale, v_scale, position)]
    for i in range(0, len(more), 5):
        contents.append(
            (*more[i : i + 2], *(x if x.numel() else None for x in more[i + 2 : i + 5]))
        )
    # All tokens together, or each node's where none has several. What is planned on the device is
    # not known here: this chooses among kernels that all are right.
    rows = hq // heads * (1 if token.shape[0] == first.shape[0] else t)
    of = _constants(
        q_thd.get_device(), q_thd.dtype, hq, heads, d, rows <= 16, tracks, group,
        recent, *map(_layout, contents),
    )  # fmt: skip
    sizes = of.sizes
    if of.kind in TUNED:
        sizes = TUNED[of.kind] | ({"BLOCK_M": 16} if sizes["BLOCK_M"] == 16 else {})

    q = Rows(q_thd, *q_thd.stride())
    several = len(contents) > 1
    work = Work(page_indptr, page, first, length, base, store if several else None, token, item)
    mask = Mask(position_t, before_t, sliding or None)
    softcap = softcap or None
    turns, frames = framed(frame, frame_t)
    stores = tuple(
        (*content(k, k_scale), paged(position), *content(v, v_scale))
        for k, v, k_scale, v_scale, position in contents
    )
    # Of each part: outputs, log-sum-exps and, where they are tracked, how many slots were visible.
    n_parts = part.shape[0]
    scratch = q_thd.new_empty(n_parts * (hq * (d + 1) + heads * tracks), dtype=torch.float32)
    items = item.shape[0]
    if items:
        _attend_kernel[(items * heads,)](
            q, mask, turns, frames, work, stores, scratch, n_parts, scale, softcap, heads,
            **of.attend, **sizes, enable_fp_fusion=True,
        )  # fmt: skip
    turned = mean_th = state = state_sum = None
    if tracks:
        turned = q_thd.new_empty((t, hq, block_d(d)), dtype=of.k_dtype)
        mean_th = torch.empty_like(lse_th)
    if state_out is not None:
        state = Rows(state_out, *state_out.stride())
        state_sum = Sums(state_lse, *state_lse.stride())
    _merge_parts_kernel[(t, heads)](
        scratch, n_parts, part_indptr, part, state, state_sum,
        None if sink_h is None else sink_h.contiguous(), Rows(out_thd, *out_thd.stride()), lse_th,
        q if tracks else None, turns, frames, turned, mean_th, **of.merge, enable_fp_fusion=True,
    )  # fmt: skip
    if tracks and items:
        k, k_scale, position, _, _ = stores[0]
        _track_kernel[(items, heads)](
            turned, mask, work, own, token_indptr, k, k_scale, position, paged(importance),
            paged(history), lse_th, mean_th, scale, softcap, window, **of.track,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out_thd, lse_th


def _layout(content: tuple) -> tuple:
    """What constants depend on in the tensors of a store: dtype, slots and last axis of keys, dtype
    and last axis of values, whether each lies by 16 bits, and the scales of both by 32."""
    k, v, k_scale, v_scale, _ = content
    even = (
        x.dtype.itemsize == 1 and not any(n % 2 for n in (x.data_ptr(), *x.stride()[:3]))
        for x in (k, v)
    )  # fmt: skip
    paired = (
        k_scale is not None and v_scale is not None and k_scale.stride() == v_scale.stride()
        and v_scale.data_ptr() == k_scale.data_ptr() + 2 and k_scale.data_ptr() % 4 == 0
        and not any(n % 2 for n in k_scale.stride())
    )  # fmt: skip
    return k.dtype, k.shape[2:], v.dtype, v.shape[3], *even, paired


@cache
def _constants(
    device: int, dtype: torch.dtype, hq: int, heads: int, d: int, few: bool, tracks: bool,
    group: str, recent: int, *contents: tuple,
) -> Constants:  # fmt: skip
    """`few` query rows for each KV head; `contents`: of each store its `_layout`. The device is
    the current one."""
    stores, k_dtypes, wide = [], [], False
    for i, (k_dtype, (page_size, k_width), v_dtype, v_width, *lie, paired) in enumerate(contents):
        k_format, v_format = format_of(k_dtype, k_width, d), format_of(v_dtype, v_width, d)
        words = (even and x in WORDS for even, x in zip(lie, (k_format, v_format), strict=True))
        stores.append(Store(k_format, v_format, page_size, bool(recent >> i & 1), *words, paired))
        k_dtypes.append(_dot_dtype(dtype, k_dtype, k_format))
        wide |= torch.float32 in (k_dtypes[i], _dot_dtype(dtype, v_dtype, v_format))
    planes = max(PLANES.get(x, 1) for store in stores for x in store[:2])
    floats = any(FLOAT in store[:2] for store in stores)
    kind = f"{architecture()} {'wide' if wide else ('plain', 'coded', 'planes')[planes]}"
    shape = dict(G=hq // heads, D=d, BLOCK_D=block_d(d))
    first = stores[0]
    return Constants(
        f"{kind} {block_d(d)}",
        _blocks(few, d, wide, planes, floats, tracks or len(stores) > 1), k_dtypes[0],
        shape | dict(STORES=tuple(map(tuple, stores)), TRACKS=tracks),
        shape | dict(
            ROTATED=any(store.v_format != FLOAT for store in stores),
            K_FORMAT=first.k_format if tracks else FLOAT,
            BLOCK_P=max(1, 8192 // (triton.next_power_of_2(hq // heads) * block_d(d))),
        ),
        shape | dict(
            K_FORMAT=first.k_format, PAGE_SIZE=first.page_size, RECENT=first.recent,
            ALL=group == "all", BLOCK_N=32,
        ),
    )  # fmt: skip


def _dot_dtype(q: torch.dtype, x: torch.dtype, format: int) -> torch.dtype:
    """Operands of the products. Codes are exact in fp16, or nearly, and so is what p becomes."""
    if format == FLOAT:
        return torch.promote_types(q, x)
    return torch.float32 if q == torch.float32 else torch.float16


def _blocks(few: bool, d: int, wide: bool, planes: int, floats: bool, more: bool) -> dict[str, int]:
    """Tile sizes for products in fp32 (`wide`) or 16 bits, with so many planes of codes, `floats`
    besides or alone; SMALL_N slots for few rows. By `python -m bench.model`, with no register
    short, of which tracking and several stores take `more`."""
    m, n, small, warps, stages = 64, 64, 128, 4, 4 if floats else 5
    if wide:
        m, n, small, warps, stages = 16, 16, 16, 4 if d <= 128 else 8, 3
    elif planes == 2:
        m, n, small, warps, stages = (64, 32, 32, 8, 3) if d <= 128 else (16, 16, 16, 4, 3)
    elif d > 128:
        m, n, small, warps, stages = (32, 32, 64, 4, 4) if planes else (64, 32, 64, 8, 4)
    if more:
        n = min(n, 32)
    if few:
        m, n = 16, small
    elif architecture() in ("sm_80", "sm_86", "sm_87", "sm_89"):  # accumulators are in registers
        m, n = min(m, 32), min(n, 32)
    if architecture().startswith("gfx"):
        # Warps are of 64 lanes that may have twice as many registers; shared memory is 64 KiB.
        least = 16 if d > 128 and planes else 32
        m, n, small, warps, stages = min(m, 2 * least), min(n, least), min(small, least), 4, 3
    return dict(BLOCK_M=m, BLOCK_N=n, SMALL_N=small, num_warps=warps, num_stages=stages)


@triton.constexpr_function
def count(STORES):
    return len(STORES)


@triton.constexpr_function
def constant(STORES, i, j):
    return STORES[i][j]


@triton.constexpr_function
def rotates(STORES):
    """Whether values of a store are rotated, and so partial results."""
    return any(store[1] != 0 for store in STORES)


@triton.constexpr_function
def operand(Q, X, FORMAT):
    """_dot_dtype."""
    if FORMAT != 0:
        return Q if Q in (tl.float16, tl.float32) else tl.float16
    return Q if Q == X else tl.float32


@triton.jit
def _find(pages_ptr, at, live, PAGE_SIZE: tl.constexpr):
    """Page, and offset in it, of slots counted from the first page's start."""
    page = tl.load(pages_ptr + at // PAGE_SIZE, mask=live, other=0)
    return page.to(tl.int64), (at % PAGE_SIZE).to(tl.int64)


@triton.constexpr_function
def unit(FORMAT, WORDS):
    return word_unit(FORMAT) if WORDS else 1.0


@triton.constexpr_function
def tiles(FORMAT, WORDS, D, BLOCK_M, LEAST):
    """In how many tiles slots are multiplied, of LEAST columns at least. Few rows take the operands
    of their products from registers, where decoded words lie apart; many take them from shared
    memory."""
    if not WORDS or BLOCK_M > 16:
        return 1
    return min(fields(FORMAT), max(1, fields(FORMAT) * word_columns(FORMAT, D) // LEAST))


@triton.constexpr_function
def width(FORMAT, WORDS, D, BLOCK_D):
    """Columns of all tiles together."""
    return fields(FORMAT) * word_columns(FORMAT, D) if WORDS else BLOCK_D


@triton.jit
def _elements(
    i, TILES: tl.constexpr, FORMAT: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Elements that are the columns of tile i."""
    if WORDS:
        N: tl.constexpr = width(FORMAT, WORDS, D, BLOCK_D) // TILES
        return word_element(i * N + tl.arange(0, N), FORMAT, D)
    else:
        return column_element(D, BLOCK_D, parts(FORMAT))


@triton.jit
def _load_tiles(
    x: Paged, page, head, offset, live, TILES: tl.constexpr, FORMAT: tl.constexpr,
    WORDS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Slots [N] of a head, as a tuple."""
    if WORDS:
        found = load_words(x, page, head, offset, live, FORMAT, D, DTYPE)
        N: tl.constexpr = fields(FORMAT) // TILES
        if N == 1:
            return found
        else:
            wider = ()
            for i in tl.static_range(TILES):
                wider = wider + (side_by_side(found[N * i : N * i + N], N),)
            return wider
    else:
        return (load_tile(x, page, head, offset, live, FORMAT, D, BLOCK_D, DTYPE),)


@triton.jit
def _query_tiles(
    x, TILES: tl.constexpr, FORMAT: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr
):
    """Of rows [M, BLOCK_D] in order what meets the tiles of keys."""
    found = ()
    if WORDS:
        for i in tl.static_range(TILES):
            element = _elements(i, TILES, FORMAT, WORDS, D, x.shape[1])
            index = tl.minimum(element, D - 1)[None, :]
            index = tl.broadcast_to(index, [x.shape[0], element.shape[0]])
            tile = tl.gather(x, index, 1)
            if element.shape[0] * TILES != D:  # padding of keys is no zero
                tile = tl.where((element < D)[None, :], tile, 0)
            found = found + (tile,)
    else:
        found = (to_columns(x, D, parts(FORMAT)),)
    return found


@triton.jit
def _load_queries(
    q: Rows, frame: Frame, frames, token, kv_head, heads, head, mask, FORMAT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows (token, head) over their gains, rotated as keys of FORMAT are."""
    column = tl.arange(0, BLOCK_D)
    start = token.to(tl.int64) * q.stride_t + head * q.stride_h
    mask = mask[:, None] & (column < D)[None, :]
    x = tl.load(q.ptr + start[:, None] + column[None, :] * q.stride_d, mask=mask, other=0)
    if frame is not None:
        at = frame_start(tl.load(frame.of + token), frames, 1, kv_head, heads, D)
        gain = tl.load(frame.ptr + at[:, None] + column[None, :], mask=mask, other=1.0)
        x = x.to(tl.float32) / gain.to(tl.float32)
    if FORMAT != 0:
        x = rotate(x.to(tl.float32), D)
    return x


@triton.jit
def _logits(q, k, k_scale, scale, softcap, N: tl.constexpr):
    """Scores [M, N] of queries and keys in as many tiles, as powers of 2 have them."""
    x = tl.zeros([q[0].shape[0], k[0].shape[0]], tl.float32)
    for i in tl.static_range(N):
        x = dot(q[i], tl.trans(k[i]), x)
    if softcap is None:
        scale *= LOG2_E
    if k_scale is not None:
        x *= (k_scale * scale)[None, :]
    else:
        x *= scale
    if softcap is not None:
        x = tanh(x / softcap) * (softcap * LOG2_E)
    return x


@triton.jit
def _range(mask: Mask, token, RECENT: tl.constexpr):
    """Positions of queries, and of the first and the last key that is theirs in these pages."""
    query = tl.load(mask.query + token)
    first, last = tl.full(token.shape, -(2**31), tl.int32), query
    if mask.before is not None:
        before = tl.load(mask.before + token)
        if RECENT:
            first = before
        else:
            last = tl.where(before <= query, tl.maximum(before, -(2**31) + 1) - 1, query)
    return query, first, last


@triton.jit
def _key(position: Paged, in_order, page, head, offset, live):
    """True positions of keys; after every query where not `live`."""
    key = in_order
    if position is not None:
        key = tl.load(position.ptr + slot_start(position, page, head, offset), mask=live, other=0)
    return tl.where(live, key, 2**31 - 1)


@triton.jit
def _attend_tile(
    row0, rows, head, node, token_begin, part, begin, end, q: Rows, mask: Mask, frame: Frame,
    frames, work: Work, k: Paged, k_scale: Paged, position: Paged, v: Paged, v_scale: Paged,
    out_ptr, lse_ptr, seen_ptr, scale, softcap, heads, STORES: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TRACKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows from `row0` on of a work item against all its slots."""
    K_FORMAT: tl.constexpr = constant(STORES, INDEX, 0)
    V_FORMAT: tl.constexpr = constant(STORES, INDEX, 1)
    PAGE_SIZE: tl.constexpr = constant(STORES, INDEX, 2)
    RECENT: tl.constexpr = constant(STORES, INDEX, 3)
    K_WORDS: tl.constexpr = constant(STORES, INDEX, 4)
    V_WORDS: tl.constexpr = constant(STORES, INDEX, 5)
    PAIRED: tl.constexpr = constant(STORES, INDEX, 6)
    K_TILES: tl.constexpr = tiles(K_FORMAT, K_WORDS, D, BLOCK_M, 16)
    # Four warps share the columns of values, 8 each.
    V_TILES: tl.constexpr = tiles(V_FORMAT, V_WORDS, D, BLOCK_M, 32)
    V_WIDTH: tl.constexpr = width(V_FORMAT, V_WORDS, D, BLOCK_D) // V_TILES
    K_DTYPE: tl.constexpr = operand(q.ptr.dtype.element_ty, k.ptr.dtype.element_ty, K_FORMAT)
    V_DTYPE: tl.constexpr = operand(q.ptr.dtype.element_ty, v.ptr.dtype.element_ty, V_FORMAT)
    row = row0 + tl.arange(0, BLOCK_M)
    real = row < rows
    token = tl.load(work.token + token_begin + row // G, mask=real, other=0)
    head_m = head * G + row % G
    x_q = _load_queries(q, frame, frames, token, head, heads, head_m, real, K_FORMAT, D, BLOCK_D)
    x_q = _query_tiles(x_q.to(K_DTYPE), K_TILES, K_FORMAT, K_WORDS, D)
    query, oldest, last = _range(mask, token, RECENT)
    base = tl.load(work.base + node)
    first = tl.load(work.first + node)
    pages_ptr = work.page + tl.load(work.page_indptr + node)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = ()
    for _ in tl.static_range(V_TILES):
        acc = acc + (tl.zeros([BLOCK_M, V_WIDTH], tl.float32),)
    seen = tl.zeros([BLOCK_M], tl.int32)
    unit_v = (
        2.0**-24
    )  # of acc: the greatest scale of values so far, so that fp16 can hold the others
    live = tl.full([BLOCK_N], True, tl.int1)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        # Behind the end the last slot is read again, and hidden below: loads need no predicates.
        page, offset = _find(pages_ptr, first + tl.minimum(slot, end - 1), live, PAGE_SIZE)
        x_k = _load_tiles(
            k, page, head, offset, live, K_TILES, K_FORMAT, K_WORDS, D, BLOCK_D, K_DTYPE
        )
        x_scale, p_scale = None, None
        if PAIRED:
            x_scale, p_scale = load_scales(k_scale, page, head, offset, live)
        else:
            if K_FORMAT != 0:
                x_scale = load_scale(k_scale, page, head, offset, live)
            if V_FORMAT != 0:
                p_scale = load_scale(v_scale, page, head, offset, live)
        x = _logits(x_q, x_k, x_scale, scale * unit(K_FORMAT, K_WORDS), softcap, K_TILES)
        key = _key(position, base + slot, page, head, offset, slot < end)[None, :]
        visible = key <= last[:, None]
        if mask.sliding is not None:
            visible &= query[:, None] - key < mask.sliding
        if RECENT and mask.before is not None:
            visible &= key >= oldest[:, None]
        x = tl.where(visible, x, float("-inf"))
        if TRACKS and INDEX == 0:
            seen += tl.sum(visible.to(tl.int32), 1)

        peak = tl.maximum(m_i, tl.max(x, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        p = exp2(x - safe[:, None])
        alpha = exp2(m_i - safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = peak
        if V_FORMAT != 0:
            greatest = tl.maximum(unit_v, tl.max(p_scale, 0))
            alpha *= unit_v * (1 / greatest)
            unit_v = greatest
            p *= (p_scale * (1 / greatest))[None, :]
        x_v = _load_tiles(
            v, page, head, offset, live, V_TILES, V_FORMAT, V_WORDS, D, BLOCK_D, V_DTYPE
        )
        new = ()
        for i in tl.static_range(V_TILES):
            new = new + (dot(p.to(V_DTYPE), x_v[i], acc[i] * alpha[:, None]),)
        acc = new

    total = tl.where(l_i == 0, 1.0, l_i)
    result = (part + row // G).to(tl.int64)
    at = result * heads * G + head_m
    for i in tl.static_range(V_TILES):
        x = acc[i]
        if V_FORMAT != 0:
            x *= unit_v * unit(V_FORMAT, V_WORDS)
        x = x / total[:, None]
        if rotates(STORES) and V_FORMAT == 0:
            x = rotate(x, D)
        element = _elements(i, V_TILES, V_FORMAT, V_WORDS, D, BLOCK_D)
        tl.store(
            out_ptr + at[:, None] * D + element[None, :], x,
            mask=real[:, None] & (element < D)[None, :],
        )  # fmt: skip
    lse = tl.where(l_i == 0, float("-inf"), m_i / LOG2_E + tl.log(total))
    tl.store(lse_ptr + at, lse, mask=real)
    if TRACKS:
        if INDEX > 0:
            seen -= 1  # nothing that is tracked
        at = result * heads + head
        tl.store(seen_ptr + at, seen.to(tl.float32), mask=real & (row % G == 0))


@triton.jit
def _attend_item(
    node, token_begin, part, begin, end, rows, head, heads, q: Rows, mask: Mask, frame: Frame,
    frames, work: Work, k: Paged, k_scale: Paged, position: Paged, v: Paged, v_scale: Paged,
    out_ptr, lse_ptr, seen_ptr, scale, softcap, STORES: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TRACKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SMALL_N: tl.constexpr,
):  # fmt: skip
    """All rows of a work item that lies in store INDEX."""
    # Flat tuples only: Triton 3.6 mistakes tuples in tuples inside loops.
    # Rollouts' own nodes have few rows: a tile of their size keeps the others' products away.
    if BLOCK_M > SMALL_M and rows <= SMALL_M:
        if rows > 0:
            _attend_tile(
                0, rows, head, node, token_begin, part, begin, end, q, mask, frame, frames, work, k,
                k_scale, position, v, v_scale, out_ptr, lse_ptr, seen_ptr, scale, softcap, heads,
                STORES, INDEX, G, D, BLOCK_D, TRACKS, SMALL_M, SMALL_N,
            )  # fmt: skip
    else:
        # What is the same for all its turns would take registers from the loop over slots.
        for row0 in tl.range(0, rows, BLOCK_M, disable_licm=True):
            _attend_tile(
                row0, rows, head, node, token_begin, part, begin, end, q, mask, frame, frames, work,
                k, k_scale, position, v, v_scale, out_ptr, lse_ptr, seen_ptr, scale, softcap, heads,
                STORES, INDEX, G, D, BLOCK_D, TRACKS, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["frames", "n_parts"])
def _attend_kernel(
    q: Rows, mask: Mask, frame: Frame, frames, work: Work, stores, scratch_ptr, n_parts, scale,
    softcap, heads, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STORES: tl.constexpr,
    TRACKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SMALL_N: tl.constexpr,
):  # fmt: skip
    """A work item and a KV head: output, lse and number of visible slots of each of its tokens."""
    # All heads of an item before the next: a plan has its longest items first.
    program = tl.program_id(0).to(tl.int64)
    item, head = work.item + program // heads * 6, program % heads
    node, token_begin, part = tl.load(item), tl.load(item + 1), tl.load(item + 5)
    rows = (tl.load(item + 2) - token_begin) * G
    begin, end = tl.load(item + 3), tl.minimum(tl.load(item + 4), tl.load(work.length + node))
    lse_ptr, seen_ptr = _behind(scratch_ptr, n_parts, heads, G, D)
    store = 0
    if count(STORES) > 1:
        store = tl.load(work.store + node)
    for i in tl.static_range(count(STORES)):
        if store == i:
            _attend_item(
                node, token_begin, part, begin, end, rows, head, heads, q, mask, frame, frames,
                work, stores[i][0], stores[i][1], stores[i][2], stores[i][3], stores[i][4],
                scratch_ptr, lse_ptr, seen_ptr, scale, softcap, STORES, i, G, D, BLOCK_D, TRACKS,
                BLOCK_M, BLOCK_N, SMALL_N,
            )  # fmt: skip


@triton.jit
def _behind(out_ptr, n_parts, heads, G: tl.constexpr, D: tl.constexpr):
    """Where log-sum-exps and numbers of visible slots begin, behind the outputs of the parts."""
    rows = n_parts.to(tl.int64) * heads * G
    lse_ptr = out_ptr + rows * D
    return lse_ptr, lse_ptr + rows


@triton.jit(do_not_specialize=["frames", "n_parts"])
def _merge_parts_kernel(
    part_out_ptr, n_parts, part_indptr, part_ptr, state: Rows, state_sum: Sums, sink_ptr, out: Rows,
    lse_ptr, q: Rows, frame: Frame, frames, turned_ptr, mean_ptr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROTATED: tl.constexpr, K_FORMAT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A token and a KV head: its partial results, what is kept elsewhere and the sink in one. For
    what is tracked, its queries as the keys are, and the mean of a slot of the first store."""
    token, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    part_lse_ptr, seen_ptr = _behind(part_out_ptr, n_parts, heads, G, D)
    BLOCK_G: tl.constexpr = triton.next_power_of_2(G)
    g, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head_g = head * G + g
    mask = (g < G)[:, None] & (column < D)[None, :]
    begin, end = tl.load(part_indptr + token), tl.load(part_indptr + token + 1)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    here = tl.zeros([BLOCK_G], tl.float32)  # mass of the first store, whose slots are counted
    seen = 0.0
    for start in range(begin, end, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        part = tl.load(part_ptr + index, mask=index < end, other=0).to(tl.int64)
        real = (index < end)[:, None] & (g < G)[None, :]
        at = part[:, None] * heads * G + head_g[None, :]
        lse = tl.load(part_lse_ptr + at, mask=real, other=float("-inf"))
        x = tl.load(
            part_out_ptr + at[:, :, None] * D + column[None, None, :],
            mask=(lse > float("-inf"))[:, :, None] & (column < D)[None, None, :], other=0,
        )  # fmt: skip
        greatest = tl.maximum(peak, tl.max(lse, 0))
        safe = tl.where(greatest == float("-inf"), 0.0, greatest)
        weight = tl.exp(lse - safe[None, :])
        old = tl.exp(peak - safe)
        acc = acc * old[:, None] + tl.sum(weight[:, :, None] * x, 0)
        mass = mass * old + tl.sum(weight, 0)
        if mean_ptr is not None:
            counts = tl.load(seen_ptr + part * heads + head, mask=index < end, other=-1)
            seen += tl.sum(tl.maximum(counts, 0.0), 0)
            here = here * old + tl.sum(tl.where((counts >= 0)[:, None], weight, 0.0), 0)
        peak = greatest

    total = tl.where(mass == 0, 1.0, mass)
    acc = acc / total[:, None]
    lse = tl.where(mass == 0, float("-inf"), peak + tl.log(total))
    if ROTATED:
        acc = rotate_back(acc, D)
    if state is not None:
        ptr = state_sum.ptr + token * state_sum.stride_t + head_g * state_sum.stride_h
        lse, weight, other = merge_weights(lse, tl.load(ptr, mask=g < G, other=float("-inf")))
        start = token * state.stride_t + head_g * state.stride_h
        ptr = state.ptr + start[:, None] + column[None, :] * state.stride_d
        x = tl.load(ptr, mask=mask & (other > 0)[:, None], other=0).to(tl.float32)
        acc = acc * weight[:, None] + x * other[:, None]
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head_g, mask=g < G, other=0).to(tl.float32)
        lse, weight, _ = merge_weights(lse, sink)
        acc = acc * weight[:, None]
    start = token * out.stride_t + head_g * out.stride_h
    tl.store(
        out.ptr + start[:, None] + column[None, :] * out.stride_d,
        acc.to(out.ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip
    at = token * heads * G + head_g
    tl.store(lse_ptr + at, lse, mask=g < G)
    if mean_ptr is not None:
        # What a slot of these pages gets on average: their share of the mass over their number.
        tl.store(mean_ptr + at, tl.exp(peak + tl.log(here) - lse) / seen, mask=g < G)
        token_g = tl.zeros([BLOCK_G], tl.int32) + tl.program_id(0)
        x_q = _load_queries(
            q, frame, frames, token_g, head, heads, head_g, g < G, K_FORMAT, D, BLOCK_D
        )
        x_q = to_columns(x_q.to(turned_ptr.dtype.element_ty), D, parts(K_FORMAT))
        ptr = turned_ptr + at[:, None] * BLOCK_D + column[None, :]
        tl.store(ptr, x_q, mask=(g < G)[:, None])


@triton.jit
def _track_kernel(
    turned_ptr, mask: Mask, work: Work, own_ptr, token_indptr, k: Paged, k_scale: Paged,
    position: Paged, importance: Paged, history: Paged, lse_ptr, mean_ptr, scale, softcap, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, K_FORMAT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, RECENT: tl.constexpr, ALL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """An item of a row's own node, and a KV head: what its slots got from all the node's tokens."""
    item = work.item + tl.program_id(0).to(tl.int64) * 6
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    node = tl.load(item)
    begin, end = tl.load(item + 3), tl.minimum(tl.load(item + 4), tl.load(work.length + node))
    token_begin = tl.load(token_indptr + node)
    token_end = tl.load(token_indptr + node + 1)
    # Items with the same slots and other tokens leave it to the first of them.
    if (tl.load(own_ptr + node) == 0) | (tl.load(item + 1) != token_begin):
        end = begin
    if work.store is not None:
        end = tl.where(tl.load(work.store + node) == 0, end, begin)
    BLOCK_G: tl.constexpr = max(16, triton.next_power_of_2(G))
    g, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    base = tl.load(work.base + node)
    first = tl.load(work.first + node)
    pages_ptr = work.page + tl.load(work.page_indptr + node)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        live = slot < end
        page, offset = _find(pages_ptr, first + slot, live, PAGE_SIZE)
        x_k = load_tile(
            k, page, head, offset, live, K_FORMAT, D, BLOCK_D, turned_ptr.dtype.element_ty
        )
        x_scale = None
        if K_FORMAT != 0:
            x_scale = load_scale(k_scale, page, head, offset, live)
        key = _key(position, base + slot, page, head, offset, live)[None, :]
        received = tl.zeros([BLOCK_N], tl.float32)
        for c in range(token_begin, token_end):
            token = tl.load(work.token + c)
            at = token * heads * G + head * G + g
            token_g = tl.zeros([BLOCK_G], tl.int32) + token
            ptr = turned_ptr + at.to(tl.int64)[:, None] * BLOCK_D + column[None, :]
            x_q = tl.load(ptr, mask=(g < G)[:, None], other=0)
            query, oldest, last = _range(mask, token_g, RECENT)
            past = key <= last[:, None]
            if RECENT and mask.before is not None:
                past &= key >= oldest[:, None]
            lse = tl.load(lse_ptr + at, mask=g < G, other=0)
            x = _logits((x_q,), (x_k,), x_scale, scale, softcap, 1)
            p = exp2(x - lse[:, None] * LOG2_E)
            visible = past & (g < G)[:, None]
            if mask.sliding is not None:
                visible &= query[:, None] - key < mask.sliding
            p = tl.where(visible, p, 0.0)
            if importance is not None:
                received += tl.sum(p, 0) / G
            if history is not None:
                mean = tl.load(mean_ptr + at, mask=g < G, other=0)
                if ALL:
                    low = tl.sum((~(p < mean[:, None]) & (g < G)[:, None]).to(tl.int32), 0) == 0
                else:
                    low = tl.sum(p, 0) / G < tl.sum(mean, 0) / G
                low &= tl.max(past.to(tl.int32), 0) > 0
                step = (tl.load(mask.query + token) % window + window) % window
                ptr = history.ptr + slot_start(history, page, head, offset) + step // 32
                bit = (1 << (step % 32)).to(tl.int32)
                old = tl.load(ptr, mask=live)
                tl.store(ptr, tl.where(low, old | bit, old & ~bit), mask=live)
                # The next token's load may have another layout than this store: other threads.
                tl.debug_barrier()
        if importance is not None:
            ptr = importance.ptr + slot_start(importance, page, head, offset)
            tl.store(ptr, tl.load(ptr, mask=live) + received, mask=live)


def merge_states(
    a_bhd: Tensor, a_lse_bh: Tensor, b_bhd: Tensor, b_lse_bh: Tensor
) -> tuple[Tensor, Tensor]:
    b, h, d = a_bhd.shape
    out_bhd = torch.empty_like(a_bhd)
    lse_bh = torch.empty_like(a_lse_bh, dtype=torch.float32)
    if b * h:
        _merge_states_kernel[(triton.cdiv(b * h, 16),)](
            Rows(a_bhd, *a_bhd.stride()), a_lse_bh, *a_lse_bh.stride(),
            Rows(b_bhd, *b_bhd.stride()), b_lse_bh, *b_lse_bh.stride(),
            Rows(out_bhd, *out_bhd.stride()), lse_bh, *lse_bh.stride(), b * h, h,
            D=d, BLOCK_D=block_d(d), BLOCK_B=16, enable_fp_fusion=True,
        )  # fmt: skip
    return out_bhd, lse_bh


@triton.jit(do_not_specialize=["rows"])
def _merge_states_kernel(
    a: Rows, a_lse_ptr, stride_alb, stride_alh, b: Rows, b_lse_ptr, stride_blb, stride_blh,
    out: Rows, lse_ptr, stride_lb, stride_lh, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """BLOCK_B rows of (b, h): both outputs weighted, and their lse."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < rows
    i, h = (row // heads).to(tl.int64), row % heads
    a_lse = tl.load(a_lse_ptr + i * stride_alb + h * stride_alh, mask=live, other=float("-inf"))
    b_lse = tl.load(b_lse_ptr + i * stride_blb + h * stride_blh, mask=live, other=float("-inf"))
    lse, a_weight, b_weight = merge_weights(a_lse, b_lse)
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (column < D)[None, :]
    a_at = (i * a.stride_t + h * a.stride_h)[:, None] + column[None, :] * a.stride_d
    b_at = (i * b.stride_t + h * b.stride_h)[:, None] + column[None, :] * b.stride_d
    # What an empty state holds must not show, be it NaN.
    x = tl.load(a.ptr + a_at, mask=mask & (a_weight > 0)[:, None], other=0).to(tl.float32)
    y = tl.load(b.ptr + b_at, mask=mask & (b_weight > 0)[:, None], other=0).to(tl.float32)
    result = a_weight[:, None] * x + b_weight[:, None] * y
    out_at = (i * out.stride_t + h * out.stride_h)[:, None] + column[None, :] * out.stride_d
    tl.store(out.ptr + out_at, result.to(out.ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + i * stride_lb + h * stride_lh, lse, mask=live)


@triton.jit
def merge_weights(a_lse, b_lse):
    """The lse of two states together, and the weight of each; 0 for what is empty."""
    peak = tl.maximum(a_lse, b_lse)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    a, b = tl.exp(a_lse - safe), tl.exp(b_lse - safe)
    total = a + b
    none = total == 0
    total = tl.where(none, 1.0, total)
    return tl.where(none, float("-inf"), safe + tl.log(total)), a / total, b / total
