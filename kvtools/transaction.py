"""Changes of a cache that can be taken back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
from torch import Tensor

from ._host import Forest

CONTENT = ("k", "v", "k_scale", "v_scale", "position")
SIGNALS = ("importance", "history")


class Journal:
    """What slots held before they were overwritten, for the transactions that are open.

    Only what a row could see when they were opened is of interest: nothing is noted of a slot that
    was free.
    """

    def __init__(self) -> None:
        self.open: WeakSet[Transaction] = WeakSet()

    def step(self) -> bool:
        """Begin a step of all rows; whether an open transaction has seen one before."""
        again = any(x.stepped for x in self.open)
        for transaction in self.open:
            transaction.stepped = True
        return again

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nothing is noted here."""
        before, self.open = self.open, WeakSet()
        try:
            yield
        finally:
            self.open = before

    def note(self, part: Any, names: tuple[str, ...], index: Tensor | tuple | None = None) -> None:
        """Keep `index` of these tensors of `part`, or all, which is about to be written."""
        if not self.open:
            return
        for name in names:
            x = getattr(part, name)
            if x is not None:
                # An index made of tensors copies.
                entry = part, name, x, index, x.clone() if index is None else x[index]
                for transaction in self.open:
                    transaction.overwritten.append(entry)

    def write(self, part: Any, name: str, new: Tensor | None) -> None:
        """Give a tensor of `part` new content of its shape, where it is."""
        if new is not None:
            self.note(part, (name,))
            getattr(part, name).copy_(new)


class Transaction:
    """One change of a cache: in a `with` block it is undone if the block raises.

    It holds the host's part as it was, which costs a copy of what is small, and of the device's
    part what the journal notes. `undo` can be called again where it was interrupted itself. A
    transaction that nobody holds any more is closed.
    """

    def __init__(self, journal: Journal, states: list[tuple[Any, dict[str, Any]]]) -> None:
        self._journal, self._states = journal, states
        self.overwritten: list[tuple[Any, str, Tensor, Any, Tensor]] = []
        self.stepped = False
        journal.open.add(self)

    def undo(self) -> None:
        """Put everything back."""
        if self not in self._journal.open:
            return
        for part, state in self._states:
            vars(part).update(state)
        kept = {id(part) for part, _ in self._states}
        for part, name, written, index, old in reversed(self.overwritten):
            x = getattr(part, name)
            # Pools keep what they have grown to. Of other parts the tensors of before are back, and
            # those that were made since are nobody's.
            if x is written or (x is not None and id(part) not in kept):
                x[slice(len(old)) if index is None else index] = old
        self.close()

    def close(self) -> None:
        """Keep what was changed."""
        self._journal.open.discard(self)
        self.overwritten = []

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.undo()


def state_of(part: Any, **stale: None) -> tuple[Any, dict[str, Any]]:
    """`part` and copies of its attributes; of tensors and pages, the very ones. `stale` ones are
    not kept, because they are changed in place and can be made again."""
    kinds = (dict, list, np.ndarray, Forest)
    state = {
        name: value.copy() if isinstance(value, kinds) else value
        for name, value in vars(part).items()
        if name not in stale
    }
    return part, state | stale
