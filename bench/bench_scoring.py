"""Scores of reasoning steps, and log-probabilities of given tokens, from hidden states."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kvtools.ops import NATIVE
from kvtools.ops.scoring import step_scores, token_logprobs


@dataclass(frozen=True)
class Shape:
    r: int  # rollouts
    t: int  # tokens of all rollouts
    s: int  # steps of all rollouts
    m: int
    v: int

    def __str__(self):
        return f"r={self.r},t={self.t},s={self.s},m={self.m},v={self.v}"


SHAPES = [Shape(4, 256, 20, 576, 49_152), Shape(16, 1024, 80, 576, 49_152)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]


def inputs(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    hidden_tm = torch.randn(shape.t, shape.m, generator=generator).to(device, dtype)
    weight_vm = torch.randn(shape.v, shape.m, generator=generator).to(device, dtype)
    step_s = torch.arange(1, shape.s + 1, device=device).mul_(shape.t // shape.s).sub_(1)
    cu_steps = torch.arange(shape.r + 1, device=device) * (shape.s // shape.r)
    target_t = torch.randint(shape.v, (shape.t,), generator=generator).to(device)
    return hidden_tm, weight_vm, step_s, cu_steps, target_t


def full_logits(hidden_tm, weight_vm, step_s, cu_steps, target_t):
    """What readers on top of a causal LM do: all logits, two columns, the steps."""
    logits_tv = hidden_tm @ weight_vm.T
    prob_s = logits_tv[:, [10, 12]].float().softmax(-1)[step_s, 0]
    return prob_s[cu_steps[1:] - 1]


def gather_matmul(hidden_tm, weight_vm, step_s, cu_steps, target_t):
    """The strong rival: gather the steps, multiply by two rows."""
    prob_s = (hidden_tm[step_s] @ weight_vm[[10, 12]].T).float().softmax(-1)[:, 0]
    return prob_s[cu_steps[1:] - 1]


def log_softmax(hidden_tm, weight_vm, step_s, cu_steps, target_t):
    logits_tv = (hidden_tm @ weight_vm.T).float()
    return logits_tv.log_softmax(-1).gather(1, target_t.unsqueeze(1))


def scores(hidden_tm, weight_vm, step_s, cu_steps, target_t, impl):
    return step_scores(hidden_tm, step_s, cu_steps, weight_vm[[10, 12]], impl=impl)


def logprobs(hidden_tm, weight_vm, step_s, cu_steps, target_t, impl):
    return token_logprobs(hidden_tm, weight_vm, target_t, impl=impl)


RIVALS = {
    "step_scores": {"full_logits": full_logits, "gather_matmul": gather_matmul},
    "token_logprobs": {"log_softmax": log_softmax},
}
for impl in ("reference", NATIVE[DEVICE]):
    RIVALS["step_scores"][impl] = partial(scores, impl=impl)
    RIVALS["token_logprobs"][impl] = partial(logprobs, impl=impl)


def nbytes(op, shape, dtype):
    """Step scores read the gathered rows and two head rows, log-probs all rows and the head."""
    if op == "step_scores":
        return (shape.s + 2) * shape.m * dtype.itemsize + 8 * shape.s + 4 * (2 * shape.s + shape.r)
    return (shape.t + shape.v) * shape.m * dtype.itemsize + (8 + 4) * shape.t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op,rival", [(op, rival) for op in RIVALS for rival in RIVALS[op]])
@torch.inference_mode()
def test_scoring(benchmark, op, rival, shape, dtype):
    args = inputs(shape, dtype, DEVICE)

    def run():
        RIVALS[op][rival](*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {shape} {dtype}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        op=op, impl=rival, shape=str(shape), dtype=str(dtype), device=DEVICE
    )
    if benchmark.stats:
        benchmark.extra_info["bytes"] = nbytes(op, shape, dtype)
        benchmark.extra_info["GB/s"] = nbytes(op, shape, dtype) / benchmark.stats["median"] / 1e9
