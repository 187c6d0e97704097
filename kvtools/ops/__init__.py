"""The operators `kvtools::*`: one schema each, one overload per implementation.

`kvtools::name` (the default overload) is the reference; `kvtools::name.cpu` and so on stand next to
it, with the same schema and fake. The functions in `ops/<row>.py` check, choose and call.
"""

from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

try:
    from .. import _C  # noqa: F401  registers the C++ kernels
except ModuleNotFoundError:  # anything else, such as a library that is missing, is said
    COMPILED = False
else:
    COMPILED = True

Impl = Literal["auto", "reference", "cpu", "triton", "cuda"]

_LIBRARY = torch.library.Library("kvtools", "DEF")
_LIBRARY.define("cpu_isa(str isa) -> str")  # the instruction set that `cpu` uses; for tests
OPS: dict[str, "Op"] = {}


class Op:
    """An operator: a schema without its name, a fake, and one implementation per `impl`.

    `impl="auto"` is the C++ kernel ("cpu") where there is one, on a CPU and without float64; the
    reference elsewhere.
    """

    def __init__(self, name: str, schema: str, fake: Callable, *, reference: Callable) -> None:
        OPS[name] = self
        self.name = name
        self._overloads: dict[str, Any] = {}
        self._add("reference", schema, fake)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        if COMPILED:
            self._add("cpu", schema, fake)

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
        double = False
        for arg in args:
            if isinstance(arg, Tensor):
                double = double or arg.dtype == torch.float64
                if arg.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(
                        f"{self.name} is for inference only: call it under torch.no_grad() or "
                        "detach its inputs"
                    )
            elif arg is torch.float64:
                double = True
        fits = "cpu" in self._overloads and args[0].device.type == "cpu" and not double
        if impl == "auto":
            impl = "cpu" if fits else "reference"
        overload = self._overloads.get(impl)
        if overload is None:
            self._lacks(impl)
        if impl == "cpu" and not fits:
            raise RuntimeError(
                f"impl='cpu' of {self.name} takes float32, float16 and bfloat16 on a CPU: use "
                "impl='auto'"
            )
        return overload(*args)

    def _lacks(self, impl: str) -> NoReturn:
        if impl not in get_args(Impl):
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(get_args(Impl))}")
        remedy = ""
        if impl == "cpu" and not COMPILED:
            remedy = (
                ". kvtools was installed without its C++ kernels: with torch, setuptools and "
                "pybind11 installed, reinstall it with pip install --no-build-isolation"
            )
        raise RuntimeError(
            f"impl={impl!r} does not exist for {self.name}; available: auto, "
            f"{', '.join(self.impls)}{remedy}"
        )


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition`. A message that has to be formatted comes as a
    function: formatting is slow, and torch.compile cannot format symbolic sizes."""
    if not condition:
        raise ValueError(message() if callable(message) else message)
