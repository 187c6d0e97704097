"""bench.step on tiny models: what it counts, and what it makes of two builds."""

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import step, step_worker
from kvtools import cache, ops
from kvtools.hf import decode
from kvtools.quality import Journal

ROOT = Path(__file__).resolve().parent.parent
TINY = step.Scale(layers=2, rows=2, own=6, rounds=2, steps=1, few=(1, 2), counted=2, device_rows=2,
                  batches=1)  # fmt: skip


@pytest.fixture
def builds(monkeypatch):
    """Both are this one, in this process, which must be left as it is."""
    for module, name in ((ops, "_runs_on"), (ops.attention, "limits"), (cache, "limits"),
                         (decode, "capturer")):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))
    build = step_worker.Build()
    for name in ("launches", "replayed", "compiled"):  # they need a process of their own
        monkeypatch.setattr(build, name, lambda *args: 1 / 0)

    @contextmanager
    def start(name):
        yield lambda method, *args: json.loads(json.dumps(getattr(build, method)(*args)))

    return start


def test_every_part_is_measured_and_every_target_judged(builds, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "DTYPES", ("float32",))
    path = tmp_path / "step.json"
    journal = Journal(path, {"commit": "1234567"})
    step.run(list(step.PARTS), TINY, ["ours", "base"], builds, journal, Console(quiet=True))
    journal.save(targets=step.targets(journal.cells))
    result = json.loads(path.read_text())
    for name in step.CONFIGS:
        row = result["cells"]["operators"]["float32"][name]
        assert row["ours"] == row["base"] and row["ours"]["layer"]["kvtools"] >= 2
        layer, rest = row["ours"]["layer"], row["ours"]["step"]
        assert layer["added"] == pytest.approx(sum(layer["by name"].values()))
        assert rest["by name"]["kvtools::sample.cpu" if ops.COMPILED else "kvtools::sample"] == 1
        for row in result["cells"]["host"][name].values():
            assert row["ours"]["step ms"] > 0 and row["ours"]["forward ms"] > 0 and row["share"]
    assert list(result["cells"]["device"]) == ["16-bit", "balanced"]
    for row in result["cells"]["device"].values():
        for kind in ("ours", "replayed"):
            assert row[kind]["launches"]["failed"].startswith("ZeroDivisionError")
            found = row[kind]["copies"]
            assert found["uploads"] == found["waits"] == 1, found["by line"]
        assert "decode.py" in str(row["replayed"]["copies"]["by line"])
    assert list(result["cells"]["compiled"]) == ["16-bit", "balanced"]
    judged = {x["name"]: x["ok"] for x in result["targets"]}
    assert len(judged) == len(result["targets"]) == 3 + 3 * 4 + 2 * 5 + 2
    assert judged["launches in a step, balanced"] is None
    assert judged["replayed: uploads in a step, balanced"] is True


@pytest.mark.parametrize("met", [True, False])
def test_targets(met):
    x = 0.1 if met else 100.0
    kind = {"ours": {"ratio": x}, "share": x}
    row = {"launches": {"launches": x, "ms": x}, "copies": {"uploads": x, "waits": x}}
    base = {"launches": {"ms": 1.0}}
    cells = {
        "operators": {"float32": {"max": {"ours": {"layer": {"added": x}}}}},
        "host": {"max": {"rollouts": kind}},
        "device": {"balanced": {"ours": row, "base": base, "replayed": row}},
        "compiled": {"max": {"eager ms": 3.0, "compiled ms": 2.0}, "balanced": {"failed": "no"}},
    }
    found = step.targets(cells)
    assert len(found) == 10 and all(target["ok"] is met for target in found)
    alone = step.targets({"device": {"balanced": {"ours": row}}})
    assert [x["ok"] for x in alone if "base" in x["name"]] == [None, None]
    heads, *rows = step.table(cells)
    assert {len(x) for x in rows} == {len(heads)}
    rows = {x[0]: x[1:] for x in rows}
    missed = "" if met else " missed"
    assert rows["launches in a step"] == ["", f"{x:.3g}{missed}", "", "90"]
    assert rows["replayed: host's ms of a step"] == ["", f"1 → {x:.3g}", "", ""]
    assert ["", "-", "3 → 2", ""] in rows.values()
    assert rows["rollouts: own share over the base's"] == ["", "", f"{x:.3g}{missed}", "0.2"]


@pytest.mark.parametrize("kind,uploads,waits", [
    ("copy_", 1, 0), ("to", 1, 0), ("tensor", 1, 0), ("within", 0, 0), ("item", 0, 1),
    ("tolist", 0, 1), ("back", 0, 1), ("mask", 0, 1),
])  # fmt: skip
def test_what_crosses(kind, uploads, waits):
    there, here = torch.zeros(3, device="meta"), torch.zeros(3)
    mask = torch.zeros(3, device="meta", dtype=torch.bool)
    calls = {
        "copy_": lambda: there.copy_(here), "to": lambda: here.to("meta"),
        "tensor": lambda: torch.tensor([1.0], device="meta"),
        "within": lambda: there.copy_(there + here.sum(0)), "item": lambda: there[0].item(),
        "tolist": lambda: there.tolist(), "back": lambda: there.to("cpu"),
        "mask": lambda: there.index_put_((mask,), there[:1]),
    }  # fmt: skip
    with step_worker.Boundary() as crossed:
        calls[kind]()
    assert (sum(crossed.uploads.values()), sum(crossed.waits.values())) == (uploads, waits)


def test_operators_are_told_by_kind():
    x = torch.zeros(4)
    counted = step_worker.counted(lambda: (x.view(2, 2), x.add_(1), x + 1, x[1:]), 2)
    kinds = {(kind, name.partition(".")[0]): n for (kind, name), n in counted.items()}
    assert kinds == {("views", "aten::view"): 0.5, ("views", "aten::slice"): 0.5,
                     ("others", "aten::add_"): 0.5, ("others", "aten::add"): 0.5}  # fmt: skip


def test_a_worker():
    """It measures the build that it is told to, and says what failed."""
    with step.Worker(ROOT) as ask:
        with pytest.raises(RuntimeError, match="nothing: AttributeError: .*'nothing'"):
            ask("nothing")
        assert Path(ask("where")) == ROOT


def test_a_base_of_a_commit(monkeypatch, tmp_path):
    """Made once; parts that are compiled already are taken."""

    def git(*command):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *command],
                       cwd=tmp_path, check=True)  # fmt: skip

    (tmp_path / "kvtools").mkdir()
    (tmp_path / "kvtools" / "old.py").write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "old")
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(step, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="--base-build .*: has no _\\*.so"):
        step.built("HEAD", tmp_path / "parts")
    (tmp_path / "parts" / "_C.so").write_text("compiled")
    root = step.built("HEAD", tmp_path / "parts")
    assert sorted(x.name for x in (root / "kvtools").iterdir()) == ["_C.so", "old.py"]
    assert step.built("HEAD", None) == root
    with pytest.raises(SystemExit, match="--base nowhere: git has no such commit"):
        step.built("nowhere", None)


@pytest.mark.long
def test_launches():
    """Over the stand-in for CUDA's driver: what a layer and a step launch."""
    pytest.importorskip("triton")
    found = []
    for layers in (1, 2):
        with step.Worker(ROOT) as ask:
            found.append(ask("launches", "16-bit", layers, 2, 2, 1))
    one, two = (x["kernels"] for x in found)
    layer = {name: two[name] - one[name] for name in two}
    assert layer["_attend_kernel"] == layer["_append_kv_kernel"] == 1
    assert layer["_finish_kernel"] == 0 < one["_finish_kernel"]


@pytest.mark.long
def test_replayed():
    """Nothing is launched but while a step is captured, and by the one before."""
    pytest.importorskip("triton")
    with step.Worker(ROOT) as ask:
        found = ask("replayed", "balanced", 1, 2, 8, 3)
    assert found["ms"] > 0 and found["launches"] < 1
