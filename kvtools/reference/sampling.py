"""Truth for sampling: counter-based noise, filters as one floor per row, Gumbel-max."""

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW_WORD = 0xFFFFFFFF

# Mass is summed as integers, in units of 2^-40 of the best token's. Integer sums have no order, so
# neither the batch, nor the threads, nor a shortcut can move a token across the top-p boundary.
# Nor can another implementation: 2^x is this polynomial, every product and sum rounded to fp32.
MASS_BITS = 40
LOG2E = float.fromhex("0x1.715476p0")
EXP2 = "0x1.41fbbcp-13 0x1.5f3e54p-10 0x1.3b2d4cp-7 0x1.c6aee8p-5 0x1.ebfbdcp-3 0x1.62e430p-1 0x1p0"
EXP2_COEFFICIENTS = [float.fromhex(x) for x in EXP2.split()]

# For top-p without top-k this many logits are sorted first, and so many times more while a row's
# nucleus is larger.
NUCLEUS_GUESS, NUCLEUS_GROWTH = 256, 8

# Philox counters computed at once on a CPU, so that the temporaries stay in cache.
CACHED_BLOCKS = 2**16


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter and key, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product is below 2^64 and int64 wraps, so no bit of it is lost; words are cut to 32 bits
        # only where they are multiplied again. Broadcasting keeps the first two rounds small.
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ (c1 ^ k0)) & LOW_WORD
        c2 = ((product_0 >> 32) ^ (c3 ^ k1)) & LOW_WORD
        c1, c3 = product_1, product_0
        k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
    return c0, c1 & LOW_WORD, c2, c3 & LOW_WORD


def gumbel_noise(seed_b: Tensor, position_b: Tensor, token_bk: Tensor) -> Tensor:
    """Standard Gumbel noise of given tokens, a pure function of (seed, position, token)."""
    words_bk4 = _words(seed_b, position_b, token_bk // 4)
    return _gumbel(words_bk4.gather(-1, (token_bk % 4).unsqueeze(-1)).squeeze(-1))


def gumbel_noise_of_all(seed_b: Tensor, position_b: Tensor, vocabulary: int) -> Tensor:
    """`gumbel_noise` of the tokens 0 .. vocabulary - 1, with a quarter of the work."""
    block_1k = torch.arange((vocabulary + 3) // 4, device=seed_b.device).unsqueeze(0)
    rows = len(seed_b)
    if seed_b.device.type == "cpu":
        rows = max(1, CACHED_BLOCKS // block_1k.numel())
    words = [
        _words(seed_b[i : i + rows], position_b[i : i + rows], block_1k).flatten(1)
        for i in range(0, len(seed_b), rows)
    ]
    return torch.cat([_gumbel(words_bv[:, :vocabulary]) for words_bv in words])


def _words(seed_b: Tensor, position_b: Tensor, block_bk: Tensor) -> Tensor:
    seed_b1, position_b1 = seed_b.unsqueeze(1), position_b.long().unsqueeze(1) & LOW_WORD
    zero_11 = torch.zeros(1, 1, dtype=torch.int64, device=seed_b.device)
    counter = block_bk, position_b1, zero_11, zero_11
    key = seed_b1 & LOW_WORD, (seed_b1 >> 32) & LOW_WORD
    return torch.stack(philox4x32(counter, key), dim=-1)


def _gumbel(words: Tensor) -> Tensor:
    # In fp64, where implementations whose logarithms differ in the last bit choose the same token.
    u = words.double().add_(0.5).mul_(2.0**-32)
    exponential = u.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def lowest_kept(z_bv: Tensor, top_k_b: Tensor, top_p_b: Tensor, min_p_b: Tensor) -> Tensor:
    """The least scaled logit that passes the filters: each keeps what lies above some floor."""
    vocabulary = z_bv.shape[1]
    least = torch.finfo(z_bv.dtype).min
    floor_b = (z_bv.amax(-1).double() + min_p_b.double().log()).to(z_bv.dtype).clamp(min=least)
    cut_b = (top_k_b > 0) & (top_k_b < vocabulary)
    nucleus_b = top_p_b < 1
    uncut_b = nucleus_b & ~cut_b
    longest = int(torch.where(cut_b, top_k_b, 0).max())
    if uncut_b.any():
        longest = max(longest, NUCLEUS_GUESS)
    if longest == 0:
        return floor_b

    head_bk = z_bv.topk(min(longest, vocabulary)).values
    last_b1 = (top_k_b.long() - 1).clamp(0, head_bk.shape[1] - 1).unsqueeze(1)
    kth_b = torch.where(cut_b, head_bk.gather(1, last_b1).squeeze(1), least)
    floor_b = torch.maximum(floor_b, kth_b)
    if not nucleus_b.any():
        return floor_b

    # The mass after top-k is that of the head and of what equals the k-th value beyond it.
    own_bk = _relative_mass(head_bk)
    inside_bk = head_bk >= kth_b.unsqueeze(1)
    beyond_b = (z_bv >= kth_b.unsqueeze(1)).sum(-1) - inside_bk.sum(-1)
    mass_b = (own_bk * inside_bk).sum(-1) + beyond_b * own_bk.gather(1, last_b1).squeeze(1)
    if uncut_b.any():
        mass_b = torch.where(uncut_b, _relative_mass(z_bv).sum(-1), mass_b)
    wanted_b = top_p_b.double() * mass_b.double()
    nucleus_floor_b = _nucleus_floor(head_bk, own_bk, wanted_b)
    row_n = (uncut_b & (own_bk.sum(-1) < wanted_b)).nonzero().squeeze(1)
    while len(row_n) and longest < vocabulary:
        longest = min(longest * NUCLEUS_GROWTH, vocabulary)
        head_nk = z_bv[row_n].topk(longest).values
        own_nk = _relative_mass(head_nk)
        nucleus_floor_b[row_n] = _nucleus_floor(head_nk, own_nk, wanted_b[row_n])
        row_n = row_n[own_nk.sum(-1) < wanted_b[row_n]]
    return torch.where(nucleus_b, torch.maximum(floor_b, nucleus_floor_b), floor_b)


def _relative_mass(z_bk: Tensor) -> Tensor:
    x_bk = (z_bk.amax(-1, keepdim=True) - z_bk).float().mul_(LOG2E).clamp_(max=64)
    whole_bk = x_bk.round()
    x_bk = whole_bk - x_bk
    mass_bk = torch.zeros_like(x_bk)
    for coefficient in EXP2_COEFFICIENTS:
        mass_bk.mul_(x_bk).add_(coefficient)
    exponent_bk = (MASS_BITS + 127 - whole_bk).int()
    return mass_bk.mul_((exponent_bk << 23).view(torch.float32)).double().round_().long()


def _nucleus_floor(sorted_bk: Tensor, own_bk: Tensor, wanted_b: Tensor) -> Tensor:
    # The first of several equal logits has exactly the greater ones before it: it decides for all.
    before_bk = own_bk.cumsum(-1) - own_bk
    kept_b1 = (before_bk < wanted_b.unsqueeze(1)).sum(-1, keepdim=True)
    return sorted_bk.gather(1, kept_b1 - 1).squeeze(1)


def sample(
    logits_bv: Tensor,
    seed_b: Tensor,
    position_b: Tensor,
    temperature_b: Tensor,
    top_k_b: Tensor,
    top_p_b: Tensor,
    min_p_b: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row. Its shortcuts read sizes back: on a GPU it waits for the device."""
    dtype = torch.float64 if logits_bv.dtype == torch.float64 else torch.float32
    if len(logits_bv) == 0:
        empty_b = torch.zeros(0, dtype=dtype, device=logits_bv.device)
        return empty_b.long(), empty_b, empty_b.clone()

    greedy_b = temperature_b == 0
    divisor_b = torch.where(greedy_b, 1, temperature_b).to(dtype)
    z_bv = logits_bv.contiguous().to(dtype) / divisor_b.unsqueeze(1)
    best_b = z_bv.amax(-1)
    valid_b = torch.isfinite(best_b)
    if not valid_b.all():
        z_bv[~valid_b], best_b[~valid_b] = 0, 0
    floor_b = torch.where(greedy_b, best_b, lowest_kept(z_bv, top_k_b, top_p_b, min_p_b))

    z_bk, token_bk, noise_bk = _candidates(z_bv, floor_b, seed_b, position_b)
    noise_bk.masked_fill_(greedy_b.unsqueeze(1), 0)
    winner_b1 = (z_bk + noise_bk).argmax(-1, keepdim=True)
    token_b = token_bk.gather(1, winner_b1).squeeze(1)

    chosen_b = (z_bk.gather(1, winner_b1).squeeze(1) - best_b).double()
    logprob_b = chosen_b - _log_sum(z_bv, best_b)
    filtered_logprob_b = (chosen_b - _log_sum(z_bk, best_b)).masked_fill_(greedy_b, 0)
    return (
        token_b.masked_fill_(~valid_b, -1),
        logprob_b.masked_fill_(~valid_b, torch.nan).to(dtype),
        filtered_logprob_b.masked_fill_(~valid_b, torch.nan).to(dtype),
    )


def _candidates(
    z_bv: Tensor, floor_b: Tensor, seed_b: Tensor, position_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept logits, their ids (ascending) and noise: gathered if few are kept; padded with -inf."""
    kept_bv = z_bv >= floor_b.unsqueeze(1)
    count_b = kept_bv.sum(-1)
    widest = int(count_b.max())
    b, vocabulary = z_bv.shape
    if 4 * widest >= vocabulary:
        token_bv = torch.arange(vocabulary, device=z_bv.device).expand(b, -1)
        noise_bv = gumbel_noise_of_all(seed_b, position_b, vocabulary)
        return z_bv.masked_fill(~kept_bv, -torch.inf), token_bv, noise_bv
    row_n, token_n = kept_bv.nonzero(as_tuple=True)
    slot_n = torch.arange(len(row_n), device=z_bv.device) - (count_b.cumsum(0) - count_b)[row_n]
    token_bk = torch.zeros(b, widest, dtype=torch.int64, device=z_bv.device)
    token_bk[row_n, slot_n] = token_n
    z_bk = torch.full((b, widest), -torch.inf, dtype=z_bv.dtype, device=z_bv.device)
    z_bk[row_n, slot_n] = z_bv[row_n, token_n]
    return z_bk, token_bk, gumbel_noise(seed_b, position_b, token_bk)


def _log_sum(z_bk: Tensor, best_b: Tensor) -> Tensor:
    # In fp64, so that the order of summation, which depends on the shape, does not show in fp32.
    return (z_bk - best_b.unsqueeze(1)).exp_().sum(-1, dtype=torch.float64).log()
