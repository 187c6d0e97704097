"""Fixtures: the device, the implementations this machine can run, poisoned fresh memory."""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)  # tests are small and run side by side

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton

from kvtools.ops import COMPILED  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# The C++ kernels run once per instruction set that this processor has.
IMPLS = ["reference", "cpu-base", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16"]


@pytest.fixture(params=IMPLS)
def impl(request):
    """An implementation; one that this machine cannot run is skipped."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    if not COMPILED:
        pytest.skip("kvtools was built without its C++ kernels")
    try:
        before = torch.ops.kvtools.cpu_isa(isa)
    except RuntimeError:
        pytest.skip(f"this processor has no {isa}")
    yield name
    torch.ops.kvtools.cpu_isa(before)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """`torch.empty*` called by the package returns NaN (floats) or absurd values (integers)."""

    def poison(function):
        def wrapper(*args, **kwargs):
            tensor = function(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("kvtools") and tensor.device.type != "meta":
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
