"""What recurrent layers hold of rows: a state, of a size that does not depend on their length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plug import Unsupported


@dataclass(frozen=True, eq=False)
class _Batch:
    """What a forward has left, of each layer its attributes, in which all tensors have an entry for
    each of `size` texts. No entry is written to that a row names."""

    size: int
    layers: dict[int, dict[str, Any]]


@dataclass
class _Moves:
    """Of each token of a step ahead of the host, the entries of the pool that its row's state is
    read from and written to; 0 where there is no token."""

    old_t: Any
    new_t: Any


class States:
    """States of recurrent layers (linear attention, Mamba, short convolutions), of each row one.

    A row names an entry of a batch, so to fork or reorder rows is to renumber; a forward gets
    copies, which the layers may write to, and what it leaves replaces those once it has succeeded.
    Steps ahead of the host read and write at fixed addresses: in a batch that lasts, the pool, from
    the entries that rows name to others that none does. Its first entry is nobody's.

    A state cannot be rewound: it is known how many tokens it has seen, and one that has seen others
    than its row is stale.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[_Batch] = []
        self._batch = np.zeros(0, np.int64)  # by row, and so are these
        self._entry = np.zeros(0, np.int64)
        self._seen = np.zeros(0, np.int64)
        self._pool: _Batch | None = None
        self._moves: _Moves | None = None

    def stale(self, lengths: np.ndarray) -> np.ndarray:
        """Which rows of these lengths have a state of another."""
        return self._seen != lengths

    def gather(self, index: np.ndarray) -> None:
        """Make the rows rows[index]."""
        self._batch, self._entry, self._seen = (
            x[index] for x in (self._batch, self._entry, self._seen)
        )
        self._trim()

    def take(self, rows: np.ndarray) -> dict[int, dict[str, Any]]:
        """Copies of the states of `rows`: by layer, the attributes of transformers' cache layer."""
        used, which = np.unique(self._batch[rows], return_inverse=True)
        batches = [self._batches[i] for i in used]
        start = np.cumsum([0, *(x.size for x in batches)])
        index = torch.from_numpy(start[which] + self._entry[rows]).to(self._device)

        def pick(parts: list[Tensor]) -> Tensor:
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            return x.index_select(0, index)

        return _mapped(pick, [x.layers for x in batches])

    def put(
        self, rows: np.ndarray, entry: np.ndarray, seen: np.ndarray,
        layers: dict[int, dict[str, Any]],
    ) -> None:  # fmt: skip
        """Give rows, new ones too, the states that a forward has left.

        Args:
            rows: [n] ascending.
            entry: [n] which of the forward's texts each of them is.
            seen: [n] how many tokens its state has seen.
            layers: as `take` returns them.

        Raises:
            Unsupported: they hold nothing, or something else than an entry for each text; says what
                the model does.
        """
        size, held = int(entry.max()) + 1, list(_tensors(layers))
        if not held:
            raise Unsupported("its recurrent layers hold their states elsewhere than in the cache")
        for x in held:
            if x.dim() == 0 or len(x) != size:
                raise Unsupported(
                    f"its recurrent layers hold {size} rows in the shape {tuple(x.shape)}"
                )
        total = max(len(self._seen), int(rows.max()) + 1)
        new = len(self._batches), entry, seen
        names = "_batch", "_entry", "_seen"
        for name, values in zip(names, new, strict=True):
            x = np.append(getattr(self, name), np.full(total - len(self._seen), -1))
            x[rows] = values
            setattr(self, name, x)
        self._batches = [*self._batches, _Batch(size, layers)]
        self._trim()

    def step(self, rows: np.ndarray) -> _Moves:
        """Plan a step ahead of the host, of a token for each of `rows`, none of which is stale."""
        self._settle(rows)
        new, seen = self._entry.copy(), self._seen.copy()
        new[rows] = self._free(len(rows))
        seen[rows] += 1
        self._moves = _Moves(self._entry[rows], new[rows])
        self._entry, self._seen = new, seen
        return self._moves

    def read(self) -> dict[int, dict[str, Any]]:
        """As `take`, in the step that was planned last; it can be captured."""
        return _mapped(lambda x: x[0].index_select(0, self._moves.old_t), [self._pool.layers])

    def write(self, layers: dict[int, dict[str, Any]], skip_t: Tensor) -> None:
        """Keep what that step has left; states of tokens that are skipped [t] stay as they were."""
        old_t, new_t = self._moves.old_t, self._moves.new_t.long()
        for pool, x in zip(_tensors(self._pool.layers), _tensors(layers), strict=True):
            skip = skip_t.view(-1, *[1] * (x.dim() - 1))
            pool.index_copy_(0, new_t, torch.where(skip, pool.index_select(0, old_t), x))

    def retract(self, rows: np.ndarray) -> None:
        """Take back the last step of `rows`, whose tokens it has skipped."""
        self._seen = self._seen.copy()
        self._seen[rows] -= 1

    def lasting(self) -> list[Tensor]:
        """What steps ahead of the host read and write."""
        return [] if self._pool is None else list(_tensors(self._pool.layers))

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        batches = [x for x in self._batches if x is not self._pool]
        return [x for batch in batches for x in _tensors(batch.layers)] + self.lasting()

    def _settle(self, rows: np.ndarray) -> None:
        """Give the states of `rows` entries in the pool, with as many left for what comes."""
        inside = self._batch == self._number()
        outside = rows[~inside[rows]]
        needed = len(np.unique(self._entry[inside])) + len(outside) + len(rows)
        if self._pool is None or needed >= self._pool.size:
            outside, size = rows, 1 + (1 << (2 * len(rows) - 1).bit_length())
            layers = _mapped(lambda x: x[0].new_zeros(size, *x[0].shape[1:]), [self.take(rows[:1])])
            self._pool = _Batch(size, layers)
        if not len(outside):
            return
        entry = self._free(len(outside))
        index = torch.from_numpy(entry).to(self._device)
        for pool, x in zip(self.lasting(), _tensors(self.take(outside)), strict=True):
            pool.index_copy_(0, index, x)
        if self._number() < 0:
            self._batches = [*self._batches, self._pool]
        batch, where = self._batch.copy(), self._entry.copy()
        batch[outside], where[outside] = self._number(), entry
        self._batch, self._entry = batch, where
        self._trim()

    def _number(self) -> int:
        """Of the pool among the batches; -2 if no row names it."""
        return next((i for i, x in enumerate(self._batches) if x is self._pool), -2)

    def _free(self, count: int) -> np.ndarray:
        """So many entries of the pool that no row names."""
        named = self._entry[self._batch == self._number()]
        return np.setdiff1d(np.arange(1, self._pool.size), named)[:count]

    def _trim(self) -> None:
        """Drop what no row names: batches, and entries where they are half of one or more."""
        kept, batch, entry = [], self._batch.copy(), self._entry.copy()
        for i in np.unique(batch):
            mine, part = self._batch == i, self._batches[i]
            named, place = np.unique(entry[mine], return_inverse=True)
            if part is not self._pool and 2 * len(named) <= part.size:
                index = torch.from_numpy(named).to(self._device)
                layers = _mapped(lambda x, index=index: x[0].index_select(0, index), [part.layers])
                part, entry[mine] = _Batch(len(named), layers), place
            batch[mine] = len(kept)
            kept.append(part)
        if not len(batch):
            self._pool = None
        self._batches, self._batch, self._entry = kept, batch, entry


def _mapped(change: Callable[[list[Tensor]], Tensor], parts: list[Any]) -> Any:
    """The first of `parts`, with what `change` makes of each tensor's likes."""
    first = parts[0]
    if isinstance(first, Tensor):
        return change(parts)
    if isinstance(first, dict):
        return {name: _mapped(change, [part[name] for part in parts]) for name in first}
    return first


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, dict):
        for x in part.values():
            yield from _tensors(x)
