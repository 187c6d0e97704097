"""The GPU benchmark, dry: its code on a CPU with tiny shapes."""

import json

import pytest
import torch
from rich.console import Console

pytest.importorskip("pytest_benchmark")

from bench import gpu, gpu_parts, gpu_report, gpu_rivals  # noqa: E402
from bench.targets import Targets  # noqa: E402
from kvtools.ops import COMPILED  # noqa: E402

pytestmark = pytest.mark.skipif(not COMPILED, reason="kvtools was built without its C++ kernels")
PARTS = [part for part in gpu_parts.PARTS if part != "tests"]


@pytest.fixture
def here(monkeypatch):
    """Parts run in this process."""

    def run(part, folder, where, dry, end):
        gpu.run_part(part, folder, where, dry, gpu.SECONDS)

    monkeypatch.setattr(gpu, "in_process", run)


def results(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


def test_every_part_runs_dry(here, tmp_path, capsys):
    assert gpu.main(["--dry", "--out", str(tmp_path), "--part", *PARTS]) == 0
    for part in PARTS:
        cells = results(tmp_path, part)["cells"]
        assert cells and not any("failed" in rows for rows in cells.values())
        for rows in cells.values():
            cpp = {name for name in rows if name.endswith(gpu_parts.IN_CPP)}
            assert all("skipped" in rows[name] for name in cpp)
            ours = [rows[name] for name in set(rows) - cpp if name.startswith("kvtools")]
            assert all("ms" in row and row["of_floor"] > 0 for row in ours), ours
    rows = results(tmp_path, "attention")["cells"]["llama 2 x 16 + 8"]
    assert set(gpu_rivals.ATTENTION) < set(rows)  # those that are not installed too
    assert rows["flex_attention"]["ratio"] > 0
    assert rows["kvtools int4"]["bytes"] < rows["kvtools"]["bytes"]
    report = (tmp_path / "report.md").read_text()
    assert "kvtools int4, CUDA C++" in rows
    assert "| sdpa flash |" in report and "nothing shared: over FlashInfer" in report
    assert "tests: not run" in capsys.readouterr().out


def test_what_was_measured_is_kept_for_its_commit(here, tmp_path):
    def run(*options):
        gpu.main(["--dry", "--out", str(tmp_path), "--part", "scoring", *options])
        return results(tmp_path, "scoring")["cells"]

    def ms(cells):
        return [row["ms"] for rows in cells.values() for row in rows.values() if "ms" in row]

    first = run("--commit", "a")
    assert run("--commit", "a") == first
    path = tmp_path / "scoring.json"
    result = json.loads(path.read_text())
    dropped, _ = result["cells"].popitem()
    path.write_text(json.dumps(result))
    resumed = run("--commit", "a")
    assert dropped in resumed and {**resumed, dropped: 0} == {**first, dropped: 0}
    assert run("--commit", "a", "--seconds", "1") == resumed
    forced = run("--commit", "a", "--force")
    assert ms(forced) != ms(resumed)
    assert ms(run("--commit", "b")) != ms(forced)


def test_a_contender_that_fails_is_a_row(here, tmp_path, monkeypatch):
    def wrong(step):
        return lambda: 1.1 * step.exact

    def broken(step):
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu_rivals, "ATTENTION", {"wrong": wrong, "broken": broken})
    gpu.main(["--dry", "--out", str(tmp_path), "--part", "tree"])
    for rows in results(tmp_path, "tree")["cells"].values():
        assert rows["kvtools"]["ratio"] == 1
        assert "differs from float32 attention by 0.100" in rows["wrong"]["failed"]
        assert rows["broken"] == {"failed": "ValueError: no such kernel"}


def test_what_took_the_device_down_is_left_out(tmp_path, monkeypatch):
    def fault():
        with gpu.Crashes(tmp_path).watch("cell", "rival"):
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        fault()
    assert gpu.Crashes(tmp_path).found == []  # the device lived
    monkeypatch.setattr(gpu, "alive", lambda: False)
    with pytest.raises(SystemExit):
        fault()
    with pytest.raises(RuntimeError, match="when it was tried before"):
        fault()
    with gpu.Crashes(tmp_path).watch("other cell", "rival"):
        pass
    (tmp_path / "trying.json").write_text('["other cell", "rival"]')  # as a killed process leaves
    with pytest.raises(RuntimeError, match="before"), gpu.Crashes(tmp_path).watch("3", "rival"):
        pass


def test_tests_are_counted(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_skipped(): pytest.skip()\n"
    )
    found = gpu_parts.run_tests(gpu.Bench(tmp_path, dry=True), "x", [str(tmp_path / "test_x.py")])
    assert (found["passed"], found["failures"], found["skipped"]) == (1, 1, 1)
    assert "not equal" in found["test_bad"] and "not equal" in (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize("met", [True, False])
def test_targets(met):
    x, share = (100.0, 0.9) if met else (0.1, 0.1)
    rows = {"kvtools": {"of_floor": share}, "kvtools int4": {"ratio": 1 / x}}
    rows |= dict.fromkeys(["sdpa flash", "flashinfer by hand", "fa3 paged"], {"ratio": x})
    rows |= dict.fromkeys(["sdpa cudnn", "flashinfer decode"], {"ratio": 1000.0})  # not the fastest
    found = Targets()
    for part, cells in {
        "tests": {"quant": {"failures": 0 if met else 3}},
        "attention": dict.fromkeys(
            [f"{heads} {shape}" for heads in ("llama", "qwen")
             for shape in ("64 x 8192 + 256", "64 x 4096")], rows,
        ),
        "sampling": {"b=64,v=151936 top_k,top_p": {"transformers": {"ratio": x}}},
        "scoring": {
            "step_scores r=1": dict.fromkeys(["full_logits", "gather_matmul"], {"ratio": x})
        },
    }.items():  # fmt: skip
        found += gpu_report.targets(part, cells)
    assert len(found) == 1 + 2 * (2 + 3) + 1 + 2
    assert all(target["ok"] is met for target in found)


def test_a_target_without_a_figure_is_neither_met_nor_missed(capsys):
    found = gpu_report.targets("attention", {"llama 64 x 512": {"kvtools": {"failed": "x"}}})
    assert [target["ok"] for target in found] == [None]
    found.show(Console())
    assert "no figure" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_needs_a_gpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
