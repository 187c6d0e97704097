"""Importance from a window of queries, who goes, and closing the gaps: the specification."""

import torch
from torch import Tensor

from .attention import below_mean
from .quant import as_bytes, in_pages

EMPTY = 2**31 - 1
QUERY_CHUNK = 64  # bounds the scores held at once


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
    dtype = torch.promote_types(q_bhwd.dtype, torch.float32)
    b, heads, s, _ = k_bhsd.shape
    w = q_bhwd.shape[2]
    q = q_bhwd.to(dtype).unflatten(1, (heads, -1))
    mass = q.new_zeros(b, heads, s)
    low = torch.zeros(b, heads, s, dtype=torch.int32, device=q.device)
    key = torch.arange(s, device=q.device)
    for begin in range(0, w, QUERY_CHUNK):
        x = (
            torch.einsum(
                "bhgwd,bhsd->bhgws", q[:, :, :, begin : begin + QUERY_CHUNK], k_bhsd.to(dtype)
            )
            * scale
        )
        if softcap:
            x = torch.tanh(x / softcap) * softcap
        query = s - w + begin + torch.arange(x.shape[3], device=q.device)[:, None]
        past = key <= query
        visible = past & (key > query - sliding) if sliding else past
        x = x.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(x, -1, keepdim=True)
        if sink_h is not None:
            lse = torch.logaddexp(lse, sink_h.to(dtype).view(heads, -1, 1, 1))
        p = (x - lse.masked_fill(lse == torch.inf, torch.nan)).exp()
        seen = visible[:, sinks:].sum(-1)[:, None].clamp(min=1)
        mean = p[..., sinks:].sum(-1, keepdim=True) / seen
        mass += p.mean(2).sum(2)
        low += (below_mean(p, mean, group) & past).sum(2, dtype=torch.int32)
    return mass, low


def select_victims(
    score_nhs: Tensor,
    tie_nhs: Tensor,
    position_nhs: Tensor,
    protect_below_n: Tensor,
    protect_from_n: Tensor,
    count: int,
) -> Tensor:
    empty = position_nhs == EMPTY
    protected = position_nhs < protect_below_n[:, None, None]
    protected |= (position_nhs >= protect_from_n[:, None, None]) & ~empty
    rank = protected.to(torch.int8) - empty.to(torch.int8)
    order = torch.arange(position_nhs.shape[-1], device=position_nhs.device).expand_as(position_nhs)
    for key in (
        position_nhs,
        tie_nhs,
        score_nhs,
        rank,
    ):  # stable sorts, least significant key first
        order = order.gather(-1, key.gather(-1, order).sort(dim=-1, stable=True).indices)
    return order[..., :count].to(torch.int32)


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
    moves = in_pages("source_nh", source_nh, k) & in_pages("target_nh", target_nh, k)
    head, page_size = moves.nonzero()[:, 1], k.shape[2]
    source, target = (
        (x // page_size, head, x % page_size)
        for x in (source_nh[moves].long(), target_nh[moves].long())
    )
    for pages in (k, v, k_scale, v_scale, position, importance, history):
        if pages is not None:
            raw = as_bytes(pages)
            raw[target] = raw[source]
