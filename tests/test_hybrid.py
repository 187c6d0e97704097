"""Models with recurrent layers: rows say what they would say alone, whatever is done to them, and
states are shared, forked and put back as keys and values are."""

import functools
import weakref

import numpy as np
import pytest
import test_decode
import torch
import transformers
from interrupts import Exhausted, Interrupt
from models import COMMON, PROMPT, D, padded_prompts, random_ids, scaled
from test_prm import QUESTION, SOLUTIONS, byte_level
from transformers import AutoModelForCausalLM

import kvtools
from kvtools.hf import Unsupported, check_model
from kvtools.hf.plug import CACHE

NEW = 40
MIXED = ["linear_attention", "full_attention"] * 2
DELTA = dict(
    layer_types=MIXED, head_dim=D, linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=D, linear_value_head_dim=D,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8)
MODELS = {
    "qwen3_next": lambda: make("Qwen3NextConfig", **DELTA, **EXPERTS, decoder_sparse_step=2),
    "qwen3_5": lambda: make("Qwen3_5TextConfig", **DELTA),
    # whose recurrent layers forget their state where several tokens come
    "jamba": lambda: make(
        "JambaConfig", attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8
    ),
    "granite": lambda: make(
        "GraniteMoeHybridConfig", layer_types=MIXED, num_local_experts=0, **MAMBA
    ),
    # attention and a state in one layer
    "falcon_h1": lambda: make("FalconH1Config", mamba_d_ssm=128, **MAMBA),
    "lfm2": lambda: make("Lfm2Config", layer_types=["conv", "full_attention"] * 2),
    "nemotron_h": lambda: make(
        "NemotronHConfig", layers_block_type=["mamba", "attention"] * 2, mamba_num_heads=8,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1,
    ),
}  # fmt: skip


def mamba2():
    """No attention at all; refused before transformers 5.24."""
    sizes = dict(num_heads=8, head_dim=16, state_size=8, n_groups=1)
    return make("Mamba2Config", num_hidden_layers=2, **sizes)


MODELS |= {"mamba2": mamba2} if CACHE == "cache" else {}
EXACT, TIGHT = kvtools.CacheConfig(), kvtools.CacheConfig(bits=8, budget=32, prompt_budget=0.5)


def make(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **options})
    model = scaled(AutoModelForCausalLM.from_config(config).float())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@functools.cache
def hybrid(name):
    return MODELS[name]()


def plain(name, text, new=NEW):
    """What plain generate adds to a text by itself."""
    ids = torch.as_tensor(text)[None]
    return hybrid(name).generate(ids, do_sample=False, max_new_tokens=new)[0].tolist()


def rollouts(name, config=EXACT, **options):
    return kvtools.Rollouts(
        hybrid(name), config, **{"temperature": 0, "eos_token_id": (), **options}
    )


def texts(*lengths, seed=1):
    return [random_ids(1, n, seed=seed + i)[0].tolist() for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_as_alone(name):
    """Padded rows of generate; forks, rewinds and given tokens of rollouts."""
    ids, mask = padded_prompts((40, 20, 40, 11))
    alone = [plain(name, row[seen > 0]) for row, seen in zip(ids, mask, strict=True)]
    assert len({token for text in alone for token in text[-NEW:]}) > 12, "nothing is shown"
    out = hybrid(name).generate(
        ids, attention_mask=mask, custom_generate=kvtools.generate, do_sample=False,
        max_new_tokens=NEW,
    )  # fmt: skip
    assert out[:, -NEW:].tolist() == [text[-NEW:] for text in alone]
    r = rollouts(name)
    r.prefill([row[seen > 0] for row, seen in zip(ids, mask, strict=True)], n=2)
    of = np.repeat([0, 1, 2, 3], 2)
    r.generate([9, 0, 5, 9, 9, 2, 1, 3])
    index = [7, 0, 0, 2, 4, 1]
    r.gather(index)
    of = of[index]
    r.generate(4)
    r.crop(np.array([len(tokens) for tokens in r.tokens]) - [2, 0, 6, 1, 0, 4])
    r.append([[], alone[0][len(r.tokens[1]) : len(r.tokens[1]) + 5], [], [], [], []])
    r.generate(
        [NEW - (len(x) - n) for x, n in zip(r.tokens, r.prompt_lengths.tolist(), strict=True)]
    )
    assert r.tokens == [alone[i] for i in of]
    counted = check_model(hybrid(name)).counted  # then rows share a forward less often
    assert counted == (name == "mamba2")


@pytest.mark.parametrize("name", ["qwen3_5", "jamba", "falcon_h1"])
def test_forks_are_as_rows_alone(name):
    """A row that was forked and sits among others draws what it draws alone."""
    prompts = texts(PROMPT, 12)
    r = rollouts(name, temperature=1.0, seed=3)
    r.prefill(prompts, n=3)
    r.generate([6, 0, 3, 9, 2, 2])
    r.gather([5, 2, 2, 0])
    seeds = r.seeds
    r.generate([20, 17, 9, 20])
    for row, tokens in enumerate(r.tokens):
        one = rollouts(name, temperature=1.0)
        one.prefill([r.tokens[row][: r.prompt_lengths[row]]])
        own = {2: 3}.get(row, 0)  # a copy's first tokens are those of its origin
        one.append([tokens[int(r.prompt_lengths[row]) :][:own]])
        one.seeds = seeds[[row]]
        one.generate(len(tokens) - len(one.tokens[0]))
        assert one.tokens[0] == tokens
        assert one.logprobs[0][own:] == pytest.approx(r.logprobs[row][own:], abs=1e-4)


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "lfm2"])
def test_shared_beginnings(name):
    """Are run once where recurrent layers can go on from a state; rows are as alone anyhow."""
    begin = texts(50)[0]
    prompts = [begin + text for text in texts(7, 7, 20, seed=5)] + [begin]
    r = rollouts(name)
    r.prefill(prompts, n=2)
    r.generate(NEW)
    assert r.tokens == [plain(name, text) for text in prompts for _ in (0, 1)]
    apart = kvtools.Rollouts(hybrid(name))
    for text in prompts:
        apart.prefill([text])
    shared = r.kv.memory()["prefix"] < 0.6 * apart.kv.memory()["prefix"]
    assert shared == (name != "jamba") == (not check_model(hybrid(name)).single)


def states(r):
    """Of all rows, copies of all that recurrent layers hold."""
    layers = r.kv.states.take(np.arange(r.rows))
    return [x for held in layers.values() for part in held.values() if isinstance(part, dict)
            for x in part.values() if isinstance(x, torch.Tensor)]  # fmt: skip


def same(before, after):
    return len(before) == len(after) > 0 and all(map(torch.equal, before, after))


@pytest.mark.parametrize("config", [EXACT, TIGHT], ids=["exact", "tight"])
@pytest.mark.parametrize("name", ["qwen3_5", "jamba", "falcon_h1"])
def test_peek_leaves_states(name, config):
    r = rollouts(name, config)
    r.prefill(texts(PROMPT, 9), n=2)
    r.generate(9)
    before, tokens = states(r), [list(x) for x in r.tokens]
    logits = r.peek([5, 6, 7], [3, 0, 3])
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
    assert same(before, states(r)) and r.tokens == tokens
    if config is EXACT:
        with torch.no_grad():
            want = hybrid(name)(torch.tensor([[*tokens[3], 5, 6, 7]])).logits[0, -1]
        torch.testing.assert_close(logits[0], want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [Interrupt, Exhausted])
@pytest.mark.parametrize("name", ["qwen3_5", "jamba"])
def test_an_error_leaves_states(name, kind):
    """At points all over a step, a prefill and given tokens: rows are as before, and go on."""
    prompts, rng = texts(PROMPT, 9, 13), np.random.default_rng(0)
    r, twin = rollouts(name), rollouts(name)
    for x in (r, twin):
        x.prefill(prompts[:2], 2)
        x.generate([4, 6, 4, 5])
    calls = {
        "step": lambda x: x.step([0, 2, 3]),
        "append": lambda x: x.append([[5, 6, 7], [8, 9]], [1, 2], logprobs=True),
        "prefill": lambda x: x.prefill(prompts[2:]),
    }
    for what, call in calls.items():
        with kind() as whole:
            call(twin)
        before, tokens = states(r), [list(x) for x in r.tokens]
        for at in [*rng.integers(1, whole.seen // 2, 4), whole.seen // 2]:
            with pytest.raises((KeyboardInterrupt, MemoryError)), kind(int(at)):
                call(r)
            r.finished = r.finished  # the next call puts right what was interrupted
            r.peek([5], [0])
            assert same(before, states(r)) and r.tokens == tokens, what
        call(r)
        assert r.tokens == twin.tokens and same(states(r), states(twin)), what
    for x in (r, twin):
        x.generate(6)
    assert r.tokens == twin.tokens


def test_states_are_shared_until_rows_grow():
    """A prompt's state is there once for all its rows; forks copy none, dropped rows free it."""
    r = rollouts("qwen3_5")

    def held():
        return sum(x.nbytes for x in r.kv.states.tensors())

    r.prefill(texts(PROMPT))
    one, empty = held(), r.kv.memory()["suffix"]
    assert empty >= one > 0
    r.gather([0] * 8)
    assert held() == one
    r.generate(3)
    assert held() == 8 * one
    r.gather([*range(8), 3, 3, 3])
    assert held() == 8 * one
    r.gather([3, 3])
    assert held() == one
    r.gather([])
    assert held() == 0


@pytest.mark.parametrize("name", ["qwen3_next", "granite", "falcon_h1"])
@pytest.mark.parametrize("preset", ["balanced", "max"])
def test_compressed(name, preset):
    """Attention layers are; states stay what they are."""
    config = kvtools.CacheConfig.preset(preset)
    text = texts(120)
    r, exact = rollouts(name, config), rollouts(name)
    for x in (r, exact):
        x.prefill(text, n=4)
        x.generate(30)
    assert all(len(tokens) == 150 for tokens in r.tokens)
    states = sum(x.nbytes for x in r.kv.states.tensors())
    assert states == sum(x.nbytes for x in exact.kv.states.tensors())
    ours, plain = r.kv.memory(), exact.kv.memory()
    assert ours["total"] - states < 0.6 * (plain["total"] - states)
    logits = [x.peek([7], [0])[0] for x in (r, exact)] if r.tokens == exact.tokens else None
    first = [x.logprobs[0][0] for x in (r, exact)]
    assert first[0] == pytest.approx(first[1], abs=1e-4), logits  # of the prompt, which is exact
    with pytest.raises(ValueError, match="out of range"):
        r.kv.crop([1] * 4)


@pytest.mark.skipif("mamba2" not in MODELS, reason="refused before transformers 5.24")
@pytest.mark.parametrize("config", [EXACT, TIGHT], ids=["exact", "tight"])
def test_without_attention_nothing_is_evicted(config):
    prompts = texts(PROMPT, 12)
    r = rollouts("mamba2", config)
    r.prefill(prompts, n=2)
    r.generate([NEW, 3, NEW, 20])
    r.gather([0, 2, 3])
    r.generate([0, 0, NEW - 20])
    assert r.tokens == [plain("mamba2", prompts[i]) for i in (0, 1, 1)]


def test_what_is_kept():
    """Of layers without attention: no positions, as there are no heads."""
    r = rollouts("lfm2")
    r.prefill(texts(9))
    assert [r.kv.kept(layer, 0) for layer in (0, 1)] == [[], [list(range(9))] * 2]


@pytest.mark.parametrize("name", ["qwen3_5", "jamba"])
def test_few_logits_of_what_is_fed_again(name):
    """Rows that are rewound, and given texts, are long: logits of their last tokens alone are
    held."""
    r, held, most = rollouts(name), [], []

    def seen(module, args, out):
        held[:] = [x for x in held if x() is not None]
        held.append(weakref.ref(out))
        most.append(sum(x().numel() for x in held) // out.shape[-1])

    r.prefill(texts(PROMPT, 12), n=2)
    r.generate([NEW, 30, NEW, NEW])
    hook = hybrid(name).lm_head.register_forward_hook(seen)
    try:
        r.crop([len(tokens) - 1 for tokens in r.tokens])
        r.generate(1)
        r.append(texts(20, 20, 17, 9))  # in three forwards
        r.generate(1)
    finally:
        hook.remove()
    assert max(most) <= 4 * r.rows


def test_generate_goes_on_from_its_cache():
    name, model = "qwen3_5", hybrid("qwen3_5")
    ids = torch.tensor(texts(PROMPT))
    options = dict(custom_generate=kvtools.generate, do_sample=False, return_dict_in_generate=True)
    first = model.generate(ids, max_new_tokens=9, **options)
    more = torch.cat([first.sequences, random_ids(1, 6, seed=8)], 1)
    second = model.generate(more, max_new_tokens=9, **options, **{CACHE: first[CACHE]})
    assert second.sequences[0].tolist() == plain(name, more[0], 9)
    again = model.generate(ids, max_new_tokens=9, **options, **{CACHE: second[CACHE]})
    assert torch.equal(again.sequences, first.sequences)  # rewound to the prompt


def test_logprobs():
    name = "jamba"
    prompt, answers = texts(20)[0], texts(9, 6, seed=4)
    found = kvtools.logprobs(hybrid(name), [prompt], [answers])
    for answer, ours in zip(answers, found.logprobs[0], strict=True):
        with torch.no_grad():
            logits = hybrid(name)(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(ours, want, atol=1e-3, rtol=1e-3)


def test_reward_models():
    """Scores of rows that grow and are rewound are those of whole texts."""
    model = make("Qwen3_5TextConfig", **DELTA, vocab_size=512)
    reward = kvtools.prm.load(model, byte_level(), "rlhflow")
    want = reward.score(QUESTION, SOLUTIONS).margins
    session = reward.session(QUESTION, rows=len(SOLUTIONS))
    most = max(map(len, SOLUTIONS))
    for k in range(most):
        session.append([steps[k] if k < len(steps) else None for steps in SOLUTIONS])
    session.crop([max(0, len(steps) - 1) for steps in SOLUTIONS])
    session.append([steps[-1] if steps else None for steps in SOLUTIONS])
    for ours, whole in zip(session.margins, want, strict=True):
        assert ours == pytest.approx(whole.tolist(), abs=1e-3)


def test_refused_by_name(tmp_path, monkeypatch):
    model, ids = hybrid("lfm2"), torch.tensor(texts(9))
    out = model.generate(
        ids, custom_generate=kvtools.generate, max_new_tokens=3, return_dict_in_generate=True
    )
    for call in (
        lambda: kvtools.save_cache(model, out[CACHE], tmp_path / "x"),
        lambda: kvtools.load_cache(model, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match="lfm2 has recurrent layers, whose states no file"):
            call()
    session = kvtools.hf.Session(model, EXACT)
    session.prefill([ids[0]])
    session.extend(ids[0, :4], np.array([4]))
    session.kv.crop([10])
    with pytest.raises(Unsupported, match="lfm2 encodes a text that was rewound"):
        session.extend(ids[0, :1])
    with pytest.raises(Unsupported, match="recurrent layers, and pads prompts"):
        check_model(with_switch())
    if CACHE != "cache":
        with pytest.raises(Unsupported, match="mamba2: its forward takes no past_key_values"):
            check_model(mamba2())
    monkeypatch.setattr(kvtools.hf.door, "ranks_of", lambda model: "two")
    with pytest.raises(Unsupported, match="recurrent layers, and lies on several ranks"):
        check_model(MODELS["lfm2"]())


def with_switch():
    """One that says it drops its cache at a length."""
    model = make("Lfm2Config", layer_types=["conv", "full_attention"] * 2)
    model.config.original_max_position_embeddings = 48
    stock = model.prepare_inputs_for_generation

    def drops(input_ids, **options):
        out = stock(input_ids, **options)
        if input_ids.shape[1] > 48 and options[CACHE].get_seq_length() == 48:
            out |= {CACHE: None, "input_ids": input_ids}
        return out

    model.prepare_inputs_for_generation = drops
    return model


def test_not_compiled():
    """With a warning; tokens are the same."""
    compiled = torch.compile(MODELS["lfm2"](), backend="eager")
    with pytest.warns(RuntimeWarning, match="lfm2 without torch.compile: it has recurrent layers"):
        r = kvtools.Rollouts(compiled, temperature=0, eos_token_id=())
    r.prefill(texts(PROMPT))
    r.generate(9)
    assert r.tokens == [plain("lfm2", texts(PROMPT)[0], 9)]


def pair(name, config, **options):
    """The same rows, that the host steps and that run ahead of it."""
    return [
        test_decode.started(config, hybrid(name), graph=graph, **options)
        for graph in (False, "auto")
    ]


def alike(one, other):
    test_decode.same(one, other)
    stale = [r.kv.states.stale(r.kv.lengths.numpy()).tolist() for r in (one, other)]
    assert stale[0] == stale[1]
    for ours, theirs in zip(states(one), states(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [EXACT, TIGHT], ids=["exact", "tight"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mamba2"])
def test_steps_ahead(name, config, graphs):
    """Rows end, pause, are forked, given tokens, rewound, looked at, stepped by the host, and more
    come: they say the same, and hold the same states."""
    one, other = pair(name, config)
    changes = [
        lambda r: r.generate([20, 20, 3, 20, 9, 20]),
        lambda r: r.gather([0, 0, 1, 3, 5, 2]),
        lambda r: r.generate(8),
        lambda r: r.append([[3, 4, 5], [], [7], [], [], []]),
        lambda r: r.generate(5),
        lambda r: r.crop([len(x) - 2 for x in r.tokens]) if config is EXACT else r.step(),
        lambda r: r.generate(6),
        lambda r: r.peek([3, 4], [0, 1]),
        lambda r: r.prefill(texts(11), n=3),
        lambda r: r.generate(7),
        lambda r: r.generate(9, set(range(40, 90))),
        lambda r: r.step(),
        lambda r: r.generate(6),
    ]  # fmt: skip
    for change in changes:
        for r in (one, other):
            change(r)
        alike(one, other)
    assert one.finished.any() and not one.finished.all()
    assert graphs.replays > 2 * graphs.captures > 0


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1"])
def test_generate_ahead(name, graphs):
    """Rows end apart, and samples take the places of others."""
    ids, mask = padded_prompts((40, 20, 40, 11))
    prompts, out, drawn = texts(20, 9), [], []
    for graph in (False, "auto"):
        torch.manual_seed(1)
        with kvtools.patch(hybrid(name), EXACT, graph=graph) as model:
            out.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True,
                    eos_token_id=[*range(60, 70)],
                )
            )  # fmt: skip
        r = rollouts(name, graph=graph, temperature=0.9, eos_token_id=[5, 77, 9], seed=3)
        found = r.sample(prompts, 5, rows=3, max_new_tokens=20)
        drawn.append({(x.prompt, x.number): list(x.tokens) for x in found})
    assert torch.equal(*out) and drawn[0] == drawn[1] and graphs.replays


@pytest.mark.parametrize("name", ["qwen3_5", "jamba"])
def test_interrupts_of_steps_ahead(name, graphs):
    """Anywhere, also once the device has run a step: its state counts for nothing."""
    rng = np.random.default_rng(0)
    twin, ours = pair(name, EXACT, eos_token_id=())
    with Interrupt() as whole:
        pair(name, EXACT)[1].generate(3)
    ours.generate(6)
    for at in rng.integers(1, whole.seen // 3, 16):
        try:
            with Interrupt(int(at)):
                ours.generate([min(3, 30 - len(x)) for x in ours.logprobs])
        except KeyboardInterrupt:
            pass
    ours.generate([30 - len(x) for x in ours.logprobs])
    twin.generate(30)
    alike(twin, ours)


def test_places_of_states(graphs):
    """As many rows keep to the same, forked or in another order; rows that come get more places,
    and all are free once no row is left."""
    one, other = pair("qwen3_5", EXACT, eos_token_id=())
    for r in (one, other):
        r.generate(20)
        r.gather([5, 4, 3, 2, 1, 0])
    places = [x.data_ptr() for x in other.kv.states.lasting()]
    for r in (one, other):
        r.generate(9)
        r.gather([0, 0, 0, 3, 3, 3])
        r.generate(9)
    assert places == [x.data_ptr() for x in other.kv.states.lasting()]
    alike(one, other)
    each = sum(x.nbytes for x in states(one)) // 6
    assert sum(x.nbytes for x in other.kv.states.tensors()) == 17 * each
    for r in (one, other):
        r.gather([*range(6)] * 3)
        r.generate([9] * 17 + [0])
    alike(one, other)
    other.gather([])
    assert not other.kv.states.tensors()


@pytest.mark.skipif("mamba2" not in MODELS, reason="refused before transformers 5.24")
def test_without_positions_step_by_step(graphs):
    with pytest.warns(UserWarning, match="mamba2 is run step by step.*positions depend on"):
        r = kvtools.Rollouts(mamba2(), temperature=0, eos_token_id=())
    r.prefill(texts(PROMPT))
    r.generate(9)
    assert r.tokens == [plain("mamba2", texts(PROMPT)[0], 9)] and not graphs.captures


def test_unseen():
    """Without the probe a recurrent layer is given one token at a time."""
    model = MODELS["jamba"]()
    r = kvtools.Rollouts(model, temperature=0, eos_token_id=(), probe=False)
    text = texts(PROMPT)[0]
    r.prefill([text])
    r.append([plain("jamba", text)[PROMPT : PROMPT + 9]])
    r.generate(NEW - 9)
    assert r.tokens == [plain("jamba", text)]


def test_in_and_out_of_inference_mode():
    r = rollouts("qwen3_5")
    with torch.inference_mode():
        r.prefill(texts(PROMPT), n=2)
        r.generate([1, 3])
    r.generate(3)
    with torch.inference_mode():
        r.generate(3)
    want = plain("qwen3_5", texts(PROMPT)[0], 9)
    assert [tokens + want[len(tokens) :] for tokens in r.tokens] == [want] * 2


def test_what_was_left_in_layers_is_not_gone_on_from():
    """As an interrupt may leave it, in the last line of a forward."""
    r = rollouts("qwen3_5")
    first, second = texts(PROMPT, 9)
    r.prefill([first])
    layers = r._session.cache.layers
    for i, held in r.kv.states.take(np.array([0])).items():
        vars(layers[i]).update(held)
    r.prefill([second])
    r.generate(NEW)
    assert r.tokens == [plain("qwen3_5", first), plain("qwen3_5", second)]


def test_some_rows_at_a_time():
    """Samples that take turns, in rollouts and in generate, are those of all at once."""
    prompts, options = texts(PROMPT, 12), dict(temperature=1.0, seed=4)
    r = rollouts("lfm2", **options)
    r.prefill(prompts, n=3)
    r.generate(9)
    turns = rollouts("lfm2", **options).sample(prompts, 3, rows=2, max_new_tokens=9)
    found = {(x.prompt, x.number): x.tokens for x in turns}
    want = [tokens[n:] for tokens, n in zip(r.tokens, r.prompt_lengths.tolist(), strict=True)]
    assert [list(found[i, j]) for i in range(2) for j in range(3)] == want
    out = []
    for rows in (None, 2):
        torch.manual_seed(0)
        out.append(
            hybrid("lfm2").generate(
                torch.tensor(prompts[:1]),
                do_sample=True,
                num_return_sequences=5,
                rows=rows,
                max_new_tokens=9,
                custom_generate=kvtools.generate,
            )  # fmt: skip
        )
    assert torch.equal(*out) and len(out[0].unique(dim=0)) == 5
