"""The search benchmark on a few worked sums, and its trained scorer: they must not rot."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import Counter, tiny_model
from rich.console import Console
from test_search_stopping import Letters

from kvtools import Rollouts, search
from kvtools.cli import demo
from kvtools.quality import Journal

bench = pytest.importorskip("bench.search")
from bench import adaptive  # noqa: E402
from bench import adaptive_report as report  # noqa: E402
from bench.playback import Kept, Recorded  # noqa: E402
from bench.probe import Probe, area  # noqa: E402
from bench.problems import TASKS, Bytes, chance, two_steps, worked  # noqa: E402

WORDS, SUMS = TASKS
SCALE = bench.Scale(problems=3, pool=4, trained_on=6, batch=2, widths=(4,))


@pytest.fixture(scope="module")
def policy():
    return SUMS.load()


@pytest.fixture(scope="module")
def result(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "search.json"
    task = replace(SUMS, load=lambda: policy)
    journal = Journal(path, {"commit": "1234567"})
    bench.Bench(task, SCALE, journal).run(Console(quiet=True))
    first = path.read_text()
    resumed = Journal(path, {"commit": "1234567"})
    lost = {"DVTS, trained, 4": resumed.cells[task.name].pop("DVTS, trained, 4")}
    bench.Bench(task, SCALE, resumed).run(Console(quiet=True))
    again = resumed.cells[task.name]["DVTS, trained, 4"]
    assert again["right"] == lost["DVTS, trained, 4"]["right"], "the head is read back"
    kept = json.loads(first)["cells"][task.name]
    assert {k: v for k, v in resumed.cells[task.name].items() if k not in lost} == {
        k: v for k, v in kept.items() if k not in lost
    }
    where = demo.where("cpu") | {"commit": "1234567", "dirty": False}
    resumed.cells[WORDS.name] = resumed.cells[task.name]  # both policies in table and figure
    resumed.save(where=where, targets=bench.targets(resumed.cells, 4))
    return json.loads(path.read_text())


def test_every_cell_is_measured(result):
    cells = result["cells"][SUMS.name]
    assert len(cells) == 3 + 3 * 3
    samples = cells["samples"]
    assert {len(rows) for rows in samples["right"].values()} == {4}
    assert {len(x) for rows in samples["right"].values() for x in rows} == {3}
    for n in range(4):
        reached = samples["right"]["any"][n]
        for name, rows in samples["right"].items():
            assert all(a >= b for a, b in zip(reached, rows[n], strict=True)), name
    assert samples["tokens"] == sorted(samples["tokens"])
    for name, cell in cells.items():
        if name.endswith(", 4"):
            assert cell["tokens"] > 0 and cell["seconds"]["all"] >= cell["seconds"]["policy"]
            assert (cell["encoded"] > 0) == ("trained" in name)
    names = [x["name"] for x in result["targets"]]
    assert len(names) == len(set(names)) == 2 * (1 + 9)


def test_table_and_figure(result, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- search:begin -->\n<!-- search:end -->\n")
    heads, *rows = found = bench.table(result["cells"], 4)
    assert {len(row) for row in rows} == {len(heads)} and len(rows) == 2 * (1 + 7 + 9)
    demo.rewrite(readme, "search", found, bench.caption(result))
    assert "worked sums: beam, 4" in readme.read_text() and "1234567." in readme.read_text()
    plots = pytest.importorskip("bench.plots", exc_type=ImportError)
    plots.draw_search(result, tmp_path / "search.svg")
    assert "trained scorer" in (tmp_path / "search.svg").read_text()


@pytest.fixture(scope="module")
def drawn(policy, tmp_path_factory):
    """Draws of few problems, as they are read back from the file."""
    path = tmp_path_factory.mktemp("bench") / "adaptive.json"
    task = replace(SUMS, load=lambda: policy)
    scale = bench.Scale(problems=2, pool=8, trained_on=3, batch=2)
    found = adaptive.Adaptive(task, scale, Journal(path, {}), 2)
    found.run(Console(quiet=True))
    again = adaptive.Adaptive(task, scale, Journal(path, {}), 2)
    again.run(Console(quiet=True))
    assert again.cells == json.loads(path.read_text())["cells"][SUMS.name] == found.cells
    return again


@pytest.mark.long
def test_adaptive_cells(drawn, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "TRIED", [("best_of_n", {"n": 2}), ("beam", {"n": 8})])
        found = {
            SUMS.name: adaptive.measured(*map(drawn.played, (adaptive.FITTED, adaptive.TESTED)))
        }
    cells = found[SUMS.name]
    assert len(cells) == 1 + len(adaptive.STOPS) + 2 * 6
    for name, cell in cells.items():
        if "spent" in cell:
            assert len(cell["right"]) == len(cell["spent"]) == 2
            assert cell["tokens"] == pytest.approx(np.mean(cell["spent"])), name
        if "budget" in cell:
            assert len(cell["chosen"]) == 2
    assert cells["stop, one verified"]["tokens"] < sum(map(sum, cells["samples"]["tokens"])) / 2
    names = [x["name"] for x in report.targets(found)]
    assert len(names) == len(set(names))
    heads, *rows = report.table(found)
    assert {len(row) for row in rows} == {len(heads)}
    page = tmp_path / "page.md"
    page.write_text("<!-- adaptive:begin -->\n<!-- adaptive:end -->\n")
    where = demo.where("cpu") | {"commit": "1234567"}
    demo.rewrite(page, "adaptive", [heads, *rows], report.caption(found, where, ["7654321"]))
    assert "worked sums: deepen, exact" in page.read_text() and "7654321" in page.read_text()


@pytest.mark.long
def test_scores_are_played_back(drawn):
    played, how = drawn.played(adaptive.TESTED), dict(n=6, seed=bench.SEED)
    real = drawn.rollouts(SUMS.temperature)
    want = search.best_of_n(real, played.questions, drawn.probe, drawn.steps, **how)
    trained = played.scorer("trained")
    found = search.best_of_n(played.policy(), played.questions, trained, drawn.steps, **how)
    assert told(found) == told(want)
    for some, others in zip(found.candidates, want.candidates, strict=True):
        for a, b in zip(some, others, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)


QUESTIONS = ["ab", "cde", "a"]
LETTERS = search.Steps(Letters(), ["\n", " "], 5, 14, done=lambda text: "e" in text)


def tiny():
    return Rollouts(tiny_model(), temperature=0.9, eos_token_id=9)


def told(result):
    candidates = [[(c.tokens, c.steps, c.finished) for c in some] for some in result.candidates]
    return candidates, result.trace, result.spent


@pytest.mark.parametrize("rule", [
    None, {"wave": 1, "enough": 1, "verified": 0.5}, {"wave": 1, "answer": len, "sure": 0.7},
    {"margin": -0.5, "window": 2},
], ids=["whole", "enough", "votes", "margin"])  # fmt: skip
def test_what_is_played_back_is_what_would_be_drawn(rule):
    samples = search.best_of_n(tiny(), QUESTIONS, None, LETTERS, n=6, seed=3).candidates
    prompts = [tuple(Letters().encode(question)) for question in QUESTIONS]
    said = {p: [c.tokens for c in some] for p, some in zip(prompts, samples, strict=True)}
    how = dict(n=5, seed=3, stop=rule and search.Stopping(**rule))
    real = search.best_of_n(tiny(), QUESTIONS, chance, LETTERS, **how)
    played = search.best_of_n(Recorded(said, [9]), QUESTIONS, chance, LETTERS, **how)
    assert told(played) == told(real)
    assert bool(rule) == any(real.stopped)
    later = search.best_of_n(Recorded(said, [9], first=4), QUESTIONS, chance, LETTERS, n=2)
    assert [[c.tokens for c in some] for some in later.candidates] == [x[4:] for x in said.values()]


@pytest.mark.parametrize("strategy,how", [
    (search.best_of_n, dict(n=3)), (search.beam, dict(n=4, beam=2, lookahead=1)),
    (search.prune, dict(n=3, evaluation=search.SelfEvaluation("c", "a", "b"))),
    (search.deepen, dict(n=2, trigger="b", depths=(1,))),
])  # fmt: skip
def test_prompts_that_stay_are_prompts(strategy, how):
    """Search after search over one prefill, each as with rollouts of its own."""
    kept, cost = Kept(tiny()), []
    for questions in (QUESTIONS, QUESTIONS, QUESTIONS[:1]):
        with Counter(tiny_model()) as seen:
            found = strategy(kept, questions, chance, LETTERS, seed=5, **how)
        cost.append(sum(seen.forwards))
        assert kept.rows == 0
        assert told(found) == told(strategy(tiny(), questions, chance, LETTERS, seed=5, **how))
    assert cost[1] == cost[0] - sum(map(len, QUESTIONS)), "no prompt twice"
    assert kept.inner.rows == 1


def test_rules_are_fitted_on_other_problems():
    class Trials:
        samples = {"tokens": [[9] * 8] * 2, "answers": [[0] * 8] * 2, "right": ["1" * 8] * 2,
                   "trained": [[0.5] * 8] * 2}  # fmt: skip

        def stop(self, how, rule):
            return adaptive.cell(*rule["result"])

    def best(*results):
        rules = [{"result": x} for x in results]
        return adaptive.fitted_rule(Trials(), "max, trained", rules)["result"]

    dear, cheap, wrong = ("11", [8, 8]), ("11", [3, 3]), ("01", [1, 1])
    assert best(dear, cheap, wrong) == cheap, "none that loses a right answer"
    assert best(wrong, ("00", [0, 0])) == wrong, "or that which loses least"


def test_nothing_to_play_back(tmp_path, capsys):
    path = tmp_path / "adaptive.json"
    with pytest.raises(SystemExit):
        bench.main(["--adaptive", "--kept", "--json", str(path)])
    assert "--kept needs --json PATH, a file that is there" in capsys.readouterr().err
    path.touch()
    with pytest.raises(ValueError, match="no draws of word problems, fitted: leave out --kept"):
        bench.main(["--adaptive", "--kept", "--json", str(path)])


def test_half_of_the_answers():
    """Of four that agree and four that do not, the former are answered."""
    samples = {"answers": [[0] * 8, [0] * 8, [*range(8)], [*range(8)]] * 2,
               "right": ["1" * 8, "1" * 8, "0" * 8, "1" + "0" * 7] * 2,
               "exact": [[0.5] * 8] * 8, "trained": [[0.5] * 8] * 8}  # fmt: skip
    found = report.abstained(samples, 8)
    assert (found["share"], found["answered"], found["right"]) == (0.5, 1.0, 0.75)
    assert found["low"] <= found["difference"] == 0.25 <= found["high"]


def test_heads_are_those_of_the_search_bench(tmp_path):
    path, scale = tmp_path / "search.json", bench.Scale(trained_on=7)
    held = {"seed": bench.SEED, "scale": {"trained_on": 7}, "cells": {"sums": {"probe": {"ok": 1}}}}
    path.write_text(json.dumps(held))
    assert adaptive.heads_of(path, scale) == {"sums": {"ok": 1}}
    for other in ({"seed": 1}, {"scale": {"trained_on": 8}}, {"scale": {}}):
        path.write_text(json.dumps(held | other))
        with pytest.raises(ValueError, match=r"--heads .*search\.json: not results"):
            adaptive.heads_of(path, scale)


def made_up():
    """Two problems of four samples, with ties and answers that cannot be read."""
    return {
        "tokens": [[10, 20, 10, 10], [10, 20, 10, 10]], "answers": [[0, 1, 1, -1], [-1, -1, 0, 1]],
        "right": ["0111", "1010"], "exact": [[0, 1, 1, 1], [1, 0, 1, 0]],
        "trained": [[0.2, 0.9, 0.8, 0.99], [0.9, 0.1, 0.3, 0.3]],
    }  # fmt: skip


@pytest.mark.parametrize("how", ["majority", "max, trained", "max, exact"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_what_is_taken_of_samples_is_what_choose_takes(how, n):
    samples = made_up()
    found = report.taken(samples, how, n)
    for i, right in enumerate(samples["right"]):
        scores = samples["exact" if "exact" in how else "trained"][i]
        rows = [search.Candidate(text=str(j), scores=[x], margins=[0.0])
                for j, x in enumerate(scores)]  # fmt: skip
        names = {str(j): x for j, x in enumerate(samples["answers"][i]) if x >= 0}
        best = search.choose(rows[:n], how.split(",")[0], answer=names.get)
        assert found[i] == (right[int(best.text)] == "1")


def test_samples_at_equal_tokens_are_mixed():
    samples = made_up()
    one, two = (report.taken(samples, "max, trained", n) for n in (1, 2))
    np.testing.assert_allclose(report.at_tokens(samples, "max, trained", 15), 0.75 * one + two / 4)
    for tokens, n in ((5, 1), (10, 1), (30, 2), (99, 4)):
        want = report.taken(samples, "max, trained", n)
        np.testing.assert_allclose(report.at_tokens(samples, "max, trained", tokens), want)


@pytest.mark.parametrize("differences", [[0, 0, 0], [1, 0, 0, 1], [0.5, -1, 0, 1]])
def test_intervals_of_differences_mirror(differences):
    low, high = report.paired(np.array(differences, float))
    assert report.paired(-np.array(differences, float)) == (-high, -low)
    assert low <= np.mean(differences) <= high and low < high


@pytest.mark.parametrize("likelihood", [False, True])
def test_probe_encodes_no_token_twice(policy, likelihood):
    """A session over forks and rewinds gives what a fresh one gives, from the new tokens alone."""
    model, tokenizer = policy
    probe = Probe(model, tokenizer.encode, ",", likelihood=likelihood)
    width = model.config.hidden_size + 2 * likelihood
    probe.head = np.random.default_rng(0).normal(size=width + 1).astype(np.float32).tobytes()
    question = "<AB7><CD3>\n?AB+CD="
    with Counter(model) as seen:
        session = probe.session(question, 3)
        session.append(["AB7:07", "AB7:08", None])
        session.gather([0, 2, 0, 1])
        session.append(["CD3:10", "AB3:03", "CD4:11", None])
        session.crop([1, 1, 2, 0])
        margin, probability = session.append(["CD3:09", "CD7:10", None, "AB7:07"])
    rows = [["AB7:07", "CD3:09"], ["AB3:03", "CD7:10"], ["AB7:07", "CD4:11"], ["AB7:07"]]
    for row, x in zip(rows, margin, strict=True):
        fresh = probe.session(question, 1)
        for step in row:
            want, _ = fresh.append([step])
        torch.testing.assert_close(x[None], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probability, margin.sigmoid())
    assert session.tokens == len(question) + 2 * 6 + (2 * 7 + 6) + (2 * 7 + 6)
    assert session.tokens <= sum(seen.forwards) <= session.tokens + 2, "but for padding"


def test_probe_learns():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator) * 3 + 5
    right = (x[:, 2] - x[:, 5] > 0).tolist()
    probe = Probe(None, None, "")
    probe.fit(x[:300], right[:300])
    assert area(probe.margin(x[300:]), right[300:]) > 0.99
    saved, other = probe.margin(x), Probe(None, None, "")
    other.head = probe.head
    torch.testing.assert_close(other.margin(x), saved)
    assert area([1, 2, 3, 4], [False, True, False, True]) == 0.75


@pytest.mark.parametrize("text,right", [
    (" 5 + 7 = 12,", True), (" 7 + 5 = 12, then 12 - 2 = 10. The answer is 10", True),
    (" 5 - 2 = 3, then 3 + 7 = 10.", True), (" 7 - 2 = 5, then 5 + 5 = 10.", True),
    (" 5 + 7 = 13,", False), (" 5 + 2 = 7,", False), (" 5 + 7 = 12, then 12 - 5 = 7.", False),
    (" 5 + 7 = 12, then 12 - 2 = 10, then 10 + 0 = 10", False), (" The answer is 10", True),
    (" 5 + 7 = 12. The answer is 12", False), ("", True),
])  # fmt: skip
def test_two_steps(text, right):
    question = "Q: 1 and 2\nA: 3\n\nQ: Tom has 5 coins and gets 7 more. Then Tom gives away 2.\nA:"
    assert two_steps(question, text) is right
    assert WORDS.truth(question) == 10


def test_worked_sums():
    (question,) = SUMS.questions(1, 3)
    solution = worked(question)
    assert SUMS.answer(solution) == SUMS.truth(question) is not None
    assert SUMS.check(question, solution) and SUMS.check(question, solution[:7])
    assert not SUMS.check(question, solution[:6] + "x")
    assert Bytes().decode(Bytes().encode(question)) == question
    assert SUMS.steps(Bytes()).done(solution)


def test_chance_depends_on_the_text_alone():
    texts = [["a,", "b"], ["a,", "c"]]
    (a, b), (c, d) = chance("Q", texts)
    assert a == c and b != d and all(0 < x < 1 for x in (a, b, d))
    assert search.Candidate(scores=[a, b]).score("prod") == pytest.approx(a * b)
