"""Prompts that share a forward are stored as if each had been alone."""

import itertools

import numpy as np
import pytest
import torch
from models import COMMON, Counter, fresh_model, padded_prompts, random_ids, tiny_model
from test_door import MODELS, alone, with_rope
from transformers import LlamaConfig, LlamaForCausalLM
from twin import Twin

import kvtools
from kvtools import CacheConfig
from kvtools.hf import Session, Unsupported
from kvtools.hf.session import PADDING, TOKENS

NEW = 12
SIMILAR = (35, 40, 33, 40, 31)
COMPRESSED = {
    "balanced": dict(bits=4, recent=8),
    "evicts": dict(bits=8, budget=14, recent=4, window=8, drop=4, sinks=2, prompt_budget=20),
    "own copies": dict(bits=16, recent=8, recent_bits=8, sinks=3, prompt_budget=0.5),
}


def texts(lengths):
    return [random_ids(n, seed=i + 1) for i, n in enumerate(lengths)]


def plain(model, prompts, new=NEW):
    """[prompts, new] what generate gives for the batch."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in prompts])
    seen = torch.arange(width) >= width - torch.tensor([len(x) for x in prompts])[:, None]
    out = model.generate(ids, attention_mask=seen.long(), do_sample=False, max_new_tokens=new)
    return out[:, width:].tolist()


def rollouts(model, config=None, **options):
    return kvtools.Rollouts(model, config, temperature=0, eos_token_id=(), **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss"])
def test_a_batch_is_one_forward(name):
    model, prompts = tiny_model(name), texts(SIMILAR)
    want = plain(model, prompts)
    r = rollouts(model)
    with Counter(model) as count:
        r.prefill([*prompts, prompts[1]], 2)
    assert count.forwards == [5 * 40]
    assert r.generate(NEW) == [x for x in [*want, want[1]] for _ in (0, 1)]
    ids, mask = padded_prompts(SIMILAR)
    how = dict(attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    with Counter(model) as count:
        out = model.generate(ids, custom_generate=kvtools.generate, **how)
    assert count.forwards == [5 * 40] + [5] * (NEW - 1)
    assert torch.equal(out, model.generate(ids, **how))


def test_many_short_prompts():
    model, prompts = tiny_model(), texts(190 + i % 21 for i in range(32))
    r = rollouts(model)
    with Counter(model) as count:
        r.prefill(prompts)
    assert count.forwards == [32 * 210]
    assert r.generate(4) == plain(model, prompts, 4)


def test_padding_is_bounded():
    """Every prompt is run once; none that is alone in a forward could have gone into another."""
    session = Session(tiny_model(), CacheConfig())
    generator = np.random.default_rng(0)
    for lengths in ([10, 2000], [1, 1, 2], [9000, 9000], generator.integers(10, 2001, 300)):
        lengths = np.array(lengths)
        batches = session._batches(lengths)
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
        for batch in batches:
            size = len(batch) * lengths[batch].max()
            assert lengths[batch].min() >= (1 - PADDING) * lengths[batch].max()
            assert size <= TOKENS or len(batch) == 1
    assert len(batches) < 60
    prompts = texts([5, 200, 60, 6, 70, 190, 66])
    r = rollouts(tiny_model())
    with Counter(tiny_model()) as count:
        r.prefill(prompts)
    assert count.forwards == [2 * 200, 3 * 70, 2 * 6]
    assert r.generate(NEW) == plain(tiny_model(), prompts)


@pytest.mark.parametrize("options", COMPRESSED.values(), ids=COMPRESSED)
def test_a_compressed_batch_is_as_alone(options):
    """Tokens, logits and what each head keeps."""
    model, prompts = tiny_model(), texts(SIMILAR)
    together = rollouts(model, CacheConfig(**options))
    together.prefill(prompts, 2)
    new = together.generate(NEW)
    for i, prompt in enumerate(prompts):
        r = rollouts(model, CacheConfig(**options))
        r.prefill([prompt], 2)
        assert r.generate(NEW) == new[2 * i : 2 * i + 2]
        assert r.kv.kept(2, 0) == together.kv.kept(2, 2 * i)
        want, got = r.peek([5], [0, 1]), together.peek([5], [2 * i, 2 * i + 1])
        assert (want - got).abs().max() < 1e-2 * want.std()


@pytest.mark.parametrize("options", [{}, *COMPRESSED.values()], ids=["exact", *COMPRESSED])
def test_filled_together(options):
    """Bit by bit what prompts one by one give, also where they are shorter than the sinks."""
    config, lengths, copies = CacheConfig(page_size=4, **options), [9, 1, 30, 5], [2, 1, 3, 1]
    one, all_ = (Twin(config, layers=2, dtype=torch.float32) for _ in range(2))
    for twin in (one, all_):  # prompts and rows that were there before
        twin.add(7, 2, seed=5)
    for seed, each in enumerate(zip(lengths, copies, strict=True)):
        one.add(*each, seed=seed)
    all_.cache.add_prompt(lengths, copies)
    for layer in range(2):
        rows = 2 + np.cumsum(copies) - copies
        parts = zip(*(one.qkv(layer, row) for row in rows), strict=True)
        all_.cache.fill(layer, *(torch.cat(x).transpose(0, 1) for x in parts))
    all_.rows, all_.seeds = [list(row) for row in one.rows], list(one.seeds)
    all_.prompts, all_.recent = list(one.prompts), list(one.recent)
    for index in (None, [8, 3, 0, 5, 5]):
        if index:
            one.gather(index), all_.gather(index)
        for _ in range(12):
            assert torch.equal(*(torch.stack(twin.step()) for twin in (one, all_)))
        for row in range(len(one.rows)):
            assert one.cache.kept(1, row) == all_.cache.kept(1, row)


@pytest.mark.parametrize("config", [CacheConfig(), CacheConfig(**COMPRESSED["evicts"])],
                         ids=["exact", "evicts"])  # fmt: skip
@pytest.mark.parametrize("fails_at", [1, 3])
def test_undone_in_the_middle(config, fails_at):
    """Of the first forward, of three; and of the last."""
    model = fresh_model()
    r, want = (rollouts(model, config) for _ in range(2))
    for x in (r, want):
        x.prefill(texts([40, 37]), 2)
        x.generate(5)
    calls = []

    def fails(module, args):
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("mine")

    hook = model.model.layers[2].register_forward_pre_hook(fails)
    more = texts([20, 9, 60, 18])
    with pytest.raises(RuntimeError, match="mine"):
        r.prefill(more, 2)
    hook.remove()
    assert r.rows == r.kv.rows == 4 and r.tokens == want.tokens
    r.prefill(more, 2)
    want.prefill(more, 2)
    assert r.generate(NEW) == want.generate(NEW)


def test_a_session_returns_what_each_prompt_gives():
    model, prompts = tiny_model(), texts([20, 5, 19, 6])
    plain_v = [model(x[None]).logits[0, -1] for x in prompts]
    hidden = [model.model(x[None]).last_hidden_state[0] for x in prompts]
    session = Session(model, CacheConfig())
    for got, want in zip(session.prefill(prompts, [1, 2, 1, 3]), plain_v, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert session.kv.lengths.tolist() == [20, 5, 5, 19, 6, 6, 6]
    headless = Session(model, CacheConfig(), head=False)
    for got, want in zip(headless.prefill(prompts), hidden, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert session.prefill([]) == []
    with pytest.raises(ValueError, match="prompts holds an empty prompt"):
        session.prefill([prompts[0], prompts[0][:0]])
    with pytest.raises(ValueError, match="copies=0"):
        session.prefill(prompts, 0)
    assert session.kv.rows == 7


class NoMask(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, **kwargs):
        assert "attention_mask" not in kwargs
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


def unmasked():
    torch.manual_seed(0)
    model = NoMask(LlamaConfig(**COMMON))
    model.load_state_dict(tiny_model().state_dict())
    return model.eval()


@pytest.mark.parametrize("make,forwards", [
    (lambda: with_rope("LlamaConfig", "dynamic"), [2 * 44, 2 * 52, 55]),
    (lambda: with_rope("LlamaConfig", "longrope"), [3 * 55, 2 * 44]),
    (lambda: with_rope("Phi3Config", "longrope"), [3 * 55, 2 * 44]),
    (MODELS["positions counted from the cache"], [2 * 52, 55, 44, 42]),
    (unmasked, [2 * 52, 55, 44, 42]),
], ids=["dynamic rope", "longrope", "switch", "counted", "no mask"])  # fmt: skip
def test_only_rows_that_may_share_a_forward_do(make, forwards):
    model, lengths = make(), (52, 44, 55, 42, 52)
    ids, mask = padded_prompts(lengths)
    prompts = [row[seen > 0] for row, seen in zip(ids, mask, strict=True)]
    want = [x.tolist() for x in alone(model, ids, mask)] if make is not unmasked else None
    r = rollouts(model)
    with Counter(model) as count:
        r.prefill(prompts)
    assert sorted(count.forwards) == sorted(forwards)
    new = r.generate(16)
    assert new == (want or plain(tiny_model(), prompts, 16))


def test_attention_that_sees_padding_is_refused(monkeypatch):
    model, prompts = fresh_model(), texts([40, 37])
    kvtools.hf.check_model(model)
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None
    )
    with pytest.raises(Unsupported, match="its attention sees padding"):
        rollouts(model).prefill(prompts)
    r = rollouts(model)
    for prompt in prompts:
        r.prefill([prompt])
    assert r.generate(4) == [x for p in prompts for x in plain(tiny_model(), [p], 4)]
