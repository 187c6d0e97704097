"""Random calls of the operators, good and bad: python tests/fuzz_ops.py --cases 20000 --seed 1

A case passes if it returns and agrees with the reference, or raises an error that names an
argument; either way nothing outside of its tensors may have changed. They lie in larger buffers of
poison, in any layout, so that a stray write is seen and a stray read is NaN or absurd. Cases run in
a child process; a case in which it dies has failed, and the next ones get a new child.
"""

import argparse
import json
import math
import os
import random
import select
import signal
import sys
import traceback
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kvtools
from kvtools import KVPages, Plan, _host
from kvtools.ops.quant import FLOATS, FORMATS, TENSORS
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import LINKS, REDUCES, step_scores, token_logprobs
from kvtools.reference import quant

GUARD = 64  # bytes of poison on each side
PATIENCE = 300  # seconds that a case may take
RAISED = (ValueError, TypeError, IndexError, RuntimeError)
STORES = ("pages", "pages1", "pages2", "pages3")


@dataclass
class Case:
    """A call: `args` by name, those of pages and plans as `pages.k` or `plan.page`; `pages1.k` is
    of a second store."""

    function: object
    args: dict
    writes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # what an error may say besides
    bad: bool = False  # whether something was changed

    def call(self, impl: str, args: dict):
        args = dict(args)
        parts = {}
        for key in [key for key in args if "." in key]:
            name, _, part = key.partition(".")
            parts.setdefault(name, {})[part] = args.pop(key)
        for name, attributes in parts.items():
            args[name] = (Plan if name == "plan" else KVPages)(**attributes)
        stores = [args.pop(name) for name in STORES if name in args]
        if stores:
            args["pages"] = stores if len(stores) > 1 else stores[0]
        if "also" in args:
            args["also"] = args.pop("also_slot"), args["also"]
        if "state_out" in args:
            args["state"] = args.pop("state_out"), args.pop("state_lse")
        return self.function(**args, **({} if impl is None else {"impl": impl}))


class Buffers:
    """Tensors in buffers of poison."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.held = rng, []

    def put(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """A copy of `x` in a layout of chance, its last axis contiguous; `plain`: in order."""
        rng = self.rng
        order = list(range(x.dim()))
        room = [0] * x.dim()
        if not plain and x.dim():
            lead = order[:-1]
            rng.shuffle(lead)
            order = [*lead, order[-1]]
            room = [rng.choice((0, 0, 1, 2)) for _ in order]
        outer = [x.shape[i] + room[i] for i in order]
        size = math.prod(outer) * x.itemsize
        absurd = 0xFF if x.dtype.is_floating_point or x.dtype == torch.uint8 else 0x7F
        buffer = torch.full((size + 2 * GUARD,), absurd, dtype=torch.uint8)
        view = buffer[GUARD : GUARD + size].view(x.dtype).view(outer)
        view = view.permute([order.index(i) for i in range(x.dim())])
        for axis, extra in enumerate(room):
            view = view.narrow(axis, rng.randint(0, extra), x.shape[axis])
        view.copy_(x)
        self.held.append((buffer, None))
        return view

    def remember(self) -> None:
        self.held = [(buffer, buffer.clone()) for buffer, _ in self.held]

    def check(self, args: dict, writes: tuple[str, ...]) -> None:
        written = [
            x for n, x in args.items() if n in writes and isinstance(x, Tensor) and not x.is_meta
        ]
        for buffer, before in self.held:
            changed = buffer != before
            for x in written:
                if x.untyped_storage().data_ptr() == buffer.data_ptr():
                    raw = x[..., None].view(torch.uint8)
                    changed.as_strided(raw.shape, raw.stride(), raw.storage_offset()).zero_()
            if changed.any():
                where = changed.nonzero()[:8, 0].tolist()
                raise AssertionError(f"a stray write, at bytes {where} of {len(buffer)}")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def make_pages(rng, put, pages, heads, page_size, d, name="pages", **options) -> dict:
    made = KVPages.empty(pages, heads, page_size, d, **options)
    for x in made.tensors():
        if x is not None:
            x[..., None].view(torch.uint8).zero_()
    if made.importance is not None:
        made.importance.uniform_()
    tensors = zip(TENSORS, made.tensors(), strict=True)
    return {f"{name}.{n}": x if x is None else put(x) for n, x in tensors}


def pages_of(args: dict, name: str) -> KVPages:
    return KVPages(*(args[f"{name}.{n}"] for n in TENSORS))


def some_frames(rng, put, t: int, heads: int, d: int, dtype: torch.dtype) -> dict:
    count = rng.randint(1, 3)
    frame = torch.randn(count, 2, heads, d)
    frame[:, 1] = 2.0 ** torch.randint(-2, 3, (count, heads, d))
    frame_t = torch.randint(0, count, (t,), dtype=torch.int32)
    return dict(frame=put(frame.to(dtype)), frame_t=put(frame_t))


def some_format(rng: random.Random, d: int) -> str:
    return rng.choice(FORMATS) if d % 8 == 0 else "none"


def tree_attention(rng, put) -> Case:
    page_size, heads, group = rng.choice((1, 3, 4, 16)), rng.randint(1, 2), rng.randint(1, 3)
    d, dtype = rng.choice((8, 16, 20, 40)), rng.choice(FLOATS[1:])
    forest = _host.Forest(64, page_size)
    for _ in range(rng.randint(1, 2)):
        forest.insert(rng.randint(1, min(20, 8 * page_size)), 0, rng.randint(1, 3))
    counts = np.array([rng.randint(0, 3) for _ in range(forest.num_rows)], np.int32)
    forest.append(counts)
    window = rng.choice((0, 0, 5, 40))
    args = make_pages(
        rng, put, forest.num_pages, heads, page_size, d, k_format=some_format(rng, d),
        v_format=some_format(rng, d), dtype=rng.choice((dtype, torch.float32)),
        position=rng.random() < 0.3, importance=rng.random() < 0.3, window=window,
    )  # fmt: skip
    pages = pages_of(args, "pages")
    used = np.unique(np.concatenate([forest.row_slots(r) for r in range(forest.num_rows)]))
    k = randn(2, len(used), heads, d, dtype=dtype)
    place = torch.arange(len(used))
    kvtools.append_kv(*k, torch.from_numpy(used), pages, place, impl="reference")
    t, lengths = int(counts.sum()), forest.lengths()
    plans = [forest.plan(counts, rng.randint(0, 3), rng.choice((0, 0, page_size)))]
    for name in STORES[1 : rng.choice((1, 1, 2, 3, 4))]:
        count, size, blocks = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3)
        args |= make_pages(
            rng, put, count, heads, size, d, name, k_format=some_format(rng, d),
            v_format=some_format(rng, d), dtype=rng.choice((dtype, torch.float32)),
            position=rng.random() < 0.5,
        )  # fmt: skip
        store, place = pages_of(args, name), torch.arange(count * size)
        k = randn(2, len(place), heads, d, dtype=dtype)
        kvtools.append_kv(*k, place, store, place, impl="reference")
        args[f"{name}.recent"] = rng.random() < 0.5
        shape = len(counts), max(blocks, -(-int(counts.max(initial=0)) // size))
        table = np.array([[rng.randrange(count) for _ in range(shape[1])] for _ in counts])
        lens = np.array([rng.randint(int(n), shape[1] * size) for n in counts])
        table, lens = (x.astype(np.int32) for x in (table.reshape(shape), lens))
        plans.append(_host.plan_from_block_table(table, lens, size, counts))
    plan = Plan.from_host(plans if len(plans) > 1 else plans[0])
    for name, x in zip(Plan.TENSORS, plan.tensors(), strict=True):
        args[f"plan.{name}"] = put(x, plain=True)
    args["plan.page_size"] = plan.page_size
    if rng.random() < 0.3:
        args |= some_frames(rng, put, t, heads, d, rng.choice((dtype, torch.float32)))
    ends = np.repeat(lengths - counts, counts) + 1
    args["q_thd"] = put(randn(t, heads * group, d, dtype=dtype))
    args["position_t"] = put(torch.from_numpy(ends.astype(np.int32)))
    if rng.random() < 0.3:
        args["before_t"] = put(args["position_t"] - 1)
    if rng.random() < 0.3:
        args["sink_h"] = put(randn(heads * group, dtype=dtype))
    if rng.random() < 0.3:
        args["state_out"] = put(randn(t, heads * group, d, dtype=dtype))
        args["state_lse"] = put(randn(t, heads * group))
    args |= dict(
        scale=rng.choice((None, 0.3)), softcap=rng.choice((0.0, 2.0)), window=window,
        sliding=rng.choice((0, 0, 4)), group=rng.choice(("all", "mean")),
    )  # fmt: skip
    return Case(
        kvtools.tree_attention, args, ("pages.importance", "pages.history"), ("state", "more")
    )


def merge_states(rng, put) -> Case:
    shape, dtype = [rng.randint(0, 3), rng.randint(1, 3), rng.choice((1, 7, 16))], some_float(rng)
    a, b = (put(randn(*shape, dtype=dtype)) for _ in "ab")
    a_lse, b_lse = (put(randn(*shape[:2])) for _ in "ab")
    return Case(kvtools.merge_states, dict(a_bhd=a, a_lse_bh=a_lse, b_bhd=b, b_lse_bh=b_lse))


def some_float(rng) -> torch.dtype:
    return rng.choice(FLOATS[1:])


def quantize_kv(rng, put) -> Case:
    x = put(randn(rng.randint(0, 3), rng.randint(1, 3), rng.choice((8, 24, 64)),
                  dtype=some_float(rng)))  # fmt: skip
    return Case(kvtools.quantize_kv, dict(x=x, format=rng.choice(FORMATS[1:])))


def dequantize_kv(rng, put) -> Case:
    d, format = rng.choice((8, 24, 64)), rng.choice(FORMATS[1:])
    codes, scale = quant.quantize_kv(randn(rng.randint(0, 3), 2, d), format)
    args = dict(codes=put(codes), scale=put(scale), d=d, dtype=some_float(rng))
    return Case(kvtools.dequantize_kv, args)


def append_kv(rng, put) -> Case:
    heads, page_size, d, count = rng.randint(1, 3), rng.randint(1, 5), rng.choice((5, 8, 24)), 4
    position = rng.random() < 0.5
    args = make_pages(
        rng, put, count, heads, page_size, d, k_format=some_format(rng, d), position=position,
        v_format=some_format(rng, d), dtype=some_float(rng), importance=rng.random() < 0.5,
        window=rng.choice((0, 9)),
    )  # fmt: skip
    t = rng.randint(0, min(5, count * page_size))

    def some_slots(size: int) -> Tensor:
        slots = torch.randperm(count * size)[:t].to(rng.choice((torch.int32, torch.int64)))
        slots[torch.rand(t) < 0.2] = -1
        return put(slots[:, None].expand(t, heads).contiguous() if rng.random() < 0.5 else slots)

    second = rng.random() < 0.4
    if second:
        size = rng.randint(page_size, 6)
        args |= make_pages(
            rng, put, count, heads, size, d, "also", k_format=some_format(rng, d),
            v_format=some_format(rng, d), dtype=some_float(rng), position=rng.random() < 0.5,
            importance=rng.random() < 0.5,
        )  # fmt: skip
    writes, dtype = tuple(args), some_float(rng)
    if second:
        args["also_slot"] = some_slots(size)
    args["slot"] = some_slots(page_size)
    args |= {name: put(randn(t, heads, d, dtype=dtype)) for name in ("k_thd", "v_thd")}
    if position:
        args["position_t"] = put(torch.arange(t, dtype=torch.int32))
    if rng.random() < 0.4:
        args |= some_frames(rng, put, t, heads, d, some_float(rng))
    return Case(kvtools.append_kv, args, writes, ("also",))


def compact_kv(rng, put) -> Case:
    heads, page_size, count = rng.randint(1, 3), rng.randint(1, 5), 4
    args = make_pages(
        rng, put, count, heads, page_size, 8, k_format=rng.choice(FORMATS),
        v_format=rng.choice(FORMATS), dtype=some_float(rng), position=rng.random() < 0.5,
        importance=rng.random() < 0.5, window=rng.choice((0, 9)),
    )  # fmt: skip
    writes = tuple(args)
    n, slots = rng.randint(0, count * page_size), count * page_size
    for name in ("source_nh", "target_nh"):
        moves = torch.stack([torch.randperm(slots)[:n] for _ in range(heads)], 1)
        args[name] = put(moves.to(rng.choice((torch.int32, torch.int64))))
    return Case(kvtools.compact_kv, args, writes)


def key_scores(rng, put) -> Case:
    b, heads, group, s = rng.randint(0, 2), rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 70)
    w, d, dtype = rng.randint(0, min(s, 20)), rng.choice((1, 8, 24)), some_float(rng)
    args = dict(q_bhwd=put(randn(b, heads * group, w, d, dtype=dtype)),
                k_bhsd=put(randn(b, heads, s, d, dtype=dtype)))  # fmt: skip
    if rng.random() < 0.3:
        args["sink_h"] = put(randn(heads * group))
    args |= dict(sinks=rng.randint(0, 3), softcap=rng.choice((0.0, 2.0)),
                 sliding=rng.choice((0, 0, 4)), group=rng.choice(("all", "mean")))  # fmt: skip
    return Case(kvtools.key_scores, args)


def select_victims(rng, put) -> Case:
    shape = [rng.randint(0, 3), rng.randint(1, 2), rng.randint(0, 40)]
    worth = rng.choice((torch.float32, torch.int32, torch.bfloat16, torch.int64))
    position = torch.rand(shape).argsort(-1).int()
    position[torch.rand(shape) < 0.1] = 2**31 - 1
    args = dict(score_nhs=put((3 * torch.randn(shape)).round().to(worth)),
                position_nhs=put(position), count=rng.randint(0, shape[2]))  # fmt: skip
    if rng.random() < 0.5:
        args["tie_nhs"] = put(torch.randn(shape))
    for name in ("protect_below_n", "protect_from_n"):
        if rng.random() < 0.5:
            args[name] = put(torch.randint(0, 40, shape[:1], dtype=torch.int32))
    return Case(kvtools.select_victims, args)


def draw(rng, put) -> Case:
    b, v = rng.randint(0, 4), rng.choice((1, 5, 100, 1000))
    args = dict(
        logits_bv=put(3 * randn(b, v, dtype=some_float(rng))),
        seed_b=put(torch.randint(-(2**62), 2**62, (b,))),
        position_b=put(torch.randint(0, 99, (b,), dtype=torch.int32)),
        temperature=rng.choice((0.0, 1.0, 0.6)),
        top_k=rng.choice((0, 3, 10**6)),
        top_p=rng.choice((1.0, 0.7)),
        min_p=rng.choice((0.0, 0.1)),
    )
    if rng.random() < 0.3:
        args["top_k"] = put(torch.randint(0, v + 2, (b,)))
    if rng.random() < 0.3:
        args["top_p"] = put(torch.rand(b).clamp(min=0.01))
    return Case(sample, args)


def steps(rng, put) -> Case:
    counts = [rng.randint(0, 4) for _ in range(rng.randint(0, 3))]
    t, m, dtype = rng.randint(1, 9), rng.choice((1, 8, 33)), some_float(rng)
    k, s = rng.randint(1, 3), sum(counts)
    kind = rng.choice((torch.int32, torch.int64))
    args = dict(
        hidden_tm=put(randn(t, m, dtype=dtype)),
        step_s=put(torch.randint(0, t, (s,), dtype=kind)),
        cu_steps=put(torch.tensor([0, *counts]).cumsum(0).to(kind)),
        weight_km=put(randn(k, m, dtype=dtype)),
        temperature=rng.choice((0.1, 1.0)),
    )
    args["link"], args["reduce"] = rng.choice(PAIRS)
    if rng.random() < 0.5:
        args["bias_k"] = put(randn(k, dtype=dtype))
    return Case(step_scores, args)


def logprobs(rng, put) -> Case:
    t, m, v = rng.randint(0, 9), rng.choice((1, 8, 33)), rng.choice((1, 7, 100))
    dtype, kind = some_float(rng), rng.choice((torch.int32, torch.int64))
    target = torch.randint(0, v, (t,), dtype=kind)
    target[torch.rand(t) < 0.2] = -100
    args = dict(hidden_tm=put(randn(t, m, dtype=dtype)), weight_vm=put(randn(v, m, dtype=dtype)),
                target_t=put(target), softcap=rng.choice((0.0, 3.0)))  # fmt: skip
    if rng.random() < 0.5:
        args["cu_seqlens"] = put(torch.tensor([0, t // 2, t], dtype=kind))
    if rng.random() < 0.3:
        args["ref_hidden_tm"] = put(randn(t, m + 1, dtype=dtype))
        args["ref_weight_vm"] = put(randn(v, m + 1, dtype=dtype))
    return Case(token_logprobs, args)


def block_table(rng, put) -> Case:
    rows, blocks, page_size = rng.randint(0, 4), rng.randint(1, 4), rng.choice((1, 4))
    kind = rng.choice((torch.int32, torch.int64))
    lens = torch.randint(0, blocks * page_size + 1, (rows,), dtype=kind)
    args = dict(block_table=put(torch.randint(0, 3, (rows, blocks), dtype=kind)),
                seq_lens=put(lens), page_size=page_size)  # fmt: skip
    if rng.random() < 0.5:
        args["query_lens"] = put(torch.minimum(lens, torch.ones_like(lens)))
    args |= dict(tile=rng.randint(0, 2), chunk=rng.choice((0, page_size)), items=rng.randint(0, 3))

    def plan_and_read(**arguments):
        plan = kvtools.plan_from_block_table(**arguments)
        if plan.page_size > 2**20:
            return None
        pages = KVPages.empty(3, 1, arguments["page_size"], 8)
        for x in (pages.k, pages.v):
            x.zero_()
        t = len(plan.part_indptr) - 1
        return kvtools.tree_attention(
            torch.ones(t, 1, 8), torch.zeros(t, dtype=torch.int32), pages, plan
        )

    return Case(plan_and_read, args, names=("pages", "counts", "item"))


MAKERS = (
    tree_attention, tree_attention, tree_attention, merge_states, quantize_kv, dequantize_kv,
    append_kv, append_kv, compact_kv, key_scores, select_victims, draw, steps, logprobs,
    block_table,
)  # fmt: skip
PAIRS = [
    (link, reduce)
    for link in LINKS
    for reduce in REDUCES
    if link == "sigmoid" or reduce not in ("prod", "gmean")
]
NUMBERS = (0, 1, -1, 3, 0.5, -1.5, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, math.nan, math.inf)
IDS = (0, 1, -1, -2, 5, 64, 1000, 2**31 - 1, -(2**31), 2**40)
KINDS = (
    *FLOATS, torch.int32, torch.int64, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn,
    torch.complex64,
)  # fmt: skip


def spoil(rng: random.Random, case: Case, put) -> None:
    """Change something about one argument, or move all to where nothing is."""
    case.bad = True
    if rng.random() < 0.02:
        case.args = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in case.args.items()}
        return
    name = rng.choice([n for n, x in case.args.items() if not isinstance(x, str | None)])
    x = case.args[name]
    if isinstance(x, torch.dtype):
        case.args[name] = rng.choice(KINDS)
        return
    if isinstance(x, bool):
        case.args[name] = not x
        return
    if not isinstance(x, Tensor):
        case.args[name] = rng.choice(NUMBERS)
        return
    if x.is_meta or x.requires_grad or x.dim() == 0:  # changed before
        return
    axis = rng.randrange(x.dim())
    kind = rng.choice(("value",) * 4 + ("cut", "grow", "drop", "add", "dtype", "device", "turn",
                                        "none", "expand", "grad", "spread"))  # fmt: skip
    if kind == "value" and x.numel() and not x.dtype.is_complex:
        at = tuple(rng.randrange(n) for n in x.shape)
        if x.dtype.is_floating_point and x.dtype != torch.float8_e4m3fn:
            x[at] = rng.choice((math.nan, math.inf, -math.inf))
        elif not x.dtype.is_floating_point:
            range_ = torch.iinfo(torch.uint8 if x.dtype == torch.bool else x.dtype)
            x[at] = min(max(rng.choice(IDS), range_.min), range_.max)
    elif kind == "cut" and x.shape[axis]:
        x = x.narrow(axis, rng.randint(0, 1), x.shape[axis] - 1)
    elif kind == "grow" and x.shape[axis]:
        index = torch.arange(x.shape[axis] + rng.randint(1, 3)) % x.shape[axis]
        raw = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        x = put(raw.index_select(axis, index).view(x.dtype))
    elif kind == "drop" and x.shape[0]:
        x = x[0]
    elif kind == "add":
        x = x[None]
    elif kind == "dtype":
        x = x.to(rng.choice(KINDS))
    elif kind == "device":
        x = x.to("meta")
    elif kind == "turn":
        x = x.transpose(0, -1)
    elif kind == "none":
        x = x[:0]
    elif kind == "expand" and x.shape[0] and name not in case.writes:
        x = x[:1].expand_as(x)
    elif kind == "grad" and x.dtype.is_floating_point:
        x = x.detach().clone().requires_grad_()
    elif kind == "spread" and x.dtype != torch.float8_e4m3fn:
        x = torch.stack([x, x], -1)[..., 0]
    case.args[name] = x


def run(seed: int, index: int, impl: str) -> str:
    """Run a case: what it came to, "equal" or the name of an error. AssertionError if it failed."""
    rng = random.Random(f"{seed}/{index}")
    torch.manual_seed(rng.getrandbits(60))
    buffers = Buffers(rng)
    case = rng.choice(MAKERS)(rng, buffers.put)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        spoil(rng, case, buffers.put)
    buffers.remember()
    try:
        return outcome_of(case, buffers, impl)
    except AssertionError as error:
        shown = {n: shape_of(x) if isinstance(x, Tensor) else x for n, x in case.args.items()}
        raise AssertionError(f"{error}\n{case.function.__name__} {shown}") from error


def shape_of(x: Tensor) -> str:
    return f"{str(x.dtype)[6:]}{list(x.shape)}@{x.device}"


def outcome_of(case: Case, buffers: Buffers, impl: str) -> str:
    impl = None if case.function.__name__ == "plan_and_read" else impl
    before = {n: x.clone() if isinstance(x, Tensor) else x for n, x in case.args.items()}
    try:
        actual = case.call(impl, case.args)
    except RAISED as error:
        buffers.check(case.args, case.writes)
        assert case.bad, f"refused: {error!r}"
        names = {part for n in (*case.args, *case.names) for part in (n, n.rpartition(".")[2])}
        assert any(n in str(error) for n in names), f"names no argument: {error!r}"
        return type(error).__name__
    buffers.check(case.args, case.writes)
    if impl is not None and not any(isinstance(x, Tensor) and x.is_meta for x in before.values()):
        compare(case, actual, before)
    return "equal"


def compare(case: Case, actual: object, args: dict) -> None:
    """`actual` against the reference on the arguments as they were."""
    name = case.function.__name__
    try:
        eager = case.call("reference", args)
    except RAISED as error:
        raise AssertionError(f"the reference refuses: {error!r}") from error
    tensors = [x for x in args.values() if isinstance(x, Tensor)]
    finite = all(x.isfinite().all() for x in tensors if x.dtype in FLOATS)
    if name in ("select_victims", "compact_kv", "append_kv"):
        if name == "select_victims":
            assert torch.equal(actual, eager), "other victims"
            return
        for slots in (args[n] for n in ("slot", "also_slot", "target_nh") if n in args):
            slots = slots if slots.dim() == 2 else slots[:, None]
            for column in slots.T.tolist():
                column = [slot for slot in column if slot >= 0]
                if len(set(column)) < len(column):
                    return
        for key in case.writes:
            x, y = case.args[key], args[key]
            if x is None:
                continue
            if name == "append_kv" and key.endswith((".k", ".v", ".k_scale", ".v_scale")):
                continue
            x, y = (each.contiguous().view(torch.uint8) for each in (x, y))
            assert torch.equal(x, y), f"other {key}"
        if name == "append_kv":
            d = args["k_thd"].shape[-1]
            for key in (key for key in case.writes if key.endswith((".k", ".v"))):
                x, y = (decoded(each[key], each[f"{key}_scale"], d) for each in (case.args, args))
                close(x, y, key, share_of(args[key], d))
        return
    actual, eager = several(actual), several(eager)
    if name == "quantize_kv":
        d = args["x"].shape[-1]
        x, y = decoded(*actual, d), decoded(*eager, d)
        close(x, y, "codes", share_of(actual[0], d))
        return
    if name == "sample":
        assert torch.equal(actual[0], eager[0]), "other tokens"
        for x, y in zip(actual[1:], eager[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)
        return
    if not finite:
        for x, y in zip(actual, eager, strict=True):
            assert torch.isfinite(x[y.isfinite()]).all(), "a number became none"
        return
    if any(x.dtype == torch.float64 for x in tensors):
        return
    narrow = ("hidden_tm", "weight_km", "bias_k", "weight_vm", "ref_hidden_tm", "ref_weight_vm")
    if name in ("step_scores", "token_logprobs"):  # take no fp64
        args = {n: x.float() if n in narrow else x for n, x in args.items()}
        for x, y in zip(actual, case.call("reference", args), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3, equal_nan=True)
        return
    wide = args | ({"dtype": torch.float64} if "dtype" in args else {})
    for key, x in args.items():
        if isinstance(x, Tensor) and x.dtype in FLOATS and "scale" not in key:
            wide[key] = x if key == "pages.importance" else x.double()
    exact = several(case.call("reference", wide))
    for what, *triple in zip("012", actual, exact, eager, strict=False):
        if triple[0].dtype.is_floating_point:
            within(f"result {what}", triple[0], triple[1].double(), triple[2])


def several(x: object) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def decoded(pages: Tensor, scale: Tensor | None, d: int) -> Tensor:
    return quant.decode(pages, scale, quant.format_of(pages, d), torch.float32)


def share_of(codes: Tensor, d: int) -> float:
    """What a code that differs by one, where two are as near, may do to a few heads."""
    return 0.5 if codes.dtype == torch.uint8 and codes.shape[-1] * 8 <= 3 * d else 0.1


def within(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The error rule, with room for results that are small beside what they are summed of."""
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: other non-finite entries"
    if not finite.any():
        return
    error, allowed = ((x[finite].double() - exact[finite]).abs().max() for x in (actual, eager))
    most = max(1.0, float(exact[finite].abs().max()))
    allowed = 4 * (allowed + torch.finfo(actual.dtype).eps * most)
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"


def close(x: Tensor, y: Tensor, what: str, share: float) -> None:
    """Codes may differ by one here and there: what they stand for may not."""
    assert torch.equal(x.isnan(), y.isnan()), f"other NaN in {what}"
    x, y = x.nan_to_num(0, 0, 0).double(), y.nan_to_num(0, 0, 0).double()
    assert (x - y).norm() <= share * y.norm() + 1e-6, f"other {what}"


def work(seed: int, begin: int, end: int, impl: str, pipe: int) -> None:
    """The child: a line when a case starts, and one when it is over."""
    torch.set_num_threads(1)
    for index in range(begin, end):
        os.write(pipe, f"{index}\n".encode())
        try:
            outcome, failure = run(seed, index, impl), None
        except BaseException:
            outcome, failure = "failed", traceback.format_exc()[-1500:]
        os.write(pipe, (json.dumps([outcome, failure]) + "\n").encode())


def fuzz(cases: int, seed: int, impl: str = "auto", begin: int = 0) -> tuple[dict, list]:
    """How many cases came to what, and those that failed: (index, why)."""
    counts, failures = {}, []
    while begin < cases:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                work(seed, begin, cases, impl, writer)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        why, running = "", None
        with open(reader, "rb", buffering=0) as lines:
            text = b""
            while True:
                if not select.select([lines], [], [], PATIENCE)[0]:
                    os.kill(child, signal.SIGKILL)
                    why = f"took more than {PATIENCE} s"
                    break
                got = lines.read(65536)
                if not got:
                    break
                *whole, text = (text + got).split(b"\n")
                for line in whole:
                    if line.startswith(b"["):
                        outcome, failure = json.loads(line)
                        counts[outcome] = counts.get(outcome, 0) + 1
                        if failure:
                            failures.append((running, failure))
                        begin, running = running + 1, None
                    else:
                        running = int(line)
        _, status = os.waitpid(child, 0)
        if running is not None:
            failures.append((running, why or f"the process died: wait status {status}"))
            counts["died"] = counts.get("died", 0) + 1
            begin = running + 1
        elif begin < cases:
            raise RuntimeError(f"the child ended before case {begin}: wait status {status}")
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--only", type=int, help="run this case alone, here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        print(run(args.seed, args.only, args.impl))
        return 0
    counts, failures = fuzz(args.cases, args.seed, args.impl)
    for index, why in failures[:20]:
        print(f"case {index}: {why}\n")
    print(f"{args.cases} cases, seed {args.seed}, impl={args.impl}: {len(failures)} failed", counts)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
