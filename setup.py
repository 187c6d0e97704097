"""Builds the compiled part, `kvtools._host`; everything declarative is in pyproject.toml.

KVTOOLS_EXT=0 leaves it out and gives a pure-Python install.
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import setup

REMEDY = "or set KVTOOLS_EXT=0 for a pure-Python install."


def extensions() -> dict:
    """The arguments of `setup` that build what is compiled."""
    if os.environ.get("KVTOOLS_EXT", "1") == "0":
        print("kvtools: KVTOOLS_EXT=0, so without the compiled part kvtools._host", file=sys.stderr)
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

        def compiler_works(self) -> bool:
            """Tells a machine that cannot compile from sources that do not."""
            with tempfile.TemporaryDirectory() as folder:
                probe = Path(folder, "probe.cpp")
                probe.write_text("#include <Python.h>\n#include <vector>\nint main() {}\n")
                options = self.extensions[0].extra_compile_args
                try:
                    self.compiler.compile([str(probe)], folder, extra_postargs=options)
                except CompileError:
                    return False
            return True

    ParallelCompile("KVTOOLS_JOBS").install()
    host = Pybind11Extension(
        "kvtools._host",
        sorted(map(str, Path("csrc/host").glob("*.cpp"))),
        depends=[*map(str, Path("csrc").rglob("*.h")), "setup.py"],
        cxx_std=17,
        extra_compile_args=[] if os.name == "nt" else ["-O3"],  # pybind11 adds -fvisibility=hidden
    )
    return {"ext_modules": [host], "cmdclass": {"build_ext": Build}}


setup(**extensions())
