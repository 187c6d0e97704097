"""The door: models that are unlike Llama give plain generate's tokens, or are refused by name; and
nothing of ours stays behind, in the model, in other threads or in memory."""

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers
from models import COMMON, PROMPT, D, fresh_model, padded_prompts, random_ids, scaled, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

import kvtools
from kvtools.cache import KVCache
from kvtools.hf import Unsupported, check_model
from kvtools.hf.door import door_of

NEW = 16


def build(name, cls=AutoModelForCausalLM, **options):
    """A tiny model of config class `name`; fields that it does not know are left out."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **options})
    model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    model = scaled(model.float())
    own = model.generation_config
    own.eos_token_id, own.forced_eos_token_id, own.pad_token_id = None, None, 0
    return model


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_routed_experts=4)
EXPERTS |= dict(num_local_experts=4, shared_expert_intermediate_size=32, n_group=1, topk_group=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16)
DECODER = dict(d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
    patch_size=16,
)  # fmt: skip


def longrope(long=2.0):
    factors = dict(short_factor=[1 + i / 10 for i in range(D // 2)])
    factors |= dict(long_factor=[long + i * 0.7 for i in range(D // 2)])
    return dict(
        rope_type="longrope", rope_theta=1e4, factor=4.0, original_max_position_embeddings=48,
        **factors,
    )  # fmt: skip


def with_rope(name, rope_type, **more):
    rope = dict(rope_type=rope_type, rope_theta=1e4, factor=4.0)
    if rope_type == "longrope":
        rope = longrope()
    return build(
        name, max_position_embeddings=192 if rope_type == "longrope" else 48,
        original_max_position_embeddings=48, rope_parameters=rope, **more,
    )  # fmt: skip


def composite():
    text = {**COMMON, "head_dim": D, "sliding_window": 16}
    return build("Gemma3Config", text_config=text, vision_config=VISION, mm_tokens_per_image=4)


MODELS = {
    "positions counted from the cache": lambda: build("BartConfig", **DECODER, is_decoder=True),
    "a window in the mask alone": lambda: build(
        "Qwen2MoeConfig", **EXPERTS, use_sliding_window=True, sliding_window=16, max_window_layers=4
    ),
    "latent keys": lambda: build(
        "DeepseekV3Config", **EXPERTS, **LATENT, head_dim=8, v_head_dim=16, first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "heads of values smaller": lambda: build(
        "MiMoV2FlashConfig", **EXPERTS, head_dim=16, v_head_dim=8, sliding_window=16
    ),
    "keys repeated after caching": lambda: build(
        "JetMoeConfig", **EXPERTS, kv_channels=16, num_attention_heads=4
    ),
    "text and images": composite,
    "layers that share keys": lambda: build(
        "Gemma3nTextConfig", head_dim=D, sliding_window=16, num_kv_shared_layers=2, laurel_rank=8,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=256, altup_num_inputs=2,
        intermediate_size=[96] * 4, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "longrope past its switch": lambda: with_rope("Phi3Config", "longrope"),
    "longrope": lambda: with_rope("LlamaConfig", "longrope"),
    "dynamic rope": lambda: with_rope("LlamaConfig", "dynamic"),
}  # fmt: skip


def alone(model, ids, mask):
    """What plain generate gives for each row by itself, with frequencies as of a new model."""
    rows = []
    for row, seen in zip(ids, mask, strict=True):
        plain = copy.deepcopy(model)
        rows.append(
            plain.generate(row[seen > 0][None], do_sample=False, max_new_tokens=NEW)[0, -NEW:]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_as_alone(name):
    model = MODELS[name]()
    ids, mask = padded_prompts((40, 20, 70))
    want = alone(model, ids, mask)
    assert want.unique().numel() > 8, "the model repeats itself: nothing is shown"
    out = model.generate(
        ids, attention_mask=mask.float(), custom_generate=kvtools.generate, do_sample=False,
        max_new_tokens=NEW,
    )  # fmt: skip
    assert torch.equal(out[:, -NEW:], want)
    rollouts = kvtools.Rollouts(model, temperature=0, eos_token_id=())
    rollouts.prefill([row[seen > 0] for row, seen in zip(ids, mask, strict=True)])
    rollouts.generate(5)
    rollouts.gather([2, 0, 1, 0])
    rollouts.crop([70, 42, 21, 45])
    out = rollouts.generate([NEW, NEW - 2, NEW - 1, NEW - 5])
    tokens = [t[-NEW:] for t in rollouts.tokens]
    assert torch.equal(torch.tensor(tokens), want[[2, 0, 1, 0]]), out


def test_longrope_is_encoded_again_when_rewound():
    """Forks share the prompt again; a row that comes back below the switch has the first keys."""
    model = with_rope("Phi3Config", "longrope")
    rollouts = kvtools.Rollouts(model, temperature=0, eos_token_id=())
    rollouts.prefill([random_ids(1, PROMPT)[0]], n=4)
    pages = rollouts.kv.memory()["prefix"]
    rollouts.generate(20)
    first = [list(t) for t in rollouts.tokens]
    assert rollouts.kv.memory()["prefix"] == pages and rollouts.kv.switched.all()
    rollouts.crop([PROMPT + 2] * 4)
    rollouts.generate(18)
    assert rollouts.tokens == first
    with pytest.raises(Unsupported, match="longrope"):
        run = kvtools.hf.Session(model, kvtools.CacheConfig())
        run.prefill([random_ids(1, 48)[0]])
        run.extend(random_ids(1, 1)[0])


def test_shared_keys_want_an_exact_cache():
    model = MODELS["layers that share keys"]()
    with pytest.raises(ValueError, match="exact"):
        kvtools.Rollouts(model, kvtools.CacheConfig(bits=4)).prefill([[5, 6, 7]])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptoss"])
def test_autocast(name):
    model, ids = tiny_model(name), random_ids(2, PROMPT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.generate(
            ids, custom_generate=kvtools.generate, max_new_tokens=4, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        plain = model(out.sequences[:, :-1]).logits[:, PROMPT - 1 :]
    ours = torch.stack(out.logits, 1)
    assert (ours - plain).norm() < 0.1 * plain.norm()


def test_mixed_precision():
    """bfloat16 linears under float32 norms and embeddings, as adapters of quantised models have."""
    model = fresh_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts = kvtools.Rollouts(model, temperature=0, eos_token_id=())
        rollouts.prefill([random_ids(1, PROMPT)[0]], n=2)
        rollouts.generate(4)
        assert rollouts.tokens[0] == rollouts.tokens[1]


def chunked():
    text = {**COMMON, **EXPERTS, "head_dim": D, "intermediate_size_mlp": 96}
    return build("Llama4TextConfig", **text, attention_chunk_size=16)


def own_attention():
    def cold(module, q, k, v, mask, scaling=None, **options):
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling / 2, **options)

    AttentionInterface.register("cold", cold)
    AttentionMaskInterface.register("cold", sdpa_mask)
    model = fresh_model()
    model.set_attn_implementation("cold")
    return model


def own_inputs():
    model = fresh_model()
    stock = model.prepare_inputs_for_generation

    def soft_prompt(*args, **kwargs):
        inputs = stock(*args, **kwargs)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        return inputs

    model.prepare_inputs_for_generation = soft_prompt
    return model


def window_of_the_cache():
    """The cache forgets what the mask shows."""
    return build("LlamaConfig", sliding_window=16, layer_types=["sliding_attention"] * 4)


def both_ways():
    model = fresh_model()
    model.config.is_causal = False
    return model


REFUSED = {
    "neither causal nor": chunked, "not transformers' own": own_attention,
    "changes inputs_embeds": own_inputs, "its own cache": window_of_the_cache,
    "causal nor causal": both_ways,
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    model = REFUSED[reason]()
    for door in (check_model, kvtools.Rollouts, lambda m: kvtools.patch(m).__enter__()):
        with pytest.raises(Unsupported, match=reason):
            door(model)
    assert model.config._attn_implementation in ("sdpa", "cold")


def test_wrappers():
    model, ids = tiny_model(), random_ids(1, PROMPT)
    with pytest.raises(TypeError, match=r"\.module"):
        kvtools.Rollouts(torch.nn.DataParallel(model))
    with pytest.raises(TypeError, match="whole model"), kvtools.patch(model.model):
        pass
    with pytest.raises(TypeError, match="transformers model"):
        kvtools.Rollouts("smollm2")
    compiled, plain = torch.compile(model, backend="eager"), model.generate(ids, max_new_tokens=4)
    with kvtools.patch(compiled):
        assert torch.equal(compiled.generate(ids, max_new_tokens=4), plain)
    assert type(model) is type(fresh_model())


@pytest.mark.parametrize(
    "twist",
    [
        lambda p: p - p[:, :1],  # counted in the forward, whatever it is told
        lambda p: p * p.shape[1],  # depends on how many tokens come at a time
    ],
)
def test_the_probe_alone_finds_what_differs(twist):
    model = fresh_model()
    stock = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: stock(x, twist(position_ids))
    with pytest.raises(Unsupported, match="from token"):
        check_model(model)
    assert not door_of(model).probed
    kvtools.Rollouts(model, probe=False)


def test_the_door_is_kept():
    model = fresh_model()
    door = check_model(model)
    assert check_model(model) is door and door.probed
    model.set_attn_implementation("eager")
    assert check_model(model) is not door


def test_plain_forwards_beside_ours():
    """Forwards and generates of other threads, plain and ours, on one model."""
    model = tiny_model("mistral")
    ids, mask = padded_prompts()
    position = (mask.cumsum(-1) - 1).clamp(min=0)

    def forward():
        with torch.no_grad():
            return model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits

    def plain():
        return model.generate(ids, attention_mask=mask, max_new_tokens=4)

    def ours():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=4, custom_generate=kvtools.generate
        )

    want = {forward: forward()[:, -1], plain: plain(), ours: plain()}
    wrong, errors = [], []

    def work(jobs):
        try:
            for job in jobs:
                got = job() if job is not forward else job()[:, -1]
                if not torch.allclose(got.float(), want[job].float(), atol=1e-3):
                    wrong.append(job.__name__)
        except Exception as error:
            errors.append(error)

    plans = [[ours] * 6, [forward] * 12, [ours, plain] * 3, [forward, ours] * 3]
    threads = [threading.Thread(target=work, args=(jobs,)) for jobs in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not wrong
    assert model.config._attn_implementation == "sdpa"


def test_overlapping_patches():
    model, base = fresh_model(), type(fresh_model())
    first, second = kvtools.patch(model), kvtools.patch(model, kvtools.CacheConfig(bits=4))
    options = dict(max_new_tokens=2, return_dict_in_generate=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    out = model.generate(random_ids(1, 8), **options)
    assert out.past_key_values.kv.config.bits == 4
    second.__exit__(None, None, None)
    assert type(model) is base


def test_copies_inside_patch(tmp_path):
    model, ids = fresh_model(), random_ids(1, 8)
    plain = model.generate(ids, max_new_tokens=4)
    outside = pickle.dumps(model)
    with kvtools.patch(model):
        twin, inside = copy.deepcopy(model), pickle.dumps(model)
        model.save_pretrained(tmp_path)
    assert b"kvtools" not in inside and len(inside) == pytest.approx(len(outside), abs=200)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for each in (twin, pickle.loads(inside), loaded):
        assert type(each) is type(model) and "generate" not in vars(each)
        out = each.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
        assert torch.equal(out.sequences, plain)
        assert not isinstance(out.past_key_values, kvtools.hf.PagedCache)


def test_copy_during_generate():
    model, ids = fresh_model(), random_ids(1, 8)
    plain, copies = model.generate(ids, max_new_tokens=4), []

    def processor(input_ids, scores):
        copies.append(copy.deepcopy(model))
        return scores

    model.generate(
        ids, max_new_tokens=2, custom_generate=kvtools.generate, logits_processor=[processor]
    )
    assert torch.equal(copies[0].generate(ids, max_new_tokens=4), plain)


def test_nothing_stays_behind():
    model, ids = tiny_model(), random_ids(1, PROMPT)
    gc.collect()
    before = sum(isinstance(x, KVCache) for x in gc.get_objects())
    gc.disable()
    try:
        for _ in range(3):
            model.generate(ids, max_new_tokens=3, custom_generate=kvtools.generate)
        assert sum(isinstance(x, KVCache) for x in gc.get_objects()) == before
    finally:
        gc.enable()
    state = torch.get_rng_state()
    model.generate(ids, max_new_tokens=3, custom_generate=kvtools.generate, do_sample=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_no_cache_outside():
    model, ids = tiny_model(), random_ids(1, 8)
    cache = model.generate(
        ids, max_new_tokens=2, custom_generate=kvtools.generate, return_dict_in_generate=True
    ).past_key_values
    for use in (
        lambda: cache.crop(3), lambda: cache.reset(), lambda: copy.deepcopy(cache),
        lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices([0]),
        lambda: pickle.dumps(cache), lambda: model(ids, past_key_values=cache),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="Rollouts"):
            use()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(do_sample=True, top_k=3)])
def test_no_token_from_bad_logits(bad, options):
    model, ids = fresh_model(), random_ids(2, 8)
    with torch.no_grad():
        model.lm_head.weight[5] = bad
    options = dict(top_k=0) | options if options.get("do_sample") else options
    with pytest.raises(ValueError, match="row 0 at step 0"):
        model.generate(ids, max_new_tokens=2, custom_generate=kvtools.generate, **options)

    def third(input_ids, scores):
        if input_ids.shape[1] == 10:
            scores = scores.clone()
            scores[1] = -torch.inf
        return scores

    with pytest.raises(ValueError, match="row 1 at step 2"):
        tiny_model().generate(
            ids, max_new_tokens=4, custom_generate=kvtools.generate, logits_processor=[third],
            **options,
        )  # fmt: skip


def test_arguments_that_generate_loses():
    model, ids = tiny_model(), random_ids(1, 8)

    def through_a_lambda(**options):
        return model.generate(
            ids,
            custom_generate=lambda *a, **k: kvtools.generate(*a, **k),
            max_new_tokens=2,
            **options,
        )

    with pytest.raises(ValueError, match="functools.partial"):
        through_a_lambda(streamer=type("S", (), {"put": lambda *a: None, "end": lambda s: None})())
    with pytest.raises(ValueError, match="assistant_model"):
        through_a_lambda(assistant_model=model)


def test_options_that_nobody_passed():
    model, ids = fresh_model(), random_ids(1, 8)
    plain = model.generate(ids, max_new_tokens=3)
    for name, value in [("use_cache", False), ("output_attentions", True)]:
        setattr(model.generation_config, name, value)
    out = model.generate(ids, max_new_tokens=3, custom_generate=kvtools.generate)
    assert torch.equal(out, plain)


def test_weights_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    model, ids = fresh_model(), random_ids(2, 8)
    plain = model.generate(ids, max_new_tokens=4)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    out = model.generate(ids, max_new_tokens=4, custom_generate=kvtools.generate)
    assert torch.equal(out, plain)


def test_every_seed_of_a_batch_differs():
    model = tiny_model()
    runs = [kvtools.Rollouts(model, seed=seed) for seed in (0, 1)]
    for run in runs:
        run.prefill([[5, 6, 7]], n=8)
    assert not np.intersect1d(*(run.seeds for run in runs)).size


def test_only_transformers_models():
    assert issubclass(Unsupported, ValueError)
    with pytest.raises(TypeError):
        check_model(torch.nn.Linear(2, 2))
    assert isinstance(tiny_model(), PreTrainedModel)
