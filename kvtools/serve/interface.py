"""What kvtools counts on in vLLM and SGLang, so that another version says what changed."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import packages_distributions, version

WRITTEN_FOR = "0.31 and 0.32"
BACKEND = "vllm.v1.attention.backend"
SAMPLING = "vllm.v1.sample.logits_processor"
# Parameters, all of them and in this order: vLLM passes them by position.
CALLS = {
    (BACKEND, "AttentionBackend.customize_spec"): ("spec",),
    (BACKEND, "AttentionImpl.__init__"): (
        "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window",
        "kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name",
    ),
    (BACKEND, "AttentionImpl.forward"): (
        "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
        "output_scale", "output_block_scale",
    ),
    (BACKEND, "AttentionMetadataBuilder.__init__"): (
        "self", "kv_cache_spec", "layer_names", "vllm_config", "device",
    ),
    (BACKEND, "AttentionMetadataBuilder.build"): (
        "self", "common_prefix_len", "common_attn_metadata", "fast_build",
    ),
    (BACKEND, "AttentionMetadataBuilder.get_cudagraph_support"): ("vllm_config", "kv_cache_spec"),
    (BACKEND, "AttentionMetadataBuilder.build_for_cudagraph_capture"): (
        "self", "common_attn_metadata",
    ),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.do_kv_cache_update"): (
        "self", "layer", "key", "value", "kv_cache", "slot_mapping",
    ),
    ("vllm.v1.attention.backends.registry", "register_backend"): (
        "backend", "class_path", "is_mamba",
    ),
    (SAMPLING, "LogitsProcessor.__init__"): ("self", "vllm_config", "device", "is_pin_memory"),
    (SAMPLING, "LogitsProcessor.apply"): ("self", "logits"),
    (SAMPLING, "LogitsProcessor.update_state"): ("self", "batch_update"),
    (SAMPLING, "process_dict_updates"): ("req_entries", "batch_update", "new_state"),
}  # fmt: skip
# Fields, among others.
FIELDS = {
    (BACKEND, "CommonAttentionMetadata"): {
        "query_start_loc_cpu", "seq_lens", "num_reqs", "block_table_tensor", "causal",
        "max_query_len",
    },
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec"): {
        "block_size", "num_kv_heads", "head_size", "head_size_v", "sliding_window",
        "kv_quant_mode", "state_content_bytes",
    },
    ("vllm.v1.kv_cache_interface", "SlidingWindowSpec"): {
        "block_size", "num_kv_heads", "head_size", "head_size_v", "sliding_window",
        "kv_quant_mode", "state_content_bytes",
    },
}  # fmt: skip


SGLANG = "sglang.srt"
SGLANG_CALLS = {
    (f"{SGLANG}.layers.attention.base_attn_backend", f"AttentionBackend.{name}"): ("self", *given)
    for name, given in {
        "init_forward_metadata": ("forward_batch",),
        "init_forward_metadata_out_graph": ("forward_batch", "in_capture"),
        "init_forward_metadata_in_graph": ("forward_batch",),
        "init_cuda_graph_state": ("max_bs", "max_num_tokens"),
        "get_cuda_graph_seq_len_fill_value": (),
        "forward_decode": ("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
        "forward_extend": ("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
    }.items()
} | {
    (f"{SGLANG}.layers.attention.attention_registry", "register_attention_backend"): ("name",),
    (f"{SGLANG}.model_executor.cuda_graph_config", "check_cuda_graph_backend"): (
        "phase", "backend",
    ),
    (f"{SGLANG}.layers.radix_attention", "RadixAttention.__init__"): (
        "self", "num_heads", "head_dim", "scaling", "num_kv_heads", "layer_id", "logit_cap",
        "v_head_dim", "sliding_window_size", "is_cross_attention", "pos_encoding_mode",
        "logit_capping_method", "quant_config", "attn_type", "use_irope", "prefix",
        "use_prefill_attention_wrapper",
    ),
    (f"{SGLANG}.mem_cache.memory_pool", "KVWriteLoc.for_batch"): (
        "forward_batch", "swa_loc", "full_loc",
    ),
    (f"{SGLANG}.mem_cache.memory_pool", "MHATokenToKVPool.set_kv_buffer"): (
        "self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale",
        "layer_id_override", "dcp_kv_mask",
    ),
    (f"{SGLANG}.mem_cache.memory_pool", "MHATokenToKVPool.get_kv_buffer"): ("self", "layer_id"),
    (f"{SGLANG}.mem_cache.swa_memory_pool", "SWAKVPool.set_kv_buffer"): (
        "self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale",
    ),
    (f"{SGLANG}.mem_cache.swa_memory_pool", "SWAKVPool.translate_loc_from_full_to_swa"): (
        "self", "kv_indices",
    ),
}  # fmt: skip
SGLANG_FIELDS = {
    (f"{SGLANG}.model_executor.forward_batch_info", "ForwardBatch"): {
        "forward_mode", "req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc",
        "extend_seq_lens", "extend_seq_lens_cpu",
    },
}  # fmt: skip
SAMPLER = f"{SGLANG}.layers.sampler"
SGLANG_SAMPLER_CALLS = {
    (SAMPLER, "register_sampler_backend"): ("backend", "factory"),
    (SAMPLER, "Sampler._preprocess_logits"): ("self", "logits", "sampling_info"),
    (SAMPLER, "Sampler._sample_from_probs"): (
        "self", "probs", "sampling_info", "positions", "simple_sampling_case",
    ),
    (f"{SGLANG}.sampling.sampling_batch_info", "SamplingBatchInfo.adjusted_from_schedule_batch"): (
        "self", "batch", "vocab_size",
    ),
}  # fmt: skip
SGLANG_SAMPLER_FIELDS = {
    (f"{SGLANG}.sampling.sampling_batch_info", "SamplingBatchInfo"): {
        "temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "is_all_greedy",
        "sampling_mask_batch_indices",
    },
}  # fmt: skip


def check_interface() -> None:
    """Raise RuntimeError, saying what differs, unless vLLM has the interface that is used."""
    _check(CALLS, FIELDS, f"attention was written for vLLM {WRITTEN_FOR}, and vLLM {installed()}",
           "Unset KVTOOLS_VLLM to run without it")  # fmt: skip


def check_sglang() -> None:
    """`check_interface` for SGLang's attention."""
    _check(SGLANG_CALLS, SGLANG_FIELDS,
           f"attention was written for SGLang 0.5.23, and SGLang {installed('sglang')}",
           "Choose another --attention-backend")  # fmt: skip


def check_sglang_sampler() -> None:
    """`check_interface` for SGLang's sampler."""
    _check(SGLANG_SAMPLER_CALLS, SGLANG_SAMPLER_FIELDS,
           f"sampler was written for SGLang 0.5.23, and SGLang {installed('sglang')}",
           "Choose another --sampling-backend")  # fmt: skip


def refuse(found: dict[str, bool], engine: str, remedy: str) -> None:
    """Raise NotImplementedError if any of what was found is so, naming all of it."""
    asked = [name for name, is_asked in found.items() if is_asked]
    if asked:
        raise NotImplementedError(
            f"kvtools' attention does not do {'; nor '.join(asked)}. {remedy} to run with "
            f"{engine}'s own"
        )


def _check(calls: dict, fields_of: dict, written: str, remedy: str) -> None:
    differs = []
    for (module, name), expected in calls.items():
        found = _look_up(module, name)
        names = None if found is None else _parameters(found)
        if names != expected:
            differs.append(f"{name} takes {_list(names)}, not {_list(expected)}")
    for (module, name), expected in fields_of.items():
        found = _look_up(module, name)
        missing = expected - {x.name for x in fields(found)} if found else expected
        if missing:
            differs.append(f"{name} has no {_list(sorted(missing))}")
    if differs:
        raise RuntimeError(f"kvtools' {written} differs: {'; '.join(differs)}. {remedy}")


def _parameters(call: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(call).parameters)


def installed(package: str = "vllm") -> str:
    """The version of the distribution that brought a package, whatever its name."""
    names = packages_distributions().get(package, [])
    return version(names[0]) if names else "of unknown version"


def _look_up(module: str, name: str) -> object | None:
    try:
        found = import_module(module)
    except ModuleNotFoundError:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _list(names: tuple[str, ...] | list[str] | None) -> str:
    return "nothing, as it is gone" if names is None else ", ".join(names)
