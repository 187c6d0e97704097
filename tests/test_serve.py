"""What plugins of engines need no engine for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvtools
from kvtools import serve
from kvtools.serve.steps import step_from_block_table
from kvtools.testing import assert_within_budget

BLOCK, BLOCKS, HEADS, GROUP, D = 4, 40, 2, 2, 8
# Rows of a step: tokens, query tokens, and how many leading blocks are those of the row before.
BATCHES = {
    "decode": [(13, 1, 0), (14, 1, 3), (9, 1, 2), (1, 1, 0)],
    "a prompt": [(11, 11, 0)],
    "mixed": [(13, 1, 0), (17, 6, 3), (8, 8, 0), (12, 0, 0), (13, 4, 2)],
    "windows that freed blocks": [(30, 1, 0), (29, 3, 0)],
    "no rows": [],
}


def batch(rows, freed=0):
    """Block table, lengths and offsets of query tokens; the first `freed` blocks of all are 0."""
    width = max([-(-n // BLOCK) for n, *_ in rows], default=0) + 1
    table = torch.full((len(rows), width), 2**31 - 1, dtype=torch.int32)
    unused = iter(torch.randperm(BLOCKS - 1) + 1)
    for i, (n, _, shared) in enumerate(rows):
        for j in range(-(-n // BLOCK)):
            table[i, j] = table[i - 1, j] if j < shared else 0 if j < freed else next(unused)
    lens = torch.tensor([n for n, *_ in rows], dtype=torch.int32)
    start = torch.tensor([0, *(t for _, t, _ in rows)]).cumsum(0).int()
    return table, lens, start


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_reads_what_its_rows_hold(name):
    torch.manual_seed(0)
    rows, sliding = BATCHES[name], 7 if "windows" in name else 0
    table, lens, start = batch(rows, freed=5 if sliding else 0)
    step = step_from_block_table(table, lens, start, BLOCK, blocks=BLOCKS)
    k, v = torch.randn(2, BLOCKS, HEADS, BLOCK, D)
    q_thd = torch.randn(int(start[-1]), HEADS * GROUP, D)
    assert step.tokens == len(q_thd)
    out, _ = kvtools.tree_attention(
        q_thd, step.position_t, kvtools.KVPages(k, v), step.plan, sliding=sliding
    )
    for i, (n, t, _) in enumerate(rows):
        pages = table[i, : -(-n // BLOCK)].long()
        k_hsd, v_hsd = (x[pages].transpose(0, 1).flatten(1, 2)[:, :n] for x in (k, v))
        query, key = torch.arange(n - t, n)[:, None], torch.arange(n)
        mask = (key <= query) & (key > query - (sliding or n))
        q_htd = q_thd[start[i] : start[i + 1]].transpose(0, 1)

        def dense(dtype, *args, mask=mask):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.to(dtype)[None] for x in args), attn_mask=mask, enable_gqa=True
            )[0].transpose(0, 1)

        exact, eager = (dense(x, q_htd, k_hsd, v_hsd) for x in (torch.float64, torch.float32))
        assert_within_budget(name, out[start[i] : start[i + 1]], exact, eager)


@pytest.mark.parametrize("at,value,error,said", [
    ("table", BLOCKS, IndexError, f"block_table: row 1 reads block {BLOCKS}, the cache has 40"),
    ("table", -1, ValueError, "block_table: row 1 has a block within its length that is negative"),
    ("lens", 21, ValueError, "seq_lens: row 1 has 21, a row of the table holds 20"),
    ("lens", 3, ValueError, "query_lens: row 1 has 4, seq_lens has 3"),
    ("start", 9, ValueError, "query_start: expected 3 offsets from 0 on that do not descend"),
])  # fmt: skip
def test_a_faulty_batch_is_refused_by_name(at, value, error, said):
    given = dict(zip(("table", "lens", "start"), batch([(13, 1, 0), (14, 4, 3)]), strict=True))
    x = given[at]
    x[(1, 2) if x.dim() == 2 else 1] = value
    with pytest.raises(error, match=said):
        step_from_block_table(*given.values(), BLOCK, blocks=BLOCKS)


def test_the_plugin_does_nothing_unless_asked(monkeypatch):
    code = (
        "import os, sys\n"
        "from kvtools.serve import SETTING, vllm_plugin\n"
        "before = set(sys.modules)\n"
        "for value in (os.environ.pop(SETTING, None) and None, '', '0'):\n"
        "    if value is not None:\n"
        "        os.environ[SETTING] = value\n"
        "    vllm_plugin()\n"
        "assert set(sys.modules) == before\n"
        "assert not [x for x in before if x.startswith(('triton', 'vllm', 'kvtools.serve.'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    monkeypatch.setenv(serve.SETTING, "yes")
    with pytest.raises(ValueError, match="KVTOOLS_VLLM='yes': expected 1, for kvtools' attention"):
        serve.vllm_plugin()


def test_the_plugin_is_where_vllm_looks_for_it():
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines()
    entry = lines[lines.index('[project.entry-points."vllm.general_plugins"]') + 1]
    assert entry.startswith(f'kvtools = "{serve.__name__}:{serve.vllm_plugin.__name__}"')


def test_targets_of_the_benchmark_are_those_of_its_results():
    """And where something was not measured they say so."""
    bench = pytest.importorskip("bench.engines", exc_type=ImportError)
    path = Path(bench.__file__).parent / "results" / "engines.json"
    result = json.loads(path.read_text())
    found = bench.targets(result["cells"])
    assert found == result["targets"] and all(x["ok"] is not None for x in found)
    assert [x["name"] for x in bench.targets({})] == [x["name"] for x in found]
    assert {x["ok"] for x in bench.targets({})} == {None}
    assert set(bench.host(1)) == {"1,000 shared", "4,000 shared", "nothing shared"}
