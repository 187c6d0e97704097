"""kvtools as an attention backend of SGLang: what requests share in its pools is read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.cuda_graph_config import Backend as Graph
from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_disagg, get_exec, get_parallel
from torch import Tensor

from ..ops.attention import limits, tree_attention
from ..ops.quant import KVPages
from .interface import check_sglang, refuse
from .steps import Graphs, Step, step_from_block_table

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
    have different backends. Tables are read by the host, once per forward, before what a CUDA graph
    has captured runs.

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
        self._pools = [self._pool]
        if self._windows:
            self._pools = [self._pool.full_kv_pool, self._pool.swa_kv_pool]
        self._graphs: list[Graphs] = []  # of each pool
        self._limits = {}
        if layers:
            heads = layers[0].tp_k_head_num
            group = layers[0].tp_q_head_num // heads
            self._limits = limits(torch.device(runner.device), heads, group)
        self._pages: dict[int, tuple[Tensor, Tensor, KVPages]] = {}

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Make the `Metadata` of a forward: that of a graph of as many requests, if there is one.

        Raises:
            NotImplementedError: the forward, or one that is captured as a CUDA graph, is of a kind
                that this does not do.
            IndexError, ValueError: a request, a slot or a length is none that the pools have.
                Nothing was written.
        """
        batch, mode = forward_batch, forward_batch.forward_mode
        self.forward_metadata = None  # should this fail, nobody reads that of another forward
        if mode.is_idle():
            return
        if mode not in MODES or (in_capture and not mode.is_decode()):
            what = "CUDA graphs of forwards" if in_capture else "forwards"
            raise NotImplementedError(
                f"kvtools' attention does not do {what} of SGLang's mode {mode.name}. {REMEDY}"
            )
        lens = (batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu).cpu()
        if in_capture:
            for graphs in self._graphs:
                graphs.hold(len(lens))
        start = torch.arange(len(lens) + 1)
        if not mode.is_decode():
            counts = batch.extend_seq_lens_cpu
            counts = torch.as_tensor(batch.extend_seq_lens if counts is None else counts).cpu()
            start = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
        requests, written, table = batch.req_pool_indices, batch.out_cache_loc, self._table
        self._check(requests, lens)
        if not self._windows and self._pool.page_size == 1 and table.device.type == "cpu":
            # The host has the table, and pages are slots: rows need not be copied together.
            step = self._step(table, lens, start, written, 0, requests)
            self.forward_metadata = Metadata(step)
            return
        longest = int(lens.max()) if len(lens) else 0
        slots = table[:, : longest : self._pool.page_size].index_select(0, requests)
        step = self._step(slots, lens, start, written, 0)
        if not self._windows:
            self.forward_metadata = Metadata(step)
            return
        # Of slots that no row reads, the table may hold any.
        known = slots.clamp(0, self._pool.full_to_swa_index_mapping.shape[0] - 1)
        there = self._pool.translate_loc_from_full_to_swa(known)
        window_loc = self._pool.translate_loc_from_full_to_swa(written)
        window = self._step(there, lens, start, window_loc, 1)
        if self._graphs and mode.is_decode() and len(lens) in self._graphs[1]:
            held = self._window_loc[: len(lens)]
            held[: len(written)] = window_loc
            held[len(written) :] = 0  # what fills up a batch is written where nobody reads
            window_loc = held
        self.forward_metadata = Metadata(step, window, window_loc)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make room for graphs of up to `max_bs` requests: 4 bytes for each page of each."""
        longest, device = self._table.shape[1], self._table.device
        self._graphs = [
            Graphs(-(-longest // x.page_size), x.page_size, _pages(x), device, **self._limits)
            for x in self._pools
        ]
        with torch.inference_mode(False):
            self._window_loc = torch.zeros(max_bs, dtype=torch.int64, device=device)

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

    @property
    def _table(self) -> Tensor:
        """[requests, tokens] slots; past a request's end they may be any."""
        return self._requests.req_to_token

    def _check(self, requests: Tensor, lens: Tensor) -> None:
        count, longest = self._table.shape
        for row, request in _outside(requests, count):
            raise IndexError(
                f"req_pool_indices: row {row} is request {request}, req_to_token has {count}"
            )
        for row, n in _outside(lens, longest + 1):
            raise ValueError(
                f"seq_lens: row {row} has {n} tokens, req_to_token holds {longest} of each"
            )

    def _step(
        self, slots: Tensor, lens: Tensor, start: Tensor, written: Tensor, which: int,
        index: Tensor | None = None,
    ) -> Step:  # fmt: skip
        """Over one of the pools. `slots`: [rows, pages] the first of each of the rows' pages."""
        pool, table = self._pools[which], slots
        page, blocks = pool.page_size, _pages(pool)
        if page > 1:
            # A page that does not begin where a page should is as wrong as one that does not exist.
            is_power = page & (page - 1) == 0  # then shifts, as divisions take long
            table = slots >> page.bit_length() - 1 if is_power else slots // page
            table = table.where(table * page == slots, -1)
        graphs = self._graphs[which] if self._graphs else None
        step = step_from_block_table(
            table, lens, start, page, blocks=blocks, graphs=graphs, index=index, **self._limits
        )
        for token, slot in _outside(written, pool.size + page):
            raise IndexError(
                f"out_cache_loc: token {token} goes to slot {slot}, the pool has {pool.size + page}"
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


def _pages(pool: MHATokenToKVPool) -> int:
    return (pool.size + pool.page_size) // pool.page_size


def _outside(x: Tensor, end: int) -> list[tuple[int, int]]:
    """Where `x` is below 0, or not below `end`, and what it is there."""
    values = x.cpu().numpy()
    if not len(values) or (values.min() >= 0 and values.max() < end):
        return []
    return [(i, int(values[i])) for i in np.flatnonzero((values < 0) | (values >= end))]


def _of_runner(runner: Any) -> dict[str, bool]:
    parallel, model = get_parallel(), runner.model_config
    return {
        # By default attention stays outside of a prefill's graphs.
        "prefill as one CUDA graph (--cuda-graph-backend-prefill full)": (
            check_cuda_graph_backend(Phase.PREFILL, Graph.FULL)
        ),
        "torch.compile (--enable-torch-compile)": get_exec().graph.enable_torch_compile,
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
