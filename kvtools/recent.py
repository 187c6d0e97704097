"""The newest tokens of every row, held more finely than the pages hold them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._host import plan_from_block_table
from .ops.quant import EMPTY, KVPages, fitting, packed_for
from .ops.upload import at_once
from .transaction import CONTENT, Journal


class Recent:
    """One page of `size` + 1 slots per row: the token at position p is in slot p % (size + 1).

    A query at position p reads here the tokens from p - size + 1 on, its own included, and from the
    row's first that is here. Older ones it reads elsewhere. What it reads does not depend on how
    many tokens come at a time: where a row gets several, they lie in pages of one slot until all
    layers have attended. The slot more is what a single new token goes to, so that undoing it has
    nothing to put back, but where a step was taken before it.
    """

    def __init__(
        self, size: int, k_format: str, v_format: str, device: torch.device, journal: Journal
    ) -> None:
        self.size, self.slots, self.journal = size, size + 1, journal
        self.formats = dict(k_format=k_format, v_format=v_format)
        self.layers: dict[int, KVPages] = {}
        # Positions [rows, slots] that are here; and one place more, for what is skipped.
        self._held = torch.zeros(1, dtype=torch.int32, device=device)
        self.start = np.zeros(0, np.int32)  # first position that is here, by row
        self._before = self.start  # as it was before the last step
        self._step: Step | None = None
        self._read: tuple[Tensor, dict[int, Tensor]] = self._held, {}  # and as heads have it

    @property
    def held(self) -> Tensor:
        return self._held[:-1].view(-1, self.slots)

    @held.setter
    def held(self, held: Tensor) -> None:
        self._held = self._with_place(held)

    @staticmethod
    def _with_place(held: Tensor) -> Tensor:
        return torch.cat([held.reshape(-1), held.new_zeros(1)])

    def packed(self) -> dict[str, Tensor]:
        """All that it holds, for `unpack`, on the CPU."""
        parts = {"held": self.held.cpu().contiguous(), "start": torch.from_numpy(self.start.copy())}
        parts["layers"] = torch.tensor([*self.layers])
        for layer, pages in self.layers.items():
            parts |= replace(pages, position=None).packed(f"{layer}.")
        return parts

    def unpack(self, parts: dict[str, Tensor]) -> None:
        """Hold what another, empty till now, had packed.

        Raises:
            KeyError, ValueError: it is not that of rows of this configuration.
        """
        rows, device = len(parts["start"]), self.held.device
        self.start = fitting(parts, "start", (rows,), torch.int32).numpy().copy()
        self._before = self.start
        for layer in parts["layers"].tolist():
            heads, d, dtype = packed_for(parts, f"{layer}.", **self.formats)
            like = torch.empty(heads, 0, d, dtype=dtype, device=device)
            self.layers[layer] = self._empty(rows, self.slots, like)
            self.layers[layer].unpack(parts, f"{layer}.")
        held = fitting(parts, "held", (rows, self.slots), torch.int32)
        self.held = held.to(device, copy=True)
        self._read = self._held, {}

    def add(
        self, length: np.ndarray, first: np.ndarray, copies: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add `copies` rows over each prompt of `length` tokens, of which the `first` stay
        elsewhere; `fill` must follow.

        Returns:
            Where the tokens of each prompt begin that are here, and their slots for `fill`.
        """
        start = np.minimum(length, np.maximum(first, length - self.size))
        position = np.concatenate([np.arange(*x) for x in zip(start, length, strict=True)])
        self._new = len(length)
        slot = np.repeat(np.arange(self._new), length - start) * self.slots + position % self.slots
        held = np.full(self._new * self.slots, EMPTY, np.int32)
        held[slot] = position
        held = held.reshape(-1, self.slots).repeat(copies, axis=0)
        self.held = torch.cat([self.held, torch.from_numpy(held).to(self.held.device)])
        self.start = np.concatenate([self.start, start.repeat(copies).astype(np.int32)])
        return start, slot

    def fill(
        self,
        layer: int,
        k_hld: Tensor,
        v_hld: Tensor,
        slot: Tensor,
        row: Tensor,
        append: Callable,
    ) -> None:
        """Store the last tokens of the prompts that were added, at `slot` of a page for each; and
        these as the pages of the new rows, of which `row` tells the prompts."""
        page = self._empty(self._new, self.slots, k_hld)
        append(k_hld, v_hld, slot, page)
        pages = self.layers.get(layer)
        new = [None if x is None else x[row] for x in page.tensors()]
        if pages is not None:
            rows = len(self.start) - len(row)
            new = [
                None if x is None else torch.cat([old[:rows], x])
                for old, x in zip(pages.tensors(), new, strict=True)
            ]
        self.layers[layer] = KVPages(*new, recent=True)

    def _empty(self, pages: int, slots: int, like_hld: Tensor) -> KVPages:
        """Zeros: masked slots count nothing times what they hold."""
        heads, _, d = like_hld.shape
        new = KVPages.empty(
            pages, heads, slots, d, **self.formats, dtype=like_hld.dtype, device=like_hld.device
        )
        for x in new.tensors():
            if x is not None:
                x.zero_()
        return replace(new, recent=True)

    def step(self, counts: np.ndarray, position: np.ndarray) -> "Step":
        """Make room for `counts` tokens per row at `position`; `begin` must follow."""
        row = np.repeat(np.arange(len(counts)), counts)
        before = np.maximum(position - self.size + 1, self.start[row])
        self._before = self.start.copy()
        np.maximum.at(self.start, row, before)
        slot, token = row * self.slots + position % self.slots, np.arange(len(row))
        if (counts <= 1).all():
            return Step(before, slot)
        stays = token >= np.cumsum(counts)[row] - self.size
        return Step(before, token, slot[stays], token[stays])

    def retract(self, rows: np.ndarray) -> None:
        """Take back the last step from `rows`; it wrote nothing there."""
        self.start = self.start.copy()
        self.start[rows] = self._before[rows]

    def begin(self, step: "Step", position_t: Tensor, skip_t: Tensor | None) -> None:
        """Let the layers attend in `step`, which is on the device now."""
        self._step, self._position_t, self._again = step, position_t, self.journal.step()
        step.begin(skip_t)
        read, slot = self._held, step.slot.long()
        self.journal.note(self, ("_held",), slot)
        if step.token is not None:  # what is here now is read before it is overwritten
            read, position_t = read.clone(), position_t[step.token]
        if self._read[0] is not read:
            self._read = read, {}
        self._held[slot] = position_t  # -1 is the last place

    def plans(self, counts: np.ndarray, active: np.ndarray, **limits: int) -> list[dict]:
        """Plans of `stores` for the `active` of the `counts` tokens per row."""
        rows = len(counts)
        ring = plan_from_block_table(
            np.arange(rows)[:, None], np.full(rows, self.slots), self.slots, active, **limits
        )
        if counts.max(initial=0) <= 1:
            return [ring]
        own = (np.cumsum(counts) - counts)[:, None] + np.arange(counts.max())
        return [ring, plan_from_block_table(own, counts, 1, active, **limits)]

    def stores(self, layer: int, k_thd: Tensor) -> list[KVPages]:
        """What a layer reads here; new tokens go to the last."""
        pages, heads = self.layers[layer], k_thd.shape[1]
        held, views = self._read
        if heads not in views:
            views[heads] = held[:-1].view(-1, 1, self.slots).expand(-1, heads, -1)
        pages.position = views[heads]
        if self._step.token is None:
            if self._again:
                self._note(pages)
            return [pages]
        new = self._empty(len(k_thd), 1, k_thd.transpose(0, 1))
        new.position = self._position_t[:, None, None].expand(-1, heads, -1)
        return [pages, new]

    def keep(self, layer: int, new: KVPages) -> None:
        """Move to the ring what stays of `new`, where rows got several tokens."""
        pages, step = self.layers[layer], self._step
        if new is pages:
            return
        where = self._note(pages)
        for name in CONTENT[:4]:
            here, there = getattr(pages, name), getattr(new, name)
            if here is not None:
                if here.itemsize == 1:  # not every float8 type can be indexed
                    here, there = here.view(torch.uint8), there.view(torch.uint8)
                here[where] = there[step.token, :, 0]

    def _note(self, pages: KVPages) -> tuple:
        """What the step overwrites, and where."""
        slot = self._step.slot
        where = slot // self.slots, slice(None), slot % self.slots
        self.journal.note(pages, CONTENT[:4], where)
        return where

    def lasting(self) -> list[Tensor]:
        """What steps read besides pages and what the host brings."""
        return [self._held]

    def tensors(self) -> list[Tensor]:
        """What is kept on the device besides pages."""
        read = [] if self._read[0] is self._held else [self._read[0]]
        return [self._held, *read, *([] if self._step is None else [self._step.write_t])]

    def gather(self, index: np.ndarray) -> None:
        """Make the rows rows[index]; each has its own page."""
        (where,) = at_once([index], self.held.device)
        where, same = where.long(), len(index) == len(self.start)
        held, self.start = self.held[where], self.start[index]
        if same:
            self.journal.write(self, "_held", self._with_place(held))
        else:
            self.held = held
        for layer, pages in self.layers.items():
            content = {name: getattr(pages, name) for name in CONTENT[:4]}
            content = {name: None if x is None else x[where] for name, x in content.items()}
            if not same:
                self.layers[layer] = KVPages(*content.values(), recent=True)
                continue
            for name, x in content.items():
                self.journal.write(pages, name, x)

    def crop(self, lengths: np.ndarray) -> None:
        """Forget what lies behind `lengths`, and what the slot more holds: its token is read
        elsewhere already."""
        self.start = np.minimum(self.start, lengths).astype(np.int32)
        bounds = np.stack([self.start, lengths.astype(np.int32)])
        start, end = at_once([bounds], self.held.device)[0][:, :, None]
        held = torch.where((self.held < start) | (self.held >= end), EMPTY, self.held)
        self.journal.write(self, "_held", self._with_place(held))


@dataclass
class Step:
    """Where new tokens go, the same for all layers: arrays, which `on_device` brings there."""

    before_t: Any  # what each token reads here begins at this position
    also_t: Any  # slots of the store that `stores` gives last: the ring, for one token per row
    slot: Any = None  # where rows get several: slots of the ring, of the tokens that stay
    token: Any = None  # and which ones stay

    def begin(self, skip_t: Tensor | None) -> None:
        """Once it is on the device."""
        self.write_t = self.also_t if skip_t is None else torch.where(skip_t, -1, self.also_t)
        if self.token is None:
            self.slot = self.write_t
