"""kvtools as an attention backend of vLLM: what rows share in its block tables is read once."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
)

from ..ops.attention import limits, tree_attention
from ..ops.quant import KVPages, append_kv, width
from . import SETTING
from .interface import refuse
from .steps import Graphs, Step, step_from_block_table

# What kvtools stores where vLLM is asked for a scale per token and head: formats of its own.
FORMATS = {f"{x}_per_token_head": x for x in ("int8", "int4", "fp8")}
SCALES = 4  # bytes of a token and head: fp16 of the key, fp16 of the value


class Backend(AttentionBackend):
    """Causal self-attention of decoders, on any device."""

    # Keys and values are written by `Attention.do_kv_cache_update`, before `forward`.
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FORMATS]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up among its own

    @staticmethod
    def get_impl_cls() -> type["Attention"]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # All are views; a head's slots are best read one after another.
        best = KVCacheLayout.LBHNC
        return best, *(x for x in KVCacheLayout if x is not best)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Have vLLM make its blocks as small as what they hold."""
        format = FORMATS.get(spec.kv_quant_mode.name.lower())
        if format is None:
            return spec
        return replace(spec, state_content_bytes=2 * width(format, spec.head_size) + SCALES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # the plan is made of the host's


class Builder(AttentionMetadataBuilder[Step]):
    """Makes one `Step` of a batch, for all layers of a cache group."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        """Graphs of decode steps. Those of drafts, and of two halves of a batch at once, are others
        than have been tried: attention stays outside of graphs there."""
        parallel = vllm_config.parallel_config
        if vllm_config.speculative_config is not None or parallel.use_ubatching:
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        kind = type(kv_cache_spec)
        _refuse(
            {
                f"a cache of {kind.__name__}": kind not in (FullAttentionSpec, SlidingWindowSpec),
                "values of another head size than keys": (
                    kv_cache_spec.head_size_v != kv_cache_spec.head_size
                ),
            }
        )
        layers = vllm_config.compilation_config.static_forward_context
        self._layer = layers[layer_names[0]]
        group = self._layer.impl.num_heads // kv_cache_spec.num_kv_heads
        self._limits = limits(device, kv_cache_spec.num_kv_heads, group)
        self._graphs: Graphs | None = None

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """The step that graphs of as many requests are captured with; `build` refills it."""
        batch = common_attn_metadata
        if batch.max_query_len != 1:
            raise NotImplementedError(
                "kvtools' attention is captured in decode steps only: choose the cudagraph_mode "
                "FULL_AND_PIECEWISE or FULL_DECODE_ONLY"
            )
        self._hold(batch)
        return self.build(0, batch)

    def _hold(self, batch: CommonAttentionMetadata) -> None:
        if self._graphs is None:
            width, block = batch.block_table_tensor.shape[1], self.kv_cache_spec.block_size
            blocks = self._layer.kv_cache.shape[0]
            self._graphs = Graphs(width, block, blocks, self.device, **self._limits)
        self._graphs.hold(batch.num_reqs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError("kvtools' attention is causal; this batch of vLLM's is not")
        cache, rows = self._layer.kv_cache, batch.num_reqs
        compiled = self.vllm_config.compilation_config
        if (
            batch.max_query_len == 1
            and cache.dim() == 4
            and compiled.cudagraph_mode.has_full_cudagraphs()
            and rows in compiled.cudagraph_capture_sizes
        ):
            self._hold(batch)  # so that what warms up runs the kernels that are then captured
        return step_from_block_table(
            batch.block_table_tensor[:rows],
            batch.seq_lens[:rows],
            batch.query_start_loc_cpu[: rows + 1],
            self.kv_cache_spec.block_size,
            blocks=cache.shape[0] if cache.dim() == 4 else None,
            graphs=self._graphs,
            **self._limits,
        )


class Attention(AttentionImpl[Step]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        config = get_current_vllm_config()
        _refuse(
            {
                "MLA (multi-head latent attention)": "kv_lora_rank" in others,
                f"{AttentionType(attn_type).value} attention": attn_type != AttentionType.DECODER,
                "ALiBi": alibi_slopes is not None,
                f"kv_cache_dtype={kv_cache_dtype!r}": (
                    kv_cache_dtype not in Backend.supported_kv_cache_dtypes
                ),
                f"kv_cache_dtype={kv_cache_dtype!r} of heads of {head_size}, no multiple of 8": (
                    kv_cache_dtype in FORMATS and head_size % 8 > 0
                ),
                "layers that share another layer's keys and values": (
                    kv_sharing_target_layer_name is not None
                ),
                f"the layer's arguments {', '.join(sorted(others))}": (
                    bool(others) and "kv_lora_rank" not in others
                ),
            }
            | _of_config(config)
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window or 0
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self._moves = config.kv_transfer_config is not None
        self._cache: Tensor | None = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write a step's keys and values; a slot of -1 is none."""
        t = slot_mapping.shape[0]
        append_kv(key[:t], value[:t], slot_mapping, self._pages_of(kv_cache))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of [tokens, heads, D] into `output`; zeros where vLLM only warms up."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("kvtools' attention does not quantise its output")
        if attn_metadata is None:
            return output.zero_()
        t = attn_metadata.tokens
        output[:t], _ = tree_attention(
            query[:t],
            attn_metadata.position_t,
            self._pages_of(kv_cache),
            attn_metadata.plan,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            sliding=self.sliding_window,
            sink_h=self.sinks,
        )
        return output

    def _pages_of(self, kv_cache: Tensor) -> KVPages:
        if self._cache is not kv_cache:
            self._cache = kv_cache
            format = FORMATS.get(self.kv_cache_dtype, "none")
            self._pages = pages_of(kv_cache, format, self.head_size, self._moves)
        return self._pages


def pages_of(kv_cache: Tensor, format: str, d: int, moves: bool = False) -> KVPages:
    """Views of a cache of vLLM's, [blocks, Hkv, block, content], content being a token's key, its
    value and, where they are quantised, both scales, of any 8-bit dtype.

    Where the slots of a head lie together, so do its keys, its values and its scales, which is
    faster to read, unless it `moves`: others, who copy tokens, count on them being whole.
    """
    cells = kv_cache if format == "none" else kv_cache.view(torch.uint8)
    sizes = [width(format, d)] * 2 + [SCALES] * (format != "none")
    slots, content = cells.shape[2:]
    if cells.stride(2) == content and not moves:
        parts = cells.flatten(2).split([slots * x for x in sizes], -1)
        k, v, *scale = (x.unflatten(-1, (slots, -1)) for x in parts)
    else:
        k, v, *scale = cells.split(sizes, -1)
    if format == "fp8":
        k, v = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
    return KVPages(k, v, *(y for x in scale for y in x.view(torch.float16).unbind(-1)))


def _of_config(config: VllmConfig) -> dict[str, bool]:
    """What vLLM was asked for that kvtools does not do. vLLM asks backends itself, but on a CPU."""
    model, parallel = config.model_config, config.parallel_config
    speculative = config.speculative_config
    return {
        f"dtype {model.dtype}": model.dtype not in Backend.supported_dtypes,
        "attention to later tokens within a prompt (prefix LM)": model.is_mm_prefix_lm,
        "reference sliding windows": model.rswa_window is not None,
        "attention that is not causal": config.attention_config.use_non_causal,
        "batch invariance": envs.VLLM_BATCH_INVARIANT,
        "context parallelism": max(
            parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        ) > 1,
        "adaptive verification of drafts": (
            speculative is not None and speculative.enable_adaptive_verification
        ),
    }  # fmt: skip


def _refuse(found: dict[str, bool]) -> None:
    refuse(found, "vLLM", f"Unset {SETTING}")
