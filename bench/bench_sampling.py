"""One token per row from logits, with the filters people use."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kvtools.ops import NATIVE
from kvtools.ops.sampling import sample


@dataclass(frozen=True)
class Shape:
    b: int
    v: int

    def __str__(self):
        return f"b={self.b},v={self.v}"


SHAPES = [Shape(1, 49_152), Shape(16, 49_152), Shape(64, 151_936)]
FILTERS = {
    "temperature": {"temperature": 0.8},
    "top_k,top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    # A spread of 4 gives nuclei of some hundred tokens, as language models do.
    logits_bv = 4 * torch.randn(shape.b, shape.v, generator=generator)
    seed_b = torch.randint(2**62, (shape.b,), generator=generator)
    position_b = torch.arange(shape.b)
    return logits_bv.to(device, dtype), seed_b.to(device), position_b.to(device)


def nbytes(shape, dtype):
    """Logits read once; seed, position, token and two log-probabilities per row."""
    return shape.b * (shape.v * dtype.itemsize + 8 + 8 + 8 + 2 * 4)


def transformers(logits_bv, seed_b, position_b, temperature, top_k=0, top_p=1.0):
    """What `generate` does: warpers, softmax, multinomial. Noise is the device's, no log-probs."""
    if temperature == 0:
        return logits_bv.argmax(-1)
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is not installed"
    )
    scores_bv = process.TemperatureLogitsWarper(temperature)(None, logits_bv.float())
    if top_k:
        scores_bv = process.TopKLogitsWarper(top_k)(None, scores_bv)
    if top_p < 1:
        scores_bv = process.TopPLogitsWarper(top_p)(None, scores_bv)
    return torch.multinomial(scores_bv.softmax(-1), 1)


RIVALS = {"transformers": transformers}
RIVALS |= {impl: partial(sample, impl=impl) for impl in ("reference", NATIVE[DEVICE])}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("rival", RIVALS)
@torch.inference_mode()
def test_sample(benchmark, rival, filters, shape):
    dtype = torch.float32
    args = inputs(shape, dtype, DEVICE)

    def run():
        RIVALS[rival](*args, **FILTERS[filters])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"sample {filters} {shape}"
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    benchmark.extra_info.update(
        op="sample", impl=rival, shape=str(shape), filters=filters, dtype=str(dtype), device=DEVICE
    )
    if benchmark.stats:
        benchmark.extra_info["bytes"] = nbytes(shape, dtype)
        benchmark.extra_info["GB/s"] = nbytes(shape, dtype) / benchmark.stats["median"] / 1e9
