"""What recurrent layers hold of rows: a state, of a size that does not depend on their length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plug import Unsupported


@dataclass(frozen=True)
class _Batch:
    """What a forward has left, never written to again: of each layer its attributes, in which all
    tensors have an entry for each of `size` texts."""

    size: int
    layers: dict[int, dict[str, Any]]


class States:
    """States of recurrent layers (linear attention, Mamba, short convolutions), of each row one.

    A row names an entry of a batch, so to fork or reorder rows is to renumber; a forward gets
    copies, which the layers may write to, and what it leaves replaces those once it has succeeded.
    A state cannot be rewound: it is known how many tokens it has seen, and one that has seen others
    than its row is stale.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[_Batch] = []
        self._batch = np.zeros(0, np.int64)  # by row, and so are these
        self._entry = np.zeros(0, np.int64)
        self._seen = np.zeros(0, np.int64)

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

    def tensors(self) -> list[Tensor]:
        return [x for batch in self._batches for x in _tensors(batch.layers)]

    def _trim(self) -> None:
        """Drop what no row names: batches, and entries where they are half of one or more."""
        kept, batch, entry = [], self._batch.copy(), self._entry.copy()
        for i in np.unique(batch):
            mine, part = self._batch == i, self._batches[i]
            named, place = np.unique(entry[mine], return_inverse=True)
            if 2 * len(named) <= part.size:
                index = torch.from_numpy(named).to(self._device)
                layers = _mapped(lambda x, index=index: x[0].index_select(0, index), [part.layers])
                part, entry[mine] = _Batch(len(named), layers), place
            batch[mine] = len(kept)
            kept.append(part)
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
