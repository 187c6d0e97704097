"""SGLang without the packages that it needs of GPUs, of media and of grammars: names only."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

WITHOUT = (
    "torchvision", "torchaudio", "torchcodec", "sgl_kernel", "flashinfer", "triton_kernels",
    "deep_gemm", "datasets", "xgrammar", "outlines", "llguidance", "soundfile", "av",
)  # fmt: skip


class Anything(type):
    """A class whose attributes, calls and items are classes like it."""

    def __getattr__(cls, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __getitem__(cls, key: object) -> Any:
        return cls


class Absent(ModuleType):
    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # Any, where it is a type of a field of pydantic's.
        return Any if self.__name__.split(".")[0] == "xgrammar" else Anything(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in WITHOUT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


def install() -> None:
    """Stand-ins for those that are not installed; for this process."""
    missing = [x for x in WITHOUT if importlib.util.find_spec(x) is None]
    if missing:
        sys.meta_path.append(Finder())
