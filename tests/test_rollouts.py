"""Rollouts: steps, forks, rewinds and prunings, each against fresh rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from interrupts import Exhausted, Interrupt
from models import (
    KV_HEADS,
    LAYERS,
    PROMPT,
    VOCAB,
    Counter,
    D,
    fresh_model,
    random_ids,
    tiny_model,
)

import kvtools
from kvtools import CacheConfig, Rollouts
from kvtools._host import PoolExhausted
from kvtools.ops.sampling import row_seeds

NEW = 12
EXACT = CacheConfig()
TIGHT = CacheConfig(bits=4, budget=12, recent=4, window=8, drop=3)
# What a step overwrites differs: nothing, a ring of recent tokens, victims and their signals.
KINDS = {
    "exact": EXACT,
    "ring": CacheConfig(bits=4, recent=6),
    "tight": TIGHT,
    "selection": CacheConfig(policy="snapkv", budget=12, recent=4, prompt_budget=24, page_size=4),
    "step": CacheConfig(policy="tova", budget=12, recent=4, layer_budget="later"),
}


def prompts(*lengths, seed=1):
    return [random_ids(length, seed=seed + i).tolist() for i, length in enumerate(lengths)]


def greedy(text, new, model=None):
    """`text` and the `new` tokens that plain generate says next."""
    model = model or tiny_model()
    return model.generate(torch.tensor([text]), max_new_tokens=new)[0].tolist()


def rollouts(config=EXACT, **options):
    return Rollouts(options.pop("model", tiny_model()), config, **options)


def run(texts, n=1, new=NEW, config=EXACT, **options):
    r = rollouts(config, **options)
    r.prefill(texts, n)
    r.generate(new)
    return r


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gptoss"])
def test_greedy_is_generate(name):
    model, texts = tiny_model(name), prompts(PROMPT, 7, 23)
    r = rollouts(temperature=0, model=model)
    r.prefill(texts[:2], 2)
    r.prefill(texts[2:])
    new = r.generate(NEW)
    want = [greedy(texts[i], NEW, model) for i in (0, 0, 1, 1, 2)]
    assert r.tokens == want
    assert new == [text[-NEW:] for text in want]
    assert r.prompt_lengths.tolist() == [PROMPT, PROMPT, 7, 7, 23]
    assert r.kv.lengths.tolist() == [len(text) - 1 for text in want]
    assert not r.finished.any() and r.rows == 5


@pytest.mark.only(when=lambda: len(kvtools.ops.OPS["sample"].impls) > 2)
@pytest.mark.parametrize(
    "config", [EXACT, pytest.param(TIGHT, marks=pytest.mark.long)], ids=["exact", "tight"]
)
def test_tokens_do_not_depend_on_the_implementation(config):
    texts, found = prompts(9, 7), {}
    for impl in {"reference", "cpu", "triton"} & set(kvtools.ops.OPS["sample"].impls):
        r = run(texts, 1, 4, replace(config, impl=impl, layer_budget="uniform"), seed=3, top_p=0.9)
        found[impl] = r.tokens
    assert all(tokens == found["reference"] for tokens in found.values())


def test_logprobs():
    model, (text,) = tiny_model(), prompts(PROMPT)
    r = run([text], n=2, top_k=20, temperature=0.8)
    for tokens, logprobs in zip(r.tokens, r.logprobs, strict=True):
        logits = model(torch.tensor([tokens])).logits[0, PROMPT - 1 : -1] / 0.8
        want = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[PROMPT:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), want, atol=1e-4, rtol=1e-4)


def test_eos():
    model, (text,) = fresh_model(), prompts(PROMPT)
    full = run([text], n=4)
    end = full.tokens[1][PROMPT + 4]

    def upto(tokens):
        new = tokens[PROMPT:]
        return text + (new[: new.index(end) + 1] if end in new else new)

    want = [upto(tokens) for tokens in full.tokens]
    for eos in (end, [end, VOCAB], {"eos_token_id": None}):
        if isinstance(eos, dict):  # that of the model
            model.generation_config.eos_token_id, eos = end, None
        r = run([text], n=4, eos_token_id=eos, model=model)
        assert r.tokens == want
        assert r.finished.tolist() == [tokens[-1] == end for tokens in want]
    assert run([text], n=4, eos_token_id=(), model=model).tokens == full.tokens
    before = [list(tokens) for tokens in r.tokens]
    r.step([1])
    assert r.tokens == before


def test_finished_rows_are_not_fed():
    texts = prompts(PROMPT, 9)
    full = run(texts, temperature=0)
    end = full.tokens[0][PROMPT + 3]
    with Counter(tiny_model()) as seen:
        r = run(texts, temperature=0, eos_token_id=end)
    assert r.finished[0] and len(r.tokens[0]) == PROMPT + 4
    steps = [len(tokens) - length for tokens, length in zip(r.tokens, (PROMPT, 9), strict=True)]
    fed = [sum(step > t + 1 for step in steps) for t in range(NEW)]
    assert seen.forwards == [PROMPT, 9] + [count for count in fed if count]


def test_equal_prompts_run_once():
    a, b = prompts(PROMPT, 11)
    r = rollouts(temperature=0)
    with Counter(tiny_model()) as seen:
        r.prefill([a, b, torch.tensor(a)], 2)
    assert seen.forwards == [PROMPT, 11]
    assert r.tokens == [a, a, b, b, a, a]
    r.generate(NEW)
    assert r.tokens == [greedy(t, NEW) for t in (a, a, b, b, a, a)]
    pages = -(-PROMPT // 16) + 1
    assert r.kv.memory()["prefix"] == pages * 16 * LAYERS * 2 * KV_HEADS * D * 4


@pytest.mark.parametrize("config", [EXACT, TIGHT], ids=["exact", "tight"])
def test_row_alone_is_row_in_batch(config):
    """A row's tokens depend on its seed and text: not on neighbours, gather, or who left."""
    text, other = prompts(PROMPT, 17)
    new = 24
    full = run([text], n=4, new=new, config=config, seed=5)
    assert len({tuple(tokens) for tokens in full.tokens}) == 4, "seeds must differ"
    assert full.tokens == run([text], n=4, new=new, config=config, seed=5).tokens
    assert full.tokens != run([text], n=4, new=new, config=config, seed=6).tokens
    alone = rollouts(config)
    alone.prefill([text])
    alone.seeds = full.seeds[2:3].copy()
    alone.generate(new)
    assert full.tokens[2] == alone.tokens[0]

    r = rollouts(config, seed=5)
    r.prefill([text], 4)
    r.prefill([other], 1)
    r.generate(7)
    r.gather([4, 2, 0, 1])
    r.generate(9)
    r.gather([3, 1])
    r.generate(new - 16)
    assert r.tokens == [full.tokens[1], full.tokens[2]]
    want = torch.tensor([full.logprobs[1], full.logprobs[2]])
    torch.testing.assert_close(torch.tensor(r.logprobs), want, atol=1e-3, rtol=0)

    ended = run(
        [text], n=4, new=new, config=config, seed=5, eos_token_id=full.tokens[0][PROMPT + 3]
    )
    assert ended.finished[0]
    for tokens, whole in zip(ended.tokens, full.tokens, strict=True):
        assert tokens == whole[: len(tokens)]


def test_forks_diverge():
    (text,) = prompts(PROMPT)
    r = run([text], n=2, new=5)
    before = [list(tokens) for tokens in r.tokens]
    full = run([text], n=2, new=5 + NEW)
    r.gather([1, 0, 1, 1])
    assert r.tokens == [before[i] for i in (1, 0, 1, 1)]
    assert len(set(r.seeds.tolist())) == 4
    r.generate(NEW)
    assert len({tuple(tokens) for tokens in r.tokens}) == 4
    assert r.tokens[:2] == [full.tokens[1], full.tokens[0]], "the first copy goes on as it would"


def test_runs_share_no_seed():
    """Rows of runs, their copies, and numbers from one call or several."""
    (text,), found = prompts(3), []
    for seed in (0, 1, 2, -1, 2**62):
        r = rollouts(seed=seed)
        r.prefill([text], 5)
        r.prefill([text], 3)
        assert r.seeds.tolist() == row_seeds(seed, 8).tolist()
        r.gather([*range(8), 0, 0, 7])
        assert r.seeds.tolist() == row_seeds(seed, 11).tolist()
        found += r.seeds.tolist()
    assert len(set(found)) == len(found) and 0 <= min(found) <= max(found) < 2**62


def test_forks_do_not_touch_each_other():
    """With a budget each fork evicts on its own: a fork equals the row that was not forked."""
    (text,) = prompts(PROMPT)
    alone = run([text], new=30, config=TIGHT, temperature=0)
    r = rollouts(TIGHT, temperature=0)
    r.prefill([text])
    r.generate(15)
    r.gather([0, 0, 0])
    r.filters["temperature"] = 1.0  # siblings go elsewhere
    r.step([1, 2])
    r.filters["temperature"] = 0.0
    r.generate(14)
    r.step([0])
    assert r.tokens[0] == alone.tokens[0]


def test_until():
    (text,) = prompts(PROMPT)
    full = run([text], n=3, new=23)
    new = [tokens[PROMPT : PROMPT + 20] for tokens in full.tokens]
    pause = {new[0][4], new[1][9]}
    cut = [next((i + 1 for i, t in enumerate(row) if t in pause), 20) for row in new]
    assert len(set(cut)) > 1
    r, grows = rollouts(), []
    r.prefill([text], 3)
    assert r.generate(20, until=pause, progress=grows.append) == [
        row[:end] for row, end in zip(new, cut, strict=True)
    ]
    assert grows == [sum(end > t + 1 for end in cut) for t in range(max(cut))][:-1] + grows[-1:]
    assert not r.finished.any()
    ragged = [len(tokens) for tokens in r.tokens]
    r.generate(3)  # from ragged lengths
    assert [len(tokens) for tokens in r.tokens] == [length + 3 for length in ragged]
    assert r.tokens == [whole[: len(t)] for whole, t in zip(full.tokens, r.tokens, strict=True)]

    r = rollouts()
    r.prefill([text], 3)
    got = r.generate(20, until=lambda row: sum(row) > 500)
    want = [[i for i in range(1, 21) if sum(row[:i]) > 500] for row in new]
    assert [len(row) for row in got] == [(stops + [20])[0] for stops in want]
    again = r.generate(20, until=lambda row: len(row) == 2)  # counts from this call
    assert [len(row) for row in again] == [2] * 3
    assert [len(row) for row in r.generate([3, 0, 1])] == [3, 0, 1]
    assert [len(row) for row in r.generate([1, 4, -2], until=lambda row: len(row) == 2)] == [
        1,
        2,
        0,
    ]


@pytest.mark.parametrize("config", [EXACT, CacheConfig(bits=8)], ids=["exact", "8 bits"])
def test_crop_then_continue(config):
    texts = prompts(PROMPT, 9, 20)
    full = run(texts, new=20, temperature=0, config=config)
    r = run(texts, new=20, temperature=0, config=config)
    keep = [PROMPT + 20, 9, 27]  # nothing, all of it, a part
    before = [list(tokens) for tokens in r.tokens]
    r.crop(keep)
    assert r.tokens == [tokens[:n] for tokens, n in zip(before, keep, strict=True)]
    assert [len(x) for x in r.logprobs] == [20, 0, 7]
    with Counter(tiny_model()) as seen:
        r.step([1])
    assert not seen.forwards, "the prompt's logits are at hand"
    r.generate(12)
    for tokens, whole in zip(r.tokens[1:], full.tokens[1:], strict=True):
        assert tokens == whole[: len(tokens)]
    assert r.tokens[0][: PROMPT + 20] == full.tokens[0]
    longer = run(texts, new=32, temperature=0, config=config)
    assert r.tokens[0] == longer.tokens[0]


def test_crop_revives():
    (text,) = prompts(PROMPT)
    full = run([text], temperature=0)
    r = run([text], temperature=0, eos_token_id=full.tokens[0][PROMPT + 5])
    assert r.finished[0]
    end = len(r.tokens[0])
    r.crop([end])
    assert r.finished[0], "nothing was cut"
    r.crop([end - 1])
    assert not r.finished[0]
    r.generate(NEW)
    assert r.finished[0] and len(r.tokens[0]) == end


def test_crop_under_budget():
    """Tokens evicted meanwhile do not come back; what is left goes on within the budget."""
    (text,) = prompts(PROMPT)
    config = replace(TIGHT, recent_bits=None)  # finer copies, once overwritten, are lost
    r = run([text], n=3, new=30, config=config)
    r.crop([PROMPT + 25, PROMPT, PROMPT + 30])
    assert_within(r, recent=0)
    r.generate(20)
    assert [len(tokens) for tokens in r.tokens] == [PROMPT + 45, PROMPT + 20, PROMPT + 50]
    assert_within(r)
    assert r.tokens[1] == run([text], n=3, new=20, config=config).tokens[1]


def assert_within(r, recent=TIGHT.recent):
    """No head of a row owns more than the budget; its prompt and its recent tokens are there."""
    config = r.kv.config
    for row, length in enumerate(r.prompt_lengths):
        seen = int(r.kv.lengths[row])
        for layer in range(LAYERS):
            heads = r.kv.kept(layer, row)
            assert len(heads) == KV_HEADS
            for held in heads:
                own = [p for p in held if p >= length]
                assert held == sorted(set(held)) and held[-1] < seen
                assert len(own) <= config.budget
                assert held[: len(held) - len(own)] == list(range(length))
                assert set(range(max(length, seen - recent), seen)) <= set(held)


def test_budget_at_every_step():
    texts = prompts(PROMPT, 6)
    r = rollouts(TIGHT)
    r.prefill(texts, 2)
    for step in range(26):
        r.step()
        if step == 19:
            r.gather([3, 0, 0, 1])
        assert_within(r)
    own = len(r.kv.kept(0, 0)[0]) - r.prompt_lengths[0]
    assert own == TIGHT.budget, "a full row uses all of it"


@pytest.mark.parametrize("seed", range(6))
def test_random_operations(seed):
    """Steps of some rows, gather, crop, prefill: every row says what it would say alone."""
    rng = np.random.default_rng(seed)
    texts = prompts(PROMPT, 5, 18)
    alone = [greedy(text, 60) for text in texts]
    r = rollouts(temperature=0)
    r.prefill(texts[:2], 2)
    of = [0, 0, 1, 1]
    for _ in range(40):
        rows = r.rows
        match rng.choice(
            ["step", "some", "gather", "crop", "prefill"], p=[0.3, 0.3, 0.2, 0.15, 0.05]
        ):
            case "step":
                r.step()
            case "some":
                r.step(rng.integers(rows, size=rng.integers(rows + 1)))
            case "gather":
                index = rng.integers(rows, size=rng.integers(1, 7))
                r.gather(index)
                of = [of[i] for i in index]
            case "crop":
                lengths = [len(tokens) for tokens in r.tokens]
                lengths = rng.integers(r.prompt_lengths, np.array(lengths) + 1)
                r.crop(lengths)
                assert [len(tokens) for tokens in r.tokens] == lengths.tolist()
            case "prefill":
                r.prefill([texts[2]])
                of.append(2)
        for tokens, which in zip(r.tokens, of, strict=True):
            assert tokens == alone[which][: len(tokens)]
    assert r.kv.rows == r.rows


def test_drop_all_rows():
    texts = prompts(PROMPT)
    r = run(texts, n=3, temperature=0)
    r.gather([])
    assert r.rows == r.kv.rows == 0
    r.step()
    assert r.generate(3) == []
    r.prefill(texts)
    r.generate(NEW)
    assert r.tokens == [greedy(texts[0], NEW)]


def test_processor():
    """It sees the rows that sample, and decides."""
    calls = []

    def processor(tokens, logits):
        calls.append(tokens)
        assert logits.shape == (len(tokens), VOCAB)
        logits = logits.clone()
        logits[:, [text[-1] for text in tokens]] = -torch.inf
        return logits

    texts = prompts(PROMPT, 9)
    r = rollouts(processor=processor)
    r.prefill(texts, 2)
    r.step()
    r.step([2])
    assert [len(call) for call in calls] == [4, 1]
    assert calls[0] == [texts[0], texts[0], texts[1], texts[1]]
    assert calls[1] == [r.tokens[2][:-1]]
    forced = rollouts(processor=lambda t, x: torch.where(torch.arange(VOCAB) == 77, 0.0, -torch.inf)
                      .expand_as(x))  # fmt: skip
    forced.prefill(texts)
    forced.generate(3)
    assert [text[-3:] for text in forced.tokens] == [[77] * 3] * 2


@pytest.mark.parametrize("config", [EXACT, TIGHT], ids=["exact", "tight"])
@pytest.mark.parametrize("step", [0, 3, 18])
def test_processor_raises(config, step):
    texts, armed = prompts(PROMPT, 9), [False]

    def processor(tokens, logits):
        if armed[0]:
            raise RuntimeError("mine")
        return logits

    want = run(texts, n=2, new=22, config=config)
    r = rollouts(config, processor=processor)
    r.prefill(texts, 2)
    r.generate(step)
    before = [list(tokens) for tokens in r.tokens]
    armed[0] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            r.step()
        assert r.tokens == before and [len(x) for x in r.logprobs] == [step] * 4
    armed[0] = False
    r.generate(22 - step)
    assert r.tokens == want.tokens


def test_forward_raises():
    """In the second forward of a prefill: the rows before it are as they were, and go on."""
    model, texts = tiny_model(), prompts(PROMPT, 9, 30)
    r = rollouts(temperature=0)
    r.prefill(texts[:1])
    r.generate(2)
    calls = []

    def fails(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("mine")

    hook = model.model.layers[2].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="mine"):
        r.prefill(texts[1:], 2)
    hook.remove()
    assert r.rows == r.kv.rows == 1
    assert model.config._attn_implementation != "kvtools"
    r.prefill(texts[1:], 2)
    r.generate(5)
    assert r.tokens == [greedy(texts[0], 7)] + [greedy(t, 5) for t in texts[1:] for _ in (0, 1)]


@pytest.mark.parametrize("config", [EXACT, TIGHT], ids=["exact", "tight"])
def test_forward_raises_while_decoding(config):
    model, texts = tiny_model(), prompts(PROMPT, 9)
    r = rollouts(config, temperature=0)
    r.prefill(texts, 2)
    r.generate(20)
    before = [list(tokens) for tokens in r.tokens]

    def fails(module, args):
        raise RuntimeError("mine")

    hook = model.model.layers[2].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="mine"):
        r.step()
    hook.remove()
    assert r.tokens == before
    assert r.kv.lengths.tolist() == [len(tokens) - 1 for tokens in before]
    r.generate(5)
    if config is EXACT:
        assert r.tokens == [greedy(text, 25) for text in texts for _ in (0, 1)]
    else:
        assert_within(r)


def operations(r):
    """Calls that change rows, and are done again until they are done."""
    texts = prompts(9, 5, seed=7)
    lengths = [len(tokens) - 2 for tokens in r.tokens]
    return {
        "step": r.step,
        "some": lambda: r.step([2, 0]),
        "fork": lambda: r.gather([1, 3, 1, 0, 1]),
        "prefill": lambda: r.prefill([texts[0], texts[1], texts[0]], 1),
        "crop": lambda: r.crop(lengths),
        "peek": lambda: r.peek([5, 6, 7], [3, 1]),
        "append": lambda: r.append([[5, 6, 7], [8] * 9, []], [3, 0, 1], logprobs=True),
        "alike": lambda: r.prefill([[*range(3, 40), *text] for text in texts]),
    }


def seen(r):
    """All that a caller sees of rows."""
    own = [x.tolist() for x in (r.prompt_lengths, r.seeds, r.finished, r.kv.lengths)]
    return [list(x) for x in r.tokens], [list(x) for x in r.logprobs], own, r.given


def started(config, **options):
    r = rollouts(config, seed=1, **options)
    r.prefill(prompts(PROMPT, 9), 2)
    r.generate(14)
    return r


@pytest.mark.parametrize("points", [1, pytest.param(6, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["interrupt", "memory", "no memory at all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_raises_changes_nothing(kind, how, points):
    """At points all over every call; in the end rows say what undisturbed ones say."""
    rng = np.random.default_rng(len(kind + how))
    r, twin = started(KINDS[kind]), started(KINDS[kind])

    def stopper(at=None):
        if how == "interrupt":
            return Interrupt(at)
        return Exhausted(at, lasting=how != "memory")

    # The steps behind an operation cross a page's end and victims that are chosen anew.
    names = "step fork some peek append step prefill crop peek step alike step"
    for name in names.split():
        before, call, result = seen(r), operations(r)[name], None
        with stopper() as whole:
            want = operations(twin)[name]()
        for at in [*rng.integers(1, whole.seen + 1, points), whole.seen]:
            try:
                with stopper(at):
                    result = call()
                break  # it was done before the point came
            except (KeyboardInterrupt, MemoryError):
                if seen(r) == seen(twin) != before:
                    break  # the point was after the change was made
                if how != "no memory at all":  # then the next call puts it right
                    assert seen(r) == before, (name, at)
        else:
            result = call()
        if want is not None and result is not None:
            assert torch.equal(result, want)
        for rows in (r, twin):
            rows.generate(2)
        assert seen(r) == seen(twin), name
        for store in r.kv.stores:
            store.forest.check()


def test_logits_that_are_no_distribution():
    """The error names rows and step; rows are as they were, and go on."""
    texts, bad = prompts(PROMPT, 9), []

    def processor(tokens, logits):
        if bad:
            logits = logits.clone()
            logits[[1, 3]] = torch.tensor(bad)[:, None]
        return logits

    twin = run(texts, 2, 8, TIGHT)
    r = rollouts(TIGHT, processor=processor)
    r.prefill(texts, 2)
    for steps in (0, 5):
        r.generate(steps)
        before = seen(r)
        for bad[:] in ([torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0]):
            with pytest.raises(ValueError, match=f"row 1 at step {steps}:"):
                r.step()
            assert seen(r) == before
        bad.clear()
    r.generate(3)
    assert r.tokens == twin.tokens


@pytest.mark.parametrize("kind", ["exact", "ring", "tight"])
def test_in_and_out_of_inference_mode(kind):
    """What is stored in inference mode is written outside of it, and the other way round."""

    def processor(tokens, logits):
        return logits.mul_(1.0)

    texts = prompts(PROMPT, 9)
    want = run(texts, 2, 12, KINDS[kind])
    r = rollouts(KINDS[kind], processor=processor)
    with torch.inference_mode():
        r.prefill(texts, 2)
        r.step([1])
    r.step()
    r.generate([10, 9, 10, 10])
    with torch.inference_mode():
        r.gather([0, 1, 2, 3])
        if kind == "exact":
            r.crop([len(tokens) - 1 for tokens in r.tokens])
            r.step()
    r.step()
    assert r.tokens == want.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_peek(kind):
    """It gives each row's own logits, and leaves the rows bit for bit."""
    r, twin = started(KINDS[kind]), started(KINDS[kind])
    ask = [5, 6, 7, 8, 9, 10, 11]
    for _ in range(2):
        memory = [store.forest.free_pages for store in r.kv.stores]
        logits, alone = r.peek(ask, [3, 0, 3, 1]), torch.cat([r.peek(ask, [i]) for i in range(4)])
        nearest = torch.cdist(logits, alone).argmin(1)
        assert nearest.tolist() == [3, 0, 3, 1]
        assert [store.forest.free_pages for store in r.kv.stores] == memory
        for rows in (r, twin):
            rows.generate(5)
        assert seen(r) == seen(twin)
    for row in (3, 1):
        x = r.peek(ask, [row])
        r.tokens[row] += ask  # as if they were its own
        r.step([row])
        logprob = x.log_softmax(-1)[0, r.tokens[row][-1]].item()
        assert r.logprobs[row][-1] == pytest.approx(logprob, abs=1e-6)
    for rows, error in (([4], IndexError), ([-1], IndexError), ([], ValueError)):
        with pytest.raises(error, match="rows"):
            r.peek(ask, rows)
    with pytest.raises(ValueError, match="tokens is empty"):
        r.peek([], [0])


def test_pool_exhausted():
    """A fixed pool: the call that does not fit changes nothing; dropped rows make room."""
    texts = prompts(32, 16)
    r = rollouts(temperature=0, pages=2 + 4)
    r.prefill(texts[:1], 4)
    r.generate(17)  # 16 of them fed: the rows' pages are full
    before = [list(tokens) for tokens in r.tokens]
    for call in (r.step, lambda: r.prefill(texts[1:])):
        with pytest.raises(PoolExhausted, match=r"\d+ pages are needed, 0 of 6 are free"):
            call()
        assert r.tokens == before and r.rows == r.kv.rows == 4
    r.gather([0, 3])
    r.generate(10)
    assert r.tokens == [greedy(texts[0], 27)] * 2
    with pytest.raises(PoolExhausted):
        r.prefill([texts[1], texts[0]])
    assert r.rows == r.kv.rows == 2
    r.gather([1])
    r.prefill(texts[1:])
    r.generate(4)
    assert r.tokens == [greedy(texts[0], 31), greedy(texts[1], 4)]


def test_bad_input():
    texts = prompts(PROMPT, 9)
    r = rollouts(temperature=0)
    for wrong, n, match in [
        (texts, 0, "n=0"),
        (texts, -1, "n=-1"),
        ([texts[0], []], 1, "empty prompt"),
        ([torch.zeros(0, dtype=torch.long)], 1, "empty prompt"),
    ]:
        with pytest.raises(ValueError, match=match):
            r.prefill(wrong, n)
        assert r.rows == r.kv.rows == 0
    r.prefill(texts)
    r.generate(4)
    before = [list(tokens) for tokens in r.tokens]
    for lengths in ([PROMPT - 1, 9], [PROMPT, 14], [PROMPT], [PROMPT, 9, 9], [-1, 9]):
        with pytest.raises(ValueError, match="lengths"):
            r.crop(lengths)
    for index in ([2], [0, -1]):
        with pytest.raises(IndexError, match="rows 0 to 1"):
            r.gather(index)
        with pytest.raises(IndexError, match="rows 0 to 1"):
            r.step(index)
    assert r.tokens == before
    r.generate(4)
    assert r.tokens == [greedy(text, 8) for text in texts]
    with pytest.raises(TypeError, match="CacheConfig"):
        Rollouts(tiny_model(), dict(bits=4))


def test_bad_sampling_options():
    for options in (dict(temperature=-1.0), dict(top_p=0.0), dict(top_k=-1), dict(min_p=2.0),
                    dict(temperature=[1.0]), dict(top_p=object())):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            run(prompts(4), new=1, **options)


def test_public():
    assert kvtools.Rollouts is Rollouts
