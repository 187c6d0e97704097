"""Builds the compiled parts; everything declarative is in pyproject.toml.

- `kvtools._host`, the page pool, forest and plan in C++;
- `kvtools._C`, the kernels, registered through torch's stable ABI. It needs the headers of a torch
  that is installed; without one it is left out.

One `_C` serves every Python and torch. `_host` is built for each Python: pybind11 has no stable
ABI, and nanobind's, which begins with Python 3.12, would save but one wheel of four.

KVTOOLS_EXT=0 leaves both out and gives a pure-Python install. KVTOOLS_KERNELS=PATH takes a `_C`
that was built before, as make wheels does. KVTOOLS_CUDA=1 compiles csrc/cuda with nvcc into `_C`,
the default where there is nvcc and a CUDA build of torch; 0 leaves it out; `host` compiles it for
the CPU, for tests (csrc/testing). KVTOOLS_CUDA_ARCHS=90a compiles for one architecture only.
KVTOOLS_SANITIZE=1 builds what is for the CPU with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import platform
import runpy
import shutil
import sys
import sysconfig
import tempfile
from importlib.machinery import PathFinder
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup

REMEDY = "or set KVTOOLS_EXT=0 for a pure-Python install."
# Each kernel of csrc/cpu is compiled once per instruction set. `base` comes first: where objects
# share an inline function the linker takes the first, which must run everywhere.
ISAS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    # The last options silence a false alarm in GCC's own headers, and clang, which lacks it.
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c", *quiet]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        *ISAS["avx2"],
    ]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-mavx512vnni"]
    ISAS["amx"] = [*ISAS["avx512"], "-mavx512vnni", "-DKVTOOLS_TILES=1"]
# The architectures of csrc/cuda, and PTX of the last for those to come.
ARCHS = os.environ.get("KVTOOLS_CUDA_ARCHS", "80 90a 100 120").split()
FLAGS, SANITIZERS = ["-std=c++17", "-O3", "-g1", "-Wall"], []
if os.environ.get("KVTOOLS_SANITIZE", "0") == "1":
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-O1", *SANITIZERS]
KERNELS = os.environ.get("KVTOOLS_KERNELS")
TORCH = 2, 10  # the oldest that this library must run with
HEADERS = sorted(Path("csrc").rglob("*.h"))


def sources(folder: str, suffix: str = "cpp") -> list[str]:
    return sorted(map(str, Path("csrc", folder).glob(f"*.{suffix}")))


def find_torch() -> tuple[Path, str | None] | None:
    """Where a torch is whose headers will do, and its version of CUDA.

    An isolated build does not see what is installed, but pip runs it by the interpreter that it
    installs for. Nothing is taken but what is stable: another torch may run the kernels.
    """
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec("torch", places)
    found = spec and spec.origin and runpy.run_path(Path(spec.origin).with_name("version.py"))
    if found and tuple(map(int, found["__version__"].split(".")[:2])) >= TORCH:
        return Path(spec.origin).parent, found["cuda"]
    print(
        f"kvtools: torch {found['__version__'] + ' is too old' if found else 'is not installed'} "
        "here, so without the C++ kernels (impl='cpu'). For them: pip install 'torch>="
        f"{TORCH[0]}.{TORCH[1]}', then kvtools again",
        file=sys.stderr,
    )
    return None


def cuda_build(version: str | None) -> tuple[str, Path | None]:
    """How csrc/cuda is built, as KVTOOLS_CUDA says, and where CUDA is; `version` is torch's."""
    wanted, nvcc = os.environ.get("KVTOOLS_CUDA", "auto"), shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent]
    homes = [Path(x) for x in (*homes, "/usr/local/cuda") if x]
    home = next((x for x in homes if Path(x, "include", "cuda_fp16.h").exists()), None)
    if wanted not in ("auto", "0", "1", "host"):
        sys.exit(f"kvtools: KVTOOLS_CUDA={wanted}: expected 0, 1 or host")
    if wanted == "auto":
        wanted = "1" if version and home else "0"
        if version and not home:
            print("kvtools: nvcc is not here, so without impl='cuda'", file=sys.stderr)
    elif wanted != "0" and not home:
        sys.exit(
            "kvtools: nvcc is missing: install CUDA's toolkit, set CUDA_HOME, or KVTOOLS_CUDA=0"
        )
    return wanted, home


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
            if ext.name == "kvtools._C" and KERNELS:
                target = self.get_ext_fullpath(ext.name)
                self.mkpath(os.path.dirname(target))
                self.copy_file(KERNELS, target)
                return
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
                if cuda == "host":
                    # g++ must be told that they are C++, and by which calls accesses are seen.
                    ext.extra_objects += self.compile_cuda(
                        os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g1", "-fPIC", "-Wall",
                        "-Wno-unknown-pragmas", "-fsanitize=thread", "-ffp-contract=off",
                        f"-isystem{home}/include", "-xc++",
                    )  # fmt: skip
                elif cuda == "1":
                    codes = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in ARCHS]
                    ext.extra_objects += self.compile_cuda(
                        f"{home}/bin/nvcc", "-std=c++17", "-O3", "-lineinfo", "-fmad=false", *codes,
                        f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}",
                        "-Xcompiler=-fPIC", "-Xfatbin=-compress-all", "--threads=0",
                    )  # fmt: skip
            super().build_extension(ext)

        def compile_cuda(self, *command: str) -> list[str]:
            def compile(source: str) -> str:
                target = str(Path(self.build_temp, "cuda", Path(source).stem + ".o"))
                if stale(target, source):
                    self.mkpath(os.path.dirname(target))
                    self.spawn([*command, "-c", source, "-o", target])
                return target

            with ThreadPool(os.cpu_count()) as pool:
                return pool.map(compile, sources("cuda", "cu"))

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

    def stale(target: str, source: str) -> bool:
        """Whether a source, or a header that it may include, is newer."""
        folder = Path(source).parent
        near = {"cpu": ["cpu"], "cuda": ["cuda", "testing"]}.get(folder.name)
        headers = [x for x in HEADERS if not near or x.parent.name in ("csrc", *near)]
        newest = max(x.stat().st_mtime for x in (*headers, Path(source)))
        return not Path(target).exists() or Path(target).stat().st_mtime < newest

    ParallelCompile("KVTOOLS_JOBS", needs_recompile=stale, default=os.cpu_count() or 1).install()
    depends = [*map(str, HEADERS), "setup.py"]
    shared = dict(depends=depends, extra_compile_args=FLAGS, extra_link_args=SANITIZERS)
    found = [Pybind11Extension("kvtools._host", sources("host"), **shared)]
    if KERNELS:
        if not Path(KERNELS).is_file():
            sys.exit(f"kvtools: KVTOOLS_KERNELS={KERNELS} is not there: build it, with make ext")
        found.append(Extension("kvtools._C", [], depends=[KERNELS], py_limited_api=True))
    elif torch := find_torch():
        root, (cuda, home) = torch[0], cuda_build(torch[1])
        kernels = Extension("kvtools._C", ["csrc/ops.cpp", "csrc/cpu/isa.cpp"], **shared)
        kernels.depends = depends + sources("cpu") + sources("cuda", "cu")
        kernels.include_dirs = [str(root / "include")]
        kernels.library_dirs, kernels.libraries = [str(root / "lib")], ["torch_cpu"]
        kernels.define_macros = [
            ("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"),
            ("Py_LIMITED_API", "0x030a0000"),
            ("KVTOOLS_CUDA", {"host": "2"}.get(cuda, cuda)),
        ]  # fmt: skip
        if cuda == "host":
            kernels.sources += sources("testing")
            kernels.extra_compile_args = [*FLAGS, "-isystem", f"{home}/include"]
        elif cuda == "1":
            kernels.library_dirs.append(str(home / "lib64"))
            kernels.libraries += ["cudart_static", "dl", "rt", "pthread"]
        kernels.py_limited_api = True
        found.append(kernels)
    return {"ext_modules": found, "cmdclass": {"build_ext": Build}}


setup(**extensions())
