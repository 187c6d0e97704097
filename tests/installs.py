"""Real installs from the sdist and from a wheel, each in a fresh environment: `make install-check`.

An environment sees the packages of the one that runs this, but for kvtools, so that only what a
build needs is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSIONS = ["3.10", "3.11", "3.12", "3.13"]
HERE = ".".join(map(str, sys.version_info[:2]))

# Runs what needs no compiled part, and says what each of the others raises, and what it warned of.
USE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, kvtools
caught = warnings.catch_warnings(record=True).__enter__()
warnings.simplefilter("always", RuntimeWarning)
assert "site-packages" in kvtools.__file__, kvtools.__file__
codes, scale = kvtools.quantize_kv(torch.randn(2, 8), "int4")
kvtools.sample(torch.randn(2, 8), torch.arange(2), torch.arange(2))
def model():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1,
                            intermediate_size=32, num_attention_heads=2, eos_token_id=None))
def rollouts():
    r = kvtools.Rollouts(model(), kvtools.CacheConfig(bits=4))
    r.prefill([[1, 2, 3]], 2)
    assert list(map(len, r.generate(3))) == [3, 3]
def generate():
    ids, loop = torch.tensor([[1, 2, 3]]), kvtools.generate
    out = model().generate(ids, max_new_tokens=3, custom_generate=loop)
    assert out.shape == (1, 6)
def table():
    kvtools.plan_from_block_table(torch.zeros(1, 1).int(), torch.ones(1).int(), 16)
def direct():
    import kvtools.rollouts
def kernel():
    kvtools.quantize_kv(torch.randn(2, 8), "int4", impl="cpu")
def cache():
    kvtools.KVCache(kvtools.CacheConfig(), 1)
def prm():
    kvtools.prm.PRM
def search():
    kvtools.search.best_of_n
for use in (kernel, cache, table, direct, rollouts, generate, prm, search):
    try:
        use()
        print(use.__name__, "runs")
    except (ImportError, RuntimeError) as error:
        print(use.__name__, type(error).__name__, error)
for warning in caught:
    if "kvtools" in str(warning.message):
        print("warned", warning.message)
"""
LACKS = """
import sys, torch, kvtools
for impl in sys.argv[1:]:
    try:
        kvtools.quantize_kv(torch.randn(2, 8), "int4", impl=impl)
    except RuntimeError as error:
        print(impl, error)
"""
SLOW = "kvtools was installed without its C++ kernels: with torch and a C++17 compiler installed"
HOST = "kvtools was installed without its C++ part: reinstall it with this Python, a C++17 compiler"


def run(*command, **settings):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KVTOOLS_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), env=env | settings, stdin=subprocess.DEVNULL, cwd="/",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a copy of the tree, in which no list of files is left from another build."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in ("csrc", "kvtools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    code = "import os, sys, setuptools.build_meta as b; os.chdir(sys.argv[1]); "
    code += "b.build_sdist(sys.argv[2])"
    run(sys.executable, "-c", code, copy, out)
    (archive,) = out.iterdir()
    shutil.unpack_archive(archive, out)
    return next(x for x in out.iterdir() if x.is_dir())


def fresh(folder, python=sys.executable):
    run(python, "-m", "venv", "--without-pip", folder / "env")
    return folder / "env" / "bin" / "python"


def environment(folder, without=()):
    """An environment's interpreter; it sees torch and all else that is installed here."""
    python, shared = fresh(folder), folder / "shared"
    shared.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for x in Path(place).iterdir():
            if not x.name.startswith(("kvtools", "__", *without)) and x.suffix != ".pth":
                (shared / x.name).symlink_to(x)
    (site_of(python) / "shared.pth").write_text(f"{shared}\n")
    return python


def site_of(python):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(python, "-c", code).strip())


def install(python, source, *options, **settings):
    run(sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps",
        "--disable-pip-version-check", "--no-input", *options, source, **settings)  # fmt: skip


def uses(python, **settings):
    """What each use of USE said."""
    lines = [line.split(" ", 1) for line in run(python, "-c", USE, **settings).splitlines()]
    said = dict(lines)
    assert len(said) == len(lines), lines  # nothing is said twice
    return said


def test_the_sdist_holds_every_source(sdist):
    for folder, kinds in (("csrc", ("cpp", "h", "cu")), ("kvtools", ("py", "pyi", "typed"))):
        for kind in kinds:
            files = [x.relative_to(ROOT) for x in (ROOT / folder).rglob(f"*{kind}")]
            assert files and not [x for x in files if not (sdist / x).exists()]


def pythons(version):
    """Those of this version that are here and run."""
    found = [
        shutil.which(f"python{version}"),
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
    ]
    return [
        x
        for x in found
        if x and not subprocess.run([x, "--version"], capture_output=True).returncode
    ]


@pytest.mark.parametrize("version", [x for x in VERSIONS if x == HERE or pythons(x)])
def test_pure(version, sdist, tmp_path):
    """KVTOOLS_EXT=0, under each Python: all but the host's part works, by the reference."""
    python = environment(tmp_path) if version == HERE else fresh(tmp_path, pythons(version)[0])
    install(python, sdist, KVTOOLS_EXT="0")
    place = site_of(python) / "kvtools"
    assert not list(place.rglob("*.so"))
    run(python, "-m", "compileall", "-qf", place)
    if version != HERE:
        return
    said = uses(python)
    assert SLOW in said.pop("kernel") and said.pop("warned").startswith(SLOW)
    assert "kvtools.KVCache is not available" in said["cache"]
    assert {"cache", "table", "direct", "rollouts", "generate", "prm"} <= set(said)
    for name, text in said.items():
        assert text.startswith("ImportError ") and (HOST in text or name == "table"), text
    assert f"not built ({HOST}" in run(python, "-m", "kvtools.cli", "env", "--json")


def test_isolated(sdist, tmp_path):
    """`pip install` where there is no torch yet: the kernels alone are left out, which is said."""
    python = environment(tmp_path)
    install(python, sdist)
    said = uses(python)
    assert SLOW in said.pop("kernel") and said.pop("warned").startswith(SLOW)
    assert set(said.values()) == {"runs"}, said


def test_full(sdist, tmp_path):
    """`pip install` behind `pip install torch`: all that is compiled; of transformers, which is
    optional, what needs it says that."""
    python = environment(tmp_path, without=("transformers",))
    (tmp_path / "shared" / "torch").rename(site_of(python) / "torch")
    install(python, sdist, KVTOOLS_CUDA="0")
    without_transformers(uses(python))


def without_transformers(said):
    for name in ("direct", "rollouts", "generate", "prm", "search"):
        text = said.pop(name)
        assert "transformers" in text, text
        assert name == "direct" or "pip install kvtools[hf]" in text, text
    assert set(said.values()) == {"runs"}, said


@pytest.mark.parametrize("version,why", [("2.9.1+cu128", "2.9.1+cu128 is too old"),
                                         (None, "is not installed")])  # fmt: skip
def test_a_build_says_which_torch_it_lacks(version, why, sdist, tmp_path):
    python = environment(tmp_path, without=("torch",))
    if version:
        torch = site_of(python) / "torch"
        torch.mkdir()
        (torch / "__init__.py").touch()
        (torch / "version.py").write_text(f"__version__, cuda = {version!r}, None\n")
    said = run("sh", "-c", f"cd {sdist} && {python} setup.py --name 2>&1")
    assert f"torch {why} here, so without the C++ kernels" in said


def test_wheel(tmp_path):
    """`make wheels`, and its wheel where there is neither a compiler, nor triton or transformers:
    all that is compiled runs, and what is lacking says so in a line."""
    out = tmp_path / "dist"
    made = f"make -C {ROOT} wheels PYTHON={sys.executable} DIST={out} WHEELS='{HERE} 3.99' 2>&1"
    said = run("sh", "-c", made)
    assert "wheels: no Python 3.99 is here" in said
    (wheel,) = out.glob("*.whl")
    tag = f"cp{HERE.replace('.', '')}"
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name.split("-")[2:] == [tag, tag, f"{platform}.whl"]
    python = environment(tmp_path, without=("transformers", "triton"))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    install(python, wheel, PATH=str(nothing))
    without_transformers(uses(python, PATH=str(nothing)))
    lacks = run(python, "-c", LACKS, "cuda", "triton", PATH=str(nothing)).splitlines()
    remedies = "nvcc and a CUDA build of torch", "pip install triton"
    for line, impl, remedy in zip(lacks, ("cuda", "triton"), remedies, strict=True):
        assert line.startswith(impl) and remedy in line, line
