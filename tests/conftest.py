"""Fixtures: the device, the implementations this machine can run, poisoned fresh memory."""

import os
import random
import sys
import warnings
from collections import defaultdict
from inspect import signature
from itertools import combinations

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # tests are small and run side by side

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton

from kvtools import ops  # noqa: E402
from kvtools.ops import COMPILED, CUDA, IN_CUDA, OPS, TRITON, Op  # noqa: E402

GPU = torch.cuda.is_available()
ignored = {
    "test_launches.py": "launches" not in sys.modules,  # the plugin: make launches
    "test_bench.py": not COMPILED,
    "test_bench_gpu.py": not COMPILED,
}
NOT_IN_CUDA = OPS.keys() - IN_CUDA
IN_TILES = {"test_attention"}  # tests of what is computed by tiles of AMX, or their emulation
collect_ignore = [name for name in ignored if ignored[name]]


def runs(impl: str) -> bool:
    """Whether this installation runs it on this machine."""
    name, _, isa = impl.partition("-")
    if name == "triton":
        return TRITON
    if name == "cuda":
        return CUDA == "cpu" or (CUDA == "cuda" and GPU)
    if not isa:
        return True
    return COMPILED and not torch.ops.kvtools.cpu_lacks(isa)


# The C++ kernels run once per instruction set that this processor has, the best one last.
ISAS = [x for x in map("cpu-{}".format, ("amx-emulated", *ops.ISAS)) if runs(x)]
IMPLS = ["reference", *ISAS, *filter(runs, ("triton", "cuda"))]


def covering(cases: list[dict[str, tuple]], strength: int, seed: str) -> set[int]:
    """Few of these cases, such that any values of `strength` axes that meet in one of all meet in
    one of the few."""
    met = [set(combinations(sorted(x.items()), min(strength, len(x)))) for x in cases]
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    seen, few = set(), set()
    for least in range(max(map(len, met)), 0, -1):
        for i in order:
            if len(met[i] - seen) >= least:
                few.add(i)
                seen |= met[i]
    return few


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leaves what can run here, and marks cases that repeat others as long.

    Of a test of all implementations, the reference and the C++ kernels of the best instruction set
    run so many cases that each pair of values occurs, and so does a test marked `pairwise`; the
    other instruction sets, which are the same source, and Triton's interpreter so many that each
    value does. All the others are long, but that the interpreter never does more than each pair.

    What the axes guard: formats, dtypes and head sizes, the loads and conversions of a kernel;
    numbers of rows, tokens and pages, its tails and how work is cut; filters, links, reductions and
    masks, its branches; page sizes and strides, its addresses. Faults sit in one of these or where
    two meet. Policies and models are lists, not products: each stands for code of its own.
    """
    items[:] = filter(possible, items)
    products = defaultdict(list)
    for item in items:
        if any(holds(mark, item) for mark in item.iter_markers("long_if")):
            item.add_marker(pytest.mark.long)
        every = "impl" in getattr(item, "fixturenames", ()) or item.get_closest_marker("pairwise")
        if every and hasattr(item, "callspec"):
            products[item.parent.nodeid, item.originalname, impl_of(item)].append(item)
    dropped = set()
    for (_, name, impl), same in products.items():
        if GPU and impl in ("triton", "cuda"):
            continue
        cases = [axes(x) for x in same]
        few = sorted(covering(cases, 2, name + impl))
        if impl == "triton":  # interpreted: never more
            dropped |= {same[i] for i in range(len(same)) if i not in few}
        if impl in (*ISAS[:-1], "triton"):
            few = [few[i] for i in covering([cases[i] for i in few], 1, name + impl)]
        for i, item in enumerate(same):
            if i not in few:
                item.add_marker(pytest.mark.long)
    items[:] = [x for x in items if x not in dropped]


def axes(item) -> dict[str, tuple]:
    """What each `parametrize` gives a case, and each fixture but `impl`, told by identity."""
    given, found = item.callspec.params, {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = names.replace(" ", "").split(",") if isinstance(names, str) else names
        found[",".join(names)] = tuple(id(given[x]) for x in names)
    fixtures = given.keys() - set(",".join(found).split(",")) - {"impl"}
    return found | {x: (id(given[x]),) for x in fixtures}


def impl_of(item) -> str:
    return item.callspec.params.get("impl", "") if hasattr(item, "callspec") else ""


def holds(mark, item) -> bool:
    """`when` of a mark for a case's parameters; `impl` is without its instruction set, and
    `again` tells that it is not the best one."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    if impl := impl_of(item):
        params |= {"impl": impl.partition("-")[0], "again": impl in ISAS[:-1]}
    when = mark.kwargs["when"]
    return when(**{x: params[x] for x in signature(when).parameters if x in params})


def possible(item) -> bool:
    if item.get_closest_marker("gpu") and not GPU:  # not `keywords`, which has folders too
        return False
    if impl_of(item) == "cuda" and any(x in item.originalname for x in NOT_IN_CUDA):
        return False
    if impl_of(item) == "cpu-amx-emulated" and item.path.stem not in IN_TILES:
        return False
    return all(holds(mark, item) for mark in item.iter_markers("only"))


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """An implementation that this machine can run.

    Triton's kernels are interpreted where there is no GPU, else every call is taken to the GPU.
    Those of csrc/cuda run on the CPU in a build for it: `make host`.
    """
    name, _, isa = request.param.partition("-")
    if name in ("triton", "cuda") and GPU:
        monkeypatch.setattr(Op, "__call__", on_gpu(Op.__call__))
    if name == "cuda":
        monkeypatch.setattr(Op, "_lacks", lambda op, impl: pytest.skip(f"{op.name} has no {impl}"))
    before = torch.ops.kvtools.cpu_isa(isa) if isa else None
    yield name
    if isa:
        torch.ops.kvtools.cpu_isa(before)


def on_gpu(call):
    """`call` with its tensors on the GPU: strides, overlaps and what it writes are kept."""

    def wrapper(op, impl, *args):
        if impl not in ("triton", "cuda"):
            return call(op, impl, *args)
        moved = {}

        def to_gpu(x):
            if isinstance(x, list):
                return [to_gpu(each) for each in x]
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
        if impl in ("triton", "cuda") and GPU:
            args = [x.cuda() if isinstance(x, Tensor) else x for x in args]
            args = [[y.cuda() for y in x] if isinstance(x, list) else x for x in args]
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
            if torch.compiler.is_compiling():
                return tensor
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


@pytest.fixture
def graphs(monkeypatch):
    """Steps ahead of the host on a CPU, captured by the recorder; one that is not fails."""
    from captured import Captured

    from kvtools.hf import decode

    captured = Captured()
    monkeypatch.setattr(decode, "capturer", captured)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield captured
