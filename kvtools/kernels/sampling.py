"""Sampling in four launches.

`_scan_kernel` reads the logits, in chunks, and finds the greatest of each group. `_bound_kernel`
finds once for each row what its tokens must reach. `_collect_kernel` reads rows with filters once
more and leaves few candidates; of rows without it draws the noise, where the greatest of a group
lets it win, and reads only what does. `_finish_kernel` finds the floor of a row among its
candidates, and the winner. Whether a row has filters is decided on the device.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, BLOCK = 2048, 1024  # logits and candidates at once
PEAKS = tl.constexpr(16)  # groups of a chunk
SPAN = tl.constexpr(4)  # chunks of a program that collects
WARPS = 8

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
UNIT = tl.constexpr(2.0**-40)  # of mass, in best tokens
WORDS = tl.constexpr(32 * math.log(2))  # log of the number of words
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
    peak: Any  # the greatest z of each group, [b, n, PEAKS]
    score: Any  # of the winner of SPAN chunks, and its token: rows without filters
    winner: Any
    mass: Any  # rows with top-p alone


class Bounds(NamedTuple):
    """What all chunks of a row say together, [b]."""

    best: Any
    total: Any  # in fp64
    floor: Any  # no lower z is kept: rows with filters
    score: Any  # of the token with the greatest z, which the winner has, too: other rows
    token: Any


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
    chunk = min(CHUNK, max(4 * PEAKS.value, triton.next_power_of_2(v)))
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
    chunks = Chunks(n, empty(b, n), empty(b, n), empty(b, n, PEAKS.value), score, winner, mass)
    # One by one: a kernel is compiled anew for tensors that are aligned otherwise.
    total, greatest_score = (empty(b, dtype=torch.float64) for _ in range(2))
    greatest, size = (empty(b, dtype=torch.int32) for _ in range(2))
    bounds = Bounds(empty(b), total, empty(b), greatest_score, greatest)
    candidates = Candidates(size, empty(b, v), empty(b, v, dtype=torch.int32))
    # Products must not be fused with sums: the mass is specified bit by bit.
    options = dict(num_warps=WARPS, enable_fp_fusion=False)
    blocks = dict(BLOCK=min(chunk, BLOCK), BLOCK_N=max(64, triton.next_power_of_2(n)))
    spans = triton.cdiv(n, SPAN.value)
    _scan_kernel[(b, n)](rows, chunks, CHUNK=chunk, **options)
    _bound_kernel[(b,)](rows, chunks, bounds, size, CHUNK=chunk, **blocks, **options)
    _collect_kernel[(b, spans)](rows, chunks, bounds, candidates, CHUNK=chunk, **options)
    _finish_kernel[(b,)](rows, chunks, bounds, candidates, *out, **blocks, **options)
    return out


@triton.jit
def _scan_kernel(rows: Rows, chunks: Chunks, CHUNK: tl.constexpr):
    """The greatest z of a chunk and of its groups, and a sum, which is NaN if any z is."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = at * CHUNK + tl.arange(0, CHUNK)
    x = _load_logit(rows, row, token, token < rows.v)
    temperature = _temperature(rows, row)
    # Division keeps their order, so that only the greatest are divided;
    peak = tl.max(tl.reshape(x, [PEAKS, CHUNK // PEAKS]), 1)
    base = tl.max(peak, 0)
    best = tl.div_rn(base, temperature)
    per_logit = LOG2E / temperature
    # but for quotients whose rounding shows, divisors that have no inverse, and logits whose
    # differences fp32 does not hold.
    if (tl.abs(best) > 512) | (temperature < 2.0**-100) | (temperature > 2.0**100):
        x = tl.div_rn(x, temperature)
        base = tl.where(best == float("-inf"), 0.0, best)
        per_logit = LOG2E + 0 * temperature
    chunk = row * chunks.n + at
    tl.store(chunks.best + chunk, best)
    tl.store(chunks.total + chunk, tl.sum(tl.exp2((x - base) * per_logit), 0))
    peak = tl.div_rn(peak, temperature)
    tl.store(chunks.peak + chunk * PEAKS + tl.arange(0, PEAKS), peak)


@triton.jit
def _bound_kernel(
    rows: Rows, chunks: Chunks, bounds: Bounds, size_ptr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the tokens of a row must reach; and no candidates so far."""
    row = tl.program_id(0).to(tl.int64)
    bests = _load_facts(chunks.best, chunks, row, float("-inf"), BLOCK_N)
    totals = _load_facts(chunks.total, chunks, row, 0.0, BLOCK_N).to(tl.float64)
    best = tl.max(bests, 0)
    total = tl.sum(totals * tl.exp((bests - best).to(tl.float64)), 0)
    best = tl.where(total == total, best, float("inf"))  # a NaN spoils a row just the same
    tl.store(bounds.best + row, best)
    tl.store(bounds.total + row, total)
    tl.store(size_ptr + row, 0)
    if tl.abs(best) < float("inf"):
        filtered, top_k, top_p = _filters(rows, row)
        if filtered:
            floor = _min_p_floor(rows, row, best)
            if top_k < rows.v:
                # The k-th greatest peak is no greater than the k-th greatest logit.
                peak = chunks.peak + row * chunks.n * PEAKS
                floor = _floor(peak, chunks.n * PEAKS, best, top_k, False, BLOCK)
            elif top_p < 1:
                # Who has less than an equal share of what may be left out is left out, and who has
                # a mass of 0. Rounding adds half a unit at most; the factor is for what is inexact
                # here.
                share = 0.999 * (1 - top_p) * total / rows.v - 0.5 * UNIT
                floor = (best + tl.log(tl.maximum(share, 0.25 * UNIT))).to(tl.float32)
            tl.store(bounds.floor + row, tl.maximum(floor, LOWEST))
        else:
            first = tl.min(tl.where(bests == best, tl.arange(0, BLOCK_N), BLOCK_N), 0)
            z, token = _load_chunk(rows, row, first, CHUNK)
            token = tl.min(tl.where(z == best, token, rows.v), 0)
            tl.store(bounds.token + row, token)
            tl.store(bounds.score + row, _score(best, _word(rows, row, token)))


@triton.jit
def _collect_kernel(
    rows: Rows, chunks: Chunks, bounds: Bounds, candidates: Candidates, CHUNK: tl.constexpr
):
    """Of SPAN chunks of a row the candidates, or the winner."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, chunks.n)
    best = tl.load(bounds.best + row)
    if tl.abs(best) < float("inf"):
        filtered, top_k, top_p = _filters(rows, row)
        if filtered:
            floor = tl.load(bounds.floor + row)
            by_mass = (top_k >= rows.v) & (top_p < 1)
            for at in range(first, last):
                chunk = row * chunks.n + at
                if by_mass | (tl.load(chunks.best + chunk) >= floor):
                    z, token = _load_chunk(rows, row, at, CHUNK)
                    if by_mass:
                        tl.store(chunks.mass + chunk, tl.sum(_mass(z, best), 0))
                    kept = z >= floor
                    count = tl.cumsum(kept.to(tl.int32), 0)
                    start = tl.atomic_add(candidates.size + row, tl.max(count, 0), sem="relaxed")
                    slot = row * rows.v + start + count - 1
                    tl.store(candidates.z + slot, z, mask=kept)
                    tl.store(candidates.token + slot, token, mask=kept)
        elif tl.load(rows.temperature + row) != 0:
            score, winner = tl.load(bounds.score + row), tl.load(bounds.token + row)
            # By a word of more than 2^32 e^(z - score) nobody wins: -log(-log(1 - u)) <= -log(u).
            block = tl.arange(0, SPAN * CHUNK // 4)  # each of four tokens
            group = first * PEAKS + block // (CHUNK // 4 // PEAKS)
            there = group < chunks.n * PEAKS
            peak = chunks.peak + row * chunks.n * PEAKS + group
            peak = tl.load(peak, mask=there, other=float("-inf"))
            lead = (best - score + _slack(best)).to(tl.float32) + WORDS
            most = tl.exp(peak - best + lead)
            if tl.max(most, 0) >= 0.5:
                w0, w1, w2, w3 = _philox(rows, row, first * (CHUNK // 4) + block)
                least = tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3))
                if tl.max((least.to(tl.float32) <= most).to(tl.int32), 0) == 1:
                    for at in range(first, last):
                        z, token = _load_chunk(rows, row, at, CHUNK)
                        own = at * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
                        x0, x1, x2, x3 = _philox(rows, row, own)
                        word = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [CHUNK])
                        score, winner = _draw(z, token, word, best, score, winner)
            at = row * chunks.n + tl.program_id(1)
            tl.store(chunks.score + at, score)
            tl.store(chunks.winner + at, winner)


@triton.jit
def _finish_kernel(
    rows: Rows, chunks: Chunks, bounds: Bounds, candidates: Candidates, token_ptr, logprob_ptr,
    filtered_logprob_ptr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The token of a row and its log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    best, total = tl.load(bounds.best + row), tl.load(bounds.total + row)
    greedy = tl.load(rows.temperature + row) == 0
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
        elif greedy:
            token = tl.load(bounds.token + row)
        else:
            at = tl.arange(0, BLOCK_N)
            there = at < tl.cdiv(chunks.n, SPAN)
            at += row * chunks.n
            score = tl.load(chunks.score + at, mask=there, other=float("-inf"))
            winner = tl.load(chunks.winner + at, mask=there, other=rows.v)
            token = tl.min(tl.where(score == tl.max(score, 0), winner, rows.v), 0)
        behind = (_load_z(rows, row, token, True) - best).to(tl.float64)
        logprob = (behind - tl.log(total)).to(tl.float32)
        filtered_logprob = tl.where(greedy, 0.0, (behind - tl.log(kept)).to(tl.float32))
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)
    tl.store(filtered_logprob_ptr + row, filtered_logprob)


@triton.jit
def _load_logit(rows: Rows, row, token, mask):
    start = row * rows.stride_b + token.to(tl.int64) * rows.stride_v
    return tl.load(rows.logits + start, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _temperature(rows: Rows, row):
    temperature = tl.load(rows.temperature + row)
    return tl.where(temperature == 0, 1.0, temperature)


@triton.jit
def _load_z(rows: Rows, row, token, mask):
    """logits / temperature."""
    return tl.div_rn(_load_logit(rows, row, token, mask), _temperature(rows, row))


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
def _word(rows: Rows, row, token):
    w0, w1, w2, w3 = _philox(rows, row, token // 4)
    even, odd = tl.where(token % 4 == 0, w0, w2), tl.where(token % 4 == 1, w1, w3)
    return tl.where(token % 2 == 0, even, odd)


@triton.jit
def _score(z, word):
    # 1 - u is exact, so its logarithm is as good as log1p(-u).
    return z.to(tl.float64) - tl.log(-tl.log(1 - (word.to(tl.float64) + 0.5) * 2.0**-32))


@triton.jit
def _slack(best):
    """For bounds on scores in fp32; and sums in fp64 are rounded, as shows if logits are huge."""
    return 2.0**-10 + 2.0**-51 * tl.abs(best)


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
        score, winner = _draw(z, token, _word(rows, row, token), best, score, winner)
    return winner


@triton.jit
def _draw(z, token, word, best, score, winner):
    """The greatest z + noise of a tile and its token, unless `score` is greater; the lowest token
    on ties."""
    # e^(score - best) = e^(z - best) / -log(1 - u), and -log(1 - u) >= 2u / (2 - u). This bound is
    # right to 2^-18 in fp32 wherever it can win, so with some slack it tells for whom fp64 has to
    # decide.
    u = (word.to(tl.float32) + 0.5) * 2.0**-32
    bound = tl.exp(z - best) * (1 / u - 0.5)
    slack = _slack(best)
    peak = tl.max(bound, 0)
    while peak > tl.exp((score - best).to(tl.float32) - slack):
        here_token = tl.min(tl.where(bound == peak, token, 2**31 - 1), 0)
        here = token == here_token
        here_z, here_word = tl.sum(tl.where(here, z, 0.0), 0), tl.sum(tl.where(here, word, 0), 0)
        here_score = _score(here_z, here_word)
        better = (here_score > score) | ((here_score == score) & (here_token < winner))
        score, winner = tl.where(better, here_score, score), tl.where(better, here_token, winner)
        bound = tl.where(here, 0.0, bound)
        peak = tl.max(bound, 0)
    return score, winner
