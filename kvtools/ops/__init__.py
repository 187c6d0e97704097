"""The operators `kvtools::*`: one schema each, one overload per implementation.

`kvtools::name` (the default overload) is the reference; `kvtools::name.cpu` and so on stand next to
it, with the same schema and fake. The functions in `ops/<row>.py` check, choose and call.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

COMPILED, CUDA = importlib.util.find_spec("kvtools._C") is not None, ""
if COMPILED:  # if it does not load, for a library that is missing or another torch, that is said
    from .. import _C  # registers the kernels in C++

    CUDA = _C.CUDA

Impl = Literal["auto", "reference", "cpu", "triton", "cuda"]

TRITON = importlib.util.find_spec("triton") is not None

_LIBRARY = torch.library.Library("kvtools", "DEF")
# The instruction set that `cpu` is to use, or "auto"; returns the one before. For tests.
_LIBRARY.define("cpu_isa(str isa) -> str")
_LIBRARY.define("cpu_lacks(str isa) -> str")  # why an instruction set cannot run here, or ""
ISAS = ("base", "avx2", "avx512", "avx512bf16", "amx")  # the widest that can run is taken
NATIVE = {"cpu": "cpu", "cuda": "triton"}  # device to what `auto` takes there
# What csrc/cuda has.
IN_CUDA = {
    "quantize_kv", "append_kv", "tree_attention", "select_victims", "sample", "step_scores",
}  # fmt: skip
OPS: dict[str, "Op"] = {}
# What an installation may lack, by implementation, and the remedy.
LACKING = {
    "cpu": "kvtools was installed without its C++ kernels: with torch and a C++17 compiler "
    "installed, reinstall it from its sources",
    "host": "kvtools was installed without its C++ part: reinstall it with this Python, a C++17 "
    "compiler and without KVTOOLS_EXT=0",
    "cuda": "kvtools was installed without its CUDA kernels: with nvcc and a CUDA build of torch "
    "installed, reinstall it from its sources",
    "triton": "triton is not installed: pip install triton",
}
SOURCES = Path(__file__).resolve().parents[2]
if not COMPILED and (SOURCES / "setup.py").is_file():
    # Python that starts in a clone imports its folder, whatever was installed from it.
    LACKING["cpu"] = LACKING["host"] = (
        f"this is the kvtools of the folder {SOURCES}, where nothing was compiled: start Python in "
        "another folder to get the installed one, or compile here with "
        "pip install --no-build-isolation -e ."
    )


class Op:
    """An operator: a schema without its name, a fake, and one implementation per `impl`.

    The Triton kernel has the name and the module's name of the reference, and is imported when it
    first runs. `impl="auto"` is "triton" on a CUDA device and "cpu" on a CPU, where there is one
    and no tensor is float64; the reference elsewhere. "cuda" is never chosen: no measurement says
    yet where it is faster than "triton".
    """

    def __init__(self, name: str, schema: str, fake: Callable, *, reference: Callable) -> None:
        OPS[name] = self
        self.name = name
        parts = [part.split() for part in schema[1 : schema.index(") ->")].split(", ")]
        self._arguments = [name for _, name in parts]
        of_kind = {kind: [] for kind in ("Tensor", "Tensor[]", "ScalarType")}
        for at, (kind, _) in enumerate(parts):
            kind = kind.replace("?", "").partition("(")[0]
            of_kind.get(kind, []).append(at)
        self._tensors, self._lists, self._dtypes = of_kind.values()
        self._overloads: dict[str, Any] = {}
        self._add("reference", schema, fake)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        if COMPILED:
            self._add("cpu", schema, fake)
        if CUDA and name in IN_CUDA:
            self._add("cuda", schema, fake)
        if TRITON:
            row = reference.__module__.rpartition(".")[2]
            self._add("triton", schema, fake)
            _LIBRARY.impl(f"{name}.triton", _lazy(row, name), "CompositeExplicitAutograd")

    def _add(self, impl: str, schema: str, fake: Callable) -> None:
        overload = "" if impl == "reference" else f".{impl}"
        _LIBRARY.define(f"{self.name}{overload}{schema}")
        torch.library.register_fake(f"kvtools::{self.name}{overload}", fake, lib=_LIBRARY)
        packet = getattr(torch.ops.kvtools, self.name)
        self._overloads[impl] = getattr(packet, overload.lstrip(".") or "default")

    @property
    def impls(self) -> tuple[str, ...]:
        return tuple(self._overloads)

    def __call__(self, impl: str, *args: Any) -> Any:
        """Run `impl` on `args`."""
        double = any([args[at] is torch.float64 for at in self._dtypes])
        device = args[0].device
        given = [args[at] for at in self._tensors]
        for at in self._lists:
            given += args[at]
        for arg in given:
            if arg is None:
                continue
            double = double or arg.dtype == torch.float64
            if arg.device != device:
                self._elsewhere(args)
            if arg.requires_grad and torch.is_grad_enabled():
                learnt = self._named(args, lambda x: x.requires_grad)
                raise RuntimeError(
                    f"{self.name} is for inference only: call it under torch.no_grad() or "
                    f"detach {', '.join(learnt)}"
                )
        place = device.type
        best = NATIVE.get(place)
        if impl == "auto":
            impl = "reference" if double or best is None else best
            if impl not in self._overloads:
                if not torch.compiler.is_compiling():
                    _warn(impl)
                impl = "reference"
        overload = self._overloads.get(impl)
        if overload is None:
            self._lacks(impl)
        if impl != "reference" and (double or not _runs_on(impl, place)):
            raise RuntimeError(
                f"impl={impl!r} of {self.name} takes float32, float16 and bfloat16 on "
                f"{'a CPU' if impl == 'cpu' else 'a CUDA device'}, got "
                f"{'float64' if double else f'tensors on {place}'}: use impl='auto'"
            )
        return overload(*args)

    def _elsewhere(self, args: tuple) -> NoReturn:
        first, device = self._arguments[0], args[0].device
        away = self._named(args, lambda x: x.device != device)
        away = ", ".join(f"{name} on {x.device}" for name, x in away.items())
        raise ValueError(f"{self.name}: {first} is on {device}, but {away}; use one device")

    def _named(self, args: tuple, which: Callable[[Tensor], bool]) -> dict[str, Tensor]:
        found = {}
        for name, arg in zip(self._arguments, args, strict=True):
            for x in _tensors((arg,)):
                if isinstance(x, Tensor) and which(x):
                    found[name] = x
        return found

    def _lacks(self, impl: str) -> NoReturn:
        if impl not in get_args(Impl):
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(get_args(Impl))}")
        there = {"cpu": COMPILED, "cuda": CUDA, "triton": TRITON}[impl]
        remedy = "" if there else f". {LACKING[impl]}"
        raise RuntimeError(
            f"impl={impl!r} does not exist for {self.name}; available: auto, "
            f"{', '.join(self.impls)}{remedy}"
        )


def _tensors(args: tuple) -> Iterator[Any]:
    """The arguments; lists' members for lists."""
    for arg in args:
        if isinstance(arg, list):
            yield from arg
        else:
            yield arg


@cache
def _warn(impl: str) -> None:
    """Say once that `auto` has to do without `impl`."""
    slow = "until then impl='auto' takes the reference in PyTorch, which is slower"
    warnings.warn(f"{LACKING[impl]}; {slow}", RuntimeWarning, stacklevel=4)


def _lazy(row: str, name: str) -> Callable:
    @cache
    def launcher() -> Callable:
        return getattr(importlib.import_module(f"kvtools.kernels.{row}"), name)

    def run(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return launcher()(*args)

    return run


def _runs_on(impl: str, place: str) -> bool:
    if impl == "cuda":
        return place == CUDA
    if (impl, place) == ("triton", "cpu"):  # for tests
        return os.environ.get("TRITON_INTERPRET") == "1"
    return impl == NATIVE.get(place)


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition`. A message that has to be formatted comes as a
    function: formatting is slow, and torch.compile cannot format symbolic sizes."""
    if not condition:
        raise ValueError(message() if callable(message) else message)
