"""Other people's GPU kernels. Each function prepares, plans included, and returns what is timed.

`bench/gpu_rivals.sh` collects those that pip does not install on a machine without network.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench import bench_attention, bench_sampling
from bench.bench_attention import PAGE_SIZE
from bench.timing import Skip

LIMIT = 24 * 2**30  # bytes that keys and values repeated for each row may take
FA3 = "_vllm_fa3_C.abi3.so"


def need(module):
    """The module; Skip if there is none. One that does not import raises."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Skip("not installed")
    return importlib.import_module(module)


PACKAGES = {"sdpa": "torch", "torch": "torch", "flex": "torch", "flashinfer": "flashinfer-python",
            "fa3": "vllm", "transformers": "transformers", "cut": "cut-cross-entropy"}  # fmt: skip


def package(name):
    """Whose code a contender is."""
    return next((x for start, x in PACKAGES.items() if name.startswith(start)), "")


def version(package):
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def sdpa(step, backend):
    """What transformers does: keys and values repeated for each row."""
    size = 2 * len(step.q) * sum(x[0, 0].numel() for x in step.levels) * step.q.itemsize
    if size > LIMIT:
        raise Skip(f"its keys and values would take {size / 2**30:.0f} GiB")
    k, v = step.dense

    def run():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(step.q, k, v, enable_gqa=True).squeeze(2)

    return run


def prefix_merge(step):
    if len(step.levels) != 2 or step.levels[0].shape[1] != 1:
        raise Skip("takes one shared prefix")
    return lambda: bench_attention.prefix_merge(step)


def flex(step):
    """All rows as one sequence over all nodes, the tree as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, device = len(step.q), step.q.device
    kv = torch.cat([x.flatten(1, 2) for x in step.levels], 1).transpose(1, 2)
    k, v = kv[:, None].contiguous()  # [1, h, slots, d]
    node = [torch.arange(x.shape[1], device=device).repeat_interleave(x.shape[2])
            for x in step.levels]  # fmt: skip
    rows = [n // x.shape[1] for x in step.levels]
    first = torch.cat([x * r for x, r in zip(node, rows, strict=True)])
    end = torch.cat([(x + 1) * r for x, r in zip(node, rows, strict=True)])

    def sees(b, h, q, kv):
        return (first[kv] <= q) & (q < end[kv])

    mask = create_block_mask(sees, None, None, n, len(first), device=device)
    attend = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    q = step.q.transpose(0, 2).contiguous()  # [1, hq, n, d]
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@cache
def workspace():
    return torch.empty(2**29, dtype=torch.uint8, device="cuda")


def heads(step):
    """Query heads, KV heads, head size, page size."""
    return step.q.shape[1], *step.levels[0].shape[3:], PAGE_SIZE


def tables(step):
    """Each level's page ids [nodes, pages], and the slots of each node."""
    _, slots = step.forest
    ids = (torch.from_numpy(x[:, ::PAGE_SIZE] // PAGE_SIZE) for x in slots)
    return [(x.int().to(step.q.device), x_slots.shape[1])
            for x, x_slots in zip(ids, slots, strict=True)]  # fmt: skip


def path_table(step):
    """Page ids of each row's whole path, and its length."""
    found, n = tables(step), len(step.q)
    if any(length % PAGE_SIZE for _, length in found[:-1]):
        raise Skip("takes shared prefixes of whole pages")
    table = torch.cat([x.repeat_interleave(n // len(x), 0) for x, _ in found], 1)
    return table.contiguous(), sum(length for _, length in found)


def csr(table, length):
    """FlashInfer's page table: where each node's pages begin, all pages, slots of the last one."""
    nodes, pages = table.shape
    indptr = torch.arange(nodes + 1, dtype=torch.int32, device=table.device) * pages
    return indptr, table.flatten(), torch.full_like(indptr[1:], (length - 1) % PAGE_SIZE + 1)


def queries_of(table, n):
    """Where each node's rows begin."""
    nodes = len(table)
    return torch.arange(nodes + 1, dtype=torch.int32, device=table.device) * (n // nodes)


def content(step):
    """Queries [n, hq, d]; keys and values as a pair of paged tensors in FlashInfer's HND."""
    _, pages, _ = step.pages("none")
    return step.q.squeeze(2), (pages.k, pages.v)


def flashinfer_decode(step):
    """Each row reads its whole path."""
    flashinfer = need("flashinfer")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(), "HND", use_tensor_cores=True
    )
    wrapper.plan(*csr(*path_table(step)), *heads(step), q_data_type=step.q.dtype)
    return partial(wrapper.run, *content(step))


def flashinfer_cascade(step):
    """As shipped."""
    flashinfer = need("flashinfer")
    if len(step.levels) < 2:
        raise Skip("nothing is shared")
    found = tables(step)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(found), workspace(), "HND")
    indptr, page, last = zip(*(csr(*level) for level in found), strict=True)
    rows = [queries_of(table, len(step.q)) for table, _ in found]
    wrapper.plan(rows, list(indptr), list(page), list(last), *heads(step), q_data_type=step.q.dtype)
    return partial(wrapper.run, *content(step))


def flashinfer_by_hand(step):
    """Kernels that pack grouped heads and split long nodes, which the cascade does not choose on
    Hopper."""
    flashinfer = need("flashinfer")
    if len(step.levels) < 2:
        raise Skip("nothing is shared")
    *above, own = tables(step)
    inner = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND", use_tensor_cores=True)
    inner.plan(*csr(*own), *heads(step), q_data_type=step.q.dtype)
    outer = []
    for level in above:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "HND", backend="fa2")
        rows = queries_of(level[0], len(step.q))
        wrapper.plan(rows, *csr(*level), *heads(step), q_data_type=step.q.dtype)
        outer.append(wrapper)
    q, kv = content(step)

    def run():
        out, lse = inner.run(q, kv, return_lse=True)
        for wrapper in outer:
            flashinfer.merge_state_in_place(out, lse, *wrapper.run(q, kv, return_lse=True))
        return out

    return run


def fa3(step):
    """FlashAttention-3 as vLLM builds it, on pages; each row reads its whole path."""
    path = next((path for x in sys.path if (path := Path(x, FA3)).exists()), None)
    if path is None:
        raise Skip("not installed")
    torch.ops.load_library(str(path))
    ops = torch.ops._vllm_fa3_C
    table, length = path_table(step)
    q, (k, v) = content(step)
    n, (hq, h, d, _) = len(q), heads(step)
    begin = torch.arange(n + 1, dtype=torch.int32, device=q.device)
    lengths = torch.full_like(begin[1:], length)
    none = (None,) * 3
    schedule = ops.get_scheduler_metadata(
        n, 1, length, hq, h, d, d, q.dtype, lengths, begin, None, None, None, None, PAGE_SIZE, 0,
        False, -1, -1, False, 0, None, 0,
    )  # fmt: skip
    args = (
        q, k.transpose(1, 2), v.transpose(1, 2), None, None, None, None, begin, None, None, None,
        lengths, 1, length, table, None, None, *none, *none, d**-0.5, False, -1, -1, 0.0, True,
        schedule, 0, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return lambda: ops.fwd(*args)[0]


ATTENTION = {
    "sdpa flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "torch prefix + merge": prefix_merge,
    "flex_attention": flex,
    "flashinfer decode": flashinfer_decode,
    "flashinfer cascade": flashinfer_cascade,
    "flashinfer by hand": flashinfer_by_hand,
    "fa3 paged": fa3,
}


def transformers_sample(args, filters):
    need("transformers")
    return partial(bench_sampling.transformers, *args, **filters)


def flashinfer_sample(args, filters):
    """Its kernel for each set of filters; noise is the device's, no log-probabilities."""
    sampling, (logits_bv, *_) = need("flashinfer.sampling"), args
    temperature, top_k, top_p = (filters.get(x) for x in ("temperature", "top_k", "top_p"))
    if temperature == 0:
        raise Skip("has no greedy kernel")
    if top_p is None:
        return lambda: sampling.sampling_from_logits(logits_bv / temperature)

    def run():
        prob_bv = sampling.softmax(logits_bv, temperature)
        if top_k is None:
            return sampling.top_p_sampling_from_probs(prob_bv, top_p)
        return sampling.top_k_top_p_sampling_from_probs(prob_bv, top_k, top_p)

    return run


SAMPLING = {"transformers": transformers_sample, "flashinfer": flashinfer_sample}


def chunked_logprobs(hidden_tm, weight_vm, step_s, cu_steps, target_t, chunk=8192):
    """As cut cross-entropy, with a library's products: a log-sum-exp over chunks of the head."""
    lse_t = torch.full(target_t.shape, -torch.inf, device=hidden_tm.device)
    for weight_cm in weight_vm.split(chunk):
        lse_t = torch.logaddexp(lse_t, (hidden_tm @ weight_cm.T).float().logsumexp(-1))
    return (hidden_tm * weight_vm[target_t]).sum(-1, dtype=torch.float32) - lse_t


def cut_cross_entropy(hidden_tm, weight_vm, step_s, cu_steps, target_t):
    run = need("cut_cross_entropy").linear_cross_entropy
    return -run(hidden_tm, weight_vm, target_t, reduction="none")
