"""The whole of it on CUDA tensors, marked `gpu`; the same functions on a CPU, so that they are
right before there is a GPU to run them."""

import copy
import functools

import numpy as np
import pytest
import torch
from captured import Captured
from models import PROMPT, padded_prompts, random_ids, tiny_model
from test_prm import QUESTION, STEPS, Letters, parts

import kvtools
from kvtools import CacheConfig, Rollouts, ops, prm, search
from kvtools.hf import decode
from kvtools.testing import assert_within_budget

NEW = 12
MODELS = ["llama", "qwen3", "gemma3", "gptoss"]


# csrc/cuda runs where it was built for: the GPU, or the CPU.
pytestmark = pytest.mark.only(
    when=lambda config="auto", device="cpu": config == "auto" or device == ops.CUDA
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["auto", "cuda"])
def config(request, device):
    return CacheConfig(impl=request.param)


@functools.cache
def model_on(device, name="llama"):
    return copy.deepcopy(tiny_model(name)).to(device)


def prompts(*lengths):
    return [random_ids(length, seed=length).tolist() for length in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_rows_say_what_generate_says(name, config, device):
    """Several prompts; rows forked, dropped, taken back and grown again."""
    model = model_on(device, name)

    def greedy(text, new=NEW):
        ids = torch.tensor([text], device=device)
        return model.generate(ids, max_new_tokens=new, do_sample=False)[0].tolist()

    texts = prompts(PROMPT, 7, 23)
    rollouts = Rollouts(model, config, temperature=0)
    rollouts.prefill(texts[:2], 2)
    rollouts.prefill(texts[2:])
    rollouts.generate(NEW)
    assert rollouts.tokens == [greedy(texts[i]) for i in (0, 0, 1, 1, 2)]
    rollouts.gather([4, 0, 0, 2])
    cuts = (0, 5, 1, 9)
    rollouts.crop([len(x) - cut for x, cut in zip(rollouts.tokens, cuts, strict=True)])
    rollouts.generate(NEW)
    ends = [(i, 2 * NEW - cut) for i, cut in zip((2, 0, 0, 1), cuts, strict=True)]
    assert rollouts.tokens == [greedy(texts[i], new) for i, new in ends]
    assert all(np.isfinite(x).all() for x in rollouts.logprobs)


@pytest.mark.parametrize("name", MODELS[2:])
def test_generate(name, config, device):
    model, (ids, mask) = model_on(device, name), padded_prompts()
    how = dict(inputs=ids.to(device), attention_mask=mask.to(device), max_new_tokens=NEW)
    plain = model.generate(**how, do_sample=False)
    ours = model.generate(
        **how, do_sample=False, custom_generate=kvtools.generate, kv_config=config
    )
    assert torch.equal(ours, plain)
    torch.manual_seed(0)
    how |= dict(do_sample=True, num_return_sequences=3, custom_generate=kvtools.generate)
    drawn = model.generate(**how, kv_config=config, top_p=0.9)
    assert drawn.shape == (3 * len(ids), ids.shape[1] + NEW)


@pytest.mark.parametrize("options", [
    dict(bits=8, recent_bits=None), dict(bits=4), dict(bits="fp8", recent_bits="fp8"),
    dict(bits=4, budget=12, recent=4, window=8, drop=3), dict(budget=24, policy="h2o", drop=2),
    dict(bits=4, prompt_budget=20, recent=8),
], ids=str)  # fmt: skip
def test_compressed(options, device):
    """Logits after given tokens err no more against exact ones than those of the reference."""
    text = random_ids(PROMPT + 2 * NEW, seed=3).tolist()

    def logits(model, impl):
        seen = []

        def given(tokens, logits_rv):
            seen.append(logits_rv.cpu())
            forced_rv = torch.full_like(logits_rv, -torch.inf)
            for row, row_tokens in enumerate(tokens):
                forced_rv[row, text[len(row_tokens)]] = 0
            return forced_rv

        rollouts = Rollouts(
            model, CacheConfig(**options, impl=impl), temperature=0, processor=given
        )
        rollouts.prefill([text[:PROMPT]], 2)
        rollouts.generate(2 * NEW)
        return torch.stack(seen)

    exact_tv = copy.deepcopy(tiny_model()).double()(torch.tensor([text])).logits[0, PROMPT - 1 : -1]
    eager = logits(tiny_model(), "reference")
    assert_within_budget(
        "logits", logits(model_on(device), "auto"), exact_tv[:, None].expand(eager.shape), eager
    )


def test_steps_are_graphs(device, monkeypatch):
    """A step that cannot be captured is run step by step, right and slow: on a GPU none may be."""
    graphs = Captured(decode.capturer)
    monkeypatch.setattr(decode, "capturer", graphs)
    rollouts = Rollouts(model_on(device), temperature=0)
    rollouts.prefill(prompts(PROMPT), 4)
    rollouts.generate(4 * NEW)
    if device.type == "cuda":
        assert graphs.replays > NEW > graphs.captures > 0
    else:
        assert not graphs.captures


@functools.cache
def reward_model(device):
    tokenizer, model, _ = parts("trl")
    return prm.load(copy.deepcopy(model).to(device), tokenizer, "trl")


def test_session(device):
    """Scores of rows that grow, are forked and taken back, as on a CPU."""
    found = []
    for place in ("cpu", device):
        session = reward_model(torch.device(place)).session(QUESTION, 3)
        session.append(STEPS[:3])
        session.gather([2, 0, 0])
        session.append([STEPS[4], None, STEPS[5]])
        session.crop([1, 1, 2])
        session.append([STEPS[1], STEPS[2], None])
        found.append(session.margins)
    assert [len(x) for x in found[0]] == [len(x) for x in found[1]] == [2, 2, 2]
    torch.testing.assert_close(*map(torch.tensor, found), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", [
    functools.partial(search.beam, n=4, beam=2, lookahead=1),
    functools.partial(search.particle_filter, n=6),
], ids=["beam", "filter"])  # fmt: skip
def test_search(strategy, device):
    """Its scores are those of the solutions as a whole."""
    model = reward_model(device)
    steps = search.Steps(Letters(), [".", "!", "2"], step_tokens=8, tokens=24, depth=3)
    found = strategy(Rollouts(model_on(device)), [QUESTION], model, steps, seed=1)
    (candidates,) = found.candidates
    bare = [[x[:-1] if x[-1] in ".!2" and x[:-1].strip() else x for x in c.steps]
            for c in candidates]  # fmt: skip
    want = model.score(QUESTION, bare)
    for candidate, margin in zip(candidates, want.margins, strict=True):
        got = torch.tensor(candidate.margins)
        torch.testing.assert_close(got, torch.as_tensor(margin).cpu().to(got), atol=1e-4, rtol=1e-4)
