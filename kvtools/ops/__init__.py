"""The operators `kvtools::*`: one schema each, one overload per implementation.

`kvtools::name` (the default overload) is the reference; `kvtools::name.triton` and so on are added
next to it as they exist, with the same schema and fake. The functions in `ops/<row>.py` check,
choose and call.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "cpu", "triton", "cuda"]

_LIBRARY = torch.library.Library("kvtools", "DEF")
OPS: dict[str, "Op"] = {}


class Op:
    """An operator: a schema without its name, a fake, and one implementation per `impl`."""

    def __init__(self, name: str, schema: str, fake: Callable, **impls: Callable) -> None:
        OPS[name] = self
        self.name = name
        self._overloads: dict[str, Any] = {}
        for impl, function in impls.items():
            overload = "" if impl == "reference" else f".{impl}"
            _LIBRARY.define(f"{name}{overload}{schema}")
            _LIBRARY.impl(f"{name}{overload}", function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"kvtools::{name}{overload}", fake, lib=_LIBRARY)
            packet = getattr(torch.ops.kvtools, name)
            self._overloads[impl] = getattr(packet, overload.lstrip(".") or "default")

    @property
    def impls(self) -> tuple[str, ...]:
        return tuple(self._overloads)

    def __call__(self, impl: str, *args: Any) -> Any:
        """Run `impl` on `args`; "auto" is the reference until a faster one is registered."""
        overload = self._overloads.get("reference" if impl == "auto" else impl)
        if overload is None:
            if impl not in get_args(Impl):
                raise ValueError(f"impl={impl!r}: expected one of {', '.join(get_args(Impl))}")
            raise RuntimeError(
                f"impl={impl!r} does not exist for {self.name}; available: auto, "
                f"{', '.join(self.impls)}"
            )
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            raise RuntimeError(
                f"{self.name} is for inference only: call it under torch.no_grad() or detach its "
                "inputs"
            )
        return overload(*args)


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition`. A message that has to be formatted comes as a
    function: formatting is slow, and torch.compile cannot format symbolic sizes."""
    if not condition:
        raise ValueError(message() if callable(message) else message)
