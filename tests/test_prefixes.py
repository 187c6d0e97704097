"""Prompts that begin alike share what they have in common."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Counter, random_ids, tiny_model
from test_door import MODELS, alone
from test_door import NEW as AS_ALONE
from test_prefill import NEW, plain, rollouts, texts

import kvtools
from kvtools import CacheConfig
from kvtools._host import PoolExhausted
from kvtools.hf import Session
from kvtools.hf import session as sessions
from kvtools.hf.prefixes import branches
from kvtools.hf.session import STRETCH

COMPRESSED = {
    "balanced": dict(bits=4, recent=8),
    "evicts": dict(bits=8, budget=14, recent=4, window=8, drop=4, sinks=2),
    "each token once": dict(bits=8, budget=20, recent=8, policy="tova", recent_bits=None),
}


def family(shape=((80, 9), (80, 1), (80, 40), (40, 12), (40, 50), (80, 0), (3, 20))):
    """Prompts of so many common tokens and so many of their own."""
    common = random_ids(max(n for n, _ in shape), seed=99)
    return [
        torch.cat([common[:n], x])
        for (n, _), x in zip(shape, texts(m for _, m in shape), strict=True)
    ]


DISTINCT = 40 + 40 + 9 + 1 + 40 + 12 + 50 + 23


@given(
    st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=9).map(np.array), min_size=1, max_size=9
    ),
    st.integers(1, 4),
)
def test_branches(prompts, least):
    """Every prompt is its branches in order; what several have in common is there once."""
    got = [[] for _ in prompts]
    for level in branches(prompts, least):
        for begin, end, numbers in level:
            assert end - begin >= least or len(numbers) == 1
            for i in numbers:
                assert len(got[i]) == begin
                got[i] += prompts[numbers[0]][begin:end].tolist()
    assert got == [x.tolist() for x in prompts]
    if least == 1:
        stems = {tuple(x[:n].tolist()) for x in prompts for n in range(1, len(x) + 1)}
        levels = branches(prompts, least)
        assert sum(end - begin for level in levels for begin, end, _ in level) == len(stems)


def test_deep_branches():
    prompts = [np.zeros(n, int) for n in range(1, 2000)]
    assert [[x[:2] for x in level] for level in branches(prompts, 1)] == [
        [(n, n + 1)] for n in range(1999)
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma4", "gptoss", "phi3"])
def test_tokens_are_those_of_plain_prompts(name):
    model, prompts = tiny_model(name), family()
    want = plain(model, prompts)
    rollouts(model).prefill(prompts)  # the first time it is tried whether the head runs by itself
    r = rollouts(model)
    with Counter(model) as count:
        r.prefill([*prompts, prompts[2]], 2)
    assert sum(count.forwards) == DISTINCT and len(count.forwards) == 4
    assert r.generate(NEW) == [x for x in [*want, want[2]] for _ in (0, 1)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in prompts])
    mask = torch.arange(width) >= width - torch.tensor([len(x) for x in prompts])[:, None]
    how = dict(attention_mask=mask.long(), do_sample=False, max_new_tokens=NEW)
    with Counter(model) as count:
        out = model.generate(ids, custom_generate=kvtools.generate, **how)
    assert sum(count.forwards) == DISTINCT + len(prompts) * (NEW - 1)
    assert torch.equal(out, model.generate(ids, **how))


def test_what_is_shared_is_stored_and_read_once():
    model, prompts = tiny_model(), family()
    session = Session(model, CacheConfig(page_size=1))
    session.prefill(prompts, 3)
    (store,) = session.kv.stores
    assert store.forest.prefix_pages() == DISTINCT
    session.extend(torch.full((21,), 5))
    plan = store.forest.plan(np.ones(21, int))
    assert plan["length"].sum() == DISTINCT + 21
    assert session.kv.prompt_lengths.tolist() == [len(x) for x in prompts for _ in range(3)]


@pytest.mark.parametrize("options", COMPRESSED.values(), ids=COMPRESSED)
def test_a_compressed_stretch_is_as_alone(options, monkeypatch):
    """Rows over it are as those of the one prompt that is cut at the same places: tokens, logits,
    what heads keep; and a prompt is kept whole, whatever rows may own."""
    model, prompts = tiny_model(), family()
    together = rollouts(model, CacheConfig(**options))
    together.prefill(prompts, 2)
    kept = [together.kv.kept(1, 2 * i) for i in range(len(prompts))]
    assert kept == [[list(range(len(x)))] * 2 for x in prompts]
    new = together.generate(30)
    for i, ends in enumerate(
        [(40, 80, 89), (40, 80, 81), (40, 80, 120), (40, 52), (40, 90), (40, 80)]
    ):
        alone = rollouts(model, CacheConfig(**options))
        beginnings = [prompts[i][:end] for end in ends]
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "STRETCH", 1)
            alone.prefill(beginnings)
        alone.gather([len(ends) - 1] * 2)
        assert alone.generate(30) == new[2 * i : 2 * i + 2]
        assert alone.kv.kept(2, 0) == together.kv.kept(2, 2 * i)
        want, got = alone.peek([5], [0, 1]), together.peek([5], [2 * i, 2 * i + 1])
        assert (want - got).abs().max() < 1e-2 * want.std()


@pytest.mark.parametrize("options", [{}, *COMPRESSED.values()], ids=["exact", *COMPRESSED])
def test_rows_over_branches_go_on(options):
    """Forked, rewound into a shared stretch, sampled again: as the same rows one by one."""
    model, prompts = tiny_model(), family()
    session = Session(model, CacheConfig(**options))
    session.prefill(prompts)
    alone = []
    for prompt in prompts:
        other = Session(model, CacheConfig())
        other.prefill([prompt])
        alone.append(other)
    lengths = [60, 81, 100, 45, 45, 80, 10]
    session.kv.crop(lengths)
    session.kv.gather([0, 0, 1, 2, 3, 4, 5, 6])
    out = session.extend(torch.arange(8) + 7)
    for i, j in enumerate([0, 2, 3, 4, 5, 6, 7]):
        alone[i].kv.crop([lengths[i]])
        want = alone[i].extend(torch.tensor([7 + j]))[0]
        bound = 1e-4 if not options else 0.6  # of what random weights give at 4 bits
        assert (out[j] - want).norm() < bound * want.norm()


@pytest.mark.parametrize(
    "make, options",
    [
        (tiny_model, dict(prompt_budget=30, bits=4)),
        (MODELS["longrope past its switch"], {}),
        (MODELS["longrope"], {}),
        (MODELS["dynamic rope"], {}),
    ],
    ids=["budget", "longrope switched", "longrope", "dynamic"],
)
def test_prompts_that_stay_apart(make, options):
    model, prompts = make(), family(((32, 20), (32, 19)))
    want = [alone(model, x[None], torch.ones_like(x[None]))[0].tolist() for x in prompts]
    r = rollouts(model, CacheConfig(**options))
    with Counter(model) as count:
        r.prefill(prompts)
    assert sum(count.forwards) >= sum(map(len, prompts))
    if not options:
        assert r.generate(AS_ALONE) == want


def test_a_short_stretch_is_not_worth_a_node():
    model = tiny_model()
    for common, forwards in ((STRETCH - 1, 1), (STRETCH, 2)):
        with Counter(model) as count:
            rollouts(model).prefill(family(((common, 8), (common, 8), (common, 7))))
        assert len(count.forwards) == forwards


def test_equal_prompts_are_one():
    model = tiny_model()
    session = Session(model, CacheConfig(page_size=1))
    with Counter(model) as count:
        out = session.prefill([random_ids(40), random_ids(20), random_ids(40)], [1, 2, 3])
    assert sum(count.forwards) == session.kv.stores[0].forest.prefix_pages() == 60
    assert torch.equal(out[0], out[2]) and session.kv.lengths.tolist() == [40, 20, 20, 40, 40, 40]


def test_long_branches_go_in_pieces(monkeypatch):
    monkeypatch.setattr(sessions, "TOKENS", 20)
    model, prompts = tiny_model(), family()
    r = rollouts(model)
    with Counter(model) as count:
        r.prefill(prompts)
    assert sum(count.forwards) == DISTINCT and max(count.forwards) == 40  # a root is not cut
    assert r.generate(NEW) == plain(model, prompts)


def test_hidden_states_of_all_tokens():
    model, prompts = tiny_model(), family()
    got = Session(model, CacheConfig(), head=False).prefill(prompts, 2)
    for prompt, hidden in zip(prompts, got, strict=True):
        want = model.model(prompt[None]).last_hidden_state[0]
        assert hidden.shape == want.shape
        assert (hidden - want).abs().max() < 1e-4 * want.abs().max()


def test_a_pool_that_ends_in_a_branch_changes_nothing():
    model = tiny_model()
    session = Session(model, CacheConfig(), pages=14)
    session.prefill([random_ids(20)])
    before = session.kv.stores[0].forest.free_pages
    with pytest.raises(PoolExhausted):
        session.prefill(family())
    assert session.kv.rows == 1 and session.kv.stores[0].forest.free_pages == before
    want = Session(model, CacheConfig())
    want.prefill([random_ids(20)])
    assert torch.equal(session.extend(torch.tensor([9])), want.extend(torch.tensor([9])))


def test_only_what_has_not_grown_has_more_of_a_prompt():
    session = Session(tiny_model(), CacheConfig(bits=4))
    session.prefill([random_ids(20)], 2)
    session.extend(torch.tensor([9]), np.array([0, 1]))
    with pytest.raises(ValueError, match="prompt: row 1 has grown beyond its prompt"):
        session.kv.extend([1, 1], prompt=True)
    assert session.kv.lengths.tolist() == [20, 21]
