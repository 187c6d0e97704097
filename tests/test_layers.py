"""The layers of the package, and that importing it is light."""

import ast
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import kvtools
from kvtools import ops

PACKAGE = Path(kvtools.__file__).parent
# What each layer may import of the package; see the picture in docs/kernels.md.
ALLOWED = {
    "reference": {"reference"},
    "kernels": {"kernels"},
    "_host": {"ops"},
    "ops": {"ops", "reference", "kernels", "_host", "_C"},
    "policy": set(),
    "config": {"policy"},
    "transaction": {"ops", "_host"},
    "store": {"ops", "policy", "config", "transaction", "_host"},
    "recent": {"ops", "transaction", "_host"},
    "cache": {"ops", "policy", "config", "store", "recent", "transaction"},
    "hf": {"hf", "ops", "policy", "config", "cache", "results"},
    "samples": set(),
    "rollouts": {"_host", "ops", "config", "cache", "hf", "samples", "transaction"},
    "prm": {"prm", "ops", "config", "cache", "hf", "rollouts", "models", "records"},
    "search": {"search", "config", "rollouts", "results"},
    "serve": {"serve", "ops"},
    "integrations": {"config", "hf", "policy"},
    "models": {"__init__"},
    "testing": set(),
    "tasks": set(),
    "results": set(),
    "records": set(),
    "quality": {"config", "hf", "results", "rollouts", "tasks"},
    "cli": {"cli", "__init__", "ops", "config", "policy", "models", "results", "records",
            "quality", "tasks", "prm", "search"},
    "__init__": {"ops", "config", "cache", "hf", "rollouts", "prm", "search", "_host", "models",
                 "policy", "quality", "tasks"},
}  # fmt: skip
OUTSIDE = {
    "hf": {"transformers"}, "prm": {"transformers"}, "models": {"transformers"},
    "kernels": {"triton"},
}  # fmt: skip


def imports(path: Path):
    """Top-level names outside the package, and layers inside, that a file imports."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["kvtools", *parts][: -node.level] if node.level else []
            module = ".".join(filter(None, [*start, node.module]))
            names = [module] if module != "kvtools" else [f"{module}.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            yield top, (rest.split(".")[0] or "__init__") if top == "kvtools" else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_up_only(path):
    layer = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for top, inside in imports(path):
        if top == "kvtools":
            name = inside if inside in {*ALLOWED, "_host", "_C"} else "__init__"
            assert name in ALLOWED[layer], f"{layer} imports kvtools.{inside}"
        elif top in ("transformers", "triton"):
            assert top in OUTSIDE.get(layer, ()), f"{layer} imports {top}"


def files_that(path: Path) -> set[Path]:
    """Files of the package that a file imports, also within functions, but not for types alone."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = ["kvtools", *path.relative_to(PACKAGE).with_suffix("").parts]
            module = ".".join(
                filter(None, [*(parts[: -node.level] if node.level else []), node.module])
            )
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            # The longest beginning that is a file: the rest are names within it.
            ours = top == "kvtools" and rest[:1] not in (["_C"], ["_host"])
            for end in range(len(rest), -1, -1) if ours else ():
                place = PACKAGE.joinpath(*rest[:end])
                file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                if file.is_file():
                    found.add(file)
                    break
    return found - {path}


def test_no_file_imports_itself_by_way_of_others():
    left = {path: files_that(path) for path in PACKAGE.rglob("*.py")}
    assert len(left) > 30 and any(left.values())
    while free := [path for path, needs in left.items() if not needs & left.keys()]:
        for path in free:
            del left[path]
    circle = sorted(str(path.relative_to(PACKAGE)) for path in left)
    assert not circle, f"these import one another: {', '.join(circle)}"


def test_import_is_light():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import kvtools\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'transformers', 'rich'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["quantize_kv", "merge_states"])
def test_what_an_installation_lacks_is_said_once(name, monkeypatch):
    """And in one line; neither where float64 calls for the reference, nor by compiled code."""
    x, lse = torch.randn(2, 1, 8), torch.zeros(2, 1)
    args = {"quantize_kv": (x, "int4"), "merge_states": (x, lse, x, lse)}[name]
    run, op = getattr(kvtools, name), ops.OPS[name]
    monkeypatch.setattr(op, "_overloads", {"reference": op._overloads["reference"]})
    ops._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*(arg if isinstance(arg, str) else arg.double() for arg in args))
        run(*args, impl="reference")
        torch.compile(run, fullgraph=True, backend="eager")(*args)
        assert not [x for x in caught if "kvtools" in str(x.message)]
        run(*args)
        run(*args)
    (text,) = [str(x.message) for x in caught if "kvtools" in str(x.message)]
    assert text.startswith("kvtools was installed without its C++ kernels: ") and "\n" not in text
    ops._warn.cache_clear()


def test_importing_the_door_registers_nothing():
    code = (
        "from kvtools import generate\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "assert not any('kvtools' in x for x in ALL_ATTENTION_FUNCTIONS.valid_keys())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_kernels_see_no_torch():
    folder = Path(__file__).parent.parent / "csrc"
    sources = [x for x in folder.rglob("*.*") if x.name != "ops.cpp"]
    assert len(sources) > 10
    for source in sources:
        assert "#include <torch" not in source.read_text(), source


@pytest.mark.only(when=lambda: ops.COMPILED)
def test_kernels_are_bound_by_the_stable_abi():
    """What the library wants of torch has C names, so that every torch from 2.10 on loads it."""
    tool = shutil.which("nm")
    if not tool:
        pytest.skip("nm is not installed")
    said = subprocess.check_output([tool, "-D", "--undefined-only", ops._C.__file__], text=True)
    kinds = {line.split()[-1]: line.split()[-2] for line in said.splitlines()}
    of_torch = [name for name in kinds if name.startswith(("aoti_torch_", "torch_"))]
    assert of_torch
    # A weak one is null, and a call of it a crash, where no library that is linked has it.
    assert not [name for name in of_torch if kinds[name] != "U"]
    cpp = re.compile(r"^_Z\w*(2at|3c10|5torch)\d")
    assert not [name for name in kinds if cpp.match(name)]


# A torch with CUDA, as far as the stream is concerned, loaded as Python loads torch's libraries.
STREAM = """
import ctypes, os, sys
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], os.RTLD_LOCAL)
import torch, kvtools
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.kvtools.quantize_kv.cuda.redispatch(key, torch.randn(2, 64), "int4")
except RuntimeError as error:
    print(error)
"""


# Needs csrc/cuda, and a torch without CUDA.
@pytest.mark.only(when=lambda: ops.CUDA == "cuda" and torch.version.cuda is None)
def test_the_stream_is_looked_up_in_torch(tmp_path):
    def run(*args):
        return subprocess.check_output(
            [sys.executable, "-c", STREAM, *map(str, args)], text=True, stderr=subprocess.STDOUT,
            timeout=120,
        )  # fmt: skip

    lacks = "this one lacks aoti_torch_get_current_cuda_stream"
    assert lacks in run()
    source, library = tmp_path / "stand_in.c", tmp_path / "libtorch_cuda.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int i, void** x) { return 0; }\n")
    name = f"-Wl,-soname,{library.name}"
    subprocess.run(["gcc", "-shared", "-fPIC", name, source, "-o", library], check=True)
    said = run(library)  # goes on, and finds that there is no device
    assert lacks not in said and "device" in said, said


def test_public_names_exist():
    for name in kvtools.__all__:
        assert getattr(kvtools, name).__doc__, name
    assert dir(kvtools) == sorted([*kvtools.__all__, "__version__"])


@pytest.mark.parametrize("clone", [True, False], ids=["in a clone", "installed"])
def test_what_was_not_compiled_says_where_it_is(tmp_path, clone):
    """Python that starts in a clone gets its folder in place of what was installed."""
    folder = tmp_path / "a clone"
    shutil.copytree(PACKAGE, folder / "kvtools", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    if clone:
        (folder / "setup.py").touch()
    code = """if True:
        import sys  # an editable install finds the compiled parts wherever the package lies
        sys.meta_path = [x for x in sys.meta_path if "editable" not in str(x)]
        import torch, kvtools
        for use in (lambda: kvtools.KVCache, lambda: kvtools.quantize_kv(torch.ones(1, 8), "int4",
                                                                         impl="cpu")):
            try:
                use()
            except (ImportError, RuntimeError) as error:
                print(error)
    """
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    ).stdout.splitlines()  # fmt: skip
    assert len(out) == 2
    for line in out:
        assert (f"kvtools of the folder {folder}, where nothing was compiled" in line) == clone
        assert ("start Python in another folder" in line) == clone
        assert ("kvtools was installed without its C++" in line) != clone
