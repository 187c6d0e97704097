"""The CPU benchmark on tiny shapes and a tiny model: it must not rot. What the gate on compiled
kernels sees."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import fresh_model, random_ids
from rich.console import Console

pytest.importorskip("pytest_benchmark")

from bench import bench_attention, bench_sampling, cpu  # noqa: E402
from bench.bench_attention import Shape  # noqa: E402
from kvtools.cli import demo  # noqa: E402
from kvtools.ops import COMPILED  # noqa: E402
from kvtools.quality import Journal  # noqa: E402

pytestmark = pytest.mark.skipif(not COMPILED, reason="kvtools was built without its C++ kernels")
TINY = cpu.Scale(
    copied=2**16, product=32, shared=Shape(3, 40, 9, 2, 2, 16), alone=Shape(3, 0, 17, 2, 2, 16),
    long=Shape(2, 0, 40, 2, 2, 16), logits=bench_sampling.Shape(2, 300), rounds=2, rows=3,
    prompt=20, new=4, own=20, own_rounds=1, few=(2, 3), sweep_rows=(1, 3), sweep_prompts=(8, 20),
    sweep_rounds=1,
)  # fmt: skip


def tiny(dtype):
    return fresh_model().to(dtype), random_ids(1, 40)[0].tolist()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        # It starts threads and takes seconds; a rival that does not run is a row that says so.
        patch.setattr(cpu, "batched", lambda *args: 1 / 0)
        patch.setattr(cpu, "LIMIT", 8 * 3 * 4 * cpu.elements(tiny(torch.float32)[0]))
        journal = Journal(path, {"commit": "1234567"})
        cpu.run(list(cpu.PARTS), TINY, tiny, journal, Console(quiet=True))
    where = demo.where("cpu") | {"commit": "1234567", "dirty": False}
    journal.save(where=where, targets=cpu.targets(journal.cells))
    return json.loads(path.read_text())


def test_every_part_is_measured_and_every_target_judged(result):
    cells = result["cells"]
    assert list(cells) == list(cpu.PARTS)
    for dtype in ("float32", "bfloat16"):
        rows = cells["attention"]["shared"][dtype]
        assert set(bench_attention.RIVALS) < set(rows)
        assert rows["cpu"]["ratio"] == 1 and rows["cpu"]["of_floor"] > 0
        assert rows["cpu int4"]["bytes"] < rows["cpu"]["bytes"]
        step = cells["step"][dtype]
        assert {"forward", "step", "tree_attention", "append_kv", "sample"} < set(step)
        rows = cells["generate"][dtype]
        assert all(row["memory"] > 0 and row["tokens_per_s"] > 0 for row in rows.values())
    assert cells["generate"]["few"]["generate_batch"]["failed"].startswith("ZeroDivisionError")
    assert "skipped" in cells["sweep"]["prompts"]["20"]["3"]["plain"]
    assert cells["sweep"]["prompts"]["20"]["1"]["plain"]["tokens_per_s"] > 0
    names = [target["name"] for target in result["targets"]]
    assert len(names) == len(set(names)) == 24


def test_table_and_figure(result, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- cpu:begin -->\n<!-- cpu:end -->\n")
    demo.rewrite(readme, "cpu", cpu.table(result["cells"]), cpu.caption(result))
    text = readme.read_text()
    assert "does not run" in text and "commit 1234567." in text
    plots = pytest.importorskip("bench.plots", exc_type=ImportError)
    plots.draw_cpu(result, tmp_path / "cpu.svg")
    assert "prompt of 20 tokens" in (tmp_path / "cpu.svg").read_text()


@pytest.mark.parametrize("met", [True, False])
def test_targets(met):
    x, less, share = (100.0, 0.01, 0.9) if met else (0.5, 2.0, 0.1)
    rows = {"cpu": {"of_floor": share}, "sdpa": {"ratio": 100.0}, "sdpa gqa": {"ratio": x}}
    shared = rows | {"sdpa": {"ratio": x}}
    ours = {"tokens_per_s": x, "memory": less}
    balanced = ours | {"tokens_per_s": x * x}
    dtypes = ("float32", "bfloat16")
    cells = {
        "attention": {
            "shared": dict.fromkeys(dtypes, shared), "alone": dict.fromkeys(dtypes, rows),
            "long": {"bfloat16": {"cpu int4": {"ratio": less}}},
        },
        "sample": {"top_k,top_p": {"transformers": {"ratio": x}}},
        "generate": dict.fromkeys(dtypes, {
            "plain": {"tokens_per_s": 1.0, "memory": 1.0}, "kvtools 16-bit": ours,
            "kvtools balanced": balanced,
        }),
        "step": dict.fromkeys(dtypes, {"step": {"ratio": less}, "host": less}),
        "own": dict.fromkeys(dtypes, {"kvtools balanced": {"ratio": less}}),
        "sweep": {"one row": {"128": {"ratio": x}}},
    }  # fmt: skip
    found = cpu.targets(cells)
    assert len(found) == 23
    assert all(target["ok"] is met for target in found)
    assert cpu.targets({}) == []


def test_a_rival_that_computes_something_else_is_not_timed():
    step = bench_attention.inputs(TINY.shared, torch.float32, "cpu")
    out = bench_attention.sdpa(step)
    bench_attention.check(step, out)
    with pytest.raises(AssertionError, match="differs from float32 attention"):
        bench_attention.check(step, 1.1 * out)


PROBE = """
import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from bench import resources
from kvtools.kernels.format import dot


@triton.jit
def product(x_ptr, y_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, dot(x, x, tl.zeros([16, 16], tl.float32)))


@triton.jit
def copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


x = torch.zeros(1)
with resources.compiling(80) as found:
    for block in (128, 16384):
        copy[(1,)](x, x, block, num_warps=1)
assert [kernel for kernel, _ in found] == ["copy", "copy"]
binaries = [asdict(resources.read(compiled)) for compiled in found.values()]
for arch in (90, *resources.AMD):
    with resources.compiling(arch) as found:
        product[(1,)](x, x)
    binaries += [asdict(resources.read(compiled)) for compiled in found.values()]
print(json.dumps(binaries))
"""


def test_resources(monkeypatch, tmp_path):
    """A kernel whose numbers fit into registers, and one whose do not; products of fp32 on NVIDIA
    and AMD."""
    pytest.importorskip("triton")
    from bench import resources

    # A process that has interpreted kernels compiles none.
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    said = subprocess.check_output([sys.executable, str(probe)], text=True, env=env)
    good, spills, *products = (resources.Binary(**x) for x in json.loads(said.splitlines()[-1]))
    assert len(products) == 3 and all(x.products and x.registers for x in products)
    assert not any(x.spilled for x in products)
    assert 0 < good.registers < 32 < spills.registers
    assert good.spilled == good.shared == good.products == 0 < spills.spilled

    def missed(binary, multiply=frozenset()):
        found = {("copy", ""): dict.fromkeys(resources.ARCHS, binary)}
        return {x["name"].split(": ")[1] for x in resources.judge(found, multiply) if not x["ok"]}

    assert missed(good) == set()
    assert missed(spills) == {"bytes spilled"}
    assert missed(replace(good, shared=228 * 1024)) == {"KiB shared"}
    assert missed(good, {"copy"}) == missed(good, {"absent"}) == {"kernels off tensor cores"}
    for binary, status in ((good, 0), (spills, 1)):
        found = {("copy", ""): dict.fromkeys(resources.ARCHS, binary)}
        monkeypatch.setattr(resources, "build_all", lambda *args, found=found: found)
        assert resources.main(["--rows", "quant"]) == status
