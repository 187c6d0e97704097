"""Arrays of the host, brought to a device as int32, all in one copy."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What arrays are filled up with where there is room for more: 0, the last entry, or this.
SKIPPED = {"position_t": -1, "slot_t": -1, "also_t": -1, "cursor_t": -1}


def at_once(
    arrays: Sequence[np.ndarray], device: torch.device, *, given: bool = False
) -> list[Tensor]:
    """The arrays on `device`: parts of one tensor, at addresses that are multiples of 16 bytes, for
    which kernels are compiled. Where nobody else holds them (`given`), on a CPU themselves."""
    if given and device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(x, np.int32)) for x in arrays]
    sizes = [x.size for x in arrays]
    whole = _packed(arrays, sizes, device)
    return _parts(whole.to(device, non_blocking=True), sizes, [x.shape for x in arrays])


def on_device(device: torch.device, *records: Any, room: "Room | None" = None) -> None:
    """Replace the NumPy arrays among the attributes of `records` by int32 tensors on `device`; by
    those of `room` if there is one, which then hold them."""
    found = [
        (vars(record), name, x)
        for record in records
        for name, x in vars(record).items()
        if isinstance(x, np.ndarray)
    ]
    arrays = [x for *_, x in found]
    if not arrays:
        return
    if room is None:
        tensors = at_once(arrays, device)
    else:
        tensors = room.put([name for _, name, _ in found], arrays)
    for (attributes, name, _), x in zip(found, tensors, strict=True):
        attributes[name] = x


def seed_words(seeds: np.ndarray) -> np.ndarray:
    """int64 [n] as int32 [n, 2]; see `seeds_of`."""
    return np.ascontiguousarray(seeds, np.int64).view(np.int32).reshape(-1, 2)


def seeds_of(words: Tensor) -> Tensor:
    """The int64 [n] of which `words` came to the device."""
    return words.view(torch.int64)[:, 0]


class Room:
    """Tensors at fixed addresses that take other arrays at each step: what a CUDA graph reads.

    Arrays with an entry per token, whose names end in "_t", are filled up to `tokens` entries; all
    others to a power of two. Where they do not fit, or are others, the tensors are made anew.

    Attributes:
        made: how often that was.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.made, self._device = tokens, 0, device
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._tensors: list[Tensor] = []

    def put(self, names: list[str], arrays: list[np.ndarray]) -> list[Tensor]:
        """The tensors that hold `arrays` now."""
        fits = names == self._names and all(
            x.size <= size for x, size in zip(arrays, self._sizes, strict=True)
        )
        sizes = self._sizes
        if not fits:
            sizes = [self._room(name, x) for name, x in zip(names, arrays, strict=True)]
        full = [_filled(*each) for each in zip(names, arrays, sizes, strict=True)]
        packed = _packed(full, sizes, self._device)
        if not fits:
            whole = torch.empty_like(packed, device=self._device, pin_memory=False)
            shapes = [
                (size // math.prod(x.shape[1:]), *x.shape[1:])
                for size, x in zip(sizes, arrays, strict=True)
            ]
            # One call: neither an interrupt nor the end of memory leaves a part of it.
            vars(self).update(
                _names=names, _sizes=sizes, _whole=whole, _tensors=_parts(whole, sizes, shapes),
                made=self.made + 1,
            )  # fmt: skip
        self._whole.copy_(packed, non_blocking=True)
        return self._tensors

    def _room(self, name: str, x: np.ndarray) -> int:
        if name == "part_indptr":
            return self.tokens + 1
        if name.endswith("_t"):
            return self.tokens * math.prod(x.shape[1:])
        if name.endswith("indptr"):
            return _power(len(x) - 1) + 1
        return _power(len(x)) * math.prod(x.shape[1:])


class Fixed:
    """Tensors at fixed addresses as those of `Room`, but of sizes given once: who has captured them
    never has to again.

    Args:
        shapes: of each by name; of the last only as much is copied as there is.
        whole: int32 that they lie in, which may be others' too, at other times; None for new.

    Attributes:
        tensors: by name.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], device: torch.device, whole: Tensor | None = None
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        room = sum(map(_padded, sizes))
        if whole is None or len(whole) < room:
            with torch.inference_mode(False):  # whoever captures may be in it, whoever replays not
                whole = torch.zeros(room, dtype=torch.int32, device=device)
        self.whole, self._sizes = whole, dict(zip(shapes, sizes, strict=True))
        parts = _parts(whole[:room], sizes, list(shapes.values()))
        self.tensors = dict(zip(shapes, parts, strict=True))

    def fits(self, arrays: dict[str, np.ndarray]) -> bool:
        return all(arrays[name].size <= size for name, size in self._sizes.items())

    def put(self, arrays: dict[str, np.ndarray]) -> None:
        *names, last = self._sizes
        full = [_filled(name, arrays[name], self._sizes[name]) for name in names] + [arrays[last]]
        packed = _packed(full, [x.size for x in full], self.whole.device)
        self.whole[: len(packed)].copy_(packed, non_blocking=True)


def _power(n: int) -> int:
    """The least power of two that is no less than `n`, and 2."""
    return 1 << max(n - 1, 1).bit_length()


def _filled(name: str, x: np.ndarray, size: int) -> np.ndarray:
    full = np.full(size, SKIPPED.get(name, 0), np.int32)
    if x.size and (name.endswith("indptr") or name in ("pages", "owner")):
        full[:] = x[-1]
    full[: x.size] = x.reshape(-1)
    return full


def _packed(arrays: Iterable[np.ndarray], sizes: list[int], device: torch.device) -> Tensor:
    packed = np.zeros(sum(map(_padded, sizes)), np.int32)
    at = 0
    for x, size in zip(arrays, sizes, strict=True):
        packed[at : at + x.size] = x.reshape(-1)
        at += _padded(size)
    whole = torch.from_numpy(packed)
    return whole.pin_memory() if device.type == "cuda" else whole


def _parts(whole: Tensor, sizes: list[int], shapes: list[tuple]) -> list[Tensor]:
    parts = whole.split([n for size in sizes for n in (size, _padded(size) - size)])[::2]
    return [
        part if len(shape) == 1 else part.view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _padded(size: int) -> int:
    return size + -size % 4
