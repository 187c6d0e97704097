"""A tiny lively model of any causal type of transformers, from the type's default config; and what
plain `generate` gives on it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvtools.quality import head_size

VOCAB, LAYERS, HEADS, D, WINDOW = 256, 4, 4, 16, 16
# Fields of configs by what they count. Names that a config does not have are not given to it.
SIZES = [
    (64, "hidden_size n_embd d_model embedding_size word_embed_proj_dim attention_hidden_size "
         "backbone_hidden_size emb_dim"),
    (96, "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner "
         "ffn_hidden_size expert_ffn_hidden_size moe_shared_expert_intermediate_size dim_ff dff "
         "shared_expert_intermediate_size shared_experts_intermediate_size d_inner "
         "shared_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp "
         "dense_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
             "encoder_layers num_encoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
            "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
            "swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts max_window_layers "
        "sliding_window_pattern num_kv_shared_layers"),
    (1, "n_group topk_group num_expert_group num_nextn_predict_layers"),
    (0, "pad_token_id first_k_dense_replace"),
    (D, "head_dim swa_head_dim v_head_dim kv_channels index_head_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim dim_head qk_nope_head_dim "
        "laurel_rank query_pre_attn_scalar d_head"),
    (D // 2, "qk_rope_head_dim rotary_dim"),
    (2 * D, "global_head_dim"),
    (WINDOW, "sliding_window sliding_window_size window_size attention_chunk_size"),
    (2 * WINDOW, "local_attention q_lora_rank kv_lora_rank index_topk o_lora_rank"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
          "model_max_length"),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
]  # fmt: skip
NAMED: dict[str, Any] = {name: size for size, names in SIZES for name in names.split()}
NAMED |= {"bos_token_id": 1, "eos_token_id": 2, "use_sliding_window": True, "is_decoder": True}
NAMED |= {
    "use_cache": True,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
    "use_mamba_kernels": False,
}
# What field names cannot tell.
INDEXED = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": D, "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}  # fmt: skip
MIXED = ["linear_attention", "full_attention"] * (LAYERS // 2)
# They clamp time steps in a prompt and not in a step, so that a text that was rewound is another.
# This clamps nothing, and starts time steps at what they are likely to be without it.
UNCLAMPED = {"time_step_min": 1e-30, "time_step_floor": 0.02}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        "text_config": {"head_dim": 2 * D, "sliding_window": WINDOW},
    },
    "dots3_note_text": {"head_dim": 2 * D, "sliding_window": WINDOW},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "longcat_flash": {"head_dim": D // 2, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"v_head_dim": D // 2},
    "nemotron_h": UNCLAMPED,
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "reformer": {"axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB},
    "xlm": {"emb_dim": 64, "causal": True},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128,
              "num_key_value_heads": HEADS},
    "zamba2": {"attention_hidden_size": 128, "num_key_value_heads": HEADS, "head_dim": 32}
    | UNCLAMPED,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# A model as initialised repeats one token at once: embeddings and other matrices are scaled by the
# first of these that makes tokens vary and does not blow up rounding.
SCALES = [(3, 10), (3, 5), (2, 3), (5, 15), (10, 20), (1, 2), (30, 50)]
# What forwards call a cache: "past_key_values" before transformers 5.24.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
NEW = 16  # tokens
CALM = 3e-4  # what rounding the weights may do to logits, in standard deviations of these
SWITCH = 48  # positions that a scaled rope was made for
ROPES: dict[str, dict[str, float]] = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=SWITCH),
    "longrope": dict(factor=4.0, original_max_position_embeddings=SWITCH),
    "llama3": dict(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=SWITCH,
    ),
    "proportional": dict(factor=4.0),
}  # fmt: skip


class NotComparable(Exception):
    """Why plain generate cannot be compared with."""


def types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments for the class of `default` that make it tiny."""
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = shrunk(value)
        elif name in NAMED:
            found[name] = NAMED[name]
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            if len(kinds) > 1:  # one kind follows from the number of layers
                found[name] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    if "qk_rope_head_dim" in found:  # head_dim, where there is one, follows from it
        found.pop("head_dim", None)
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a type; `changes` as its class takes them."""
    options = shrunk(AutoConfig.for_model(kind))
    for name, value in (EXCEPTIONS.get(kind, {}) | changes).items():
        inner = options.get(name)
        options[name] = inner | value if isinstance(inner, dict) else value
    return AutoConfig.for_model(kind, **options)


def build(config: PreTrainedConfig, implementation: str, scale: tuple[float, float]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float()
    embeddings, others = scale
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(embeddings if "embed" in name or "lm_head" in name else others)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model.eval()


def rope_config(kind: str, rope: str) -> Any:
    """The tiny config with this rope; it is scaled from position SWITCH on."""
    changes: dict[str, Any] = {"max_position_embeddings": 4 * SWITCH}
    if rope == "dynamic":
        changes["max_position_embeddings"] = SWITCH
    own = tiny_config(kind)
    if hasattr(own, "original_max_position_embeddings"):
        changes["original_max_position_embeddings"] = SWITCH
    whole = own.rope_parameters
    kept = whole.get("full_attention", whole)
    half = int(head_size(own) * kept.get("partial_rotary_factor", 1.0)) // 2
    scaled = kept | ROPES[rope] | {"rope_type": rope}
    if rope == "longrope":
        scaled["short_factor"] = [1 + 0.1 * i for i in range(half)]
        scaled["long_factor"] = [2 + 0.7 * i for i in range(half)]
        if kind == "phimoe":
            scaled |= {"short_mscale": 1.0, "long_mscale": 1.2}
    changes["rope_parameters"] = whole | {"full_attention": scaled} if kept is not whole else scaled
    return tiny_config(kind, **changes)


def ids(length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (1, length), generator=generator)


class Forced(LogitsProcessor):
    """Makes plain `generate` write a given text."""

    def __init__(self, text_bl: Tensor) -> None:
        self.text_bl = text_bl

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.text_bl[:, input_ids.shape[1], None], 0)


@dataclass
class Run:
    """What `generate` gave: tokens [b, t] and the model's own logits [b, t, v]."""

    tokens_bt: Tensor
    logits_btv: Tensor


def _remembers(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward hook: phi4_multimodal drops its cache and goes on with the last token alone."""
    cache, positions = kwargs.get(CACHE), kwargs.get("position_ids")
    if cache is None and positions is not None and positions[..., 0].min() > 0:
        first = int(positions[..., 0].min())
        raise NotComparable(f"plain generate forgets all tokens before position {first}")


def generated(model: Any, ids_bl: Tensor, new: int = NEW, **options: Any) -> Run:
    options = {"do_sample": False, "max_new_tokens": new} | options
    with torch.no_grad():
        model(ids(1))  # a dynamic rope keeps the frequencies of the longest text until a short one
    out = model.generate(ids_bl, output_logits=True, return_dict_in_generate=True, **options)
    return Run(out.sequences[:, ids_bl.shape[1] :], torch.stack(out.logits, 1).float())


def spread(logits: Tensor) -> float:
    return float(logits[logits.isfinite()].std()) or 1.0


def distance(expected: Tensor, actual: Tensor) -> float:
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("inf")
    return float((expected - actual)[finite].abs().max()) / spread(expected)


@dataclass
class Lively:
    """A model whose greedy tokens vary, and what plain `generate` gives on it.

    Attributes:
        allowed: standard deviations by which another order of sums may change its logits.
        whole: one forward over a text gives the logits that `generate` had on the way.
    """

    model: Any
    allowed: float = 1e-3
    whole: bool = False
    _plain: dict[tuple, Run] = field(default_factory=dict)

    def plain(self, ids_bl: Tensor, new: int = NEW) -> Run:
        """What plain `generate` makes of prompts of one length."""
        key = (new, *map(tuple, ids_bl.tolist()))
        if key not in self._plain:
            self._plain[key] = self._generated(ids_bl, new)
        return self._plain[key]

    def on(self, text_bl: Tensor, start: int) -> Tensor:
        """Logits [b, t, v] that it has before each token of a text from `start` on."""
        if not self.whole:
            new, forced = text_bl.shape[1] - start, [Forced(text_bl)]
            return self._generated(text_bl[:, :start], new, logits_processor=forced).logits_btv
        with torch.no_grad():
            return self.model(text_bl, use_cache=False).logits[:, start - 1 : -1].float()

    def _generated(self, ids_bl: Tensor, new: int, **options: Any) -> Run:
        hook = self.model.register_forward_pre_hook(_remembers, with_kwargs=True)
        try:
            return generated(self.model, ids_bl, new, **options)
        finally:
            hook.remove()


def lively(config: PreTrainedConfig, implementation: str) -> Lively:
    """The tiny model of a config, with the first weights that make it lively.

    Raises:
        NotComparable: plain `generate` is not lively, finite, calm or repeatable.
    """
    why = ""
    for ngram in (0, 2, 1):  # a model that repeats itself whatever its weights is kept from it
        for scale in SCALES:
            model = build(config, implementation, scale)
            model.generation_config.no_repeat_ngram_size = ngram
            found = Lively(model)
            why = _dull(found) or _excited(found)
            if not why:
                return found
    raise NotComparable(why)


def _dull(tried: Lively) -> str:
    """Why nothing could be learnt from this model's tokens; empty if much can."""
    prompt = ids(40)
    other = prompt.clone()
    other[0, -14:-2] = ids(12, seed=9)  # inside of a window from the last token, and not the last
    run = tried.plain(prompt)
    if run.logits_btv.isnan().any() or not run.logits_btv.isfinite().any(-1).all():
        return "plain logits are not finite"
    different = len(set(run.tokens_bt[0].tolist()))
    if different < 6:
        return f"plain greedy gives {different} different tokens"
    changed = tried.plain(other)
    moved = distance(run.logits_btv[:, 0], changed.logits_btv[:, 0])
    if torch.equal(run.tokens_bt, changed.tokens_bt) or moved < 0.05:
        return "plain tokens hardly depend on the prompt"
    return ""


def _excited(tried: Lively) -> str:
    """Why its logits depend on rounding, that of weights to seven digits; empty if they do not.
    Sets `allowed` and `whole`."""
    prompt = ids(40)
    run = tried.plain(prompt)
    text = torch.cat([prompt, run.tokens_bt], 1)
    if distance(run.logits_btv, tried.on(text, 40)) > 1e-6:
        raise NotComparable("plain generate gives other logits each time")
    tried.whole = True
    try:
        tried.whole = distance(run.logits_btv, tried.on(text, 40)) < CALM
    except Exception:  # a forward without a cache is not what is tested
        tried.whole = False
    weights = [weight for weight in tried.model.parameters() if weight.dim() > 1]
    kept = [weight.data.clone() for weight in weights]
    for weight in weights:
        weight.data *= 1 + 1e-7 * torch.randn_like(weight)
    noise = distance(run.logits_btv, tried.on(text, 40))
    for weight, data in zip(weights, kept, strict=True):
        weight.data.copy_(data)
    tried.allowed = max(tried.allowed, 30 * noise)
    return (
        f"a rounding of the weights changes its logits by {noise:.2g} std" if noise > CALM else ""
    )
