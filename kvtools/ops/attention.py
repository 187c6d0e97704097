"""Attention over a forest of nodes."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..reference import attention as reference
from . import Impl, Op, check
from .quant import FLOATS, KVPages, check_frame, check_pages
from .upload import at_once

MOST_STORES = 4
TILE_ROWS = {"triton": 64, "cuda": 128}  # query rows of a work item on a GPU
# Blocks of a kernel that a GPU's multiprocessor runs at once, by `python -m bench.model`; where no
# token shares a node a plan counts on half as many again.
PLACES = {"triton": 2, "cuda": 2}


@dataclass(frozen=True)
class Plan:
    """Which query tokens read which slots: the output of `Forest.plan` or `plan_from_block_table`.

    Query tokens are numbered 0..T-1 row by row. M nodes, I items. Tensors are int32 and contiguous,
    on one device. Where a plan is made its ids are checked, so that no call has to: a plan of
    tensors on a GPU is read back once for it, one `from_host` is not. Only `length` may be changed
    afterwards; any number will do there, since items cut it.

    Attributes:
        page_indptr: [M + 1] into `page`.
        page: page ids of the nodes, in order.
        first: [M] offset of a node's first slot in its first page.
        length: [M] slots of a node.
        base: [M] true position of a node's first slot; read only where the pages store no
            positions.
        own: [M] 1 where one row alone reads the node and may evict from it.
        store: [M] which of the pages that a call is given hold the node: 0 where there is one.
        token_indptr: [M + 1] into `token`.
        token: query tokens that read each node, ascending.
        item: [I, 6] work items (node, token begin, token end, slot begin, slot end, part): a tile
            of `token` against a chunk of the node's slots, cut to `length` when it runs. Its
            partial results, one per token, are numbered from `part` on.
        part_indptr: [T + 1] into `part`.
        part: the partial results of each token.
        leaf: [rows] node in which a row grows, -1 where there is none.
        page_size: slots in a page; one for each store if there are several.
        pages: how many pages each store must have: the greatest id and one, or what was reserved.

    Raises:
        IndexError: an id or an offset points nowhere.
        ValueError: a tensor is no contiguous int32, or does not fit the others.
    """

    TENSORS: ClassVar[tuple[str, ...]] = (
        "page_indptr", "page", "first", "length", "base", "own", "store", "token_indptr", "token",
        "item", "part_indptr", "part", "leaf",
    )  # fmt: skip

    page_indptr: Tensor
    page: Tensor
    first: Tensor
    length: Tensor
    base: Tensor
    own: Tensor
    store: Tensor
    token_indptr: Tensor
    token: Tensor
    item: Tensor
    part_indptr: Tensor
    part: Tensor
    leaf: Tensor
    page_size: int | tuple[int, ...]
    # The numbers of pages, and for what they were found: all but `length`.
    _checked: tuple[tuple[int, ...], tuple] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        tensors = self.tensors()
        made_for = _but_length(tensors, self.page_size)
        if self._checked is not None and not any(map(operator.is_not, made_for, self._checked[1])):
            self._check_tensor("length", self.length)
            return
        for name, x in zip(self.TENSORS, tensors, strict=True):
            self._check_tensor(name, x)
        check(not self.item.is_meta, "item is on meta: a plan without ids cannot be checked")
        arrays = {n: x.cpu().numpy() for n, x in zip(self.TENSORS, tensors, strict=True)}
        checked = pages_needed(arrays, self.page_size), made_for
        object.__setattr__(self, "_checked", checked)

    def _check_tensor(self, name: str, x: Tensor) -> None:
        if x.dtype != torch.int32 or x.device != self.item.device or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int32 on {self.item.device}, the device of item; "
                f"got {x.dtype} on {x.device}"
            )
        if name == "length" and x.shape != self.first.shape:
            shapes = tuple(x.shape), tuple(self.first.shape)
            raise ValueError(f"length has shape {shapes[0]}, first {shapes[1]}; both are [nodes]")

    @property
    def pages(self) -> tuple[int, ...]:
        return self._checked[0]

    @property
    def page_sizes(self) -> tuple[int, ...]:
        return _several(self.page_size)

    @classmethod
    def from_host(cls, arrays: dict | Sequence[dict], device: torch.device | str = "cpu") -> "Plan":
        """A plan on `device` from the arrays of `kvtools._host`, and their `page_size`.

        Args:
            arrays: of one plan; or of several for the same query tokens, each over pages of its
                own: they become one plan over several stores, in that order. The rows grow in the
                first.
            device: where it is brought to, all at once.
        """
        arrays = arrays if isinstance(arrays, dict) else joined(arrays)
        page_size = arrays.get("page_size")
        pages = pages_needed(arrays, page_size)
        tensors = at_once([arrays[name] for name in cls.TENSORS], torch.device(device))
        return cls.of(tuple(tensors), page_size, pages)

    @classmethod
    def of(
        cls, tensors: tuple[Tensor, ...], page_size: int | tuple, pages: tuple[int, ...]
    ) -> "Plan":
        """A plan of tensors in the order of TENSORS, whose arrays are known to need `pages`."""
        return cls(*tensors, page_size, (pages, _but_length(tensors, page_size)))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of TENSORS."""
        return tuple(getattr(self, name) for name in self.TENSORS)

    def to(self, device: torch.device | str) -> "Plan":
        tensors = tuple(x.to(device) for x in self.tensors())
        return Plan.of(tensors, self.page_size, self.pages)

    def reserve(self, **sizes: int) -> "Plan":
        """The same plan in new tensors with room for others: what a CUDA graph is captured with.

        Args:
            **sizes: for the name of a tensor, its least length. The number of query tokens, the
                length of `part_indptr` less one, is that of the captured call. `pages`: how many
                pages of each store others may need; a call is held to it.
        """
        least = sizes.pop("pages", 0)
        pages = tuple(max(least, n) for n in self.pages)
        room = []
        for name, x in zip(self.TENSORS, self.tensors(), strict=True):
            # What is no work belongs to the first node, so there must be one.
            least = 2 if name.endswith("indptr") and name != "part_indptr" else 1
            least = 0 if name in ("part_indptr", "item", "leaf") else least
            size = max(sizes.pop(name, 0), x.shape[0], least)
            room.append(x.new_zeros(size, *x.shape[1:]))
        check(not sizes, lambda: f"a plan has no {', '.join(sizes)}")
        return Plan.of(tuple(room), self.page_size, pages).copy_(self)

    def copy_(self, other: "Plan") -> "Plan":
        """Become `other` in place; what it does not fill is no work.

        Raises:
            ValueError: a tensor of `other` is longer than its own here, or it needs more pages, or
                pages of another size. Nothing has changed.
        """
        check(
            other.page_size == self.page_size,
            lambda: f"page_size is {other.page_size}, here it is {self.page_size}",
        )
        check(
            all(map(operator.le, other.pages, self.pages)),
            lambda: f"{other.pages} pages are needed, not {self.pages}: reserve(pages=...) more",
        )
        pairs = list(zip(self.TENSORS, self.tensors(), other.tensors(), strict=True))
        for name, here, there in pairs:
            check(
                there.shape[0] <= here.shape[0],
                lambda name=name, here=here, there=there: (
                    f"{name} has {there.shape[0]} entries, there is room for {here.shape[0]}: "
                    f"reserve({name}=...) more"
                ),
            )
        for name, here, there in pairs:
            here[: len(there)] = there
            # The last offset goes on: tokens without partial results, items without tokens.
            here[len(there) :] = there[-1] if name.endswith("indptr") else 0
        return self


def _several(x: int | tuple[int, ...]) -> tuple[int, ...]:
    return x if isinstance(x, tuple) else (x,)


def joined(plans: Sequence[dict]) -> dict:
    """The arrays of one plan over the stores of `plans`, as `Plan.from_host` makes it."""
    starts = {
        name: np.cumsum([0, *(len(plan[name]) for plan in plans)])
        for name in ("first", "page", "token", "part")
    }
    shifted = [dict(plan) for plan in plans]
    for i, plan in enumerate(shifted):
        node, page, token, part = (int(starts[name][i]) for name in starts)
        plan["store"] = np.full(len(plan["first"]), i)
        plan["page_indptr"] = plan["page_indptr"][i > 0 :] + page
        plan["token_indptr"] = plan["token_indptr"][i > 0 :] + token
        plan["item"] = plan["item"] + [node, token, token, 0, 0, part]
        plan["part"] = plan["part"] + part
        plan["owner"] = np.repeat(
            np.arange(len(plan["part_indptr"]) - 1), np.diff(plan["part_indptr"])
        )
    joined = {name: np.concatenate([p[name] for p in shifted]) for name in (*Plan.TENSORS, "owner")}
    joined["part"] = joined["part"][np.argsort(joined["owner"], kind="stable")]
    slots = joined["item"][:, 4] - joined["item"][:, 3]
    joined["item"] = joined["item"][np.argsort(-slots, kind="stable")]  # longest first
    joined["part_indptr"] = sum(plan["part_indptr"] for plan in plans)
    joined["leaf"] = plans[0]["leaf"]
    return joined | {"page_size": tuple(plan["page_size"] for plan in plans)}


def _but_length(tensors: tuple[Tensor, ...], page_size: int | tuple) -> tuple:
    at = Plan.TENSORS.index("length")
    return *tensors[:at], *tensors[at + 1 :], page_size


def _host() -> ModuleType:
    try:
        from .. import _host
    except ImportError as error:
        raise ImportError(
            "plans need kvtools' C++ module: reinstall without KVTOOLS_EXT=0"
        ) from error
    return _host


def pages_needed(arrays: dict, page_size: int | tuple[int, ...]) -> tuple[int, ...]:
    """How many pages of each store a plan needs; raises unless it points nowhere else."""
    check(
        all(isinstance(size, int) and 0 < size < 2**31 for size in _several(page_size)),
        lambda: f"page_size={page_size!r}: expected a positive int32, or one for each store",
    )
    return tuple(_host().plan_pages(arrays, _several(page_size)))


def limits(device: torch.device, heads: int, group: int, impl: Impl = "auto") -> dict[str, int]:
    """How to cut the work of a plan for `device`, as arguments of the plan.

    On a GPU, tiles of as many query rows as the kernel takes at once, and as many work items at
    once as its multiprocessors run of the kernel. On a CPU nothing is cut: its kernel shares work
    as it runs.

    Args:
        device: that computes.
        heads: KV heads.
        group: query heads per KV head.
        impl: that computes; "auto" is Triton.
    """
    if device.type != "cuda":
        return {}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    impl = "cuda" if impl == "cuda" else "triton"
    items = PLACES[impl] * processors // heads
    return dict(tile=max(1, TILE_ROWS[impl] // group), items=max(1, items))


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
        block_table: [rows, blocks] page ids, int32 or int64; entries past a row's end may hold
            anything.
        seq_lens: [rows] tokens per row, those of this step included, int32 or int64.
        page_size: slots per block.
        query_lens: [rows] query tokens per row, at most `seq_lens`; default one each, in rows
            without tokens, too.
        tile: at most so many query tokens per work item; 0 for no limit.
        chunk: at most so many slots per work item, a multiple of `page_size`; 0 for no limit.
        items: without a `chunk`, cut such that all is done soonest where so many work items of a
            head run at once, longest first; see `limits`.

    Returns:
        A plan on the device of `block_table`. A partly filled last block is taken as its row's own.

    Raises:
        ValueError: a length or a block is no number that its row can have, or an argument has
            another shape or dtype.
    """
    limits = dict(tile=tile, chunk=chunk, items=items)
    arrays = block_table_arrays(block_table, seq_lens, page_size, query_lens, **limits)
    return Plan.from_host(arrays, block_table.device)


def block_table_arrays(
    block_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    query_lens: Tensor | None = None,
    index: Tensor | None = None,
    **how: int,
) -> dict:
    """What `plan_from_block_table` makes its plan of.

    Args:
        index: [rows] which row of the table each row is; by default all are, in order.
        **how: its limits; `share=False` plans each row by itself: as many items as rows, whatever
            these share.
    """
    check(
        block_table.dim() == 2,
        lambda: f"block_table must be [rows, blocks], got {tuple(block_table.shape)}",
    )
    rows = block_table.shape[0] if index is None else len(index)
    counts = torch.ones_like(seq_lens) if query_lens is None else query_lens
    named = dict(block_table=block_table, seq_lens=seq_lens, query_lens=counts)
    for name, x in named.items():
        check(
            x.dtype in (torch.int32, torch.int64),
            lambda name=name, x=x: f"{name} has dtype {x.dtype}, expected int32 or int64",
        )
        check(not x.is_meta, f"{name} is on meta: a plan without ids cannot be made")
        check(
            name == "block_table" or x.shape == (rows,),
            lambda name=name, x=x: f"{name} has shape {tuple(x.shape)}, expected {(rows,)}",
        )
    check(
        isinstance(page_size, int) and 0 < page_size < 2**31,
        lambda: f"page_size={page_size!r}: expected a positive int32",
    )
    table, lens, counts = (x.cpu().numpy() for x in named.values())
    if query_lens is not None:
        for row in np.flatnonzero((counts < 0) | (counts > lens)):
            raise ValueError(
                f"query_lens: row {row} has {counts[row]}, seq_lens has {lens[row]} tokens"
            )
    if index is not None:
        how["rows"] = index.cpu().numpy()
    return _host().plan_from_block_table(table, lens, page_size, counts, **how)


_TREE_SCHEMA = (
    "(Tensor q_thd, Tensor position_t, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? position, Tensor(a!)? importance, Tensor(b!)? history, Tensor[] more, int recent, "
    "Tensor page_indptr, Tensor page, Tensor first, Tensor length, Tensor base, Tensor own, "
    "Tensor store, Tensor token_indptr, Tensor token, Tensor item, Tensor part_indptr, "
    "Tensor part, Tensor? before_t, Tensor? frame, Tensor? frame_t, Tensor? state_out, "
    "Tensor? state_lse, Tensor? sink_h, float scale, float softcap, "
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
    pages: KVPages | Sequence[KVPages],
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sliding: int = 0,
    before_t: Tensor | None = None,
    frame: Tensor | None = None,
    frame_t: Tensor | None = None,
    sink_h: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    group: str = "all",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of query tokens over a forest of KV nodes, each read once for all its rows.

    Equivalent to, for each token t of row r, over the slots s of r's path with
    position[s] <= position[t] (and > position[t] - sliding; and < before[t], or, in recent pages,
    >= before[t]):

        x = softcap(scale (q[t] / gain[t]) · k[s]);  lse = logsumexp_s(x, sink_h, state.lse)
        out = Σ_s exp(x - lse) v[s] + exp(state.lse - lse) state.out

    Args:
        q_thd: queries after RoPE, the tokens of a row together, rows in the plan's order. fp64,
            fp32, fp16, bf16. Hq is a multiple of the pages' Hkv (GQA).
        position_t: true positions, int32, not below 0.
        pages: keys and values in any format, read packed; or the stores, at most MOST_STORES, that
            the plan's nodes lie in, each with formats and a page size of its own. `importance` and
            `history` of the first, where present, are changed in place for the nodes that one row
            owns: see *Importance*.
        plan: who reads what: made for as many query tokens, pages of this size and no more pages.
        scale: of the scores; default D ** -0.5.
        softcap: c in c · tanh(x / c), applied before masking (Gemma 2); 0 for none.
        sliding: how many positions a query sees, its own included; 0 for all.
        before_t: int32; a query sees only positions below this one, those from it on being kept
            elsewhere: in pages that are `recent`, where it sees these alone, or in `state`.
        frame: [frames, 2, Hkv, D]: keys are stored as (k - frame[., 0]) * frame[., 1], as
            `append_kv` does with the same; queries are divided by the gain frame[., 1]. Softmax
            does not see a center that is taken off all keys of a row; with a soft cap, `sink_h` or
            a `state` of other keys it must be 0.
        frame_t: [t] the frame of each token, int32; required with `frame`. One that does not exist
            is an IndexError on a CPU, and undefined, but within memory, where raising would have to
            wait.
        sink_h: [Hq] logits of a sink without a value (gpt-oss); they enter the final lse. fp32,
            fp16 or bf16 (fp64 for fp64).
        state: (out_thd, lse_th) over keys kept elsewhere, merged in before the final lse. Floating
            point, and fp32 (fp64 for fp64).
        window: steps that `pages.history` holds, as given to `KVPages.empty`; needed with a
            history.
        group: "all" notes a token as low if every query head of its KV head finds it low, "mean" if
            their average does.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++. What `python -m bench.model` predicts decides between
            the two, as nothing is measured: equal where nothing is shared, Triton where it is.

    Returns:
        out_thd in the dtype of `q_thd`, and lse_th (natural log, fp32; fp64 for fp64). A token that
        sees nothing gets out 0 and lse -inf.

    Importance: with p = exp(x - lse), `importance` gains the mean of p over the query heads of a KV
        head, and bit `position_t % window` of `history` becomes 1 where p is below the mean over
        the visible slots of the first pages, mean = exp(lse over them - lse) / their number. Keys
        in other pages, in `state` and the sink logit take their mass out of that mean.

    Numerics: accumulates in fp32 (fp64 for fp64), lse and merge included; on a CPU with AVX-512 few
        rows sum values of 8, 4 and 2 bits as integers, with weights of 16 bits where the output has
        16, else of 28, 64 slots at a time. A NaN in a query, or in a key that it sees, makes its
        out and lse NaN, and so does a score of +inf; a score of -inf counts nothing. A NaN in a
        value that it sees makes out NaN: there, or in all of the head if values are quantised. What
        a query does not see gives it no number: hidden keys count nothing whatever they hold,
        hidden values 0 times what they hold, which NaN and infinities in nodes that it reads turn
        into NaN. Other rows have nothing of it.

    Raises:
        ValueError: an argument has another shape, dtype or device than said, or the plan was made
            for other query tokens, another page size or more pages.

    Reference: Hydragen, arXiv:2402.05099; DeFT, arXiv:2404.00242; Scissorhands, arXiv:2305.17118
        (importance).
    """
    # Not `check`: no message is made here unless it is needed. The operator looks at devices.
    if q_thd.dim() != 3 or q_thd.dtype not in FLOATS:
        raise ValueError(
            f"q_thd has dtype {q_thd.dtype} and shape {tuple(q_thd.shape)}; expected floating "
            "point [tokens, heads, D]"
        )
    t, hq, d = q_thd.shape
    stores = (pages,) if isinstance(pages, KVPages) else tuple(pages)
    if not 0 < len(stores) <= MOST_STORES:
        raise ValueError(f"pages are {len(stores)} stores, expected 1 to {MOST_STORES}")
    for each in stores:
        check_pages(each, d)
    pages, heads = stores[0], stores[0].k.shape[1]
    if any(each.k.shape[1] != heads for each in stores):
        raise ValueError(
            f"pages have {[each.k.shape[1] for each in stores]} KV heads, not the same"
        )
    if hq == 0 or hq % heads:
        raise ValueError(f"q_thd has {hq} heads, not a multiple of the pages' {heads} KV heads")
    position_t = _per_token("position_t", position_t, t)
    if before_t is not None:
        before_t = _per_token("before_t", before_t, t)
    check_frame(frame, frame_t, t, heads, d)
    if plan.part_indptr.shape[0] != t + 1:
        raise ValueError(
            f"q_thd has {t} query tokens, plan was made for {plan.part_indptr.shape[0] - 1}"
        )
    made_for = tuple(zip(plan.pages, plan.page_sizes, strict=True))
    given = tuple((each.k.shape[0], each.page_size) for each in stores)
    if len(given) != len(made_for) or any(
        size != expected or count < least
        for (count, size), (least, expected) in zip(given, made_for, strict=True)
    ):
        raise ValueError(f"pages has {_of_slots(given)}, plan was made for {_of_slots(made_for)}")
    if group not in ("all", "mean"):
        raise ValueError(f"group={group!r}: expected 'all' or 'mean'")
    scale = d**-0.5 if scale is None else scale
    if not -inf < scale < inf:
        raise ValueError(f"scale={scale}: expected a finite number")
    if not 0 <= softcap < inf or not 0 <= sliding < 2**31:
        raise ValueError(
            f"softcap={softcap}, sliding={sliding}: softcap and sliding must not be negative, "
            "softcap finite and sliding below 2**31; 0 turns them off"
        )
    if sink_h is not None and (sink_h.shape != (hq,) or sink_h.dtype not in FLOATS):
        raise ValueError(
            f"sink_h must have shape {(hq,)}, one floating point logit per query head; got "
            f"{sink_h.dtype} {tuple(sink_h.shape)}"
        )
    words = 0 if pages.history is None else pages.history.shape[-1]
    if words != -(-window // 32):
        raise ValueError(
            f"window={window} does not fit pages.history of {words} words; pass the window given "
            "to KVPages.empty"
        )
    state_out, state_lse = (None, None) if state is None else state
    if state is not None:
        lse_dtype = torch.float64 if q_thd.dtype == torch.float64 else torch.float32
        if state_out.shape != q_thd.shape or state_out.dtype not in FLOATS:
            raise ValueError(
                f"state: out is {state_out.dtype} {tuple(state_out.shape)}, expected floating "
                f"point {tuple(q_thd.shape)} as q_thd"
            )
        if state_lse.shape != (t, hq) or state_lse.dtype != lse_dtype:
            raise ValueError(
                f"state: lse is {state_lse.dtype} {tuple(state_lse.shape)}, expected {lse_dtype} "
                f"{(t, hq)}"
            )
    more = [x for each in stores[1:] for x in each._checked[2]]
    recent = sum(bool(each.recent) << i for i, each in enumerate(stores))
    return _tree_attention(
        impl, q_thd, position_t, *pages.tensors(), more, recent, plan.page_indptr, plan.page,
        plan.first, plan.length, plan.base, plan.own, plan.store, plan.token_indptr, plan.token,
        plan.item, plan.part_indptr, plan.part, before_t, frame, frame_t, state_out, state_lse,
        sink_h, scale, softcap, sliding, window, group,
    )  # fmt: skip


def _of_slots(stores: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{pages} pages of {size} slots" for pages, size in stores)


def _per_token(name: str, x_t: Tensor, t: int) -> Tensor:
    if x_t.shape != (t,) or x_t.dtype != torch.int32:
        raise ValueError(
            f"{name} has shape {tuple(x_t.shape)} and dtype {x_t.dtype}, expected {(t,)}, int32"
        )
    return x_t if x_t.is_contiguous() else x_t.contiguous()


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
        out_bhd in the dtype of `a_bhd`, and lse_bh in fp32 (fp64 for fp64). Empty A and B give out
        0, lse -inf; what `a_bhd` or `b_bhd` holds where it is empty does not matter.

    Numerics: accumulates in fp32; a row's bits do not depend on its batch. A lse that is NaN or
        +inf makes both results NaN.

    Reference: Hydragen, arXiv:2402.05099.
    """
    check(
        a_bhd.dim() == 3 and a_bhd.shape[-1] > 0 and a_bhd.dtype in FLOATS,
        lambda: (
            f"a_bhd is {a_bhd.dtype} {tuple(a_bhd.shape)}, expected floating point [b, heads, D]"
        ),
    )
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
    lse_dtype = torch.float64 if a_bhd.dtype == torch.float64 else torch.float32
    check(
        a_lse_bh.dtype == b_lse_bh.dtype == lse_dtype,
        lambda: (
            f"a_lse_bh is {a_lse_bh.dtype}, b_lse_bh {b_lse_bh.dtype}, both must be {lse_dtype}"
        ),
    )
    return _merge_states(impl, a_bhd, a_lse_bh, b_bhd, b_lse_bh)
