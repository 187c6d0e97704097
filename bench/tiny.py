"""A tiny lively model of any causal type of transformers, from the type's default config."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
        "sliding_window_pattern"),
    (1, "n_group topk_group num_expert_group num_nextn_predict_layers"),
    (0, "pad_token_id num_kv_shared_layers first_k_dense_replace"),
    (D, "head_dim swa_head_dim v_head_dim kv_channels index_head_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim dim_head global_head_dim "
        "laurel_rank query_pre_attn_scalar d_head"),
    (D // 2, "qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (WINDOW, "sliding_window sliding_window_size window_size attention_chunk_size"),
    (2 * WINDOW, "local_attention q_lora_rank kv_lora_rank index_topk o_lora_rank"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
          "model_max_length"),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
]  # fmt: skip
NAMED: dict[str, Any] = {name: size for size, names in SIZES for name in names.split()}
NAMED |= {"bos_token_id": 1, "eos_token_id": 2, "use_sliding_window": True, "is_decoder": True}
NAMED |= {"use_cache": True, "tie_word_embeddings": False, "is_encoder_decoder": False, "use_mamba_kernels": False}
# What field names cannot tell.
MIXED = ["linear_attention", "full_attention"] * (LAYERS // 2)
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note_text": {"head_dim": 2 * D, "sliding_window": WINDOW},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "longcat_flash": {"head_dim": D // 2, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": D, "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB},
    "xlm": {"emb_dim": 64, "causal": True},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128,
              "num_key_value_heads": HEADS},
    "zamba2": {"attention_hidden_size": 128, "num_key_value_heads": HEADS, "head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# A model as initialised repeats one token at once: (embeddings, other matrices) are scaled by
# these, the first that makes tokens vary and does not blow up rounding.
SCALES = [(3, 10), (3, 5), (2, 3), (1, 2), (10, 20), (1, 1), (0.5, 0.7), (30, 50)]


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
    try:
        default = AutoConfig.for_model(kind)
        options = shrunk(default)
    except Exception:  # a type whose default is none
        if kind not in EXCEPTIONS:
            raise
        options = {}
    return AutoConfig.for_model(kind, **{**options, **EXCEPTIONS.get(kind, {}), **changes})


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
