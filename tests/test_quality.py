"""The quality harness: what it measures, its journal, the presets, and bounds on real models."""

import json
from dataclasses import asdict

import pytest
import torch
from models import Counter, random_ids, tiny_model

import kvtools
from kvtools import CacheConfig, Rollouts, quality
from kvtools.config import PRESETS
from kvtools.quality import Journal, Ours
from kvtools.tasks import Item


def items(count=3, prompt=40, then=9):
    rows = random_ids(count, prompt + then).tolist()
    return [Item(tuple(r[:prompt]), tuple(r[prompt:]), tuple(range(1, then))) for r in rows]


def test_compare_against_plain_forwards():
    model, chosen = tiny_model(), items()
    found = quality.compare(model, chosen, [Ours("same", CacheConfig())], batch=2)
    for result, twin, item in zip(found["exact"], found["same"], chosen, strict=True):
        assert result["kl"] == twin["kl"] == 0 and twin["top1"] == 1
        with torch.no_grad():
            logits = model(torch.tensor([item.prompt + item.then])).logits[0]
        x = logits[len(item.prompt) : -1].log_softmax(-1)
        target = torch.tensor(item.then[1:])
        assert result["nll"] == pytest.approx(-x.gather(1, target[:, None]).mean().item(), rel=1e-4)
        assert result["right"] == float((x.argmax(-1) == target).all())
        assert result["tokens"] == 48


def test_right_is_what_greedy_decoding_says():
    model = tiny_model()
    (prompt,) = random_ids(1, 30).tolist()
    said = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
        0, 30:
    ].tolist()
    wrong = [*said[:-1], (said[-1] + 1) % 250]
    chosen = [Item(tuple(prompt), tuple(x), tuple(range(1, len(x)))) for x in (said, wrong)]
    found = quality.compare(model, chosen, [])["exact"]
    assert [result["right"] for result in found] == [1, 0]


def test_worse_caches_score_worse_and_the_prompt_runs_once():
    model, chosen = tiny_model(), items(4)
    contenders = [Ours(str(bits), CacheConfig(bits=bits, recent_bits=None)) for bits in (8, 4, 2)]
    with Counter(model) as seen:
        found = quality.compare(model, chosen, contenders)
    assert sum(seen.forwards) == 4 * 40 + 4 * (4 * 8)  # prompts once, then every cache
    rows = [quality.summary(model, found[name]) for name in ("exact", "8", "4", "2")]
    kl, bits = [row["kl"] for row in rows], [row["bits"] for row in rows]
    assert kl == sorted(kl) and kl[-1] > 0
    assert bits == sorted(bits, reverse=True)
    assert rows[0]["ratio"] == pytest.approx(16 / rows[0]["bits"])


def test_bytes_of_a_float32_model_count_as_16_bits():
    model = tiny_model()
    found = quality.compare(model, items(1, 48, 17), [])
    row = quality.summary(model, found["exact"])
    assert 16 <= row["bits"] < 16 * 1.2  # pages are filled, 64 tokens and a plan


def test_interval():
    assert quality.interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-3)  # Wilson
    assert quality.interval([0, 1] * 50) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = quality.interval(values)
    half = 1.96 * torch.tensor(values).std().item() / 200**0.5
    mean = sum(values) / 200
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.15)


def test_journal_resumes(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "deep" / "out.json"
    four, eight = (Ours(f"{bits}", CacheConfig(bits=bits)) for bits in (4, 8))
    first = Journal(path, {"model": "a"}).run(model, "text", items(), [four])
    resumed = Journal(path, {"model": "a"})
    second = resumed.run(model, "text", items(), [four, eight])
    assert second["4"] == first["4"] and set(second) == {"exact", "4", "8"}
    with monkeypatch.context() as patched:
        patched.setattr(quality, "compare", None)  # nothing is left to measure
        assert (
            Journal(path, {"model": "a"}).run(model, "text", items(), [eight])["8"] == second["8"]
        )
    resumed.save(targets=[])
    assert json.loads(path.read_text())["targets"] == []
    before = path.read_bytes()
    with pytest.raises(ValueError, match="out.json was made with model='a', not 'b': name a new"):
        Journal(path, {"model": "b"})
    replaced = Journal(path, {"model": "b"}, stale=["model"])  # of sources that changed, as it were
    assert not replaced.cells and path.read_bytes() == before
    path.write_text("{}")
    with pytest.raises(RuntimeError, match="does another run use it"):
        replaced.save()
    assert path.read_text() == "{}"


def test_probe_items():
    chosen = quality.probe_items(list(range(400)), windows=3, length=64)
    assert [len(item.prompt) for item in chosen] == [100, 200, 300]
    assert all(item.then[0] == len(item.prompt) and len(item.then) == 64 for item in chosen)
    with pytest.raises(ValueError, match="127 tokens; a probe needs 128"):
        quality.probe_items(list(range(127)))


def test_verdict():
    words = [quality.verdict(kl) for kl in (0, 0.01, 0.05, 3, float("nan"))]
    assert words == ["the same", "close", "differs", "hurts", "hurts"]


class Speller:
    """Reads every even token as 3, every odd one as 4."""

    def encode(self, text):
        return random_ids(1, 20, seed=len(text))[0].tolist()

    def decode(self, tokens):
        return f" The answer is {3 + tokens[-1] % 2}\n"


def test_best_of():
    model = tiny_model()
    rows = Rollouts(model, temperature=0.8)
    prompts = [Speller().encode(text) for text in ("a", "ab")]
    rows.prefill(prompts, 8)
    rows.step()
    said = [[3 + rows.tokens[8 * i + j][-1] % 2 for j in range(8)] for i in range(2)]
    found = quality.best_of(model, Speller(), [("a", 3), ("ab", 9)], CacheConfig(), n=8)
    assert found["pass1"] == said[0].count(3) / 16 and 0 < said[0].count(3) < 8
    assert found["pass_n"] == 0.5 and (found["n"], found["samples"]) == (2, 8)
    assert found["majority"] == (quality.majority(said[0]) == 3) / 2
    with torch.no_grad():
        first = int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())
    assert found["greedy"] == (first % 2 == 0) / 2


def test_majority():
    assert quality.majority([None, 3, 4, 3]) == 3
    assert quality.majority([5, 4, 4, 5]) == 5
    assert quality.majority([None]) is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_work_alike_everywhere(name):
    model, ids = tiny_model(), random_ids(1, 60)
    config = CacheConfig.preset(name)
    options = dict(max_new_tokens=8, do_sample=False, num_return_sequences=1)
    direct = model.generate(ids, custom_generate=kvtools.generate, kv_config=config, **options)
    with kvtools.patch(model, config):
        patched = model.generate(ids, **options)
    rollouts = Rollouts(model, config, temperature=0.0, eos_token_id=())
    rollouts.prefill(ids)
    rollouts.generate(8)
    assert direct.tolist() == patched.tolist() == rollouts.tokens


def test_preset():
    changed = CacheConfig.preset("balanced", page_size=32)
    assert asdict(changed) == asdict(CacheConfig.preset("balanced")) | {"page_size": 32}
    with pytest.raises(ValueError, match="preset 'tiny' does not exist; expected lossless"):
        CacheConfig.preset("tiny")


@pytest.mark.long
def test_quick_bench_is_within_its_bounds(tmp_path, capsys):
    """SmolLM2 and the two small models, against bench/bounds.json."""
    try:
        kvtools_models = pytest.importorskip("kvtools.models")
        kvtools_models.smollm2()
    except ImportError as error:
        pytest.skip(str(error))
    bench = pytest.importorskip("bench.quality")
    code = bench.main(["--quick", "--json", str(tmp_path / "out.json")])
    assert code == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["targets"] == []


def test_bounds_catch_a_regression():
    bench = pytest.importorskip("bench.quality")
    cells = {"text": {"4-bit": {"kl": 0.02}}}
    assert bench.outside(cells, {"text/4-bit/kl": [0, 0.03]}) == []
    (line,) = bench.outside(cells, {"text/4-bit/kl": [0, 0.01]})
    assert line.startswith("text/4-bit/kl is 0.02")


def test_grown_items_are_the_same_tokens():
    bench = pytest.importorskip("bench.quality")
    (item,) = items(1, 40, 8)
    (grown,) = bench.grown([item], 5)
    assert len(grown.prompt) == 5 and grown.prompt + grown.then == item.prompt + item.then
    assert [grown.then[i] for i in grown.graded] == [item.then[i] for i in item.graded]


def test_table_and_caption():
    """Rows of every model that was measured; word problems in a sentence."""
    bench = pytest.importorskip("bench.quality")
    row = dict(bits=4.5, kl=0.01, kl_ci=[-0.001, 0.02], top1=0.9, right=0.75, n=8, ratio=20.0)
    shares = dict(n=12, samples=16, greedy=0.25, pass1=0.125, majority=0.5, pass_n=0.75)
    cells = {
        "text": {"exact": row, "max": row}, "needle 2000": {"exact": row, "max": row},
        "Gemma text": {"max": row}, "problems": {"exact": shares},
    }  # fmt: skip
    heads, *rows = bench.table(cells)
    assert {len(x) for x in rows} == {len(heads)}
    assert [x[0] for x in rows] == ["16-bit", "max", "Gemma max"]
    assert rows[1][1:6] == ["4.50", "0.01000", "0.00000-0.02000", "0.9000", "0.75"]
    where = dict(torch="2", transformers="5")
    result = dict(model="M", dtype="float32", commit="abc", cells=cells, where=where)
    said = "any of them: 16-bit 0.25, 0.12, 0.50, 0.75."
    assert said in bench.caption(result) and "Gemma" not in bench.caption(result)
    cells["Gemma needle 2000"] = {"exact": row}
    assert "no open-source licence" in bench.caption(result)
