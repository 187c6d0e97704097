"""The benchmark of shared beginnings, samples and completions on a small scale."""

import json

import pytest
import torch
from rich.console import Console

bench = pytest.importorskip("bench.forest")

SCALE = bench.Scale(
    prompts=6, preamble=50, own=(5, 9), batch=4, samples=30, prompt=20, most=6, completions=3,
    length=12, before=30, rounds=1,
)  # fmt: skip


def words(text):
    return {"input_ids": [3 + b % 250 for b in text[:4000].encode()]}


def test_all_parts_and_their_targets():
    model = bench.small()
    cells = {
        "few-shot prompts": bench.few_shot(model, words, SCALE),
        "samples": bench.many(SCALE),
        "given completions": bench.given(model, words, SCALE),
    }
    shots = cells["few-shot prompts"]
    assert 1 <= shots["kvtools"]["tokens"] / shots["distinct tokens"] < 1.05
    assert shots["apart"]["tokens"] >= 6 * 55 and shots["generate"]["tokens"] >= 6 * 55
    assert {shots[x]["same"] for x in ("kvtools", "apart", "generate")} == {1.0}
    found = bench.targets(cells)
    assert len(found) == 12
    assert all(x["ok"] for x in found if "same" in x["name"] or "float64 model" in x["name"]), found
    completions = cells["given completions"].values()
    assert all(0 < x["rms_error"] <= x["error"] < 1e-5 for x in completions)
    found.show(Console(quiet=True))
    lines = bench.table(cells)
    assert {len(line) for line in lines} == {5} and len(lines) == 10
    assert bench.session.STRETCH == 32
    json.dumps(cells)
    assert bench.targets({}) == []


def test_a_peak_is_seen():
    most, out = bench.peak(lambda: float(torch.ones(2**24).sum()))
    if most is None:
        pytest.skip("this system does not tell the greatest size of a process")
    assert 2**25 < most < 2**27 and out == 2**24
