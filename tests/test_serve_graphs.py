"""An engine's decode steps in tensors of fixed addresses, captured and replayed."""

import pytest
import torch
from batches import BLOCKS, PAGE, WIDTH, Batches

import kvtools
from kvtools import KVPages
from kvtools.serve import steps
from kvtools.serve.steps import Graphs, step_from_block_table
from kvtools.testing import Recorder

HEADS, D = 2, 16


def filled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pages = KVPages.empty(BLOCKS, HEADS, PAGE, D)
    for x in (pages.k, pages.v):
        x.copy_(torch.randn(x.shape, generator=generator))
    return pages


def captured(graphs, rows, pages):
    """A step of so many rows with the recorder in a graph's place: queries, output, replay."""
    q = torch.zeros(rows, 2 * HEADS, D)
    out = torch.zeros_like(q)
    nothing = torch.zeros(rows, WIDTH, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    with torch.inference_mode():  # engines differ in when they are in it
        graphs.hold(rows)
    step = step_from_block_table(
        *nothing, torch.zeros(rows + 1, dtype=torch.int32), PAGE, graphs=graphs
    )
    with Recorder() as recorder:
        out.copy_(kvtools.tree_attention(q, step.position_t, pages, step.plan)[0])
    return q, out, recorder.replay


# As of a GPU; tiny, so that plans do not fit; and without a cut, as on a CPU.
@pytest.mark.parametrize("limits", [dict(tile=2, items=6), dict(tile=1, items=1), {}], ids=str)
@pytest.mark.parametrize("deep", [False, True], ids=["forks", "deep"])
def test_replays_are_those_of_each_batch(limits, deep, monkeypatch):
    """Graphs of 3 and 9 rows take turns in one memory; how a plan is cut changes no result."""
    ways = []
    plan = steps.block_table_arrays

    def noted(*args, **how):
        ways[-1].append(how)
        return plan(*args, **how)

    pages, graphs = filled(), Graphs(WIDTH, PAGE, BLOCKS, torch.device("cpu"), **limits)
    runs = {rows: captured(graphs, rows, pages) for rows in (9, 3)}
    batches = {rows: Batches(rows, seed=rows, deep=deep) for rows in runs}
    for i in range(60):
        rows = 3 if i % 5 == 4 else 9
        q, out, replay = runs[rows]
        table, lens, start = batches[rows].step()
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(i)))
        live = int(start[-1])
        fresh = step_from_block_table(table[:live], lens[:live], start[: live + 1], PAGE)
        ways.append([])
        with monkeypatch.context() as patch:
            patch.setattr(steps, "block_table_arrays", noted)
            among = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(i))[:rows]
            larger = torch.full((rows + 2, WIDTH), -5, dtype=torch.int32)
            larger[among] = table
            given = (larger, lens, start, PAGE) if i % 2 else (table, lens, start, PAGE)
            step_from_block_table(
                *given, blocks=BLOCKS, graphs=graphs, index=among if i % 2 else None
            )
        replay()
        want, _ = kvtools.tree_attention(q[:live], fresh.position_t, pages, fresh.plan)
        torch.testing.assert_close(out[:live], want)
        assert not out[live:].any()
    last = [x[-1] for x in ways]
    assert limits in last
    if deep and not limits:  # each row reads all nodes above it: too many partial results
        assert dict(share=False) in last


def test_several_tokens_of_a_row_are_no_step_of_a_graph():
    graphs = Graphs(WIDTH, PAGE, BLOCKS, torch.device("cpu"))
    graphs.hold(3)
    table, lens = torch.ones(3, WIDTH, dtype=torch.int32), torch.tensor([4, 5, 6])
    held = [
        step_from_block_table(table, lens, torch.tensor(start), PAGE, graphs=graphs)
        for start in ([0, 1, 2, 3], [0, 1, 1, 2])
    ]
    assert held[0] is held[1]
    step = step_from_block_table(table, lens, torch.tensor([0, 1, 3, 4]), PAGE, graphs=graphs)
    assert step.tokens == 4


def test_a_faulty_table_leaves_the_step_as_it_was():
    pages, graphs = filled(), Graphs(WIDTH, PAGE, BLOCKS, torch.device("cpu"))
    q, out, replay = captured(graphs, 3, pages)
    q.normal_()
    table, lens, start = torch.ones(3, WIDTH, dtype=torch.int32), torch.tensor([4, 5, 6]), range(4)
    given = lens, torch.tensor(start), PAGE
    step_from_block_table(table, *given, graphs=graphs)
    replay()
    before = out.clone()
    table[1, 1] = BLOCKS
    with pytest.raises(IndexError, match=f"row 1 reads block {BLOCKS}, the cache has {BLOCKS}"):
        step_from_block_table(table, *given, graphs=graphs)
    replay()
    assert torch.equal(out, before) and out.any()


@pytest.mark.parametrize("largest", [2, 16])
def test_rows_longer_than_a_graph_holds_are_refused(largest):
    """Also where there is memory behind the step's, of a larger one."""
    graphs = Graphs(WIDTH, PAGE, BLOCKS, torch.device("cpu"))
    graphs.hold(largest)
    graphs.hold(2)
    table, most = torch.ones(2, 2 * WIDTH, dtype=torch.int32), WIDTH * PAGE
    table[1] = 2
    given = torch.arange(3), PAGE
    before = step_from_block_table(table, torch.tensor([most, 1]), *given, graphs=graphs)
    kept = before.plan.page.clone()
    with pytest.raises(ValueError, match=f"a row has {most + PAGE} tokens, .* holds {most} of"):
        step_from_block_table(table, torch.tensor([most + PAGE] * 2), *given, graphs=graphs)
    assert torch.equal(before.plan.page, kept)


def test_a_step_that_is_made_anew_is_noticed(monkeypatch):
    """By the recorder, as a graph would read memory that is no longer the plan's."""
    pages, graphs = filled(), Graphs(WIDTH, PAGE, BLOCKS, torch.device("cpu"))
    *_, replay = captured(graphs, 3, pages)
    graphs.hold(3)
    replay()
    graphs._held.clear()
    graphs._whole = None
    graphs.hold(3)
    with pytest.raises(RuntimeError, match="has been freed or moved since"):
        replay()
