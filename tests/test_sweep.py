"""The sweep over transformers' causal model types: its short form, and what its outcomes mean."""

import json
import os
import time
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")

import kvtools  # noqa: E402
import kvtools.cache  # noqa: E402
from bench import sweep, tiny  # noqa: E402

# A type of each kind of attention, in two modes each; the sweep itself runs all in all modes.
EQUAL = {
    "llama": "sdpa exact ragged",
    "gemma3_text": "eager batch ragged",  # windows in some layers, a rope for each kind
    "gpt_oss": "eager samples batch",  # sinks, windows, experts
    "cohere2": "sdpa exact samples",  # layers without positions
    "opt": "sdpa batch ragged",  # learned positions
    "bert": "eager exact ragged",  # no causal model as it comes
    "granite": "sdpa samples rope",
    "kimi_linear": "sdpa ragged",  # recurrent layers beside latent keys
}
REFUSED = {
    "minimax": "cache of its own",
    "bloom": "attention interface",
    "deepseek_v4": "layers of another kind",
}
NEVER_WRONG = ["qwen2_moe", "bart"]  # windows in masks alone; positions counted from the cache


@pytest.mark.parametrize("kind", EQUAL)
def test_equal(kind, monkeypatch):
    implementation, *modes = EQUAL[kind].split()
    monkeypatch.setattr(sweep, "IMPLEMENTATIONS", (implementation,))
    monkeypatch.setattr(tiny, "ROPES", {"yarn": tiny.ROPES["yarn"]})
    found = sweep.check(kind, modes)
    assert [x["outcome"] for x in found.values()] == ["equal"] * len(modes), found


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, monkeypatch):
    monkeypatch.setattr(sweep, "IMPLEMENTATIONS", ("eager",))
    for found in sweep.check(kind, ["exact", "ragged"]).values():
        assert found["outcome"] == "refused" and REFUSED[kind] in found["reason"]


@pytest.mark.parametrize("kind", NEVER_WRONG)
def test_equal_or_refused(kind, monkeypatch):
    monkeypatch.setattr(sweep, "IMPLEMENTATIONS", ("sdpa",))
    for found in sweep.check(kind, ["exact", "ragged"]).values():
        assert found["outcome"] in ("equal", "refused"), found


def test_every_type_has_a_tiny_config():
    """But for a few, whose defaults are at odds with one another."""
    failed = []
    for kind in tiny.types():
        try:
            tiny.tiny_config(kind)
        except Exception:
            failed.append(kind)
    assert len(failed) <= 4, failed


FAULTS = {"wrong": lambda out: out * 1.02, "unclear": lambda out: out.nothing}


@pytest.mark.parametrize("mode", sweep.MODES)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name, mode, monkeypatch):
    """What attention gives while decoding is a little off, or an error that is no refusal; in texts
    that are longer than what a door tries."""
    attend = kvtools.cache.KVCache.attend

    def off(cache, *args, **kwargs):
        out = attend(cache, *args, **kwargs)
        return FAULTS[name](out) if cache.lengths.max() > 16 else out

    monkeypatch.setattr(kvtools.cache.KVCache, "attend", off)
    monkeypatch.setattr(sweep, "IMPLEMENTATIONS", ("sdpa",))
    assert sweep.summed(sweep.check("llama", [mode]))["outcome"] == name


def test_only_an_error_with_a_reason_is_a_refusal():
    with pytest.raises(sweep.Refused, match="bits"), sweep.ours():
        kvtools.CacheConfig(bits=17)
    with pytest.raises(sweep.Unclear, match="after 2 tokens"), sweep.ours(lambda: 2):
        kvtools.CacheConfig(bits=17)
    for error in (ValueError("of another library"), ValueError(), RuntimeError("of kvtools")):
        with pytest.raises(sweep.Unclear), sweep.ours():
            raise error


def test_a_model_that_repeats_itself_is_not_compared(monkeypatch):
    monkeypatch.setattr(tiny, "build", partial(dull, tiny.build))
    monkeypatch.setattr(sweep, "IMPLEMENTATIONS", ("sdpa",))
    found = sweep.check("llama", ["exact"])["exact sdpa"]
    assert found["outcome"] == "not comparable" and "depend on the prompt" in found["reason"]


def dull(build, *args):
    model = build(*args)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize(
    "run,reason",
    [(partial(os._exit, 3), "died with exit code 3"), (partial(time.sleep, 60), "no end after")],
)
def test_dead_or_hanging_worker(run, reason):
    found = sweep.in_child(run, limit=20 if "died" in reason else 0.1)
    assert found["all"]["outcome"] == "unclear" and reason in found["all"]["reason"]


def test_report(tmp_path, monkeypatch, capsys):
    modes = {"exact sdpa": ("equal", ""), "ragged sdpa": ("refused", "llama cannot be rewound")}
    modes = {mode: dict(zip(("outcome", "reason"), x, strict=True)) for mode, x in modes.items()}
    failed = {"all": {"outcome": "unclear", "reason": "no end after 1 s"}}
    monkeypatch.setattr(
        sweep, "in_child", lambda run, limit: failed if run.args[0] == "phi" else modes
    )
    readme, page, out = tmp_path / "README.md", tmp_path / "page.md", tmp_path / "sweep.json"
    for path in (readme, page):
        path.write_text("a\n<!-- sweep:begin -->\n<!-- sweep:end -->\nb\n")
    options = ["--json", str(out), "--readme", str(readme), "--page", str(page), "--types"]
    assert sweep.main([*options, "llama|qwen2"]) == 0
    assert "| refused: ragged sdpa: it cannot be rewound" in page.read_text()
    assert "| refused | 2 | llama, qwen2 |" in readme.read_text()
    result = json.loads(out.read_text())
    assert result["types"]["llama"]["modes"] == modes
    assert result["where"]["torch"] == torch.__version__
    assert sweep.main([*options, "llama|phi"]) == 1
    assert "1 refused, 0 wrong, 1 unclear" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sweep.main(["--modes", "exact,nosuch"])
    # Of types that are left out, what is known stays, and where it is from.
    sweep.main([*options, "gpt2", "--merge", str(out)])
    assert "| refused | 2 | gpt2, llama |" in readme.read_text()
    merged = json.loads(out.read_text())["types"]
    assert merged["llama"]["where"]["torch"] == torch.__version__ and "where" not in merged["gpt2"]
    with pytest.raises(SystemExit):
        sweep.main([*options, "gpt2", "--merge", str(out), "--modes", "exact"])
