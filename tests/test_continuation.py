"""generate goes on from the cache that it returned."""

import numpy as np
import pytest
import torch
from models import Counter, fresh_model, padded_prompts, random_ids, tiny_model
from test_door import MODELS
from transformers import DynamicCache

import kvtools
from kvtools import CacheConfig
from kvtools.hf import CACHE

NEW = 8


def generate(model, ids, cache=None, mask=None, **how):
    how = dict(do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True) | how
    mask = torch.ones_like(ids) if mask is None else mask
    given = {} if cache is None else {CACHE: cache}
    return model.generate(
        ids, attention_mask=mask, custom_generate=kvtools.generate, **given, **how
    )


def cache_of(out):
    return getattr(out, CACHE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss"])
def test_more_samples_and_a_longer_prompt(name):
    model, ids = tiny_model(name), random_ids(1, 40)
    how = dict(do_sample=True, num_return_sequences=8)
    torch.manual_seed(1)
    first = generate(model, ids, **how)
    torch.manual_seed(2)
    with Counter(model) as count:
        second = generate(model, ids, cache_of(first), **how)
    assert count.forwards[0] == 1, "the prompt's last token alone"
    torch.manual_seed(2)
    assert torch.equal(second.sequences, generate(model, ids, **how).sequences)
    assert cache_of(second) is cache_of(first) and cache_of(second).kv.rows == 8
    said = torch.cat([second.sequences[3:5], random_ids(2, 11)], 1)
    with Counter(model) as count:
        third = generate(model, said, cache_of(second))
    assert count.forwards[0] == 2 * 12, "what was said, and each last token"
    assert torch.equal(third.sequences, model.generate(said, do_sample=False, max_new_tokens=NEW))


def test_rows_of_many_lengths():
    """Some end early; all can be gone on from, and a prompt that is shorter than what is held."""
    model = fresh_model()
    ids, mask = padded_prompts((40, 20, 33))
    free = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    how = dict(eos_token_id=int(free[1, 42]))  # the second ends at its third token
    for graph in ("auto", False):
        with kvtools.patch(model, graph=graph):
            first = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW,
                return_dict_in_generate=True, **how,
            )  # fmt: skip
        cache = cache_of(first)
        ends = []
        for row, new in zip(ids, first.sequences[:, 40:].tolist(), strict=True):
            n = new.index(how["eos_token_id"]) + 1 if how["eos_token_id"] in new else NEW
            ends.append(torch.cat([row[row > 0], torch.tensor(new[:n])]))
        assert cache.texts == [x.tolist() for x in ends]
        assert cache.kv.lengths.tolist() == [len(x) - 1 for x in ends]
        assert len(ends[1]) == 23
        longer = [torch.cat([x, random_ids(5, seed=i)]) for i, x in enumerate(ends)]
        longer.append(ids[0, :25])
        width = max(map(len, longer))
        batch = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in longer])
        seen = torch.arange(width) >= width - torch.tensor([[len(x)] for x in longer])
        with Counter(model) as count:
            second = generate(model, batch, cache, seen.long())
        assert count.forwards[0] == 6 + 6 + 6 + 1
        want = model.generate(
            batch, attention_mask=seen.long(), do_sample=False, max_new_tokens=NEW
        )
        assert torch.equal(second.sequences, want)


@pytest.mark.parametrize(
    "options", [dict(bits=8), dict(bits=8, budget=24, recent=8, sinks=2, drop=4)]
)
def test_compressed(options):
    """What is held is read as it is stored; a fresh call is near."""
    model, ids, config = tiny_model(), random_ids(1, 40), CacheConfig(**options)
    how = dict(num_return_sequences=3, do_sample=True, output_logits=True)
    torch.manual_seed(1)
    first = generate(model, ids, kv_config=config, **how)
    torch.manual_seed(2)
    second = generate(model, ids, cache_of(first), **how)
    torch.manual_seed(2)
    want = generate(model, ids, kv_config=config, **how)
    assert (second.logits[0] - want.logits[0]).norm() < 0.05 * want.logits[0].norm()
    assert cache_of(second).kv.config is config
    assert cache_of(second).kv.prompt_lengths.tolist() == [39] * 3


def test_texts_that_pass_a_switch():
    model = MODELS["longrope past its switch"]()
    first = generate(model, random_ids(1, 38))
    said = torch.cat([first.sequences, random_ids(1, 9)], 1)
    second = generate(model, said, cache_of(first))
    assert torch.equal(second.sequences, generate(model, said).sequences)


def test_what_cannot_be_gone_on_from():
    model, ids = tiny_model(), random_ids(1, 40)
    cache = cache_of(generate(model, ids, kv_config=CacheConfig(bits=8)))
    before = cache.kv.lengths.tolist(), [list(x) for x in cache.texts]
    other = random_ids(1, 40, seed=9)
    for args, words in (
        ((other, cache), "prompt 0 begins with none of those"),
        ((torch.cat([ids[:, :20], other[:, :20]], 1), cache), "prompt 0 begins with none"),
        ((ids[:, :1], cache), "prompt 0 begins with none"),
        ((ids, DynamicCache()), "of another kind than kvtools.generate returns"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(model, *args)
    with pytest.raises(ValueError, match="kv_config differs"):
        generate(model, ids, cache, kv_config=CacheConfig())
    with pytest.raises(ValueError, match="filled by another model"):
        generate(tiny_model("qwen3"), ids, cache)
    taken = cache_of(generate(model, ids))
    kvtools.Rollouts(model, cache=taken)
    with pytest.raises(ValueError, match="does not know its texts"):
        generate(model, ids, taken)
    for how, error, words in (
        (dict(cache=taken), ValueError, "cache does not know its texts"),
        (dict(cache=cache, config=CacheConfig()), ValueError, "config differs from that of cache"),
        (dict(cache=cache, pages=4), ValueError, "pages=4: .*leave it out"),
        (dict(cache=DynamicCache()), TypeError, "cache is a DynamicCache: pass one that kvtools"),
        (dict(cache=cache, model=tiny_model("qwen3")), ValueError, "filled by another model"),
    ):
        with pytest.raises(error, match=words):
            kvtools.Rollouts(**dict(model=model) | how)
    assert (cache.kv.lengths.tolist(), cache.texts) == before
    lossy = cache_of(generate(model, ids, kv_config=CacheConfig(bits=8, prompt_budget=25)))
    with pytest.raises(ValueError, match="can be cropped"):
        generate(model, ids, lossy)
    assert lossy.kv.rows == 1
    longer = torch.cat([ids, torch.tensor([lossy.texts[0][40:]]), random_ids(1, 5)], 1)
    assert generate(model, longer, lossy).sequences.shape[1] == longer.shape[1] + NEW
    again = generate(model, ids, cache)
    assert again.sequences.shape == (1, 48)


@pytest.mark.parametrize(
    "option",
    [
        dict(temperature=-1.0), dict(temperature="hot"), dict(top_k=-1), dict(top_k=1.5),
        dict(top_p=0.0), dict(min_p=2.0), dict(min_p=None), dict(eos_token_id="."),
        dict(eos_token_id=[5, 6.5]), dict(seed=None), dict(seed=1.5), dict(processor=3),
        dict(graph="never"), dict(config=dict(bits=4)), dict(pages=3),
    ],
    ids=str,
)  # fmt: skip
def test_options_are_refused_before_a_cache_is_taken(option):
    model = tiny_model()
    cache = cache_of(generate(model, random_ids(1, 40)))
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        kvtools.Rollouts(model, cache=cache, **option)
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        kvtools.Rollouts(model, cache=cache, **option)  # as before, not for what became of it
    assert kvtools.Rollouts(model, cache=cache, seed=np.int64(3)).rows == 1


def test_options_of_generate_are_refused_before_a_cache_is_changed():
    model, ids = tiny_model(), random_ids(1, 40)
    cache = cache_of(generate(model, ids))
    before = cache.kv.lengths.tolist(), [list(x) for x in cache.texts]
    said = torch.cat([ids, random_ids(1, 3, seed=7)], 1)
    for option in (dict(graph="never"), dict(rows=0), dict(kv_config=CacheConfig(bits=8))):
        for scores in (False, True):
            with pytest.raises(ValueError, match=next(iter(option))):
                generate(model, said, cache, output_scores=scores, **option)
    assert (cache.kv.lengths.tolist(), cache.texts) == before


@pytest.mark.parametrize("fails", [True, False])
def test_a_cache_that_was_used_up_says_so(fails):
    """By a call that failed half-way, or that returns none: it does not hold what it says."""
    model, ids = tiny_model(), random_ids(1, 40)
    cache = cache_of(generate(model, ids, do_sample=True))
    how = dict(do_sample=True, return_dict_in_generate=False)
    if fails:
        with pytest.raises(ZeroDivisionError):
            generate(model, ids, cache, logits_processor=[lambda ids, scores: 1 / 0], **how)
    else:
        generate(model, ids, cache, **how)
    for go_on in (
        lambda: generate(model, ids, cache), lambda: kvtools.Rollouts(model, cache=cache),
        lambda: kvtools.save_cache(model, cache, "nowhere"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="does not know its texts"):
            go_on()


def test_a_pool_that_ends_changes_nothing(monkeypatch):
    model, ids = tiny_model(), random_ids(1, 40)
    cache = cache_of(generate(model, ids))
    monkeypatch.setattr(cache.kv.stores[0], "fixed", True)
    before = cache.kv.lengths.tolist(), cache.kv.stores[0].forest.free_pages
    longer = torch.cat([ids, random_ids(1, 400)], 1)
    with pytest.raises(kvtools.PoolExhausted):
        generate(model, longer, cache)
    assert (cache.kv.lengths.tolist(), cache.kv.stores[0].forest.free_pages) == before


def test_gathered_rows_know_their_texts():
    model, ids = tiny_model(), random_ids(3, 40)
    cache = cache_of(generate(model, ids))
    cache.gather([2, 0])
    said = torch.cat([torch.tensor([cache.texts[0]]), random_ids(1, 5)], 1)
    with Counter(model) as count:
        out = generate(model, said, cache).sequences
    assert count.forwards[0] == 6
    assert torch.equal(out, model.generate(said, do_sample=False, max_new_tokens=NEW))


@pytest.mark.parametrize(
    "options", [dict(), dict(bits=4), dict(bits=8, budget=24, recent=8, sinks=2, drop=4)]
)
def test_rollouts_go_on(options):
    """As the call would have that goes on itself, also where rows have ended."""
    model, config = fresh_model(), CacheConfig(**options)
    ids, mask = padded_prompts((40, 20, 33))
    free = generate(model, ids, mask=mask, kv_config=config, max_new_tokens=30).sequences[:, 40:]
    eos = int(free[1, 3])
    first = generate(model, ids, mask=mask, kv_config=config, eos_token_id=eos, max_new_tokens=12)
    r = kvtools.Rollouts(model, temperature=0.0, eos_token_id=eos, cache=cache_of(first))
    assert r.kv.config is config and r.prompt_lengths.tolist() == [40, 20, 33]
    assert r.finished.tolist() == [eos in x for x in free[:, :12].tolist()] and r.finished[1]
    r.finished[:], r.eos = False, set()
    new = r.generate([30 - len(x) for x in r.logprobs])
    want = free.tolist()
    want[1] = r.tokens[1][20:]  # its own rest was never told
    assert [x[n:] for x, n in zip(r.tokens, (40, 20, 33), strict=True)] == want and all(new)
    assert want[1][:4] == free[1, :4].tolist()
    row = r.fork(2, 1)[0]
    r.append([[5, 6, 7]], [row])
    assert len(r.generate([0, 0, 0, 4])[3]) == 4
    if config.exact:
        said = torch.tensor([r.tokens[2] + [5, 6, 7]])
        alone = generate(model, said, max_new_tokens=4).sequences
        assert r.tokens[row] == alone[0].tolist()
        before = r.tokens[2][: 33 + 5]
        r.crop([40, 21, 33, 34])
        r.generate([0, 0, 5, 0])
        assert r.tokens[2] == before
