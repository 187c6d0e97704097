"""Trees of steps: forks of the trace, or what independent rows share; and their pictures."""

import math

import pytest
from test_search import STEPS, Script, judged, recorded, scorer_of

from kvtools import search
from kvtools.search import Candidate, Event, Result


@pytest.mark.parametrize("strategy,how", [
    (search.beam, dict(n=8, beam=4)), (search.dvts, dict(n=6, beam=3)), (search.rebase, dict(n=6)),
    (search.particle_filter, dict(n=5)),
])  # fmt: skip
def test_nodes_are_the_rows_of_the_trace(strategy, how):
    found = strategy(Script(recorded("s", 1)), ["Q", "R"], scorer_of(judged(1)), STEPS, **how)
    for question in range(2):
        nodes = search.tree(found, question)
        events = [e for e in found.trace if e.question == question]
        assert [x.value for x in nodes] == [v for e in events for v in e.values]
        assert sum(x.fate == "finished" for x in nodes) == sum(len(e.finished) for e in events)
        for i, node in enumerate(nodes):
            assert node.parent < i
            above = nodes[node.parent] if node.parent >= 0 else None
            assert node.depth == (above.depth + 1 if above else 0)
            assert above is None or above.fate != "left out"


def test_rows_share_what_they_begin_with_alike():
    def row(steps, finished="eos"):
        return Candidate(list(steps), steps, [0.0] * len(steps), [0.5] * len(steps),
                         finished=finished)  # fmt: skip

    result = Result(["Q"], [[row("abc"), row("abd"), row("x")]], [], 0, 0, {},
                    stopped=[[row("ay", "")]])  # fmt: skip
    nodes = search.tree(result, 0)
    assert [(x.parent, x.depth, x.fate) for x in nodes] == [
        (-1, 0, "went on"), (0, 1, "went on"), (1, 2, "finished"), (1, 2, "finished"),
        (-1, 0, "finished"), (0, 1, "left out"),
    ]  # fmt: skip
    with pytest.raises(IndexError, match="question=1"):
        search.tree(result, 1)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_draw(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    deep = [Event(i, 0, (math.nan, -3.0), (0, 0), (), "x") for i in range(300)]
    result = Result(["$a_b", "no rows"], [[], []], deep, 0, 0, {})
    search.draw(result, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 1000
    with pytest.raises(ValueError, match="result has no question"):
        search.draw(Result([], [], [], 0, 0, {}), tmp_path / "b.svg")
    for name in ("b", "b.jpg", "b.svg.gz"):
        with pytest.raises(ValueError, match="end its name in .svg, .png, .pdf"):
            search.draw(result, tmp_path / name)
    assert [x.name for x in tmp_path.iterdir()] == [f"a.{suffix}"]
