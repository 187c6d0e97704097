"""Builds the compiled parts; everything declarative is in pyproject.toml.

- `kvtools._host`, the page pool, forest and plan in C++;
- `kvtools._C`, the kernels, registered through torch's stable ABI. It needs the headers of an
  installed torch, so an isolated build leaves it out.

KVTOOLS_EXT=0 leaves both out and gives a pure-Python install. KVTOOLS_SANITIZE=1 builds them with
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import importlib.util
import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup

REMEDY = "or set KVTOOLS_EXT=0 for a pure-Python install."
# Each kernel of csrc/cpu is compiled once per instruction set. `base` comes first: where objects
# share an inline function the linker takes the first, which must run everywhere.
ISAS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    # The last option silences a false alarm in GCC's own headers.
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-Wno-maybe-uninitialized"]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        *ISAS["avx2"],
    ]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
FLAGS, SANITIZERS = ["-std=c++17", "-O3", "-g1", "-Wall"], []
if os.environ.get("KVTOOLS_SANITIZE", "0") == "1":
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-O1", *SANITIZERS]
HEADERS = [*map(str, sorted(Path("csrc").rglob("*.h"))), "setup.py"]


def sources(folder: str) -> list[str]:
    return sorted(map(str, Path("csrc", folder).glob("*.cpp")))


def extensions() -> dict:
    """The arguments of `setup` that build what is compiled."""
    if os.environ.get("KVTOOLS_EXT", "1") == "0":
        print("kvtools: KVTOOLS_EXT=0, so without the compiled parts", file=sys.stderr)
        return {}
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
    except ImportError:
        sys.exit(f"kvtools: pybind11 is missing: pip install pybind11, {REMEDY}")
    from setuptools.errors import CompileError, LinkError

    class Build(build_ext):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (CompileError, LinkError):
                if self.compiler_works():
                    raise
                sys.exit(
                    "kvtools: no working C++17 compiler with Python headers: install them "
                    f"(Debian: apt-get install g++ python3-dev), {REMEDY}"
                )

        def build_extension(self, ext: Extension) -> None:
            if ext.name == "kvtools._C":
                ext.extra_objects = [
                    object
                    for isa, options in ISAS.items()
                    for object in self.compiler.compile(
                        sorted(set(sources("cpu")) - set(ext.sources)),
                        str(Path(self.build_temp, isa)),
                        macros=[("KVTOOLS_ISA", isa)],
                        extra_postargs=[*FLAGS, *options],
                    )
                ]
            super().build_extension(ext)

        def compiler_works(self) -> bool:
            """Tells a machine that cannot compile from sources that do not."""
            with tempfile.TemporaryDirectory() as folder:
                probe = Path(folder, "probe.cpp")
                probe.write_text("#include <Python.h>\n#include <vector>\nint main() {}\n")
                include = [sysconfig.get_path("include")]
                try:
                    self.compiler.compile([str(probe)], folder, include_dirs=include)
                except CompileError:
                    return False
            return True

    newest = max(Path(header).stat().st_mtime for header in HEADERS)

    def stale(target: str, source: str) -> bool:
        built = Path(target).stat().st_mtime if Path(target).exists() else 0
        return built < max(newest, Path(source).stat().st_mtime)

    ParallelCompile("KVTOOLS_JOBS", needs_recompile=stale, default=os.cpu_count() or 1).install()
    shared = dict(depends=HEADERS, extra_compile_args=FLAGS, extra_link_args=SANITIZERS)
    found = [Pybind11Extension("kvtools._host", sources("host"), **shared)]
    torch = importlib.util.find_spec("torch")
    if torch is None:
        print(
            "kvtools: torch is not importable here, so without the C++ kernels (impl='cpu'). For "
            "them: pip install torch setuptools pybind11, then pip install --no-build-isolation",
            file=sys.stderr,
        )
    else:
        root = Path(torch.submodule_search_locations[0])
        kernels = Extension("kvtools._C", ["csrc/ops.cpp", "csrc/cpu/isa.cpp"], **shared)
        kernels.depends = HEADERS + sources("cpu")
        kernels.include_dirs = [str(root / "include")]
        kernels.library_dirs, kernels.libraries = [str(root / "lib")], ["torch_cpu"]
        # The oldest torch that this library must run with: 2.10.
        kernels.define_macros = [
            ("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000"),
        ]  # fmt: skip
        kernels.py_limited_api = True
        found.append(kernels)
    return {"ext_modules": found, "cmdclass": {"build_ext": Build}}


setup(**extensions())
