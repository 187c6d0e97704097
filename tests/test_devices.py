"""The cache, rollouts and sessions on tensors without data: tensors of two devices in one
operation, and any read of a value where none is due, raise."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_model
from test_prm import QUESTION, STEPS, parts

from kvtools import CacheConfig, KVCache, Rollouts, cache, prm

# None with a budget for prompts: which of their tokens stay is read, once a layer.
CONFIGS = {
    "16": {}, "packed": dict(bits=4), "fp8": dict(bits="fp8", recent_bits="fp8"),
    "no recent": dict(bits=8, recent_bits=None), "mixed": dict(k_bits=6, v_bits=2),
    "scissorhands": dict(bits=4, budget=32), "lru": dict(bits=8, budget=32, policy="lru"),
    "tova": dict(budget=40, layer_budget="later", policy="tova"),
}  # fmt: skip
LAYERS, H, G, D = 2, 2, 4, 64


@pytest.fixture(autouse=True)
def reads(monkeypatch):
    """Where values are read. Only `tolist` is let pass: it gives zeros."""
    found, tolist = [], torch.Tensor.tolist

    def noted(x):
        if not x.is_meta:
            return tolist(x)
        frame = sys._getframe(1)
        found.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        return torch.zeros_like(x, device="cpu").tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    # As for a GPU of 132 processors.
    monkeypatch.setattr(
        cache, "limits", lambda device, h, g, impl: dict(tile=max(1, 64 // g), items=-(-264 // h))
    )
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_cache(name, reads):
    config = CacheConfig(**CONFIGS[name])
    kv = KVCache(config, LAYERS, device="meta")

    def new(*shape):
        return torch.empty(*shape, D, device="meta", dtype=torch.bfloat16)

    def prompt(length, copies):
        kv.add_prompt(length, copies)
        for layer in range(LAYERS):
            kv.fill(layer, new(H * G, length), new(H, length), new(H, length))

    def step(*counts):
        kv.extend(np.array(counts, np.int32))
        t = sum(counts)
        for layer in range(LAYERS):
            out = kv.attend(layer, new(t, H * G), new(t, H), new(t, H))
            assert out.is_meta and out.shape == (t, H * G, D)

    prompt(100, 4)
    for _ in range(36):
        step(1, 1, 1, 1)
    step(1, 0, 3, 2)
    kv.gather([0, 0, 1, 3])
    step(1, 1, 1, 1)
    kv.crop(kv.lengths.numpy() - 1)
    prompt(50, 2)
    step(*[1] * 6)
    kv.memory()
    assert reads == []


@pytest.mark.parametrize("options", [{}, CONFIGS["packed"], CONFIGS["lru"]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rollouts(name, options, reads):
    """A step reads the tokens and their log-probabilities."""
    model = copy.deepcopy(tiny_model(name)).to("meta")
    rollouts = Rollouts(model, CacheConfig(**options), top_k=5, eos_token_id=())
    rollouts.prefill([[1] * 20, [2] * 7], 2)
    rollouts.generate(3)
    rollouts.gather([3, 0, 0])
    rollouts.crop(np.array([len(x) for x in rollouts.tokens]) - [0, 1, 2])
    rollouts.step([0, 2])
    rollouts.peek([5, 6], [0, 1])
    assert all(x.startswith("rollouts.") for x in reads) and len(reads) <= 2 * 4


def test_session(reads):
    """A step of all rows reads what the head says, once."""
    tokenizer, model, _ = parts("trl")
    session = prm.load(copy.deepcopy(model).to("meta"), tokenizer, "trl").session(QUESTION, 3)
    session.append(STEPS[:3])
    session.gather([2, 0, 0])
    session.append([STEPS[4], None, STEPS[5]])
    session.crop([1, 1, 2])
    session.append([STEPS[1], STEPS[2], None])
    assert reads == ["session._run"] * 3
