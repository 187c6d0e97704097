"""Attention over a forest of nodes."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..reference import attention as reference
from . import Impl, Op, check
from .quant import KVPages, check_pages

TILE_ROWS = 64  # query rows of a work item on a GPU


@dataclass(frozen=True)
class Plan:
    """Which query tokens read which slots: the output of `Forest.plan` or `plan_from_block_table`,
    int32.

    Query tokens are numbered 0..T-1 row by row. M nodes, I items.

    Attributes:
        page_indptr: [M + 1] into `page`.
        page: page ids of the nodes, in order.
        first: [M] offset of a node's first slot in its first page.
        length: [M] slots of a node. The only tensor that changes while a plan is in use.
        base: [M] true position of a node's first slot; read only where the pages store no
            positions.
        own: [M] 1 where one row alone reads the node and may evict from it.
        token_indptr: [M + 1] into `token`.
        token: query tokens that read each node, ascending.
        item: [I, 6] work items (node, token begin, token end, slot begin, slot end, part): a tile
            of `token` against a chunk of the node's slots, cut to `length` when it runs. Its
            partial results, one per token, are numbered from `part` on.
        part_indptr: [T + 1] into `part`.
        part: the partial results of each token.
        leaf: [rows] node in which a row grows, -1 where there is none.
    """

    page_indptr: Tensor
    page: Tensor
    first: Tensor
    length: Tensor
    base: Tensor
    own: Tensor
    token_indptr: Tensor
    token: Tensor
    item: Tensor
    part_indptr: Tensor
    part: Tensor
    leaf: Tensor

    @classmethod
    def from_host(cls, arrays: dict, device: torch.device | str = "cpu") -> "Plan":
        """A plan on `device` from the arrays of `kvtools._host`."""
        return cls(**{f.name: torch.from_numpy(arrays[f.name]).to(device) for f in fields(cls)})

    def to(self, device: torch.device | str) -> "Plan":
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def reserve(self, **sizes: int) -> "Plan":
        """The same plan in new tensors with room for others: what a CUDA graph is captured with.

        Args:
            **sizes: for the name of a field, its least length. The number of query tokens, the
                length of `part_indptr` less one, is that of the captured call.
        """
        room = {}
        for f in fields(self):
            x = getattr(self, f.name)
            size = max(sizes.pop(f.name, 0), x.shape[0])
            room[f.name] = x.new_zeros(size, *x.shape[1:])
        check(not sizes, lambda: f"a plan has no {', '.join(sizes)}")
        return Plan(**room).copy_(self)

    def copy_(self, other: "Plan") -> "Plan":
        """Become `other` in place; what it does not fill is no work.

        Raises:
            ValueError: a tensor of `other` is longer than its own here. Nothing has changed.
        """
        for f in fields(self):
            here, there = getattr(self, f.name), getattr(other, f.name)
            check(
                there.shape[0] <= here.shape[0],
                lambda name=f.name, here=here, there=there: (
                    f"{name} has {there.shape[0]} entries, there is room for {here.shape[0]}: "
                    f"reserve({name}=...) more"
                ),
            )
        for f in fields(self):
            here, there = getattr(self, f.name), getattr(other, f.name)
            here[: len(there)] = there
            # The last offset goes on: tokens without partial results, items without tokens.
            here[len(there) :] = there[-1] if f.name.endswith("indptr") else 0
        return self


def limits(device: torch.device, heads: int, group: int) -> dict[str, int]:
    """How to cut the work of a plan for `device`, as arguments of the plan.

    On a GPU, tiles of 64 query rows, and two rounds of work items over its multiprocessors. On a
    CPU nothing is cut: its kernel shares work as it runs.

    Args:
        device: that computes.
        heads: KV heads.
        group: query heads per KV head.
    """
    if device.type != "cuda":
        return {}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return dict(tile=max(1, TILE_ROWS // group), items=-(-2 * processors // heads))


def plan_from_block_table(
    block_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    *,
    query_lens: Tensor | None = None,
    tile: int = 0,
    chunk: int = 0,
    items: int = 0,
) -> Plan:
    """Find the tree in a server's block table: rows that share leading full blocks share nodes.

    Args:
        block_table: [rows, blocks] page ids, int32; entries past a row's end may hold anything.
        seq_lens: [rows] tokens per row, those of this step included, int32.
        page_size: slots per block.
        query_lens: [rows] query tokens per row, int32; default one each.
        tile: at most so many query tokens per work item; 0 for no limit.
        chunk: at most so many slots per work item, a multiple of `page_size`; 0 for no limit.
        items: without a `chunk`, cut into about so many work items; see `limits`.

    Returns:
        A plan on the device of `block_table`. A partly filled last block is taken as its row's own.
    """
    try:
        from .. import _host
    except ImportError as error:
        raise ImportError(
            "plan_from_block_table needs kvtools' C++ module: reinstall without KVTOOLS_EXT=0"
        ) from error

    rows = block_table.shape[0]
    check(
        block_table.dim() == 2,
        lambda: f"block_table must be [rows, blocks], got {tuple(block_table.shape)}",
    )
    check(
        seq_lens.shape == (rows,),
        lambda: f"seq_lens has shape {tuple(seq_lens.shape)}, expected {(rows,)}",
    )
    counts = torch.ones_like(seq_lens) if query_lens is None else query_lens
    table, lens, counts = (
        x.to("cpu", torch.int32).numpy() for x in (block_table, seq_lens, counts)
    )
    arrays = _host.plan_from_block_table(table, lens, page_size, counts, tile, chunk, items)
    return Plan.from_host(arrays, block_table.device)


_TREE_SCHEMA = (
    "(Tensor q_thd, Tensor position_t, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? position, Tensor(a!)? importance, Tensor(b!)? history, Tensor page_indptr, "
    "Tensor page, Tensor first, Tensor length, Tensor base, Tensor own, Tensor token_indptr, "
    "Tensor token, Tensor item, Tensor part_indptr, Tensor part, Tensor? before_t, "
    "Tensor? state_out, Tensor? state_lse, Tensor? sink_h, float scale, float softcap, "
    "int sliding, int window, str group) -> (Tensor, Tensor)"
)


def _fake_tree(q_thd: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q_thd.dtype, torch.float32)
    return torch.empty_like(q_thd), q_thd.new_empty(q_thd.shape[:2], dtype=dtype)


def _fake_merge(a_bhd: Tensor, a_lse_bh: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a_bhd.dtype, torch.float32)
    return torch.empty_like(a_bhd), a_lse_bh.new_empty(a_lse_bh.shape, dtype=dtype)


_tree_attention = Op("tree_attention", _TREE_SCHEMA, _fake_tree, reference=reference.tree_attention)
_merge_states = Op(
    "merge_states",
    "(Tensor a_bhd, Tensor a_lse_bh, Tensor b_bhd, Tensor b_lse_bh) -> (Tensor, Tensor)",
    _fake_merge,
    reference=reference.merge_states,
)


def tree_attention(
    q_thd: Tensor,
    position_t: Tensor,
    pages: KVPages,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sliding: int = 0,
    before_t: Tensor | None = None,
    sink_h: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    group: str = "all",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of query tokens over a forest of KV nodes, each read once for all its rows.

    Equivalent to, for each token t of row r, over the slots s of r's path with
    position[s] <= position[t] (and > position[t] - sliding, and < before[t]):

        x = softcap(scale q[t] · k[s]);  lse = logsumexp_s(x, sink_h, state.lse)
        out = Σ_s exp(x - lse) v[s] + exp(state.lse - lse) state.out

    Args:
        q_thd: queries after RoPE, the tokens of a row together, rows in the plan's order. fp64,
            fp32, fp16, bf16. Hq is a multiple of the pages' Hkv (GQA).
        position_t: true positions, int32.
        pages: keys and values in any format, read packed. `importance` and `history`, where
            present, are changed in place for the nodes that one row owns: see *Importance*.
        plan: who reads what.
        scale: of the scores; default D ** -0.5.
        softcap: c in c · tanh(x / c), applied before masking (Gemma 2); 0 for none.
        sliding: how many positions a query sees, its own included; 0 for all.
        before_t: int32; a query sees only positions below this one, those from it on being kept
            elsewhere (in `state`).
        sink_h: [Hq] logits of a sink without a value (gpt-oss); they enter the final lse.
        state: (out_thd, lse_th) over keys kept elsewhere, merged in before the final lse.
        window: steps that `pages.history` holds, as given to `KVPages.empty`; needed with a
            history.
        group: "all" notes a token as low if every query head of its KV head finds it low, "mean" if
            their average does.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++; whether and where it beats Triton is not measured yet.

    Returns:
        out_thd in the dtype of `q_thd`, and lse_th (natural log, fp32; fp64 for fp64). A token that
        sees nothing gets out 0 and lse -inf.

    Importance: with p = exp(x - lse), `importance` gains the mean of p over the query heads of a KV
        head, and bit `position_t % window` of `history` becomes 1 where p is below the mean over
        the visible slots of these pages, mean = exp(lse over these pages - lse) / their number.
        Keys in `state` and the sink logit take their mass out of that mean.

    Numerics: accumulates in fp32 (fp64 for fp64), lse and merge included.

    Reference: Hydragen, arXiv:2402.05099; DeFT, arXiv:2404.00242; Scissorhands, arXiv:2305.17118
        (importance).
    """
    t, hq, d = q_thd.shape
    check_pages(pages, d)
    heads = pages.k.shape[1]
    check(
        hq % heads == 0,
        lambda: f"q_thd has {hq} heads, not a multiple of the pages' {heads} KV heads",
    )
    check(
        q_thd.is_floating_point(),
        lambda: f"q_thd has dtype {q_thd.dtype}; queries are floating point",
    )
    check(
        position_t.shape == (t,),
        lambda: f"position_t has shape {tuple(position_t.shape)}, expected {(t,)}",
    )
    check(
        position_t.device == pages.k.device == plan.item.device == q_thd.device,
        lambda: (
            f"q_thd is on {q_thd.device}, position_t on {position_t.device}, pages on "
            f"{pages.k.device}, plan on {plan.item.device}; move them to one device"
        ),
    )
    check(
        before_t is None or (before_t.shape == (t,) and before_t.device == q_thd.device),
        lambda: f"before_t must have shape {(t,)} and be on the device of q_thd",
    )
    check(group in ("all", "mean"), lambda: f"group={group!r}: expected 'all' or 'mean'")
    check(
        softcap >= 0 and sliding >= 0, "softcap and sliding must not be negative; 0 turns them off"
    )
    check(
        sink_h is None or sink_h.shape == (hq,),
        lambda: f"sink_h must have shape {(hq,)}, one logit per query head",
    )
    words = 0 if pages.history is None else pages.history.shape[-1]
    check(
        words == -(-window // 32),
        lambda: (
            f"window={window} does not fit pages.history of {words} words; pass the window given "
            "to KVPages.empty"
        ),
    )
    state_out, state_lse = (None, None) if state is None else state
    return _tree_attention(
        impl, q_thd, position_t, *pages.tensors(), plan.page_indptr, plan.page, plan.first,
        plan.length, plan.base, plan.own, plan.token_indptr, plan.token, plan.item,
        plan.part_indptr, plan.part, before_t, state_out, state_lse, sink_h,
        d**-0.5 if scale is None else scale, softcap, sliding, window, group,
    )  # fmt: skip


def merge_states(
    a_bhd: Tensor, a_lse_bh: Tensor, b_bhd: Tensor, b_lse_bh: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge two attention results over disjoint key sets A and B.

    Equivalent to attention over A ∪ B:

        lse = logaddexp(a_lse, b_lse);  out = a * exp(a_lse - lse) + b * exp(b_lse - lse)

    Args:
        a_bhd: output over A. fp64, fp32, fp16 or bf16.
        a_lse_bh: log-sum-exp of the scaled scores over A. fp32, natural log; -inf where A is empty.
        b_bhd: output over B, dtype of `a_bhd`.
        b_lse_bh: as `a_lse_bh`, over B.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64.

    Returns:
        out_bhd in the dtype of `a_bhd`, and lse_bh in fp32. Empty A and B give out 0, lse -inf;
        what `a_bhd` or `b_bhd` holds where it is empty does not matter.

    Numerics: accumulates in fp32; a row's bits do not depend on its batch.

    Reference: Hydragen, arXiv:2402.05099.
    """
    check(
        a_bhd.shape == b_bhd.shape and a_bhd.dtype == b_bhd.dtype,
        lambda: (
            f"b_bhd is {b_bhd.dtype} {tuple(b_bhd.shape)}, a_bhd is {a_bhd.dtype} "
            f"{tuple(a_bhd.shape)}"
        ),
    )
    check(
        a_lse_bh.shape == b_lse_bh.shape == a_bhd.shape[:-1],
        lambda: (
            f"a_lse_bh has shape {tuple(a_lse_bh.shape)}, b_lse_bh {tuple(b_lse_bh.shape)}, both "
            f"must be {tuple(a_bhd.shape[:-1])}"
        ),
    )
    return _merge_states(impl, a_bhd, a_lse_bh, b_bhd, b_lse_bh)
