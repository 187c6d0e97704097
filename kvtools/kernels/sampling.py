"""Sampling in three launches.

`_scan_kernel` reads the logits, in chunks; rows without filters need no more. `_collect_kernel`
reads rows with filters once more and leaves few candidates, by a bound on what can be kept.
`_finish_kernel` finds the floor of a row among its candidates, and the winner. Whether a row has
filters is decided on the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, BLOCK = 2048, 1024  # logits and candidates at once
PEAKS = tl.constexpr(16)  # groups of a chunk
SPAN = tl.constexpr(4)  # chunks that share a search for the bound
WARPS = 8

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
UNIT = tl.constexpr(2.0**-40)  # of mass, in best tokens
LOG2E = tl.constexpr(float.fromhex("0x1.715476p0"))
EXP2 = "0x1.41fbbcp-13 0x1.5f3e54p-10 0x1.3b2d4cp-7 0x1.c6aee8p-5 0x1.ebfbdcp-3 0x1.62e430p-1 0x1p0"
EXP2_COEFFICIENTS = tl.constexpr([float.fromhex(x) for x in EXP2.split()])


class Rows(NamedTuple):
    """Logits [b, v], and how each row is sampled, [b]."""

    logits: Any
    stride_b: int
    stride_v: int
    v: int
    seed: Any
    position: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


class Chunks(NamedTuple):
    """Facts about the chunks of each row, [b, n]."""

    n: int
    best: Any  # the greatest z
    total: Any  # sum of e^(z - best)
    score: Any  # of the winner, and its token: rows without filters
    winner: Any
    peak: Any  # the greatest z of each group, [b, n, PEAKS]: rows with filters
    mass: Any  # rows with top-p alone


class Candidates(NamedTuple):
    """What passes the filters of each row and some more, in any order."""

    size: Any  # [b]
    z: Any  # [b, v]
    token: Any


def sample(
    logits_bv: Tensor,
    seed_b: Tensor,
    position_b: Tensor,
    temperature_b: Tensor,
    top_k_b: Tensor,
    top_p_b: Tensor,
    min_p_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    b, v = logits_bv.shape
    chunk = min(CHUNK, max(16, triton.next_power_of_2(v)))
    n = triton.cdiv(v, chunk)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_bv.device)

    out = empty(b, dtype=torch.int64), empty(b), empty(b)
    if b == 0:
        return out
    per_row = seed_b, position_b, temperature_b, top_k_b, top_p_b, min_p_b
    rows = Rows(logits_bv, *logits_bv.stride(), v, *(x.contiguous() for x in per_row))
    score, mass = (empty(b, n, dtype=dtype) for dtype in (torch.float64, torch.int64))
    winner = empty(b, n, dtype=torch.int32)
    chunks = Chunks(n, empty(b, n), empty(b, n), score, winner, empty(b, n, PEAKS.value), mass)
    size, token = empty(b, dtype=torch.int32), empty(b, v, dtype=torch.int32)
    args = rows, chunks, Candidates(size, empty(b, v), token)
    # Products must not be fused with sums: the mass is specified bit by bit.
    options = dict(num_warps=WARPS, enable_fp_fusion=False)
    blocks = dict(BLOCK=min(chunk, BLOCK), BLOCK_N=max(64, triton.next_power_of_2(n)))
    _scan_kernel[(b, n)](*args, CHUNK=chunk, **options)
    _collect_kernel[(b, triton.cdiv(n, SPAN.value))](*args, CHUNK=chunk, **blocks, **options)
    _finish_kernel[(b,)](*args, *out, **blocks, **options)
    return out


@triton.jit
def _scan_kernel(rows: Rows, chunks: Chunks, candidates: Candidates, CHUNK: tl.constexpr):
    """The facts about a chunk, but for its mass."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z, token = _load_chunk(rows, row, at, CHUNK)
    best = tl.max(z, 0)
    chunk = row * chunks.n + at
    tl.store(chunks.best + chunk, best)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(chunks.total + chunk, tl.sum(tl.exp(z - base), 0))
    filtered, _, _ = _filters(rows, row)
    if filtered:
        peak = tl.max(tl.reshape(z, [PEAKS, CHUNK // PEAKS]), 1)
        tl.store(chunks.peak + chunk * PEAKS + tl.arange(0, PEAKS), peak)
        if at == 0:
            tl.store(candidates.size + row, 0)
    else:
        if tl.load(rows.temperature + row) == 0:
            score = best.to(tl.float64)
            winner = tl.min(tl.where(z == best, token, rows.v), 0)
        else:
            w0, w1, w2, w3 = _philox(rows, row, at * (CHUNK // 4) + tl.arange(0, CHUNK // 4))
            word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [CHUNK])
            score = tl.full([], float("-inf"), tl.float64)
            winner = tl.full([], rows.v, tl.int32)  # not the number itself, which may be constant
            score, winner = _draw(z, token, word, base, score, winner)
        tl.store(chunks.score + chunk, score)
        tl.store(chunks.winner + chunk, winner)


@triton.jit
def _collect_kernel(
    rows: Rows, chunks: Chunks, candidates: Candidates,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The candidates in SPAN chunks of a row with filters."""
    row = tl.program_id(0).to(tl.int64)
    best, total = _best_and_total(chunks, row, BLOCK_N)
    filtered, top_k, top_p = _filters(rows, row)
    if filtered & (tl.abs(best) < float("inf")):
        bound = _min_p_floor(rows, row, best)
        if top_k < rows.v:
            # The k-th greatest peak is no greater than the k-th greatest logit.
            peak = chunks.peak + row * chunks.n * PEAKS
            bound = _floor(peak, chunks.n * PEAKS, best, top_k, False, BLOCK)
        elif top_p < 1:
            # Who has less than an equal share of what may be left out is left out, and who has a
            # mass of 0. Rounding adds half a unit at most; the factor is for what is inexact here.
            share = 0.999 * (1 - top_p) * total / rows.v - 0.5 * UNIT
            bound = (best + tl.log(tl.maximum(share, 0.25 * UNIT))).to(tl.float32)
        bound = tl.maximum(bound, LOWEST)
        first = tl.program_id(1) * SPAN
        for at in range(first, tl.minimum(first + SPAN, chunks.n)):
            z, token = _load_chunk(rows, row, at, CHUNK)
            if (top_k >= rows.v) & (top_p < 1):
                tl.store(chunks.mass + row * chunks.n + at, tl.sum(_mass(z, best), 0))
            kept = z >= bound
            count = tl.cumsum(kept.to(tl.int32), 0)
            start = tl.atomic_add(candidates.size + row, tl.max(count, 0), sem="relaxed")
            slot = row * rows.v + start + count - 1
            tl.store(candidates.z + slot, z, mask=kept)
            tl.store(candidates.token + slot, token, mask=kept)


@triton.jit
def _finish_kernel(
    rows: Rows, chunks: Chunks, candidates: Candidates, token_ptr, logprob_ptr,
    filtered_logprob_ptr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The token of a row and its log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    best, total = _best_and_total(chunks, row, BLOCK_N)
    token = -1
    logprob, filtered_logprob = float("nan"), float("nan")
    if tl.abs(best) < float("inf"):
        kept = total
        filtered, top_k, top_p = _filters(rows, row)
        if filtered:
            n, z_ptr = tl.load(candidates.size + row), candidates.z + row * rows.v
            floor = _min_p_floor(rows, row, best)
            if top_k < rows.v:
                kth = _floor(z_ptr, n, best, top_k, False, BLOCK)
                mass = _mass_from(kth, z_ptr, n, best, BLOCK)
                floor = tl.maximum(floor, kth)
            else:
                mass = tl.sum(_load_facts(chunks.mass, chunks, row, 0, BLOCK_N), 0)
            if top_p < 1:
                wanted = top_p * mass.to(tl.float64)
                floor = tl.maximum(floor, _floor(z_ptr, n, best, wanted, True, BLOCK))
            kept = _mass_from(floor, z_ptr, n, best, BLOCK).to(tl.float64) * UNIT
            token = _draw_candidate(rows, candidates, n, row, best, floor, BLOCK)
        else:
            score = _load_facts(chunks.score, chunks, row, float("-inf"), BLOCK_N)
            winner = _load_facts(chunks.winner, chunks, row, rows.v, BLOCK_N)
            token = tl.min(tl.where(score == tl.max(score, 0), winner, rows.v), 0)
        behind = (_load_z(rows, row, token, True) - best).to(tl.float64)
        logprob = (behind - tl.log(total)).to(tl.float32)
        greedy = tl.load(rows.temperature + row) == 0
        filtered_logprob = tl.where(greedy, 0.0, (behind - tl.log(kept)).to(tl.float32))
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)
    tl.store(filtered_logprob_ptr + row, filtered_logprob)


@triton.jit
def _load_z(rows: Rows, row, token, mask):
    """logits / temperature; infinity for a NaN, which spoils a row just the same."""
    start = row * rows.stride_b + token.to(tl.int64) * rows.stride_v
    x = tl.load(rows.logits + start, mask=mask, other=float("-inf")).to(tl.float32)
    temperature = tl.load(rows.temperature + row)
    z = tl.div_rn(x, tl.where(temperature == 0, 1.0, temperature))
    return tl.where(z == z, z, float("inf"))


@triton.jit
def _load_chunk(rows: Rows, row, at, CHUNK: tl.constexpr):
    token = at * CHUNK + tl.arange(0, CHUNK)
    return _load_z(rows, row, token, token < rows.v), token


@triton.jit
def _load_facts(ptr, chunks: Chunks, row, other, BLOCK_N: tl.constexpr):
    """A fact about all chunks of a row."""
    at = tl.arange(0, BLOCK_N)
    return tl.load(ptr + row * chunks.n + at, mask=at < chunks.n, other=other)


@triton.jit
def _best_and_total(chunks: Chunks, row, BLOCK_N: tl.constexpr):
    """The greatest z of a row, and the sum of e^(z - best) in fp64."""
    bests = _load_facts(chunks.best, chunks, row, float("-inf"), BLOCK_N)
    totals = _load_facts(chunks.total, chunks, row, 0.0, BLOCK_N).to(tl.float64)
    best = tl.max(bests, 0)
    return best, tl.sum(totals * tl.exp((bests - best).to(tl.float64)), 0)


@triton.jit
def _filters(rows: Rows, row):
    """Whether the row has any; top-k, v where it is off, and top-p, 1 where it is off, in fp64."""
    top_k, top_p = tl.load(rows.top_k + row), tl.load(rows.top_p + row)
    top_k = tl.where((top_k > 0) & (top_k < rows.v), top_k, rows.v)
    some = (top_k < rows.v) | (top_p < 1) | (tl.load(rows.min_p + row) > 0)
    some &= tl.load(rows.temperature + row) != 0
    return some, top_k.to(tl.float64), top_p.to(tl.float64)


@triton.jit
def _min_p_floor(rows: Rows, row, best):
    min_p = tl.load(rows.min_p + row).to(tl.float64)
    floor = best + tl.log(tl.maximum(min_p, 1e-300))
    return tl.where(min_p > 0, tl.maximum(floor.to(tl.float32), LOWEST), LOWEST)


@triton.jit
def _floor(z_ptr, n, best, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The least of n values whose strictly greater ones are less than `wanted`, by mass or by
    number; LOWEST if all together are less. None is above `best`."""
    least, most = tl.full([], LOWEST, tl.float32), best
    while least < most:
        pivot = least / 2 + most / 2
        pivot = tl.where((least <= pivot) & (pivot < most), pivot, least)
        weight = tl.zeros([BLOCK], tl.int64)
        below, above = tl.full([BLOCK], least, tl.float32), tl.full([BLOCK], most, tl.float32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + i, mask=i < n, other=float("-inf"))
            greater = z > pivot
            weight += tl.where(greater, _mass(z, best) if BY_MASS else 1, 0)
            below = tl.maximum(below, tl.where(greater, least, z))
            above = tl.minimum(above, tl.where(greater, z, most))
        if tl.sum(weight, 0).to(tl.float64) < wanted:
            most = tl.max(below, 0)
        else:
            least = tl.min(above, 0)
    return most


@triton.jit
def _mass_from(floor, z_ptr, n, best, BLOCK: tl.constexpr):
    """The mass of those of n values that reach `floor`."""
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + i, mask=i < n, other=float("-inf"))
        mass += tl.where(z >= floor, _mass(z, best), 0)
    return tl.sum(mass, 0)


@triton.jit
def _mass(z, best):
    """2^40 e^(z - best) as an integer; each step rounds as that of the reference."""
    x = tl.minimum((best - z) * LOG2E, 64.0)
    whole = (x + 1.5 * 2**23) - 1.5 * 2**23
    r = whole - x
    y = tl.zeros_like(r)
    for i in tl.static_range(7):
        y = y * r + EXP2_COEFFICIENTS[i]
    y *= ((40 + 127 - whole.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return tl.where(y < 2**23, (y + 2**23) - 2**23, y).to(tl.int64)


@triton.jit
def _philox(rows: Rows, row, block):
    """The words of four tokens for each block."""
    zero = tl.zeros_like(block).to(tl.uint32)
    position = zero + tl.load(rows.position + row).to(tl.uint32)
    return tl.philox(tl.load(rows.seed + row), block.to(tl.uint32), position, zero, zero)


@triton.jit
def _draw_candidate(rows: Rows, candidates: Candidates, n, row, best, floor, BLOCK: tl.constexpr):
    """The winner among those of n candidates that reach `floor`."""
    score = tl.full([], float("-inf"), tl.float64)
    winner = tl.full([], rows.v, tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        slot = row * rows.v + i
        z = tl.load(candidates.z + slot, mask=i < n, other=float("-inf"))
        z = tl.where(z >= floor, z, float("-inf"))
        token = tl.load(candidates.token + slot, mask=i < n, other=rows.v)
        w0, w1, w2, w3 = _philox(rows, row, token // 4)
        even, odd = tl.where(token % 4 == 0, w0, w2), tl.where(token % 4 == 1, w1, w3)
        word = tl.where(token % 2 == 0, even, odd)
        score, winner = _draw(z, token, word, best, score, winner)
    return winner


@triton.jit
def _draw(z, token, word, best, score, winner):
    """The greatest z + noise of a tile and its token, unless `score` is greater; the lowest token
    on ties."""
    # e^(score - best) = e^(z - best) / -log(1 - u), and -log(1 - u) >= 2u / (2 - u). This bound is
    # right to 2^-18 in fp32 wherever it can win, so with some slack it tells for whom fp64 has to
    # decide. Sums in fp64 are rounded, too, which shows if logits are huge.
    u = (word.to(tl.float32) + 0.5) * 2.0**-32
    bound = tl.exp(z - best) * (1 / u - 0.5)
    slack = 2.0**-10 + 2.0**-51 * tl.abs(best)
    peak = tl.max(bound, 0)
    while peak > tl.exp((score - best).to(tl.float32) - slack):
        here_token = tl.min(tl.where(bound == peak, token, 2**31 - 1), 0)
        here = token == here_token
        here_z = tl.sum(tl.where(here, z, 0.0), 0).to(tl.float64)
        here_word = tl.sum(tl.where(here, word, 0), 0).to(tl.float64)
        # 1 - u is exact, so its logarithm is as good as log1p(-u).
        here_score = here_z - tl.log(-tl.log(1 - (here_word + 0.5) * 2.0**-32))
        better = (here_score > score) | ((here_score == score) & (here_token < winner))
        score, winner = tl.where(better, here_score, score), tl.where(better, here_token, winner)
        bound = tl.where(here, 0.0, bound)
        peak = tl.max(bound, 0)
    return score, winner
