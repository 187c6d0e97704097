"""Fixtures: the device, the implementations this machine can run, poisoned fresh memory."""

import os
import sys

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # tests are small and run side by side

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton

from kvtools.ops import COMPILED, CUDA, TRITON, Op  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not `keywords`, which has folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# The C++ kernels run once per instruction set that this processor has.
IMPLS = ["reference", "cpu-base", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16", "triton", "cuda"]


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """An implementation; one that this machine cannot run is skipped.

    Triton's kernels are interpreted where there is no GPU, else every call is taken to the GPU.
    Those of csrc/cuda run on the CPU in a build for it: `make host`.
    """
    name, _, isa = request.param.partition("-")
    if name == "triton" and not TRITON:
        pytest.skip("triton is not installed")
    if name == "cuda" and (not CUDA or (CUDA == "cuda" and not torch.cuda.is_available())):
        pytest.skip("kvtools was built without csrc/cuda" if not CUDA else "needs a CUDA device")
    if name in ("triton", "cuda") and torch.cuda.is_available():
        monkeypatch.setattr(Op, "__call__", on_gpu(Op.__call__))
    if name == "cuda":
        monkeypatch.setattr(Op, "_lacks", lambda op, impl: pytest.skip(f"{op.name} has no {impl}"))
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


def on_gpu(call):
    """`call` with its tensors on the GPU: strides, overlaps and what it writes are kept."""

    def wrapper(op, impl, *args):
        if impl not in ("triton", "cuda"):
            return call(op, impl, *args)
        moved = {}

        def to_gpu(x):
            if not isinstance(x, Tensor) or x.is_cuda:
                return x
            storage = x.untyped_storage()
            there = moved.setdefault(storage.data_ptr(), (storage, storage.cuda()))[1]
            whole = torch.empty(0, dtype=x.dtype, device="cuda")
            return whole.set_(there, x.storage_offset(), x.shape, x.stride())

        out = call(op, impl, *map(to_gpu, args))
        for storage, there in moved.values():
            storage.copy_(there)
        out = [x.cpu() for x in (out if isinstance(out, tuple) else [out]) if x is not None]
        return out[0] if len(out) == 1 else tuple(out) or None

    return wrapper


@pytest.fixture
def opcheck(impl):
    """opcheck(name, args, **options) of torch.library, of the overload that is `impl`."""

    def run(name, args, **options):
        packet = getattr(torch.ops.kvtools, name)
        if impl not in ("reference", *packet.overloads()):
            pytest.skip(f"{name} has no {impl}")
        if impl in ("triton", "cuda") and torch.cuda.is_available():
            args = [x.cuda() if isinstance(x, Tensor) else x for x in args]
        overload = getattr(packet, "default" if impl == "reference" else impl)
        torch.library.opcheck(overload, tuple(args), **options)

    return run


@pytest.fixture(autouse=True, scope="session")
def rounding_interpreter():
    """Triton's interpreter truncates to bfloat16; a GPU rounds to the nearest."""
    if TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime import interpreter

        cast = interpreter.InterpreterBuilder.cast_impl

        def rounded(self, src, dtype):
            if (str(src.dtype.scalar), str(dtype.scalar)) == ("fp32", "bf16"):
                bits = torch.tensor(src.data).bfloat16().view(torch.uint16).numpy()
                return interpreter.TensorHandle(bits, dtype.scalar)
            return cast(self, src, dtype)

        interpreter.InterpreterBuilder.cast_impl = rounded


@pytest.fixture
def device():
    return torch.device("cpu")


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
