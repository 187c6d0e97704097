"""The newest tokens of every row, held more finely than the pages hold them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ops.attention import Plan, tree_attention
from .ops.quant import EMPTY, KVPages, append_kv
from .transaction import CONTENT, Journal


@dataclass
class Step:
    """New tokens of the rows: the host's part, the same for all layers."""

    position_t: Tensor
    before_t: Tensor  # what each token reads here begins at this position
    held: Tensor  # positions [rows, size] that are here when the layers attend
    plan: Plan  # of the pages here
    among: Plan | None  # of the new tokens themselves; None where no row gets more than one
    token: Tensor | None  # new tokens that stay; None for all
    slot: Tensor  # and where


class Recent:
    """One page of `size` + 1 slots per row: the token at position p is in slot p % (size + 1).

    A query at position p reads here the tokens from p - size + 1 on, its own included, and from the
    row's first that is here; `Step.before_t` says which of the two. Older ones it reads elsewhere.
    What it reads does not depend on how many tokens come at a time. The slot more is what a single
    new token goes to, so that undoing it has nothing to put back.
    """

    def __init__(
        self, size: int, k_format: str, v_format: str, device: torch.device, journal: Journal
    ) -> None:
        self.size, self.slots, self.journal = size, size + 1, journal
        self.formats = dict(k_format=k_format, v_format=v_format)
        self.layers: dict[int, KVPages] = {}
        self.held = torch.zeros(0, self.slots, dtype=torch.int32, device=device)
        self.start = np.zeros(0, np.int32)  # first position that is here, by row

    def add(self, length: int, first: int, copies: int) -> None:
        """Add `copies` rows over a prompt of `length` tokens, of which the `first` stay elsewhere;
        `fill` must follow."""
        start = min(length, max(first, length - self.size))
        position = torch.arange(start, length, dtype=torch.int32, device=self.held.device)
        held = self.held.new_full((1, self.slots), EMPTY)
        held[0, position.long() % self.slots] = position
        self.held = torch.cat([self.held, held.expand(copies, -1)])
        self.start = np.concatenate([self.start, np.full(copies, start, np.int32)])
        self._prompt = copies, start, length

    def fill(self, layer: int, k_hld: Tensor, v_hld: Tensor, impl: str) -> None:
        """Store the last tokens of the prompt that was added, for each of its rows."""
        (heads, _, d), (copies, start, length) = k_hld.shape, self._prompt
        page = KVPages.empty(
            1, heads, self.slots, d, **self.formats, dtype=k_hld.dtype, device=k_hld.device
        )
        for x in page.tensors()[:4]:
            if x is not None:
                x.zero_()  # masked slots count nothing times what they hold
        k, v = (x[:, start:].transpose(0, 1) for x in (k_hld, v_hld))
        slot = torch.arange(start, length, device=k.device) % self.slots
        append_kv(k, v, slot, page, impl=impl)
        pages = self.layers.get(layer)
        new = [None if x is None else x.expand(copies, *x.shape[1:]) for x in page.tensors()]
        if pages is not None:
            rows = len(self.start) - copies
            new = [
                None if x is None else torch.cat([old[:rows], x])
                for old, x in zip(pages.tensors(), new, strict=True)
            ]
        self.layers[layer] = KVPages(*(None if x is None else x.contiguous() for x in new))

    def step(self, counts: np.ndarray, position: np.ndarray, position_t: Tensor) -> Step:
        """Make room for `counts` tokens per row at `position`, on the device `position_t`; `attend`
        must follow for every layer."""
        device, rows, total = position_t.device, len(counts), int(counts.sum())
        row_t = np.repeat(np.arange(rows), counts)
        end = np.cumsum(counts)
        before = np.maximum(position - self.size + 1, self.start[row_t])
        stays = np.arange(total) >= end[row_t] - self.size
        slot = row_t * self.slots + position % self.slots
        np.maximum.at(self.start, row_t, before)

        def to_device(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        slot_t = to_device(slot[stays])
        token = None if stays.all() else to_device(np.flatnonzero(stays))
        held = self.held
        self.held = held.clone()
        self.held.view(-1)[slot_t] = position_t if token is None else position_t[token]
        several = bool((counts > 1).any())
        alone = np.arange(rows + 1)
        nodes = to_plan(alone, alone[:-1], np.full(rows, self.slots), counts, self.slots, device)
        among = None
        if several:
            among = to_plan(np.append(0, end), np.arange(total), counts, counts, 1, device)
        return Step(
            position_t, to_device(before.astype(np.int32)), held if several else self.held, nodes,
            among, token, slot_t,
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        step: Step,
        q_thd: Tensor,
        k_thd: Tensor,
        v_thd: Tensor,
        *,
        state: tuple[Tensor, Tensor] | None,
        sliding: int,
        impl: str,
        **options: float,
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer, and attend to what is here: the new state."""
        pages, heads = self.layers[layer], k_thd.shape[1]
        options |= dict(sliding=min(self.size, sliding or self.size), impl=impl)
        k, v, slot = k_thd, v_thd, step.slot
        if step.token is not None:
            k, v = k[step.token], v[step.token]
        pages.position = step.held[:, None].expand(-1, heads, -1)
        if step.among is None:
            _write(k, v, slot, pages, impl)
            return tree_attention(q_thd, step.position_t, pages, step.plan, state=state, **options)
        # Later tokens overwrite what earlier ones still read: first read, then write.
        state = tree_attention(q_thd, step.position_t, pages, step.plan, state=state, **options)
        total, _, d = k_thd.shape
        new = KVPages.empty(
            total, heads, 1, d, **self.formats, dtype=k_thd.dtype, device=k_thd.device
        )
        append_kv(k_thd, v_thd, torch.arange(total, device=k_thd.device), new, impl=impl)
        new.position = step.position_t[:, None, None].expand(-1, heads, -1)
        state = tree_attention(q_thd, step.position_t, new, step.among, state=state, **options)
        where = slot // self.slots, slice(None), slot % self.slots
        self.journal.note(pages, CONTENT[:4], where)
        _write(k, v, slot, pages, impl)
        return state

    def gather(self, index: np.ndarray) -> None:
        """Make the rows rows[index]; each has its own page."""
        where = torch.from_numpy(index.astype(np.int64)).to(self.held.device)
        self.held, self.start = self.held[where], self.start[index]
        for layer, pages in self.layers.items():
            content = (getattr(pages, name) for name in CONTENT[:4])
            self.layers[layer] = KVPages(*(None if x is None else x[where] for x in content))

    def crop(self, lengths: np.ndarray) -> None:
        """Forget what lies behind `lengths`, and what the slot more holds: its token is read
        elsewhere already."""
        self.start = np.minimum(self.start, lengths).astype(np.int32)
        bounds = np.stack([self.start, lengths.astype(np.int32)])
        start, end = torch.from_numpy(bounds).to(self.held.device)[:, :, None]
        self.held = torch.where((self.held < start) | (self.held >= end), EMPTY, self.held)


def _write(k: Tensor, v: Tensor, slot: Tensor, pages: KVPages, impl: str) -> None:
    content = KVPages(pages.k, pages.v, pages.k_scale, pages.v_scale)
    append_kv(k, v, slot, content, impl=impl)


def to_plan(
    page_indptr: np.ndarray,
    page: np.ndarray,
    length: np.ndarray,
    counts: np.ndarray,
    page_size: int,
    device: torch.device,
) -> Plan:
    """A plan in which row i alone reads node i."""
    rows, end = len(counts), np.cumsum(counts)
    live = np.flatnonzero(counts)
    begin = (end - counts)[live]
    item = np.stack([live, begin, end[live], 0 * live, length[live], begin], 1)
    token = np.arange(counts.sum())
    none = np.zeros(rows)
    arrays = dict(
        page_indptr=page_indptr, page=page, first=none, length=length, base=none, own=none,
        token_indptr=np.append(0, end), token=token, item=item,
        part_indptr=np.append(token, len(token)), part=token, leaf=np.full(rows, -1),
    )  # fmt: skip
    arrays = {name: x.astype(np.int32) for name, x in arrays.items()}
    return Plan.from_host({**arrays, "page_size": page_size}, device)
