"""As much of SGLang 0.5.23 as kvtools' backend and sampler touch, for where it is not installed.

Names, signatures, layouts and arithmetic are SGLang's: `interface.check_sglang` accepts either.
"""

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch


class AttentionType(enum.Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class ForwardMode(enum.IntEnum):
    EXTEND = enum.auto()
    DECODE = enum.auto()
    MIXED = enum.auto()
    IDLE = enum.auto()
    TARGET_VERIFY = enum.auto()

    def is_decode(self):
        return self == ForwardMode.DECODE

    def is_idle(self):
        return self == ForwardMode.IDLE


@dataclass
class ForwardBatch:
    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor
    seq_lens_sum: int
    out_cache_loc_is_physical: bool = False
    seq_lens_cpu: torch.Tensor | None = None
    extend_seq_lens: torch.Tensor | None = None
    extend_seq_lens_cpu: list[int] | None = None


class RadixAttention(torch.nn.Module):
    def __init__(
        self, num_heads, head_dim, scaling, num_kv_heads, layer_id, logit_cap=0.0, v_head_dim=-1,
        sliding_window_size=-1, is_cross_attention=False, pos_encoding_mode="NONE",
        logit_capping_method="tanh", quant_config=None, attn_type=AttentionType.DECODER,
        use_irope=False, prefix="", use_prefill_attention_wrapper=True,
    ):  # fmt: skip
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.layer_id = num_heads, num_kv_heads, layer_id
        self.qk_head_dim, self.v_head_dim = head_dim, head_dim if v_head_dim == -1 else v_head_dim
        self.scaling, self.logit_cap = scaling, logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention, self.attn_type = is_cross_attention, attn_type
        self.pos_encoding_mode = pos_encoding_mode
        self.logit_capping_method = logit_capping_method
        self.xai_temperature_len = -1


class AttentionBackend:
    forward_metadata = None

    def init_forward_metadata(self, forward_batch):
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        pass

    def init_forward_metadata_in_graph(self, forward_batch):
        pass

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        raise NotImplementedError

    def get_cuda_graph_seq_len_fill_value(self):
        raise NotImplementedError

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        raise NotImplementedError

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        raise NotImplementedError

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        call = self.forward_decode if mode.is_decode() else self.forward_extend
        return call(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)


@dataclass
class KVWriteLoc:
    loc: torch.Tensor
    swa_loc: torch.Tensor | None = None
    full_loc: torch.Tensor | None = None
    physical: bool = False

    @classmethod
    def for_batch(cls, forward_batch, *, swa_loc=None, full_loc=None):
        return cls(forward_batch.out_cache_loc, swa_loc, full_loc)


class ReqToTokenPool:
    def __init__(self, size, max_context_len, device, enable_memory_saver):
        self.req_to_token = torch.zeros(size + 1, max_context_len, dtype=torch.int32)
        self.free_slots = list(range(1, size + 1))

    def alloc_rows(self, need_size):
        if need_size > len(self.free_slots):
            return None
        return [self.free_slots.pop() for _ in range(need_size)]

    def free_rows(self, indices):
        self.free_slots.extend(indices)


class MHATokenToKVPool:
    is_quantized_kv_cache = False

    def __init__(
        self, size, page_size, dtype, head_num, head_dim, layer_num, device, enable_memory_saver,
        v_head_dim=None,
    ):  # fmt: skip
        self.size, self.page_size, self.dtype, self.head_dim = size, page_size, dtype, head_dim
        self.v_head_dim, self.kv_cache_layout = v_head_dim or head_dim, "nhd"
        shape = layer_num, 2, size + page_size, head_num, head_dim
        both = torch.zeros(shape, dtype=dtype)
        self.k_buffer, self.v_buffer = ([x[i] for x in both] for i in range(2))

    def get_kv_buffer(self, layer_id):
        return self.k_buffer[layer_id], self.v_buffer[layer_id]

    def set_kv_buffer(
        self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None,
        layer_id_override=None, dcp_kv_mask=None,
    ):  # fmt: skip
        at = layer.layer_id if layer_id_override is None else layer_id_override
        loc = loc_info.loc if isinstance(loc_info, KVWriteLoc) else loc_info
        for x, new in (self.k_buffer[at], cache_k), (self.v_buffer[at], cache_v):
            if self.kv_cache_layout == "hnd":
                x[loc // self.page_size, :, loc % self.page_size] = new.to(self.dtype)
            else:
                x[loc] = new.to(self.dtype)


class SWAKVPool:
    def __init__(
        self, size, size_swa, page_size, dtype, head_num, head_dim, swa_attention_layer_ids,
        full_attention_layer_ids, device,
    ):  # fmt: skip
        self.size, self.size_swa, self.page_size = size, size_swa, page_size
        self.swa_layer_nums = len(swa_attention_layer_ids)
        sizes = dict(page_size=page_size, dtype=dtype, head_num=head_num, head_dim=head_dim,
                     device=device, enable_memory_saver=False)  # fmt: skip
        self.full_kv_pool = MHATokenToKVPool(
            size=size, layer_num=len(full_attention_layer_ids), **sizes
        )
        self.swa_kv_pool = MHATokenToKVPool(size=size_swa, layer_num=self.swa_layer_nums, **sizes)
        self.layers_mapping = {x: (i, False) for i, x in enumerate(full_attention_layer_ids)}
        self.layers_mapping |= {x: (i, True) for i, x in enumerate(swa_attention_layer_ids)}

    def register_mapping(self, full_to_swa_index_mapping):
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def translate_loc_from_full_to_swa(self, kv_indices):
        return self.full_to_swa_index_mapping[kv_indices]

    def get_kv_buffer(self, layer_id):
        at, is_swa = self.layers_mapping[layer_id]
        return (self.swa_kv_pool if is_swa else self.full_kv_pool).get_kv_buffer(at)

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=1.0, v_scale=1.0):
        at, is_swa = self.layers_mapping[layer.layer_id]
        pool = self.swa_kv_pool if is_swa else self.full_kv_pool
        loc = loc_info.swa_loc if is_swa else loc_info.loc
        pool.set_kv_buffer(None, loc, cache_k, cache_v, layer_id_override=at)


@dataclass
class SamplingBatchInfo:
    temperatures: torch.Tensor
    top_ps: torch.Tensor
    top_ks: torch.Tensor
    min_ps: torch.Tensor
    is_all_greedy: bool
    is_any_greedy: bool
    need_top_p_sampling: bool
    need_top_k_sampling: bool
    need_min_p_sampling: bool
    vocab_size: int
    sampling_seed: torch.Tensor | None = None
    sampling_mask_batch_indices: torch.Tensor | None = None
    device: str = "cpu"

    def adjusted_from_schedule_batch(self, batch, vocab_size):
        pass


class Sampler(torch.nn.Module):
    def _preprocess_logits(self, logits, sampling_info):
        return logits

    def forward(
        self, logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs,
        positions, *, logprob_logits=None,
    ):  # fmt: skip
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        if sampling_info.is_all_greedy:
            return logits.argmax(-1)
        logits.div_(sampling_info.temperatures)
        logits[:] = logits.softmax(-1)
        return self._sample_from_probs(logits, sampling_info, positions, True)[0]

    def _sample_from_probs(self, probs, sampling_info, positions, simple_sampling_case):
        return probs.multinomial(1), None


def register_sampler_backend(backend, factory):
    SAMPLERS[backend] = factory


def register_attention_backend(name):
    return lambda fn: ATTENTION_BACKENDS.setdefault(name, fn)


class Phase:
    DECODE, PREFILL = "decode", "prefill"


class Backend:
    FULL, BREAKABLE, DISABLED = "full", "breakable", "disabled"


def check_cuda_graph_backend(phase, backend):
    return backend == Backend.DISABLED


EXECUTION = SimpleNamespace(
    overlap=SimpleNamespace(enable_two_batch_overlap=False),
    graph=SimpleNamespace(enable_torch_compile=False),
)
SAMPLERS, ATTENTION_BACKENDS, CHOICES = {}, {}, ["triton", "torch_native"]
MODULES = {
    "layers.attention.base_attn_backend": (AttentionBackend,),
    "layers.attention.attention_registry": (register_attention_backend,),
    "layers.radix_attention": (AttentionType, RadixAttention),
    "layers.sampler": (Sampler, register_sampler_backend),
    "mem_cache.memory_pool": (KVWriteLoc, MHATokenToKVPool, ReqToTokenPool),
    "mem_cache.swa_memory_pool": (SWAKVPool,),
    "model_executor.forward_batch_info": (ForwardBatch, ForwardMode),
    "model_executor.cuda_graph_config": (Phase, Backend, check_cuda_graph_backend),
    "sampling.sampling_batch_info": (SamplingBatchInfo,),
    "runtime_context": (),
    "arg_groups.choices": (),
}


def install(monkeypatch):
    """Under SGLang's names, for one test module."""
    paths = {f"sglang.srt.{name}": what for name, what in MODULES.items()}
    parents = {x.rsplit(".", i)[0] for x in paths for i in range(1, x.count(".") + 1)}
    for path in sorted(parents | set(paths), key=lambda x: x.count(".")):
        module = ModuleType(path)
        module.__path__ = []
        for each in paths.get(path, ()):
            setattr(module, each.__name__, each)
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
    srt = sys.modules["sglang.srt"]
    srt.arg_groups.choices.add_attention_backend_choices = CHOICES.extend
    for name, value in dict(
        get_parallel=SimpleNamespace(dcp_enabled=False, attn_cp_size=1),
        get_exec=EXECUTION,
        get_disagg=SimpleNamespace(enable_pdmux=False),
        get_server_args=SimpleNamespace(random_seed=7),
    ).items():
        setattr(srt.runtime_context, name, lambda value=value: value)
