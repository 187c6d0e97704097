"""The GPU benchmark, rehearsed: its code on a CPU with tiny shapes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("pytest_benchmark")

from bench import gpu, gpu_alone, gpu_checks, gpu_parts, gpu_report, gpu_rivals  # noqa: E402
from bench.targets import Targets  # noqa: E402
from bench.timing import attempt  # noqa: E402
from kvtools.ops import COMPILED  # noqa: E402

pytestmark = pytest.mark.skipif(not COMPILED, reason="kvtools was built without its C++ kernels")
ROOT = Path(__file__).resolve().parent.parent
PARTS = [part for part in gpu_parts.PARTS if part not in ("tests", "tree")]  # in the first plan
TABLE = "<!-- gpu:begin -->\n<!-- gpu:end -->\n"
STATUS = "<!-- gpu-status:begin -->\n<!-- gpu-status:end -->\n"


@pytest.fixture
def here(monkeypatch):
    """Stages, and contenders alone, run in this process."""

    one = threading.Lock()  # the interpreter takes one at a time

    def alone(bench, case, watch=()):
        part, cell, name = case
        with one:
            return attempt(dict(gpu_parts.PARTS[part](gpu_alone.Alone(True, name)))[cell])

    monkeypatch.setattr(gpu.Run, "in_process", lambda run, stage, left: run.measure(stage, left))
    monkeypatch.setattr(gpu.Bench, "alone", alone)


def rehearse(folder, *options):
    assert gpu.main(["--rehearse", "--out", str(folder), *options]) == 0


def results(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.mark.long
def test_every_stage_is_reached(here, tmp_path, capsys):
    rehearse(tmp_path, "--part", *PARTS)
    said = capsys.readouterr().out
    for stage in gpu.FIRST:
        if stage.part == "tests":
            continue
        assert f"{stage}: " in said and f"of {stage.seconds:.0f} given" in said
        cells = results(tmp_path, stage.part)["cells"]
        assert cells and not any("failed" in rows for rows in cells.values())
    for part in gpu_report.TIMED:
        for rows in results(tmp_path, part)["cells"].values():
            cpp = {name for name in rows if name.endswith(gpu.IN_CPP)}
            assert all("skipped" in rows[name] for name in cpp)
            ours = [rows[name] for name in set(rows) - cpp if name.startswith("kvtools")]
            assert ours and all("ms" in row and row["of_floor"] > 0 for row in ours), ours
    for rows in results(tmp_path, "smoke")["cells"].values():
        assert rows and all("seconds" in row or "skipped" in row for row in rows.values()), rows
    assert {"as it is", "32,64,128,4,4"} < set(
        results(tmp_path, "tune")["cells"]["llama 1 x 24 int4"]
    )
    step = results(tmp_path, "end_to_end")["cells"]["decode 2 x 20"]["kvtools balanced"]
    assert step["host ms"] > 0 and step["launches"] == 0
    rows = results(tmp_path, "attention")["cells"]["llama 2 x 16 + 8"]
    assert set(gpu_rivals.ATTENTION) < set(rows)  # those that are not installed too
    assert rows["flex_attention"]["ratio"] > 0
    assert rows["kvtools int4"]["bytes"] < rows["kvtools"]["bytes"]
    report = (tmp_path / "report.md").read_text()
    assert "| sdpa flash |" in report and "nothing shared: over FlashInfer" in report
    assert "tests: not run" in said
    assert sum(stage.seconds for stage in gpu.FIRST) <= 540
    kept = gpu_report.read(tmp_path / "gpu.tar.gz")
    assert kept == {part: results(tmp_path, part) for part in PARTS}


def test_what_was_measured_is_kept_for_its_commit(here, tmp_path):
    def run(*options):
        rehearse(tmp_path, "--part", "quant", *options)
        return results(tmp_path, "quant")["cells"]

    def ms(cells):
        return [row["ms"] for rows in cells.values() for row in rows.values() if "ms" in row]

    first = run("--commit", "a")
    assert run("--commit", "a") == first
    rehearse(tmp_path, "--part", "quant", "--commit", "a", "--force", "--cell", "no such cell")
    assert not (tmp_path / "quant.json").exists()
    timed = run("--commit", "a", "--cell", "append", "--rounds", "2")
    assert ms(timed) != ms(first)
    assert run("--commit", "a", "--seconds", "0.001") == timed
    assert ms(run("--commit", "b")) != ms(timed)


def test_a_contender_that_fails_is_a_row(here, tmp_path, monkeypatch):
    def wrong(step):
        return lambda: 1.1 * step.exact

    def broken(step):
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu_rivals, "ATTENTION", {"wrong": wrong, "broken": broken})
    rehearse(tmp_path, "--part", "attention")
    for rows in results(tmp_path, "attention")["cells"].values():
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


def test_one_that_dies_costs_one_case(tmp_path):
    bench = gpu.Bench(tmp_path, dry=True, seconds=30)
    with pytest.raises(RuntimeError, match="ended with -11"):
        bench.alone(["quant", "cell", "name"], ["sh", "-c", "kill -SEGV $$"])
    bench.deadline = 0
    assert "no time" in attempt(partial(bench.alone, [], ["sh", "-c", "sleep 60"]))["skipped"]


def test_a_killed_run_leaves_what_it_measured(tmp_path):
    """Whenever: the archive is whole, and has every cell that was said to be measured."""
    archive, said = tmp_path / "back.tar.gz", tmp_path / "said"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with said.open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", tmp_path / "out",
             "--archive", archive, "--part", "sampling"],
            cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    while run.poll() is None and "sampling / " not in said.read_text():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kept = gpu_report.read(archive)
    told = {line.split(" / ")[0:2][1].split("  ")[0].strip() for line in
            said.read_text().splitlines() if line.startswith("sampling / ")}  # fmt: skip
    assert told and told <= set(kept["sampling"]["cells"])
    assert "rates" in kept["rates"]["cells"]


def test_a_stage_ends_with_its_time(tmp_path):
    """And the contender that was under way is not to blame."""
    run = gpu.Run(tmp_path, tmp_path / "gpu.tar.gz", {"commit": "a", "device": "b"}, dry=True)
    (tmp_path / "trying.json").write_text('["cell", "rival"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "GRACE", -1)  # as soon as it has begun
        run.in_process(gpu.Stage("rates", "", 1), 0.1)
    assert results(tmp_path, "rates")["failed"] == "rates: ran out of time"
    assert gpu.Crashes(tmp_path).found == []
    assert gpu_report.read(run.archive)["rates"]["cells"] == {}


def test_tests_are_counted(tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text(
        "import pytest, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_skipped(): pytest.skip()\n"
        "@pytest.mark.parametrize('x', ['a b', 'triton'])\n"
        "def test_slow(x): time.sleep(60)\n"
    )

    def run(seconds, *options):
        bench = gpu.Bench(tmp_path, dry=True, seconds=seconds)
        return gpu_checks.run_tests(bench, "x", [str(tmp_path / "test_x.py"), *options])

    found = run(60, "-k", "not slow")
    assert (found["passed"], found["failures"], found["skipped"]) == (1, 1, 1)
    assert any("test_bad" in name and "not equal" in why for name, why in found.items()
               if isinstance(why, str))  # fmt: skip
    assert "not equal" in (tmp_path / "tests x.log").read_text()
    log = tmp_path / "tests x.log"
    monkeypatch.setattr(
        gpu.Bench, "left", property(lambda bench: -1 if "SKIPPED" in log.read_text() else 60)
    )
    found = run(60)
    monkeypatch.undo()
    assert "stopped" in found and (found["passed"], found["failures"]) == (1, 1)
    assert run(60, "-k", "nothing")["failures"] == 0
    assert run(60, "--no-such-option")["failures"] == 1


@pytest.mark.parametrize("met", [True, False])
def test_targets(met):
    x, share = (100.0, 0.9) if met else (0.1, 0.1)
    rows = {"kvtools": {"of_floor": share}, "kvtools int4": {"ratio": 1 / x}}
    rows |= dict.fromkeys(["sdpa flash", "flashinfer by hand", "fa3 paged"], {"ratio": x})
    rows |= dict.fromkeys(["sdpa cudnn", "flashinfer decode"], {"ratio": 1000.0})  # not the fastest
    found = Targets()
    for part, cells in {
        "smoke": {"quant": {"kvtools": {"seconds": 1.0} if met else {"failed": "x"}}},
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
    assert len(found) == 1 + 1 + 2 * (2 + 3) + 1 + 2
    assert all(target["ok"] is met for target in found)


def test_a_target_without_a_figure_is_neither_met_nor_missed(capsys):
    found = gpu_report.targets("attention", {"llama 64 x 512": {"kvtools": {"failed": "x"}}})
    assert [target["ok"] for target in found] == [None]
    found.show(Console())
    assert "no figure" in capsys.readouterr().out


def test_what_comes_back_is_kept_and_shown(tmp_path):
    """Made-up figures: cells of a commit are joined, those of another replaced, failures shown."""
    where = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "date": "2026-01-01"}

    def back(commit, **parts):
        path = tmp_path / "out" / "gpu.tar.gz"
        for part, cells in parts.items():
            run = gpu.Run(path.parent, path, where | {"commit": commit, "device": "NVIDIA X 80GB"})
            journal = gpu.journal_of(part, run.folder, run.where)
            journal.cells |= cells
            run.save(part, journal, **({"failed": "tune: died"} if part == "tune" else {}))
        options = ["--results", tmp_path, "--readme", readme, "--page", page]
        assert gpu_report.main([str(x) for x in (path, *options)]) == 0
        for left in path.parent.iterdir():
            left.unlink()
        return json.loads((tmp_path / "nvidia-x-80gb.json").read_text())["parts"]

    readme, page = tmp_path / "README.md", tmp_path / "kernels.md"
    readme.write_text(f"before\n{STATUS}after\n")
    page.write_text(f"before\n{STATUS}{TABLE}after\n")
    timed = {"kvtools": {"ms": 2.0, "of_floor": 0.5}, "kvtools, CUDA C++": {"failed": "x"},
             "kvtools int4": {"ms": 1.0}, "sdpa flash": {"ms": 9.0}}  # fmt: skip
    long = "llama 64 x 512"
    back("a", smoke={"quant": {"kvtools": {"seconds": 1.0}, "kvtools int4": {"failed": "x"}}},
         tests={"triton": {"passed": 7, "failures": 1}}, attention={long: timed})  # fmt: skip
    parts = back("a", attention={"llama 1 x 8 + 9": {"kvtools": {"failed": "x"}}}, tune={})
    assert list(parts["attention"]["cells"]) == ["llama 64 x 512", "llama 1 x 8 + 9"]
    text = page.read_text()
    assert "| attention: llama 64 x 512 | 2 | 0.50 | 1 | sdpa flash | 9 |" in text
    assert "| attention: llama 1 x 8 + 9 | failed | - | - | - | - |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "commit a." in text
    assert "7 passed and 1 failed" in text
    text = readme.read_text()
    assert "| attention" not in text
    assert "On NVIDIA X 80GB, 1 of 2 kernels and formats ran" in text
    assert "7 passed and 1 failed" in text and "Not finished: tune: died." in text
    assert "Missed: smoke, quant: failures (1, wanted 0); tests, triton: failures (1" in text
    assert text.startswith("before\n") and text.endswith("after\n")
    parts = back("b", attention={"llama 64 x 512": timed})
    assert list(parts["attention"]["cells"]) == ["llama 64 x 512"] and "smoke" in parts


@pytest.mark.only(when=lambda: not torch.cuda.is_available())
def test_needs_a_gpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
