"""One decode step of attention: rows that share a prefix, against what PyTorch offers for it."""

from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvtools import KVPages, Plan
from kvtools._host import Forest
from kvtools.ops.attention import limits, tree_attention
from kvtools.ops.quant import append_kv
from kvtools.reference.attention import merge_states
from kvtools.reference.quant import width


@dataclass(frozen=True)
class Tree:
    levels: tuple[tuple[int, int], ...]  # nodes, and tokens of each; every node of the last a row
    h: int
    g: int
    d: int

    def __str__(self):
        nodes, tokens = zip(*self.levels, strict=True)
        return f"{','.join(map(str, nodes))} / {','.join(map(str, tokens))}"

    @property
    def n(self):
        return self.levels[-1][0]


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

    @property
    def levels(self):
        own = (self.n, self.s)
        return ((1, self.p), own) if self.p else (own,)


# SmolLM2's heads: a prompt that is shared; nothing shared.
SHAPES = [Shape(32, 2048, 128, 3, 3, 64), Shape(32, 0, 512, 3, 3, 64)]
PAGE_SIZE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]
# How far from float32 attention an output may be, as a share of its norm: rivals that compute
# something else are not timed. Errors proper are the tests' business.
CLOSE = {"none": 0.02, "int8": 0.05, "fp8": 0.1, "int6": 0.1, "int4": 0.25, "int3": 0.5, "int2": 1}


@dataclass
class Inputs:
    """One step's queries, and the same keys and values in the layout that each rival wants."""

    q: torch.Tensor  # [n, h g, 1, d]
    levels: list[torch.Tensor]  # keys and values of each level's nodes [2, nodes, s, h, d]
    paged: dict = field(default_factory=dict)  # by format

    @cached_property
    def dense(self):
        n, (h, d) = len(self.q), self.levels[0].shape[3:]
        lengths = [x.shape[2] for x in self.levels]
        out = self.q.new_empty(2, n, h, sum(lengths), d)
        for part, x in zip(out.split(lengths, 3), self.levels, strict=True):
            part.unflatten(1, (x.shape[1], -1)).copy_(x.transpose(2, 3)[:, :, None])
        return out

    @cached_property
    def expanded(self):
        return self.dense.repeat_interleave(self.q.shape[1] // self.dense.shape[2], 2)

    @cached_property
    def exact(self):
        """Attention in float32, row by row: not all of its keys fit at once."""
        n, h = len(self.q), self.levels[0].shape[3]
        out = torch.empty_like(self.q.squeeze(2), dtype=torch.float32)
        for row, q in enumerate(self.q.squeeze(2).float()):
            own = [x[:, row * x.shape[1] // n] for x in self.levels]
            k, v = torch.cat(own, 1).float().transpose(1, 2)
            out[row] = attend(q.unflatten(0, (h, -1)), k, v)[0].flatten(0, 1)
        return out

    @cached_property
    def forest(self):
        """The tree over pages, and the slots of each level's nodes."""
        sizes = [x.shape[1:3] for x in self.levels]
        forest = Forest(sum(n * (s // PAGE_SIZE + 2) for n, s in sizes), PAGE_SIZE)
        slots = []
        for n, s in sizes:
            if forest.num_rows:
                forest.gather(np.arange(n) * forest.num_rows // n)
                new = forest.append(np.full(n, s, np.int32))
            else:
                new = np.concatenate([forest.insert(s) for _ in range(n)])
            slots.append(new.reshape(n, s))
        return forest, slots

    def pages(self, format):
        """Positions, pages and plan."""
        if format not in self.paged:
            (h, d), device = self.levels[0].shape[3:], self.q.device
            forest, slots = self.forest
            pages = KVPages.empty(
                forest.num_pages, h, PAGE_SIZE, d, k_format=format, v_format=format,
                dtype=self.q.dtype, device=device,
            )  # fmt: skip
            for x, slot in zip(self.levels, slots, strict=True):
                append_kv(*x.flatten(1, 2), torch.from_numpy(slot.flatten()).to(device), pages)
            n, length = len(self.q), sum(x.shape[2] for x in self.levels)
            position = torch.full((n,), length - 1, dtype=torch.int32, device=device)
            plan = forest.plan(np.ones(n, np.int32), **limits(device, h, self.q.shape[1] // h))
            self.paged[format] = position, pages, Plan.from_host(plan, device)
        return self.paged[format]


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)

    def new(*size):
        return torch.randn(*size, generator=generator, dtype=dtype, device=device)

    h, g, d = shape.h, shape.g, shape.d
    return Inputs(new(shape.n, h * g, 1, d), [new(2, *level, h, d) for level in shape.levels])


def nbytes(shape, dtype, format="none"):
    """Each node's keys and values read once, queries and outputs."""
    h, g, d = shape.h, shape.g, shape.d
    head = d * dtype.itemsize if format == "none" else width(format, d) + 2  # fp16 scales
    slots = sum(nodes * tokens for nodes, tokens in shape.levels)
    return 2 * slots * h * head + 2 * shape.n * h * g * d * dtype.itemsize


def flops(shape):
    return 4 * shape.n * shape.h * shape.g * shape.d * sum(tokens for _, tokens in shape.levels)


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
    *above, own_nshd = step.levels
    (n, hq, _, d), h = step.q.shape, own_nshd.shape[3]
    q_nhgd = step.q.view(n, h, hq // h, d)
    own = attend(q_nhgd, *own_nshd.transpose(2, 3))
    if not above:
        return own[0].view(n, hq, d)
    q_htd = q_nhgd.transpose(0, 1).reshape(h, -1, d)
    out, lse = attend(q_htd, *above[0][:, 0].transpose(1, 2))
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


def check(step, out, format="none"):
    """Raise unless `out` is the attention that is timed."""
    error = (out.float() - step.exact).norm() / step.exact.norm()
    assert error < CLOSE[format], f"differs from float32 attention by {error:.3f} of its norm"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rival", RIVALS)
@torch.inference_mode()
def test_tree_attention(benchmark, rival, shape, dtype):
    step = inputs(shape, dtype, DEVICE)
    format = rival.split()[1] if rival.startswith("cpu ") else "none"
    check(step, RIVALS[rival](step), format)

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
            "bytes": size, "GB/s": size / seconds / 1e9, "TFLOP/s": flops(shape) / seconds / 1e12
        }  # fmt: skip
