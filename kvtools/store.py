"""A forest of nodes and the pages of the layers that follow it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._host import Forest, PoolExhausted
from .config import CacheConfig, is_int
from .ops.attention import Plan
from .ops.evict import compact_kv, select_victims
from .ops.quant import EMPTY, KVPages
from .policy import Candidates, policy_of, unroll
from .transaction import CONTENT, SIGNALS, Journal


@dataclass
class Pass:
    """One write and read of a store, the same for all its layers: arrays, which `on_device` brings
    there."""

    token: Any  # query tokens of the step that take part; None for all
    row_t: Any
    slot_t: Any  # where the forest appended; overridden for tokens that evict
    grow: Any  # slots by row
    plan: Plan
    pages: Tensor  # those of the store in the plan
    again: bool  # the plan was there before: only lengths advance
    evict: Any = None  # tokens that overwrite a victim
    cursor: Any = None  # which victim of their row
    select: Any = None  # rows that need new victims first
    tokens: dict[str, Tensor] = field(default_factory=dict)  # what else there is of each token

    def begin(self, snapshot: bool, **tokens: Tensor) -> None:
        """Once it is on the device: advance lengths; take what there is of its tokens."""
        if self.again:
            self.plan.length.index_add_(0, self.plan.leaf.clamp(min=0).long(), self.grow)
        if snapshot:  # the next pass advances the lengths before this one has run on all layers
            self.plan = replace(self.plan, length=self.plan.length.clone())
        self.tokens = {name: self.of(x) for name, x in tokens.items()}

    def of(self, x: Tensor) -> Tensor:
        """The entries of the tokens that take part."""
        return x if self.token is None else x[self.token]


class Store:
    """A forest and the pages of all layers that follow it: those with the same budgets."""

    def __init__(
        self,
        config: CacheConfig,
        factor: float,
        pages: int | None,
        journal: Journal,
        device: torch.device,
    ) -> None:
        def scaled(budget: int | None) -> int | None:
            floor = config.sinks + config.recent + 1
            return None if budget is None else max(floor, round(budget * factor))

        self.config, self.factor, self.fixed = config, factor, pages is not None
        self.device = device
        self.budget = scaled(config.budget)
        self.drop = None
        if self.budget is not None:
            drop = config.drop or max(1, config.budget // 8)
            self.drop = min(max(1, round(drop * factor)), self.budget - config.recent)
        self.forest, self.journal = Forest(pages or 0, config.page_size), journal
        self.layers: dict[int, KVPages] = {}
        self.victims: dict[int, Tensor] = {}  # [rows, heads, drop] slots of the row's own, by layer
        self.left = np.zeros(0, np.int32)  # victims not yet overwritten, by row
        self.scrambled = np.zeros(0, bool)  # rows whose slots are no longer in order
        self.table: Tensor | None = None  # [rows, budget] flat slots of full rows
        self.limits: dict[str, int] = {}  # how plans cut work
        self._plan: Plan | None = None
        self._plan_key: tuple | None = None
        self._pages: Tensor | None = None

    def kept(self, length: int) -> int:
        """How many tokens of a prompt of `length` tokens are kept."""
        share = self.config.prompt_budget
        if share in (None, 1.0):
            return length
        floor = self.config.sinks + self.config.recent + 1
        budget = share if is_int(share) else share * length
        return min(length, max(floor, round(budget * self.factor)))

    def reserve(self, pages: int) -> None:
        """Make sure that `pages` pages are free: grow the pool, or raise if it is fixed."""
        free, total = self.forest.free_pages, self.forest.num_pages
        if pages <= free:
            return
        if self.fixed:
            raise PoolExhausted(
                f"the page pool is exhausted: {pages} pages are needed, {free} of {total} are "
                "free; give the cache more pages, or drop rows"
            )
        total += max(pages - free, total // 16)
        for layer in self.layers.values():
            layer.grow(total)
        self.forest.grow(total)  # last: where memory ends before, some layers have pages to spare

    def insert(self, slots: int, base: int, copies: int) -> np.ndarray:
        """Add a prompt of `slots` kept tokens and `copies` rows over it; returns its flat slots."""
        taken = self.forest.insert(slots, base, copies)
        self.left = np.concatenate([self.left, np.zeros(copies, np.int32)])
        self.scrambled = np.concatenate([self.scrambled, np.zeros(copies, bool)])
        for layer, victims in self.victims.items():
            none = victims.new_zeros(copies, *victims.shape[1:])
            self.victims[layer] = torch.cat([victims, none])
        return taken

    def pages_of(self, layer: int, heads: int, d: int, dtype: torch.dtype) -> KVPages:
        """The pages of `layer`, made at first use."""
        if layer not in self.layers:
            config, policy = self.config, policy_of(self.config.policy)
            evicts = self.budget is not None
            self.layers[layer] = KVPages.empty(
                self.forest.num_pages, heads, config.page_size, d,
                k_format=config.k_format, v_format=config.v_format, dtype=dtype, device=self.device,
                position=evicts or config.prompt_budget is not None,
                importance=evicts and bool(policy.mass),
                window=config.window if evicts and policy.history else 0,
            )  # fmt: skip
        return self.layers[layer]

    def passes(
        self, counts: np.ndarray, beside: Callable[[np.ndarray], list[dict]], version: tuple
    ) -> list[Pass]:
        """Take slots for `counts` tokens per row; one by one where a row exceeds its budget or the
        policy looks at the last token alone.

        `beside` gives the plans of what rows read besides, for some tokens per row; it depends on
        `version`.
        """
        last_only = policy_of(self.config.policy).mass == "step"  # so each must be the last once
        if self.budget is None or not (
            (self.forest.own_lengths() + counts > self.budget).any()
            or (last_only and (counts > 1).any())
        ):
            row_t = np.repeat(np.arange(len(counts)), counts)
            return [self._pass(None, row_t, counts, counts, beside, version)]
        passes = []
        start = np.cumsum(counts) - counts
        for i in range(counts.max()):
            active = counts > i
            row_t = np.flatnonzero(active)
            full = (self.forest.own_lengths() >= self.budget) & active
            each = self._pass(start[row_t] + i, row_t, active & ~full, active, beside, version)
            if full.any():
                slot_t = np.full(len(row_t), -1)
                slot_t[~full[row_t]] = each.slot_t
                empty = full & (self.left == 0)
                self.left[empty] = self.drop
                self.scrambled |= full
                each.slot_t, each.evict = slot_t, np.flatnonzero(full[row_t])
                each.cursor = self.drop - self.left[row_t[each.evict]]
                each.select = np.flatnonzero(empty) if empty.any() else None
                self.left[full] -= 1
            passes.append(each)
        return passes

    def _pass(
        self,
        token: np.ndarray | None,
        row_t: np.ndarray,
        grow: np.ndarray,
        counts: np.ndarray,
        beside: Callable[[np.ndarray], list[dict]],
        version: tuple,
    ) -> Pass:
        grow, counts = grow.astype(np.int32), counts.astype(np.int32)
        slot_t = self.forest.append(grow)
        key = (self.forest.version, *version, counts.tobytes())
        again = key == self._plan_key
        if not again:
            plan = self.forest.plan(counts, **self.limits)
            others = beside(counts)
            self._plan = Plan.from_host([plan, *others] if others else plan, self.device)
            self._plan_key, self._pages = key, self._plan.page[: len(plan["page"])]
        return Pass(token, row_t, slot_t, grow, self._plan, self._pages, again and grow.any())

    def own_slots(self) -> Tensor:
        """Flat slots [rows, budget] of every full row's own tokens; zeros for other rows."""
        if self.table is None or self.table.shape[0] != self.forest.num_rows:
            self.table = torch.zeros(
                self.forest.num_rows, self.budget, dtype=torch.int64, device=self.device
            )
            self._in_table = np.zeros(self.forest.num_rows, bool)
        new = (self.forest.own_lengths() >= self.budget) & ~self._in_table
        for row in np.flatnonzero(new):
            slots = self.forest.row_slots(row)[-self.budget :]
            self.table[row] = torch.from_numpy(slots.astype(np.int64))
        self._in_table |= new
        return self.table

    def gather(self, index: np.ndarray) -> None:
        copy = self.budget is not None  # so that evicting in one row cannot touch another
        free = self.forest.free_pages
        source, target = self.forest.gather(index, copy)
        if len(source) > free:  # the copies overwrite what this call has freed
            page = torch.from_numpy(target.astype(np.int64)).to(self.device)
            for pages in self.layers.values():
                self.journal.note(pages, CONTENT + SIGNALS, page)
        if len(source):
            offset = np.arange(self.config.page_size)
            slots = [
                (pages[:, None] * self.config.page_size + offset).reshape(-1, 1)
                for pages in (source.astype(np.int64), target.astype(np.int64))
            ]
            moves = torch.from_numpy(np.stack(slots)).to(self.device)
            for pages in self.layers.values():
                compact_kv(*moves.expand(-1, -1, pages.k.shape[1]), pages, impl=self.config.impl)
        self.left, self.scrambled, self.table = self.left[index], self.scrambled[index], None
        row = torch.from_numpy(index).to(self.device).long()
        for layer, victims in self.victims.items():
            self.victims[layer] = victims[row]

    def crop(self, lengths: np.ndarray, slots: np.ndarray, cut: np.ndarray) -> None:
        """Cut the rows of `cut` to `lengths` tokens: `slots` slots of a path that is in order.

        A scrambled row keeps its slots; those of later tokens become empty and are the next
        victims. It is in order again where nothing of its own is left.
        """
        self.left[cut] = 0
        shared = self.forest.lengths() - self.forest.own_lengths()
        self.scrambled &= ~cut | (slots > shared)
        emptied = np.flatnonzero(cut & self.scrambled)
        for pages in self.layers.values() if len(emptied) else ():
            where = self._where(pages, emptied)
            self.journal.note(pages, ("position",), where)
            position = pages.position[where]
            end = torch.from_numpy(lengths[emptied]).to(position.device)[:, None, None]
            pages.position[where] = torch.where(position >= end, EMPTY, position)
        target = np.where(cut & ~self.scrambled, slots, self.forest.lengths())
        self.forest.crop(target.astype(np.int32))
        self.table = None

    def victims_of(self, layer: int, step: Pass) -> Tensor:
        """Flat slots [tokens that evict, heads] to overwrite, which are noted; new victims where
        none are left."""
        pages = self.layers[layer]
        table = self.own_slots()
        rows, heads = table.shape[0], pages.k.shape[1]
        if layer not in self.victims:
            shape = (rows, heads, self.drop)
            self.victims[layer] = torch.zeros(shape, dtype=torch.int32, device=table.device)
        victims = self.victims[layer]
        if step.select is not None:
            victims = victims.index_copy(0, step.select.long(), self._select(layer, step))
            self.victims[layer] = victims
        row = step.row_t[step.evict]
        slot = table[row].gather(1, victims[row, :, step.cursor].long())
        head = torch.arange(heads, device=slot.device)
        where = slot // pages.page_size, head, slot % pages.page_size
        self.journal.note(pages, CONTENT, where)
        return slot

    def _select(self, layer: int, step: Pass) -> Tensor:
        """The `drop` own tokens [rows that select, heads, drop] that the policy values least."""
        config, pages = self.config, self.layers[layer]
        where = self._where(pages, step.select)
        position = pages.position[where].transpose(1, 2)  # [n, h, s]
        now = step.row_t.new_zeros(self.forest.num_rows)
        now[step.row_t] = step.tokens["position_t"]
        now = now[step.select]
        zeros = torch.zeros_like(position)
        mass, low, idle = zeros.float(), zeros, zeros
        if pages.importance is not None:
            mass = pages.importance[where].transpose(1, 2)
        if pages.history is not None:
            low, idle = unroll(pages.history[where].transpose(1, 2), config.window, now)
        policy = policy_of(config.policy)
        score, tie = policy.rank(Candidates(position, mass, low, idle, now, layer, prompt=False))
        if policy.mass == "selection":
            pages.importance[where] = 0
        return select_victims(
            score, position, self.drop, tie_nhs=tie, protect_from_n=now - config.recent,
            impl=config.impl,
        )  # fmt: skip

    def _where(self, pages: KVPages, rows: Tensor | np.ndarray) -> tuple:
        """Index of all own slots of full rows: [n, s] by head."""
        table = self.own_slots()
        slot = table[torch.as_tensor(rows, device=table.device)]
        return slot // pages.page_size, slice(None), slot % pages.page_size

    def tensors(self) -> list[Tensor]:
        """What the store keeps on the device besides pages and victims."""
        # A plan's tensors are parts of one.
        plan = [] if self._plan is None else [self._plan.item]
        return [*plan, *([] if self.table is None else [self.table])]
