"""Attention over a forest of nodes: the specification."""

import torch
from torch import Tensor

from .quant import decode, format_of, frames_of, rotation


def merge_states(
    a_bhd: Tensor, a_lse_bh: Tensor, b_bhd: Tensor, b_lse_bh: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a_bhd.dtype, torch.float32)
    lse = torch.logaddexp(a_lse_bh.to(dtype), b_lse_bh.to(dtype))
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    safe = lse.masked_fill(lse == -torch.inf, 0)  # both empty: weights exp(-inf) = 0
    a, b = ((x.to(dtype) - safe).exp()[..., None] for x in (a_lse_bh, b_lse_bh))
    out = torch.where(a == 0, 0, a * a_bhd.to(dtype)) + torch.where(b == 0, 0, b * b_bhd.to(dtype))
    return out.to(a_bhd.dtype), lse


def tree_attention(
    q_thd: Tensor,
    position_t: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor | None,
    importance: Tensor | None,
    history: Tensor | None,
    more: list[Tensor],
    recent: int,
    page_indptr: Tensor,
    page: Tensor,
    first: Tensor,
    length: Tensor,
    base: Tensor,
    own: Tensor,
    store: Tensor,
    token_indptr: Tensor,
    token: Tensor,
    item: Tensor,
    part_indptr: Tensor,
    part: Tensor,
    before_t: Tensor | None,
    frame: Tensor | None,
    frame_t: Tensor | None,
    state_out: Tensor | None,
    state_lse: Tensor | None,
    sink_h: Tensor | None,
    scale: float,
    softcap: float,
    sliding: int,
    window: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    tokens, heads_q, d = q_thd.shape
    heads = k.shape[1]
    dtype = torch.promote_types(q_thd.dtype, torch.float32)
    stores = [(k, v, k_scale, v_scale, position), *stores_of(more)]
    group_size = heads_q // heads
    plain = q_thd.to(dtype)
    if frame is not None:
        gain = frame[frames_of(frame, frame_t), 1].to(dtype)
        plain = plain / gain.repeat_interleave(group_size, 1)
    formats = {format_of(x, d) for pages in stores for x in pages[:2]}
    turn = rotation(d, dtype, q_thd.device) if formats != {"none"} else None
    rotated = plain if turn is None else plain @ turn
    plain, rotated = (x.unflatten(1, (heads, group_size)) for x in (plain, rotated))

    # Items of a store and of similar size are padded to one batch; what is dead or not visible is
    # masked.
    item = item.long()
    slot_end = torch.minimum(item[:, 4], length.long()[item[:, 0]]).maximum(item[:, 3])
    sizes = torch.stack([item[:, 2] - item[:, 1], slot_end - item[:, 3]])
    kind = torch.frexp(sizes.to(torch.float32)).exponent
    kind = (store.long()[item[:, 0]] * 64 + kind[0]) * 64 + kind[1]
    kinds, which = kind.unique(return_inverse=True)

    batches = []
    for i in range(len(kinds)):
        chosen = (which == i).nonzero()[:, 0]
        n_tokens, n_slots = sizes[:, chosen].amax(1).tolist()
        if not n_tokens or not n_slots:
            continue
        node = item[chosen, 0]
        number = int(kinds[i]) // 64**2
        k, v, k_scale, v_scale, position = stores[number]
        k_format, v_format, page_size = format_of(k, d), format_of(v, d), k.shape[2]
        q_thgd = plain if k_format == "none" else rotated
        c = item[chosen, 1:2] + torch.arange(n_tokens, device=q_thd.device)
        real_nc = c < item[chosen, 2:3]
        token_nc = token.long()[c.clamp(max=token.shape[0] - 1)] * real_nc
        slot_ns = item[chosen, 3:4] + torch.arange(n_slots, device=q_thd.device)
        live_ns = slot_ns < slot_end[chosen, None]
        offset_ns = (first.long()[node][:, None] + slot_ns) * live_ns
        page_ns = page.long()[page_indptr.long()[node][:, None] + offset_ns // page_size]
        offset_ns = offset_ns % page_size

        where = (page_ns, slice(None), offset_ns)
        k_nshd, v_nshd = (
            decode(pages[where], None if scales is None else scales[where], format, dtype)
            for pages, scales, format in ((k, k_scale, k_format), (v, v_scale, v_format))
        )
        if not live_ns.all():  # dead slots may hold NaN; in keys the mask on the logits covers it
            v_nshd = v_nshd.masked_fill(~live_ns[..., None, None], 0)
        logits = torch.einsum("nchgd,nshd->nhgcs", q_thgd[token_nc], k_nshd) * scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        if position is None:
            key_nhs = (base.long()[node][:, None] + slot_ns)[:, None]
        else:
            key_nhs = position[where].transpose(1, 2)
        age = position_t[token_nc].long()[:, None, :, None] - key_nhs[:, :, None]  # [n, h, c, s]
        if before_t is not None:
            newer = key_nhs[:, :, None] >= before_t[token_nc][:, None, :, None]
            age = age.masked_fill(~newer if recent >> number & 1 else newer, -1)
        past = (age >= 0) & (real_nc[:, None, :, None] & live_ns[:, None, None])
        visible = (past & (age < sliding) if sliding else past).expand(-1, heads, -1, -1)
        logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
        lse = torch.logsumexp(logits, -1)  # [n, h, g, c]
        lse = lse.masked_fill(lse == torch.inf, torch.nan)
        p = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        out = torch.einsum("nhgcs,nshd->nchgd", p, v_nshd)
        if v_format != "none":
            out = out @ turn.T
        behind_n = item[chosen, 1] - token_indptr.long()[node]  # tokens of the node before these
        batches.append((number, token_nc, real_nc, out, lse.permute(0, 3, 1, 2), visible, past,
                        logits, own[node] > 0, page_ns, offset_ns, live_ns, behind_n))  # fmt: skip

    # Merge the partial results of each token.
    peak = plain.new_full((tokens, *plain.shape[1:3]), -torch.inf)
    for _, token_nc, real_nc, _, lse, *_ in batches:
        index = token_nc[real_nc][:, None, None].expand(-1, *peak.shape[1:])
        peak.scatter_reduce_(0, index, lse[real_nc], "amax")
    peak.masked_fill_(peak == -torch.inf, 0)
    mass, mass_here = torch.zeros_like(peak), torch.zeros_like(peak)
    out_thgd = torch.zeros_like(plain)
    seen_th = mass.new_zeros(tokens, heads)
    for number, token_nc, real_nc, out, lse, visible, *_ in batches:
        index = token_nc[real_nc]
        weight = (lse[real_nc] - peak[index]).exp()
        mass.index_add_(0, index, weight)
        out_thgd.index_add_(0, index, weight[..., None] * out[real_nc])
        if number == 0:
            mass_here.index_add_(0, index, weight)
            seen_th.index_add_(0, index, visible.sum(-1).transpose(1, 2)[real_nc].to(dtype))
    out_thd = (out_thgd / mass[..., None].masked_fill(mass[..., None] == 0, 1)).flatten(1, 2)
    lse_th = (peak + mass.log()).flatten(1, 2)
    if state_out is not None:
        out_thd, lse_th = merge_states(out_thd, lse_th, state_out, state_lse)
    if sink_h is not None:
        sink_th = sink_h.to(dtype).expand(tokens, heads_q)
        out_thd, lse_th = merge_states(out_thd, lse_th, torch.zeros_like(out_thd), sink_th)

    if importance is not None or history is not None:
        # What a token of the first store gets on average: their share of the final mass over their
        # number.
        here_th = (peak + mass_here.log()).flatten(1, 2)
        mean_th = (here_th - lse_th).exp() / seen_th.repeat_interleave(group_size, 1)
        for number, token_nc, real_nc, _, _, _, past, logits, own_n, *where, behind_n in batches:
            if number != 0:
                continue
            for behind in behind_n[own_n].unique():  # one by one, as they have the same slots
                some = own_n & (behind_n == behind)
                track(
                    importance, history, window, group, position_t, lse_th, mean_th,
                    *(x[some] for x in (token_nc, real_nc, past, logits, *where)),
                )  # fmt: skip
    return out_thd.to(q_thd.dtype), lse_th


def stores_of(more: list[Tensor]) -> list[tuple[Tensor | None, ...]]:
    """The (k, v, k_scale, v_scale, position) of each store behind the first; what it lacks is
    empty in `more`."""
    return [
        (*more[i : i + 2], *(x if x.numel() else None for x in more[i + 2 : i + 5]))
        for i in range(0, len(more), 5)
    ]


def track(
    importance: Tensor | None,
    history: Tensor | None,
    window: int,
    group: str,
    position_t: Tensor,
    lse_th: Tensor,
    mean_th: Tensor,
    token_nc: Tensor,
    real_nc: Tensor,
    past_nhcs: Tensor,
    logits: Tensor,
    page_ns: Tensor,
    offset_ns: Tensor,
    live_ns: Tensor,
) -> None:
    """Add what the slots of own nodes received to `importance`; note in `history` what was below
    the mean. No two of the n items may have the same slots."""
    n, heads, g, c, s = logits.shape

    def per_query(x_th: Tensor) -> Tensor:
        return x_th[token_nc].unflatten(2, (heads, g)).permute(0, 2, 3, 1)[..., None]

    p = (logits - per_query(lse_th)).exp()
    p = p.masked_fill(logits == -torch.inf, 0)
    where = (page_ns[live_ns], slice(None), offset_ns[live_ns])
    if importance is not None:
        received = p.mean(2).sum(2).transpose(1, 2)[live_ns]
        importance[where] += received.to(importance.dtype)
    if history is not None:
        low = below_mean(p, per_query(mean_th), group) & past_nhcs
        bits = history[where]
        head = torch.arange(bits.shape[1], device=bits.device)
        row = torch.arange(bits.shape[0], device=bits.device)[:, None]
        for i in range(c):
            step_n = position_t[token_nc[:, i]].long() % window
            word = (step_n // 32)[:, None].expand(n, s)[live_ns][:, None]
            bit = (1 << (step_n % 32)).to(torch.int32)[:, None].expand(n, s)[live_ns][:, None]
            real = real_nc[:, i, None].expand(n, s)[live_ns][:, None]
            old = bits[row, head, word]
            new = torch.where(low[:, :, i].transpose(1, 2)[live_ns], old | bit, old & ~bit)
            bits[row, head, word] = torch.where(real, new, old)
        history[where] = bits


def below_mean(p: Tensor, mean: Tensor, group: str) -> Tensor:
    """Whether a token gets less than the mean: from all query heads (axis 2), or on average."""
    return (p < mean).all(2) if group == "all" else p.mean(2) < mean.mean(2)
