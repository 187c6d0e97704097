"""Checks what goes along to a machine with a GPU, and says how to run bench.gpu there.

Run by that machine's version of Python: python bench/gpu_bundle.py FOLDER. With a torch it imports
all of kvtools; without one `_host` alone, and of `_C` it reads what that wants of others.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

MOST = 64 * 2**20  # bytes, with the working tree
RIVALS = "rivals.tar.xz"  # of bench/gpu_rivals.sh, where it was put in the folder


def check_host(library: Path) -> str:
    (path,) = library.glob(f"_host.cpython-3{sys.version_info.minor}-*.so")
    spec = importlib.util.spec_from_file_location("_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Forest(4, 16).num_rows == 0
    return f"{path.name} imports"


def check_kernels(library: Path) -> str:
    path = library / "_C.abi3.so"
    said = subprocess.check_output(["nm", "-D", "--undefined-only", path], text=True)
    kinds = {line.split()[-1]: line.split()[-2] for line in said.splitlines()}
    weak = [x for x, kind in kinds.items() if kind != "U" and x.startswith(("aoti_", "torch_"))]
    bound = [x for x in kinds if re.match(r"_Z\w*(2at|3c10|5torch)\d", x)]
    assert not weak and not bound, f"{path.name} wants of torch what it must not: {weak + bound}"
    return f"{path.name} wants of torch its stable functions alone"


def check_import(library: Path) -> str:
    if importlib.util.find_spec("torch") is None:
        return "no torch here, so kvtools as a whole was not imported"
    sys.path.insert(0, str(library.parent))
    import torch

    import kvtools
    from kvtools import ops

    assert Path(kvtools.__file__).parent == library.resolve() and ops.CUDA == "cuda"
    x = torch.randn(2, 64)
    ours, exact = (kvtools.quantize_kv(x, "int4", impl=impl) for impl in ("cpu", "reference"))
    assert all(map(torch.equal, ours, exact))
    return f"kvtools imports under torch {torch.__version__}, with its CUDA kernels"


def main() -> None:
    folder = Path(sys.argv[1])
    library = (folder / "lib" / "kvtools").resolve()
    print(f"Python {sys.version.split()[0]}")
    for check in (check_host, check_kernels, check_import):
        print(f"  {check(library)}")
    carry, commands = [f"{folder}/lib"], [f"cp {folder}/lib/kvtools/_*.so kvtools/"]
    if (folder / RIVALS).exists():
        carry.append(f"{folder}/{RIVALS}")
        commands += [f"mkdir -p /tmp/site && tar -xJf {folder}/{RIVALS} -C /tmp/site",
                     "export PYTHONPATH=/tmp/site"]  # fmt: skip
    files = [x for path in map(Path, carry) for x in (path, *path.rglob("*")) if x.is_file()]
    tracked = subprocess.check_output(["git", "ls-files"], text=True).splitlines()
    size = sum(x.stat().st_size for x in (*files, *map(Path, tracked)))
    assert size < MOST, f"{size / 2**20:.0f} MiB are more than travel"
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(git, text=True).strip()
    commands.append(
        "PYTHONUNBUFFERED=1 python3 -m bench.gpu --first --seconds 540 --out bench/out/gpu "
        f"--archive $OUT/gpu.tar.gz --commit {commit}"
    )
    print(f"carry ({size / 2**20:.0f} MiB with the tree): {' '.join(carry)}")
    print(f"run there, with 590 seconds: {' && '.join(commands)}")
    print("or from source: KVTOOLS_CUDA=1 KVTOOLS_CUDA_ARCHS=90a python3 setup.py -q build_ext "
          "--inplace, instead of cp")  # fmt: skip
    print("then here: python -m bench.gpu_report gpu.tar.gz")


if __name__ == "__main__":
    main()
