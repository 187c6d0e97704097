"""What kvtools counts on in vLLM, so that another version says what changed."""

import inspect
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


def check_interface() -> None:
    """Raise RuntimeError, saying what differs, unless vLLM has the interface that is used."""
    differs = []
    for (module, name), expected in CALLS.items():
        found = _look_up(module, name)
        names = None if found is None else tuple(inspect.signature(found).parameters)
        if names != expected:
            differs.append(f"{name} takes {_list(names)}, not {_list(expected)}")
    for (module, name), expected in FIELDS.items():
        found = _look_up(module, name)
        missing = expected - {x.name for x in fields(found)} if found else expected
        if missing:
            differs.append(f"{name} has no {_list(sorted(missing))}")
    if differs:
        raise RuntimeError(
            f"kvtools' attention was written for vLLM {WRITTEN_FOR}, and vLLM {installed()} "
            f"differs: {'; '.join(differs)}. Unset KVTOOLS_VLLM to run without it"
        )


def installed() -> str:
    """The version of the distribution that brought vLLM, whatever its name."""
    names = packages_distributions().get("vllm", [])
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
