"""kvtools as an attention backend of SGLang: what requests share in its pools is read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_disagg, get_exec, get_parallel
from torch import Tensor

from ..ops.attention import limits, tree_attention
from ..ops.quant import KVPages
from .interface import check_sglang, refuse
from .steps import Step, step_from_block_table

MODES = (ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("nhd", "hnd")
REMEDY = "Choose another --attention-backend"


@dataclass(frozen=True)
class Metadata:
    """What all layers of one forward read.

    Attributes:
        step: over the pool; or over its part for layers that see all, where it has two.
        window: over the pool's part for layers with a sliding window, None where it has no such.
        window_loc: the slots there of this forward's tokens.
    """

    step: Step
    window: Step | None = None
    window_loc: Tensor | None = None


class Backend(AttentionBackend):
    """Causal self-attention of decoders over unquantised pools, on any device.

    Keys and values are written by the pool's own `set_kv_buffer`, so that prefill and decode may
    have different backends. Tables are read by the host, once per forward, so a forward cannot be
    captured as a CUDA graph.

    Raises:
        NotImplementedError: SGLang was asked for what this does not do; all of it is named.
        RuntimeError: this SGLang's interface is not the one that kvtools was written for.
    """

    def __init__(self, runner: Any) -> None:
        check_sglang()
        super().__init__()
        self._requests = runner.req_to_token_pool
        self._pool = runner.token_to_kv_pool
        layers = [x for x in runner.model.modules() if isinstance(x, RadixAttention)]
        refuse(_of_runner(runner) | _of_pool(self._pool) | _of_layers(layers), "SGLang", REMEDY)
        self._windows = isinstance(self._pool, SWAKVPool) and self._pool.swa_layer_nums > 0
        self._limits = {}
        if layers:
            heads = layers[0].tp_k_head_num
            group = layers[0].tp_q_head_num // heads
            self._limits = limits(torch.device(runner.device), heads, group)
        self._pages: dict[int, tuple[Tensor, Tensor, KVPages]] = {}

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Make the `Metadata` of a forward.

        Raises:
            NotImplementedError: a CUDA graph is captured, or the forward is of a kind that this
                does not do.
            IndexError, ValueError: a request, a slot or a length is none that the pools have.
                Nothing was written.
        """
        if in_capture:
            _no_graphs()
        batch = forward_batch
        self.forward_metadata = None  # should this fail, nobody reads that of another forward
        if batch.forward_mode.is_idle():
            return
        if batch.forward_mode not in MODES:
            raise NotImplementedError(
                f"kvtools' attention does not do forwards of SGLang's mode "
                f"{batch.forward_mode.name}. {REMEDY}"
            )
        lens = (batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu).cpu()
        counts = torch.ones_like(lens)
        if not batch.forward_mode.is_decode():
            counts = batch.extend_seq_lens_cpu
            counts = torch.as_tensor(batch.extend_seq_lens if counts is None else counts).cpu()
        start = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
        slots = self._slots_of(batch.req_pool_indices, lens)
        written = batch.out_cache_loc
        if not self._windows:
            step = self._step(slots, lens, start, written, self._pool)
            self.forward_metadata = Metadata(step)
            return
        full, window = self._pool.full_kv_pool, self._pool.swa_kv_pool
        step = self._step(slots, lens, start, written, full)
        # Of slots that no row reads, the table may hold any.
        known = slots.clamp(0, self._pool.full_to_swa_index_mapping.shape[0] - 1)
        there = self._pool.translate_loc_from_full_to_swa(known)
        window_loc = self._pool.translate_loc_from_full_to_swa(written)
        self.forward_metadata = Metadata(
            step, self._step(there, lens, start, window_loc, window), window_loc
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        _no_graphs()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of a row that only fills up a batch: one, in the slot that SGLang keeps for it."""
        return 1

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        *,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            q: [tokens, Hq * D] or [tokens, Hq, D]; rows past the forward's tokens only fill it up.
            k, v: [tokens, Hkv, D], None where another layer has written them.
            layer: its numbers of heads, scale, window and soft cap.
            forward_batch: that the metadata was made for.
            save_kv_cache: write k and v into the pool first.
            sinks: [Hq] logits.
            **others: what models pass to some backends only; refused unless None.

        Returns:
            [tokens, Hq * D], zero in rows that fill up.
        """
        asked = sorted(name for name, value in others.items() if value is not None)
        if asked:
            raise NotImplementedError(
                f"kvtools' attention does not take {', '.join(asked)} of layer {layer.layer_id}. "
                f"{REMEDY}"
            )
        metadata = self.forward_metadata
        if metadata is None:
            raise RuntimeError(
                "kvtools' attention has no metadata of this forward: init_forward_metadata was not "
                "called, or it failed"
            )
        step = metadata.step
        if self._windows and self._pool.layers_mapping[layer.layer_id][1]:
            step = metadata.window
        if save_kv_cache and k is not None:
            loc = KVWriteLoc.for_batch(forward_batch, swa_loc=metadata.window_loc)
            self._pool.set_kv_buffer(layer, loc, k, v)
        q_thd = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out_thd, _ = tree_attention(
            q_thd[: step.tokens],
            step.position_t,
            self._pages_of(layer.layer_id),
            step.plan,
            scale=layer.scaling,
            softcap=layer.logit_cap or 0.0,
            sliding=max(layer.sliding_window_size + 1, 0),  # SGLang does not count the query's own
            sink_h=sinks,
        )
        if step.tokens < len(q_thd):
            out_thd = torch.cat([out_thd, q_thd.new_zeros(q_thd[step.tokens :].shape)])
        return out_thd.flatten(1)

    forward_extend = forward_decode

    def _slots_of(self, requests: Tensor, lens: Tensor) -> Tensor:
        """[rows, pages] first slots of the rows' pages; past a row's end they may be any."""
        table = self._requests.req_to_token
        count, longest = table.shape
        rows = requests.cpu()
        for row in ((rows < 0) | (rows >= count)).nonzero().flatten().tolist():
            raise IndexError(
                f"req_pool_indices: row {row} is request {rows[row]}, req_to_token has {count}"
            )
        for row in (lens > longest).nonzero().flatten().tolist():
            raise ValueError(
                f"seq_lens: row {row} has {lens[row]} tokens, req_to_token holds {longest} of each"
            )
        longest = int(lens.max()) if len(lens) else 0
        return table[:, : longest : self._pool.page_size].index_select(0, requests)

    def _step(
        self, slots: Tensor, lens: Tensor, start: Tensor, written: Tensor, pool: MHATokenToKVPool
    ) -> Step:
        size, page = pool.size + pool.page_size, pool.page_size
        table = slots
        if page > 1:
            # A page that does not begin where a page should is as wrong as one that does not exist.
            table = torch.where(slots % page == 0, slots // page, -1)
        step = step_from_block_table(table, lens, start, page, blocks=size // page, **self._limits)
        there = written.cpu()
        for token in ((there < 0) | (there >= size)).nonzero().flatten().tolist():
            raise IndexError(
                f"out_cache_loc: token {token} goes to slot {there[token]}, the pool has {size}"
            )
        return step

    def _pages_of(self, layer: int) -> KVPages:
        # Asked each time: SGLang waits here for keys that it still loads.
        k, v = self._pool.get_kv_buffer(layer)
        known = self._pages.get(layer)
        if known is None or known[0] is not k or known[1] is not v:
            size = self._pool.page_size
            pages = KVPages(*(x if x.dim() == 4 else _by_page(x, size) for x in (k, v)))
            known = self._pages[layer] = k, v, pages
        return known[2]


def _by_page(x_shd: Tensor, size: int) -> Tensor:
    """A view [pages, heads, size, D] of slots."""
    whole = x_shd.shape[0] // size * size
    return x_shd[:whole].unflatten(0, (-1, size)).transpose(1, 2)


def _no_graphs() -> None:
    raise NotImplementedError(
        "kvtools' attention cannot be captured as a CUDA graph: its plan is made by the host. Add "
        "--disable-cuda-graph"
    )


def _of_runner(runner: Any) -> dict[str, bool]:
    parallel, model = get_parallel(), runner.model_config
    # On a CPU a graph is captured only if torch.compile is asked for.
    if torch.device(runner.device).type == "cuda" and not cuda_graph_fully_disabled():
        _no_graphs()
    return {
        "MLA (multi-head latent attention)": runner.use_mla_backend,
        "attention to an encoder": model.is_encoder_decoder,
        "attention in chunks": model.attention_chunk_size is not None,
        "speculative decoding": not runner.spec_algorithm.is_none() or runner.is_draft_worker,
        "HiSparse": runner.enable_hisparse,
        "context parallelism": parallel.dcp_enabled or parallel.attn_cp_size > 1,
        "two-batch overlap": get_exec().overlap.enable_two_batch_overlap,
        "PD multiplexing": get_disagg().enable_pdmux,
        "diffusion language models": runner.server_args.dllm_algorithm is not None,
    }  # fmt: skip


def _of_pool(pool: Any) -> dict[str, bool]:
    pools = [pool.full_kv_pool, pool.swa_kv_pool] if type(pool) is SWAKVPool else [pool]
    found = {}
    for each in pools:
        # Others lay tokens out in ways of their own, or hold none.
        is_plain = type(each) is MHATokenToKVPool
        found[f"a pool of {type(each).__name__}"] = not is_plain
        if is_plain:
            dtype, layout = each.dtype, each.kv_cache_layout
            found |= {
                f"quantised pools ({dtype})": each.is_quantized_kv_cache or dtype not in DTYPES,
                f"the pool layout {layout}": layout not in LAYOUTS,
                "values of another head size than keys": each.head_dim != each.v_head_dim,
            }
    return found


def _of_layers(layers: Sequence[RadixAttention]) -> dict[str, bool]:
    found = {}
    for layer in layers:
        asked = {
            "attention to an encoder": layer.is_cross_attention,
            f"{layer.attn_type.value} attention": layer.attn_type != AttentionType.DECODER,
            f"position encoding {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
            f"soft caps by {layer.logit_capping_method}": (
                bool(layer.logit_cap) and layer.logit_capping_method != "tanh"
            ),
            "values of another head size than keys": layer.v_head_dim != layer.qk_head_dim,
            "temperatures by length": layer.xai_temperature_len > 0,
        }
        for name in (x for x, is_asked in asked.items() if is_asked):
            found.setdefault(name, layer.layer_id)
    return {f"{name} (layer {number})": True for name, number in found.items()}
