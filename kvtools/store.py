"""A forest of nodes and the pages of the layers that follow it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._host import Forest, PoolExhausted
from .config import CacheConfig, is_int
from .ops.attention import Plan, joined, pages_needed
from .ops.evict import compact_kv, select_victims
from .ops.quant import EMPTY, KVPages, fitting, packed_for
from .ops.upload import at_once
from .policy import Candidates, Judge, policy_of, unroll
from .transaction import CONTENT, SIGNALS, Journal


@dataclass
class Pass:
    """One write and read of a store, the same for all its layers: arrays, which `on_device` brings
    there."""

    token: Any  # query tokens of the step that take part; None for all
    slot_t: Any  # where the forest appended; overridden for tokens that evict
    plan: Plan | None = None  # what is there already, but for its length
    length: Any = None
    arrays: "Arrays | None" = None  # of a plan that is not there
    row_t: Any = None  # where some evict
    cursor_t: Any = None  # which victim of its row a token overwrites, -1 for none
    pages: Any = None  # of which importance begins anew
    owner: Any = None  # the token of each of them
    select: "Selection | None" = None
    slots: Tensor | None = None  # [t] where they go; where some evict [layers, t, heads]
    tokens: dict[str, Tensor] = field(default_factory=dict)  # what else each token has
    ready: Plan | None = None

    def begin(self, skip_t: Tensor | None, **tokens: Tensor) -> None:
        """Once it is on the device: take what there is of its tokens. Nothing is noted of those
        that are skipped, in a pass of one token per row. May be called again."""
        self.ready = self.plan
        if self.arrays is not None:
            self.ready = self.arrays.plan(skip_t)
        elif self.length is not None:
            self.ready = replace(self.plan, length=self.length)
        self.tokens = {name: self.of(x) for name, x in tokens.items()}
        if self.pages is not None:
            skipped = None if skip_t is None else skip_t[self.owner.long()][:, None, None]
            self.anew = self.pages.long(), skipped

    def forget(self, importance: Tensor) -> None:
        """Let the importance of its rows, and of no others, begin anew."""
        if self.pages is None:
            return
        pages, skipped = self.anew
        if skipped is None:
            importance.index_fill_(0, pages, 0)
        else:
            importance[pages] = torch.where(skipped, importance[pages], 0)

    def of(self, x: Tensor) -> Tensor:
        """The entries of the tokens that take part."""
        return x if self.token is None else x[self.token]


class Arrays:
    """Those of a plan."""

    def __init__(self, plan: dict, pages: tuple[int, ...]) -> None:
        self._of = plan["page_size"], pages
        vars(self).update({name: plan[name] for name in Plan.TENSORS}, length=plan["length"].copy())

    def plan(self, skip_t: Tensor | None) -> Plan:
        """Once they are on the device; what skipped tokens read is nobody's own."""
        tensors = {name: getattr(self, name) for name in Plan.TENSORS}
        if skip_t is not None:
            first = self.token[self.token_indptr[:-1].clamp(max=len(self.token) - 1).long()]
            tensors["own"] = torch.where(skip_t[first.long()], 0, self.own)
        return Plan.of(tuple(tensors.values()), *self._of)


@dataclass
class Selection:
    """Rows that need new victims, and the positions of the tokens that do."""

    rows: Any
    now: Any


class Store:
    """A forest and the pages of all layers that follow it: those with the same budgets."""

    def __init__(
        self,
        config: CacheConfig,
        factor: float,
        pages: int | None,
        journal: Journal,
        device: torch.device,
        judge: Judge,
    ) -> None:
        def scaled(budget: int | None) -> int | None:
            floor = config.sinks + config.recent + 1
            return None if budget is None else max(floor, round(budget * factor))

        self.config, self.factor, self.fixed = config, factor, pages is not None
        self.device, self._judge = device, judge
        self.budget = scaled(config.budget)
        self.drop = None
        if self.budget is not None:
            drop = config.drop or max(1, config.budget // 8)
            self.drop = min(max(1, round(drop * factor)), self.budget - config.recent)
        self.last_only = self.budget is not None and policy_of(config.policy).mass == "step"
        self.forest, self.journal = Forest(pages or 0, config.page_size), journal
        self.layers: dict[int, KVPages] = {}
        self.victims: Tensor | None = None  # [layers, rows, heads, drop] which of a row's own slots
        self.left = np.zeros(0, np.int32)  # victims not yet overwritten, by row
        self.scrambled = np.zeros(0, bool)  # rows whose slots are no longer in order
        self.table: Tensor | None = None  # see `own_slots`
        self._in_table: np.ndarray | None = None  # rows that are in it as they are now
        self.heads = 0, 0  # KV heads, query heads of each
        self.limits: dict[str, int] = {}  # how plans cut work
        self._evicted = np.zeros(0, bool)  # by row, in the last pass
        self._plan: Plan | None = None  # on the device
        self._plan_key: tuple | None = None
        self._arrays: dict = {}  # of the plan, on the host

    def packed(self) -> dict[str, Tensor]:
        """All that it holds, for `unpack`: on the CPU, of its pages those in use."""
        node, page, row = self.forest.table()
        used, page = np.unique(page, return_inverse=True)
        host = dict(
            node=node, page=page.astype(np.int32), row=row, left=self.left,
            scrambled=self.scrambled, heads=np.array(self.heads), layers=np.array([*self.layers]),
        )  # fmt: skip
        parts = {name: torch.from_numpy(np.array(x)) for name, x in host.items()}
        where = torch.from_numpy(used.astype(np.int64)).to(self.device)
        for layer, pages in self.layers.items():
            parts |= pages.packed(f"{layer}.", where)
        if self.victims is not None:
            parts["victims"] = self.victims.cpu()
        return parts

    def unpack(self, parts: dict[str, Tensor]) -> None:
        """Hold what another, empty till now, had packed.

        Raises:
            KeyError, ValueError: it is not that of a store of this configuration.
        """
        node, page, row = (parts[name].numpy() for name in ("node", "page", "row"))
        total = len(np.unique(page))
        self.forest = Forest.of(total, self.config.page_size, node, page, row)
        self.heads = tuple(parts["heads"].tolist())
        self.left = fitting(parts, "left", (len(row),), torch.int32).numpy().copy()
        self.scrambled = fitting(parts, "scrambled", (len(row),), torch.bool).numpy().copy()
        self._evicted = np.zeros(len(row), bool)
        for layer in parts["layers"].tolist():
            heads, d, dtype = packed_for(
                parts, f"{layer}.", self.config.k_format, self.config.v_format
            )
            self.pages_of(layer, heads, d, dtype).unpack(parts, f"{layer}.")
        if "victims" in parts:
            heads = max(pages.k.shape[1] for pages in self.layers.values())
            shape = len(self.layers), len(row), heads, self.drop
            victims = fitting(parts, "victims", shape, torch.int32)
            if victims.numel() and not 0 <= int(victims.min()) <= int(victims.max()) < self.budget:
                raise ValueError("victims are none of a row's own tokens")
            self.victims = victims.to(self.device, copy=True)
        if not ((self.left >= 0) & (self.left <= (self.drop or 0))).all() or (
            self.left.any() and self.victims is None
        ):
            raise ValueError("left counts more victims than there are")

    def kept(self, length: int) -> int:
        """How many tokens of a prompt of `length` tokens are kept."""
        share = self.config.prompt_budget
        if share in (None, 1.0):
            return length
        floor = self.config.sinks + self.config.recent + 1
        budget = share if is_int(share) else share * length
        return min(length, max(floor, round(budget * self.factor)))

    def pages_needed(self, counts: np.ndarray, prompt: bool = False) -> int:
        """For `counts` more tokens per row, of which a budget lets no more be kept unless they are
        of its prompt."""
        if self.budget is not None and not prompt:
            counts = np.minimum(counts, self.budget - self.forest.own_lengths())
        return self.forest.pages_needed(counts.astype(np.int32), prompt)

    def reserve(self, pages: int, ahead: int = 0) -> None:
        """Make sure that `pages` pages are free: grow the pool, to `ahead` free ones if it must
        grow, or raise if it is fixed."""
        free, total = self.forest.free_pages, self.forest.num_pages
        if pages <= free:
            return
        if self.fixed:
            raise PoolExhausted(
                f"the page pool is exhausted: {pages} pages are needed, {free} of {total} are "
                "free; give the cache more pages, or drop rows"
            )
        total += max(max(pages, ahead) - free, total // 16)
        for layer in self.layers.values():
            layer.grow(total)
        self.forest.grow(total)  # last: where memory ends before, some layers have pages to spare

    def insert(self, slots: int, base: int, copies: int) -> np.ndarray:
        """Add a prompt of `slots` kept tokens and `copies` rows over it; returns its flat slots."""
        taken = self.forest.insert(slots, base, copies)
        self.left = np.concatenate([self.left, np.zeros(copies, np.int32)])
        self.scrambled = np.concatenate([self.scrambled, np.zeros(copies, bool)])
        if self.victims is not None:
            layers, _, *rest = self.victims.shape
            none = self.victims.new_zeros(layers, copies, *rest)
            self.victims = torch.cat([self.victims, none], 1)
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
        self,
        counts: np.ndarray,
        position: np.ndarray,
        beside: Callable[[np.ndarray], list[dict]],
        version: tuple,
        whole: bool = False,
        prompt: bool = False,
    ) -> list[Pass]:
        """Take slots for `counts` tokens per row; one by one where a row exceeds its budget or the
        policy looks at the last token alone.

        Args:
            counts: tokens per row.
            position: of each of them.
            beside: gives the plans of what rows read besides, for some tokens per row.
            version: what `beside` depends on.
            whole: a plan that is there already is brought to the device again.
            prompt: they are of the rows' prompts, which keep them all.
        """
        if (
            prompt
            or self.budget is None
            or not (
                (self.forest.own_lengths() + counts > self.budget).any()
                or (self.last_only and (counts > 1).any())  # each must be the last once
            )
        ):
            self._evicted = np.zeros(len(counts), bool)
            return [self._pass(None, counts, counts, beside, version, whole, prompt)]
        passes = []
        start = np.cumsum(counts) - counts
        for i in range(counts.max()):
            active = counts > i
            row_t = np.flatnonzero(active)
            full = self._evicted = self.full(active)
            token = None if counts.max() == 1 else start[row_t] + i
            each = self._pass(token, active & ~full, active, beside, version, whole)
            if full.any():
                full_t = full[row_t]
                slot_t = np.full(len(row_t), -1)
                slot_t[~full_t] = each.slot_t
                empty = full & (self.left == 0)
                self.left[empty] = self.drop
                self.scrambled |= full
                each.slot_t, each.row_t = slot_t, row_t
                each.cursor_t = np.where(full_t, self.drop - self.left[row_t], -1)
                if empty.any():
                    rows = np.flatnonzero(empty)
                    each.select = Selection(rows, position[start[rows] + i])
                self.left[full] -= 1
            passes.append(each)
        return passes

    def full(self, active: np.ndarray) -> np.ndarray:
        """[rows] those of `active` whose next token evicts."""
        if self.budget is None:
            return np.zeros(len(active), bool)
        return active & (self.forest.own_lengths() >= self.budget)

    def selects(self, active: np.ndarray) -> bool:
        """Whether rows of `active` have no victim left for their next token."""
        return bool((self.full(active) & (self.left == 0)).any())

    def retract(self, rows: np.ndarray) -> None:
        """Take back the last pass, of one token per row, from `rows`; it wrote nothing there."""
        evicted = np.zeros(len(self.left), bool)
        evicted[rows] = self._evicted[rows]
        self.left[evicted] += 1
        grown = np.zeros(len(self.left), np.int32)
        grown[rows] = ~self._evicted[rows]
        self.forest.crop(self.forest.lengths() - grown)
        self._in_table = None

    def _pass(
        self,
        token: np.ndarray | None,
        grow: np.ndarray,
        counts: np.ndarray,
        beside: Callable[[np.ndarray], list[dict]],
        version: tuple,
        whole: bool,
        seal: bool = False,
    ) -> Pass:
        grow, counts = grow.astype(np.int32), counts.astype(np.int32)
        slot_t = self.forest.append(grow, seal)
        key = (self.forest.version, *version, counts.tobytes())
        if key != self._plan_key:
            plan = self.forest.plan(counts, **self.limits)
            others = beside(counts)
            if self.last_only:
                own = np.flatnonzero(plan["own"])
                begin, end = plan["page_indptr"][own], plan["page_indptr"][own + 1]
                index = [np.arange(*each) for each in zip(begin, end, strict=True)]
                self._own_pages = plan["page"][np.concatenate([np.zeros(0, int), *index])]
                self._owner = np.repeat(plan["token"][plan["token_indptr"][own]], end - begin)
            self._arrays = joined([plan, *others]) if others else plan
            self._needed = pages_needed(self._arrays, self._arrays["page_size"])
            self._plan, self._plan_key = None, key
        else:
            leaf, length = self._arrays["leaf"], self._arrays["length"]
            np.add.at(length, leaf[leaf >= 0], grow[leaf >= 0])
        each = Pass(token, slot_t)
        if whole or self._plan is None:
            each.arrays = Arrays(self._arrays, self._needed)
            self._plan = None
        else:
            each.plan, each.length = self._plan, self._arrays["length"].copy()
        if self.last_only:
            each.pages, each.owner = self._own_pages, self._owner
        return each

    def begin(self, passes: list[Pass], skip_t: Tensor | None, **tokens: Tensor) -> None:
        """Once passes are on the device; nothing is written of tokens that are skipped."""
        for each in passes:
            each.begin(skip_t, **tokens)
            # One of a step ahead is for as many tokens as that has room for, of which some are
            # skipped, and lies where the next one is brought to.
            self._plan = each.ready if skip_t is None else None
        first = passes[0]
        first.slots = first.slot_t
        if first.cursor_t is not None:
            first.slots = self.slots_of(first, slice(None))
        if skip_t is not None:
            skip = skip_t if first.cursor_t is None else skip_t[:, None]
            first.slots = torch.where(skip, -1, first.slots)

    def own_slots(self) -> Tensor:
        """Flat slots [rows or more, budget] of every full row's own tokens."""
        rows = self.forest.num_rows
        if self._in_table is None or len(self._in_table) != rows:
            self._in_table = np.zeros(rows, bool)
            if self.table is None or len(self.table) < rows:
                self.table = torch.zeros(rows, self.budget, dtype=torch.int64, device=self.device)
        new = np.flatnonzero((self.forest.own_lengths() >= self.budget) & ~self._in_table)
        if len(new):
            slots = np.stack([self.forest.row_slots(row)[-self.budget :] for row in new])
            index, slots = at_once([new, slots], self.device)
            self.table[index.long()] = slots.long()
            self._in_table[new] = True
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
        self.left, self.scrambled, self._in_table = self.left[index], self.scrambled[index], None
        if self.victims is not None:
            victims = self.victims[:, at_once([index], self.device)[0].long()]
            if victims.shape == self.victims.shape:
                self.journal.write(self, "victims", victims)
            else:
                self.victims = victims

    def crop(self, lengths: np.ndarray, slots: np.ndarray, cut: np.ndarray) -> None:
        """Cut the rows of `cut` to `lengths` tokens: `slots` slots of a path that is in order.

        A scrambled row keeps its slots; those of later tokens become empty and are the next
        victims. It is in order again where nothing of its own is left.
        """
        self.left[cut] = 0
        shared = self.forest.lengths() - self.forest.own_lengths()
        self.scrambled &= ~cut | (slots > shared)
        emptied = np.flatnonzero(cut & self.scrambled)
        if len(emptied):
            index, end = at_once([emptied, lengths[emptied]], self.device)
            slot_ns, end = self.own_slots()[index.long()], end[:, None, None]
        for pages in self.layers.values() if len(emptied) else ():
            where = _split(pages, slot_ns)
            self.journal.note(pages, ("position",), where)
            position = pages.position[where]
            pages.position[where] = torch.where(position >= end, EMPTY, position)
        target = np.where(cut & ~self.scrambled, slots, self.forest.lengths())
        self.forest.crop(target.astype(np.int32))
        self._in_table = None

    def renew(self, step: Pass, layers: Iterable[int]) -> None:
        """Choose new victims in `layers` for the rows of a pass that have none left."""
        table = self.own_slots()
        if self.victims is None:
            # none of a model without attention
            heads = max((pages.k.shape[1] for pages in self.layers.values()), default=0)
            shape = len(self.layers), self.forest.num_rows, heads, self.drop
            self.victims = torch.zeros(shape, dtype=torch.int32, device=self.device)
        if step.select is None:
            return
        rows, now = step.select.rows.long(), step.select.now
        for layer in layers:
            chosen, number = self._select(layer, table[rows], now), self.number(layer)
            self.journal.note(self, ("victims",), (number, rows))
            self.victims[number, rows, : chosen.shape[1]] = chosen

    def number(self, layer: int) -> int:
        """Of a layer among those of this store."""
        return list(self.layers).index(layer)

    def slots_of(self, step: Pass, numbers: slice) -> Tensor:
        """Where the tokens of a pass go, [layers, t, heads]: to a victim, or where the forest
        appended."""
        row, cursor = step.row_t.long(), step.cursor_t[:, None, None]
        victim = self.victims[numbers].transpose(0, 1)[row, :, :, step.cursor_t.clamp(min=0).long()]
        slot = self.own_slots()[row[:, None, None], victim.long()]
        return torch.where(cursor < 0, step.slot_t[:, None, None], slot).transpose(0, 1)

    def slots(self, layer: int, step: Pass) -> Tensor:
        """Where a pass writes in a layer, [t] or [t, heads]; what it overwrites is noted."""
        if step.cursor_t is None:
            return step.slot_t if step.slots is None else step.slots
        pages, number = self.layers[layer], self.number(layer)
        if step.slots is None:  # not the first pass: it looks at what those before have done
            self.renew(step, [layer])
            slot_th = self.slots_of(step, slice(number, number + 1))[0]
        else:
            slot_th = step.slots[number]
        heads = pages.k.shape[1]
        slot_th = slot_th[:, :heads]
        if self.journal.open:
            head = torch.arange(heads, device=slot_th.device)
            where = slot_th // pages.page_size, head, slot_th % pages.page_size
            self.journal.note(pages, CONTENT, where)
        return slot_th

    def _select(self, layer: int, slot_ns: Tensor, now: Tensor) -> Tensor:
        """The `drop` own tokens [n, heads, drop] of rows with these slots that the policy values
        least."""
        config, pages = self.config, self.layers[layer]
        self.journal.note(pages, SIGNALS)
        where = _split(pages, slot_ns)
        position = pages.position[where].transpose(1, 2)  # [n, h, s]
        zeros = torch.zeros_like(position)
        mass, low, idle = zeros.float(), zeros, zeros
        if pages.importance is not None:
            mass = pages.importance[where].transpose(1, 2)
        if pages.history is not None:
            low, idle = unroll(pages.history[where].transpose(1, 2), config.window, now)
        policy = policy_of(config.policy)
        candidates = Candidates(position, mass, low, idle, now, layer, prompt=False)
        score, tie = self._judge(policy, candidates)
        if policy.mass == "selection":
            pages.importance[where] = 0
        return select_victims(
            score, position, self.drop, tie_nhs=tie, protect_from_n=now - config.recent,
            impl=config.impl,
        )  # fmt: skip

    def lasting(self) -> list[Tensor]:
        """What steps read besides pages and what the host brings."""
        return [x for x in (self.table, self.victims) if x is not None]

    def tensors(self) -> list[Tensor]:
        """What the store keeps on the device besides pages."""
        plan = () if self._plan is None else (self._plan.item, self._plan.length)
        return [*plan, *self.lasting()]


def _split(pages: KVPages, slot_ns: Tensor) -> tuple:
    """Index of flat slots in pages: [n, s] by head."""
    return slot_ns // pages.page_size, slice(None), slot_ns % pages.page_size
