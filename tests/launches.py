"""pytest -p launches tests/test_ROW.py: Triton's launches as a Hopper GPU would get them.

Every Triton call of the tests is compiled for sm_90 and goes through Triton's own launcher to a
stand-in for CUDA's driver (csrc/testing/libcuda.c), which refuses what a GPU would refuse. The
arguments that reach it must be those of the call. It runs nothing: results are the reference's.
`--cases N` runs N cases of each test, spread over all that there are.
"""

import os
import re
import struct
from collections import Counter, defaultdict

os.environ["TRITON_INTERPRET"] = "0"  # before conftest, which asks for the interpreter

import pytest
from triton.runtime.jit import JITFunction

from bench.stand_in import use
from kvtools import ops

# Checked elsewhere; these compare Triton's own results, or give ids that the reference refuses.
OTHERS = re.compile("contract|opcheck|alone|depend|graph|outside|nobody")
count = Counter()  # launches by kernel
launched = {}  # what was compiled, by kernel and hash


cuda = use()


def flat(value, kind):
    """What a launcher passes on of an argument: (bits, bytes) for each that is no constant."""
    if isinstance(kind, tuple):
        for pair in zip(value, kind, strict=True):
            yield from flat(*pair)
    elif kind.startswith("*"):
        yield value.data_ptr(), 8
    elif kind == "fp32":
        yield struct.unpack("<I", struct.pack("<f", value))[0], 4
    elif kind != "constexpr":
        size = int(kind[1:]) // 8
        yield value % 2 ** (8 * size), size


run = JITFunction.run


def launch(kernel, *args, grid, warmup, **kwargs):
    compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    entry = re.search(r"\.entry .*?\)", compiled.asm["ptx"], re.S)[0]
    params = re.findall(r"\.param \.\w", entry)
    cuda.stand_in_expect(len(params))
    run(kernel, *args, grid=grid, warmup=False, **kwargs)
    names = [param.name for param in kernel.params]
    given = dict(zip(names, args, strict=False)) | {x: kwargs[x] for x in names if x in kwargs}
    expected = [pair for name, kind in compiled.src.signature.items()
                for pair in flat(given[name], kind)]  # fmt: skip
    noted = cuda.stand_in_arguments()
    found = [noted[i] % 2 ** (8 * size) for i, (_, size) in enumerate(expected)]
    assert found == [bits for bits, _ in expected], f"{names[: len(args)]} arrive as others"
    scratch = [noted[i] for i in range(len(expected), len(params))]
    assert scratch == [0, 0], "the kernel has other parameters than the call has arguments"
    name = kernel.fn.__name__
    count[name] += 1
    launched.setdefault(name, {})[compiled.hash] = compiled
    return compiled


JITFunction.run = launch


def on_stand_in(call):
    def wrapper(op, impl, *args):
        if impl == "triton":
            call(op, impl, *args)
            impl = "reference"
        return call(op, impl, *args)

    return wrapper


@pytest.fixture(autouse=True)
def to_stand_in(monkeypatch):
    runs_on = ops._runs_on
    monkeypatch.setattr(
        ops, "_runs_on", lambda impl, place: impl == "triton" or runs_on(impl, place)
    )
    monkeypatch.setattr(ops.Op, "__call__", on_stand_in(ops.Op.__call__))


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=10**9, help="of each test, to be launched")


def pytest_collection_modifyitems(config, items):
    tests, kept, most = defaultdict(list), [], config.getoption("cases")
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.path.name == "test_launches.py":
            kept.append(item)
        elif params.get("impl") == "triton" and not OTHERS.search(item.originalname):
            tests[item.originalname].append(item)
    for cases in tests.values():
        n = min(most, len(cases))
        kept += [cases[i * (len(cases) - 1) // max(n - 1, 1)] for i in range(n)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter):
    said = ", ".join(f"{name} {n}" for name, n in sorted(count.items()))
    terminalreporter.write_line(f"launches: {said}")
