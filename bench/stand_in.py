"""Triton's CUDA launches without a GPU: its own driver over csrc/testing/libcuda.c, which checks
launches and runs nothing. TRITON_INTERPRET must be 0 before triton is imported."""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.nvidia import driver

SOURCE = Path(__file__).parent.parent / "csrc" / "testing" / "libcuda.c"


def stand_in() -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    library, include = f"{folder}/libcuda.so.1", Path(driver.__file__).parent / "include"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([*command, SOURCE, "-o", library], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    cuda = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    cuda.stand_in_arguments.restype = ctypes.POINTER(ctypes.c_uint64)
    return cuda


class Driver(driver.CudaDriver):
    """Triton's own, but for what it asks of torch."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_device = self.get_current_stream = lambda device=0: 0
        self.set_current_device = lambda device: None


def use() -> ctypes.CDLL:
    """CPU tensors pass for those of a Hopper GPU from here on."""
    cuda = stand_in()
    triton.runtime.driver.set_active(Driver())
    return cuda
