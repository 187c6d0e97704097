"""The error rule that every kernel is held to, and a CUDA graph's rules for steps on a CPU."""

import gc
import linecache
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Assert that `actual` errs at most twice as much as `eager`, both measured against `exact`.

    Args:
        name: what is compared, for the message.
        actual: result under test.
        exact: the same function in float64 on the same rounded inputs.
        eager: the same function in plain PyTorch in the dtype of `actual`.
        dtype: of the arithmetic, where that is coarser than `actual` shows.

    Raises:
        AssertionError: non-finite entries do not coincide, or
            max|actual - exact| > 2 (max|eager - exact| + eps(dtype) max|exact|).
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    finite = torch.isfinite(exact)
    torch.testing.assert_close(
        actual[~finite].double(),
        exact[~finite].double(),
        equal_nan=True,
        msg=f"{name}: non-finite entries",
    )
    assert torch.isfinite(actual[finite]).all(), (
        f"{name}: non-finite where the exact value is finite"
    )
    if not finite.any():
        return
    error = (actual[finite].double() - exact[finite]).abs()
    allowed = 2 * (
        (eager[finite].double() - exact[finite]).abs().max()
        + torch.finfo(dtype or actual.dtype).eps * exact[finite].abs().max()
    )
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} exceeds {allowed:.3e} at flat index {worst}: "
        f"actual {actual[finite][worst]}, exact {exact[finite][worst]}, "
        f"eager {eager[finite][worst]}"
    )


class Recorder(TorchDispatchMode):
    """Captures a step as a CUDA graph would, on a CPU, and replays it.

        with Recorder() as recorder:
            step()  # runs, and is recorded
        recorder.replay()  # runs what it called once more, on the same storages

    Every tensor counts as the device's, and numbers, lists and NumPy arrays as the host's. So it is
    refused that the host reads a tensor (`item`, `tolist`, `numpy`, `cpu`, `if x:`), that a shape
    depends on values (`nonzero`, a boolean index), and that a tensor is made from host data
    (`torch.tensor`, `torch.from_numpy`, an index that is a list), also where the host alone uses
    it: such code belongs outside of the step. Numbers that a call is given stay what they were
    (`torch.full`, `torch.arange`, `x[0] = 5`), as in a graph; a replay then says something else
    than the step would. `x.to(device)` where x is already passes.

    What the step allocates is its own: a replay writes it to where it was, so what the step
    returned is there to be read. All else must have been there before, and still be where it was:
    tensors that Python held when recording began. A kvtools operator is one call.

    Raises:
        RuntimeError: while recording, a call that a graph could not hold, or whose tensors came
            from elsewhere; from `replay`, before anything runs, one of whose tensors is gone. The
            message names the call and its line.
    """

    def __enter__(self) -> "Recorder":
        # Weak references: no storage that is made meanwhile can be taken for one of these.
        held = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        storages = [x.untyped_storage() for x in held if x.layout == torch.strided]
        self._before = {x._cdata: StorageWeakRef(x) for x in storages}
        self._own: dict[int, torch.UntypedStorage] = {}
        self._outside: list[_Outside] = []
        self._calls: list[tuple[Callable, Any, list[Tensor | None]]] = []
        self._host = _Host()
        self._host.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._host.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = args, kwargs or {}
        number = self._host.number and func is LIFT and args[0].dim() == 0
        if why := None if number else _why(func, *given):
            _refuse(func, why)
        if number:  # a graph holds it as such
            storage = args[0].untyped_storage()
            self._own[storage._cdata] = storage
        inputs = tree_map_only(Tensor, lambda x: self._input(func, x), given)
        out = func(*given[0], **given[1])
        made: list[Tensor | None] = []
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            at = None if storage is None else storage._cdata
            new = at is not None and at not in self._own and at not in self._before
            made.append(x.detach() if new else None)
            if new:
                self._own[at] = storage
        if func._schema.is_mutable or any(x is not None for x in made):  # views stay what they are
            self._calls.append((func, inputs, made))
        return out

    def _input(self, func: Any, x: Tensor) -> "Tensor | _Outside":
        """What to keep of an argument: nothing of it that would keep it alive if it is not ours."""
        storage = x.untyped_storage()
        if storage._cdata in self._own:
            return x.detach()
        if storage._cdata not in self._before:
            _refuse(
                func, "reads a tensor that was not there before the step, nor made by its calls"
            )
        self._outside.append(_Outside.of(x, self._before[storage._cdata], f"{func} at {_line()}"))
        return self._outside[-1]

    def replay(self) -> None:
        """Run the recorded calls again."""
        # What autocast does was recorded; a call where it was off must not be given it here.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            tensors = {id(x): x.tensor() for x in self._outside}
            for func, inputs, made in self._calls:
                args, kwargs = tree_map_only(_Outside, lambda x: tensors[id(x)], inputs)
                out = func(*args, **kwargs)
                for new, old in zip(tree_leaves(out), made, strict=True):
                    if old is not None:
                        old.copy_(new)


@dataclass(frozen=True)
class _Outside:
    """A tensor that others hold, as a graph knows it."""

    storage: StorageWeakRef
    address: int
    like: Tensor  # on meta
    call: str

    @classmethod
    def of(cls, x: Tensor, storage: StorageWeakRef, call: str) -> "_Outside":
        like = torch.empty_strided((0,), (1,), dtype=x.dtype, device="meta")
        like = like.as_strided(x.shape, x.stride(), x.storage_offset())
        return cls(storage, x.untyped_storage().data_ptr(), like, call)

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.data_ptr() != self.address:
            raise RuntimeError(f"{self.call}: reads a tensor that has been freed or moved since")
        x = torch.empty(0, dtype=self.like.dtype)
        return x.set_(storage, self.like.storage_offset(), self.like.shape, self.like.stride())


class _Host(TorchFunctionMode):
    """Sees what does not come to a TorchDispatchMode: reads of tensors that are on a CPU."""

    READS = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
    number = False  # within `x[...] = number`

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in self.READS:
            _refuse(f"Tensor.{func.__name__}", "the host reads values of the device")
        self.number = func is Tensor.__setitem__ and isinstance(args[2], Number)
        return func(*args, **(kwargs or {}))


LIFT = torch.ops.aten.lift_fresh.default  # of what was made from host data


def _why(func: Any, args: tuple, kwargs: dict) -> str | None:
    """Why a graph could not hold a call, if so."""
    name = func.name().partition("::")[2].partition(".")[0]
    if func is LIFT:
        return "makes a tensor from host data: fill a buffer outside of the step"
    if name in ("resize_", "resize_as_", "set_"):
        return "gives a tensor another address"
    if torch.Tag.data_dependent_output in func.tags:
        return "the host reads a value of the device"
    if name in ("index", "index_put", "index_put_"):
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            return "the host reads a boolean index: take torch.where or masked_fill"
    elif torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
        return "the host reads values of the device, for the shape of a result"
    return None


def _refuse(call: Any, why: str) -> NoReturn:
    raise RuntimeError(f"{call} at {_line()}: {why}")


def _line() -> str:
    """The innermost line of Python that is neither torch's nor here."""
    frame, torchs = sys._getframe(1), os.path.dirname(torch.__file__)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torchs):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    source = linecache.getline(file, line, frame.f_globals).strip()
    return f"{file}:{line} in {frame.f_code.co_name} (`{source}`)"
