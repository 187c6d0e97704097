"""One decode step of attention: rows that share a prefix, against what PyTorch offers for it."""

from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvtools import KVPages, Plan
from kvtools._host import Forest
from kvtools.ops.attention import tree_attention
from kvtools.ops.quant import append_kv
from kvtools.reference.attention import merge_states
from kvtools.reference.quant import width


@dataclass(frozen=True)
class Shape:
    n: int  # rows
    p: int  # tokens that they share
    s: int  # tokens of each row's own
    h: int
    g: int
    d: int

    def __str__(self):
        return ",".join(f"{name}={value}" for name, value in vars(self).items())


# SmolLM2's heads: a prompt that is shared; nothing shared.
SHAPES = [Shape(32, 2048, 128, 3, 3, 64), Shape(32, 0, 512, 3, 3, 64)]
PAGE_SIZE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]
# How far from eager attention an output may be, as a share of its norm: rivals that compute
# something else are not timed. Errors proper are the tests' business.
CLOSE = {"none": 0.02, "int8": 0.05, "fp8": 0.1, "int6": 0.1, "int4": 0.25, "int3": 0.5, "int2": 1}


@dataclass
class Inputs:
    """One step's queries, and the same keys and values in the layout that each rival wants."""

    q: torch.Tensor  # [n, h g, 1, d]
    shared: torch.Tensor  # keys and values [2, p, h, d]
    own: torch.Tensor  # [2, n, s, h, d]
    paged: dict = field(default_factory=dict)  # by format

    @cached_property
    def dense(self):
        shared = self.shared[:, None].expand(-1, len(self.q), -1, -1, -1)
        return torch.cat([shared, self.own], 2).transpose(2, 3).contiguous()

    @cached_property
    def expanded(self):
        return self.dense.repeat_interleave(self.q.shape[1] // self.dense.shape[2], 2)

    def pages(self, format):
        """Positions, pages and plan."""
        if format not in self.paged:
            _, n, s, h, d = self.own.shape
            p, device = self.shared.shape[1], self.q.device
            forest = Forest(p // PAGE_SIZE + 1 + n * (s // PAGE_SIZE + 2), PAGE_SIZE)
            if p:
                forest.insert(p, 0, n)
                forest.append(np.full(n, s, np.int32))
            for _ in range(0 if p else n):
                forest.insert(s)
            pages = KVPages.empty(
                forest.num_pages, h, PAGE_SIZE, d, k_format=format, v_format=format,
                dtype=self.q.dtype, device=device,
            )  # fmt: skip
            slots = np.stack([forest.row_slots(row) for row in range(n)])
            for kv, slot in ((self.shared, slots[0, :p]), (self.own.flatten(1, 2), slots[:, p:])):
                append_kv(*kv, torch.from_numpy(slot.flatten()).to(device), pages)
            position = torch.full((n,), p + s - 1, dtype=torch.int32, device=device)
            plan = Plan.from_host(forest.plan(np.ones(n, np.int32)), device)
            self.paged[format] = position, pages, plan
        return self.paged[format]


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, p, s, h, g, d = vars(shape).values()
    sizes = (n, h * g, 1, d), (2, p, h, d), (2, n, s, h, d)
    return Inputs(*(torch.randn(x, generator=generator).to(device, dtype) for x in sizes))


def nbytes(shape, dtype, format="none"):
    """Shared keys and values read once, own ones once, queries and outputs."""
    n, p, s, h, g, d = vars(shape).values()
    head = d * dtype.itemsize if format == "none" else width(format, d) + 2  # fp16 scales
    return 2 * (p + n * s) * h * head + 2 * n * h * g * d * dtype.itemsize


def flops(shape):
    n, p, s, h, g, d = vars(shape).values()
    return 4 * n * h * g * d * (p + s)


def attend(q, k, v):
    """Softmax in float32, as eager models have it; the output and its log-sum-exp."""
    x = (q @ k.mT).float() * q.shape[-1] ** -0.5
    lse = x.logsumexp(-1)
    return (x - lse[..., None]).exp().to(q.dtype) @ v, lse


def eager(step):
    return attend(step.q, *step.expanded)[0].squeeze(2)


def sdpa(step):
    return scaled_dot_product_attention(step.q, *step.expanded).squeeze(2)


def sdpa_gqa(step):
    return scaled_dot_product_attention(step.q, *step.dense, enable_gqa=True).squeeze(2)


def prefix_merge(step):
    """The prefix as a matrix product for all rows, then each row's own; SDPA returns no
    log-sum-exp on a CPU, so both are written out."""
    (n, hq, _, d), h = step.q.shape, step.own.shape[3]
    q_nhgd = step.q.view(n, h, hq // h, d)
    own = attend(q_nhgd, *step.own.transpose(2, 3))
    if not step.shared.shape[1]:
        return own[0].view(n, hq, d)
    q_htd = q_nhgd.transpose(0, 1).reshape(h, -1, d)
    out, lse = attend(q_htd, *step.shared.transpose(1, 2))
    shared = (x.view(h, n, -1, *x.shape[2:]).transpose(0, 1) for x in (out, lse))
    return merge_states(*shared, *own)[0].reshape(n, hq, d)


def tree(step, format="none", impl="cpu"):
    position, pages, plan = step.pages(format)
    return tree_attention(step.q.squeeze(2), position, pages, plan, impl=impl)[0]


def reference(step):
    return tree(step, impl="reference")


RIVALS = {
    "eager": eager,
    "sdpa": sdpa,
    "sdpa gqa": sdpa_gqa,
    "sdpa prefix + merge": prefix_merge,
    "reference": reference,
}
if DEVICE == "cpu":
    RIVALS["cpu"] = tree
    RIVALS |= {f"cpu {format}": partial(tree, format=format) for format in ("int8", "int4")}


def check(step, run, format="none"):
    """Raise unless `run` computes the attention that it is timed for."""
    exact = eager(step).float()
    error = (run(step).float() - exact).norm() / exact.norm()
    assert error < CLOSE[format], f"differs from eager attention by {error:.3f} of its norm"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rival", RIVALS)
@torch.inference_mode()
def test_tree_attention(benchmark, rival, shape, dtype):
    step = inputs(shape, dtype, DEVICE)
    format = rival.split()[1] if rival.startswith("cpu ") else "none"
    check(step, RIVALS[rival], format)

    def run():
        RIVALS[rival](step)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"tree_attention {shape} {dtype}"
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    benchmark.extra_info.update(
        op="tree_attention", impl=rival, shape=str(shape), dtype=str(dtype), device=DEVICE,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if benchmark.stats:
        seconds, size = benchmark.stats["median"], nbytes(shape, dtype, format)
        benchmark.extra_info |= {
            "bytes": size, "GB/s": size / seconds / 1e9, "GFLOP/s": flops(shape) / seconds / 1e9
        }  # fmt: skip
