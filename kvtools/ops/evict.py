"""Importance from a window of queries, who goes, and closing the gaps."""

from math import inf

import torch
from torch import Tensor

from ..reference import evict as reference
from . import Impl, Op, check
from .quant import EMPTY, FLOATS, INTEGERS, TENSORS, KVPages

REAL = (*FLOATS, *INTEGERS, torch.int16, torch.int8, torch.uint8, torch.bool)


def _fake_key_scores(q_bhwd: Tensor, k_bhsd: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q_bhwd.dtype, torch.float32)
    shape = k_bhsd.shape[:3]
    return k_bhsd.new_empty(shape, dtype=dtype), k_bhsd.new_empty(shape, dtype=torch.int32)


_key_scores = Op(
    "key_scores",
    "(Tensor q_bhwd, Tensor k_bhsd, Tensor? sink_h, int sinks, float scale, float softcap, "
    "int sliding, str group) -> (Tensor, Tensor)",
    _fake_key_scores,
    reference=reference.key_scores,
)
_select_victims = Op(
    "select_victims",
    "(Tensor score_nhs, Tensor tie_nhs, Tensor position_nhs, Tensor protect_below_n, "
    "Tensor protect_from_n, int count) -> Tensor",
    lambda score_nhs, *args: score_nhs.new_empty(*score_nhs.shape[:2], args[-1], dtype=torch.int32),
    reference=reference.select_victims,
)
_compact_kv = Op(
    "compact_kv",
    "(Tensor source_nh, Tensor target_nh, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, "
    "Tensor(d!)? v_scale, Tensor(e!)? position, Tensor(f!)? importance, Tensor(g!)? history) -> ()",
    lambda *args: None,
    reference=reference.compact_kv,
)


def key_scores(
    q_bhwd: Tensor,
    k_bhsd: Tensor,
    *,
    sink_h: Tensor | None = None,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    sliding: int = 0,
    group: str = "all",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Importance of keys from the last w queries of a sequence.

    Equivalent to, with p the causal attention probabilities of the w queries:

        mass[s] = Σ_w mean over the group of p[s];  low[s] = Σ_w (p[s] < mean of p over the keys
        from `sinks` on)

    Args:
        q_bhwd: queries of the last w positions, after RoPE; w <= s. fp64, fp32, fp16 or bf16.
        k_bhsd: all keys, in order, after RoPE.
        sink_h: [Hq] logits of a sink without a value (gpt-oss).
        sinks: leading keys left out of the mean: they hold most of the mass.
        scale, softcap, sliding: as for `tree_attention`.
        group: "all" counts a token as low for a KV head if every query head of it does, "mean" if
            their average does.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64.

    Returns:
        mass_bhs in fp32 (fp64 for fp64), and low_bhs in int32.

    Numerics: accumulates in fp32. A query that is NaN, sees a key that is, or has a score of +inf
        makes mass NaN and finds nothing low.

    Reference: Scissorhands, arXiv:2305.17118; SnapKV, arXiv:2404.14469.
    """
    check(
        q_bhwd.dim() == 4 and k_bhsd.dim() == 4, "q_bhwd and k_bhsd must be [b, heads, tokens, D]"
    )
    check(
        q_bhwd.shape[0] == k_bhsd.shape[0] and q_bhwd.shape[3] == k_bhsd.shape[3] > 0,
        lambda: (
            f"q_bhwd has shape {tuple(q_bhwd.shape)}, k_bhsd {tuple(k_bhsd.shape)}; b and D > 0 "
            "must agree"
        ),
    )
    check(
        q_bhwd.dtype in FLOATS and k_bhsd.dtype in FLOATS,
        lambda: f"q_bhwd is {q_bhwd.dtype}, k_bhsd {k_bhsd.dtype}; expected fp64, fp32, fp16, bf16",
    )
    w, s = q_bhwd.shape[2], k_bhsd.shape[2]
    check(
        w <= s,
        lambda: f"q_bhwd has {w} queries for {s} keys; the queries are the last of the sequence",
    )
    check(
        k_bhsd.shape[1] > 0 and q_bhwd.shape[1] > 0 and q_bhwd.shape[1] % k_bhsd.shape[1] == 0,
        lambda: (
            f"q_bhwd has {q_bhwd.shape[1]} heads, not a multiple of the {k_bhsd.shape[1]} of k_bhsd"
        ),
    )
    check(group in ("all", "mean"), lambda: f"group={group!r}: expected 'all' or 'mean'")
    check(0 <= sinks < 2**31, lambda: f"sinks={sinks} must not be negative, nor beyond int32")
    scale = q_bhwd.shape[-1] ** -0.5 if scale is None else scale
    if not -inf < scale < inf:
        raise ValueError(f"scale={scale}: expected a finite number")
    if not 0 <= softcap < inf or not 0 <= sliding < 2**31:
        raise ValueError(
            f"softcap={softcap}, sliding={sliding}: must not be negative, softcap finite and "
            "sliding below 2**31"
        )
    check(
        sink_h is None or (sink_h.shape == (q_bhwd.shape[1],) and sink_h.dtype in FLOATS),
        lambda: f"sink_h must be floating point of shape {(q_bhwd.shape[1],)}, one per query head",
    )
    return _key_scores(impl, q_bhwd, k_bhsd, sink_h, sinks, scale, softcap, sliding, group)


def select_victims(
    score_nhs: Tensor,
    position_nhs: Tensor,
    count: int,
    *,
    tie_nhs: Tensor | None = None,
    protect_below_n: Tensor | None = None,
    protect_from_n: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Choose the `count` tokens of each row and KV head that are worth least.

    Equivalent to sorting by (protected, not empty, score, tie, position) and taking the first
    `count`.

    Args:
        score_nhs: worth of each token, any real dtype; the lowest go first, NaN last.
        position_nhs: true positions, int32; `EMPTY` slots go before all others.
        count: how many, at most s.
        tie_nhs: decides among equal scores, lowest first; default none, so the oldest goes.
        protect_below_n: tokens at positions below are protected, int32.
        protect_from_n: tokens at positions from there on are protected, int32.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++; whether and where it beats Triton is not measured yet.

    Returns:
        index_nhm, int32, in the order in which they should go. Protected tokens appear only where
        fewer than `count` are unprotected.

    Numerics: exact; a row's result does not depend on its batch.

    Reference: Scissorhands, arXiv:2305.17118.
    """
    check(
        position_nhs.dim() == 3 and position_nhs.dtype in INTEGERS,
        lambda: (
            f"position_nhs is {position_nhs.dtype} {tuple(position_nhs.shape)}, expected int32 "
            "[n, heads, tokens]"
        ),
    )
    n, _, s = position_nhs.shape
    check(
        score_nhs.shape == position_nhs.shape,
        lambda: (
            f"score_nhs has shape {tuple(score_nhs.shape)}, position_nhs "
            f"{tuple(position_nhs.shape)}"
        ),
    )
    check(0 <= count <= s, lambda: f"count={count} must be between 0 and the {s} tokens of a row")
    check(
        tie_nhs is None or tie_nhs.shape == position_nhs.shape,
        lambda: f"tie_nhs has shape {tuple(tie_nhs.shape)}, expected {tuple(position_nhs.shape)}",
    )
    for name, x in (("score_nhs", score_nhs), ("tie_nhs", tie_nhs)):
        check(x is None or x.dtype in REAL, lambda name=name, x=x: f"{name} has dtype {x.dtype}")
    for name, x in (("protect_below_n", protect_below_n), ("protect_from_n", protect_from_n)):
        check(
            x is None or (x.shape == (n,) and x.dtype in INTEGERS),
            lambda name=name, x=x: (
                f"{name} is {x.dtype} {tuple(x.shape)}, expected int32 or int64 {(n,)}"
            ),
        )
    tie_nhs = torch.zeros_like(score_nhs) if tie_nhs is None else tie_nhs
    below = position_nhs.new_zeros(n) if protect_below_n is None else protect_below_n
    start = position_nhs.new_full((n,), EMPTY) if protect_from_n is None else protect_from_n
    return _select_victims(impl, score_nhs, tie_nhs, position_nhs, below, start, count)


def compact_kv(
    source_nh: Tensor, target_nh: Tensor, pages: KVPages, *, impl: Impl = "auto"
) -> None:
    """Move tokens from slot to slot, each KV head on its own, codes and all.

    Equivalent to:

        for each i, h:  pages[target[i, h]] = pages[source[i, h]], all sources read before any
            target is written

    Args:
        source_nh: flat slots, int32 or int64.
        target_nh: as `source_nh`; distinct within a head. May overlap the sources. What goes to or
            from a negative slot is skipped, and one that the pages do not have is treated as by
            `append_kv`.
        pages: changed in place, nothing is re-quantised.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64.

    Numerics: exact.
    """
    check(
        source_nh.shape == target_nh.shape
        and source_nh.dim() == 2
        and source_nh.shape[1] == pages.k.shape[1],
        lambda: (
            f"source_nh {tuple(source_nh.shape)} and target_nh {tuple(target_nh.shape)} must both "
            f"be [n, {pages.k.shape[1]}]"
        ),
    )
    check(
        source_nh.dtype in INTEGERS and target_nh.dtype in INTEGERS,
        lambda: f"source_nh is {source_nh.dtype}, target_nh {target_nh.dtype}: not int32 or int64",
    )
    shape = pages.k.shape
    for name, x in zip(TENSORS, pages.tensors(), strict=True):
        size = 4 if name in ("k", "v", "history") else 3
        check(
            x is None
            or (
                x.dim() == size
                and x.shape[:3] == shape[:3]
                and 0 not in x.shape[1:]
                and (size == 3 or x.stride(-1) == 1 or x.shape[-1] == 1)
            ),
            lambda name=name, x=x: (
                f"pages.{name} has shape {tuple(x.shape)} and strides {x.stride()}; expected "
                f"{(*shape[:3], '...')}, not empty, contiguous in axes behind the third"
            ),
        )
    _compact_kv(impl, source_nh, target_nh, *pages.tensors())
