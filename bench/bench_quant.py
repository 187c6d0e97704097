"""New tokens rotated, quantised and written into pages; and read back."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kvtools import KVPages
from kvtools.ops import NATIVE
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.reference.quant import width


@dataclass(frozen=True)
class Shape:
    t: int
    h: int
    d: int

    def __str__(self):
        return f"t={self.t},h={self.h},d={self.d}"


SHAPES = [Shape(32, 3, 64), Shape(2048, 8, 128)]  # a decode step of 32 rows; a prefill
FORMATS = ["int4", "int8", "none", "fp8"]
PAGE_SIZE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def inputs(shape, format, dtype, device):
    generator = torch.Generator().manual_seed(0)
    k_thd, v_thd = torch.randn(2, shape.t, shape.h, shape.d, generator=generator).to(device, dtype)
    pages = KVPages.empty(
        shape.t // PAGE_SIZE, shape.h, PAGE_SIZE, shape.d, k_format=format, v_format=format,
        dtype=dtype, device=device, position=True,
    )  # fmt: skip
    slot_t = torch.randperm(shape.t, generator=generator).to(device)
    position_t = torch.arange(shape.t, dtype=torch.int32, device=device)
    return k_thd, v_thd, slot_t, pages, position_t


def nbytes(shape, format, dtype):
    """Heads read, codes and scales written, for K and V; a position per token and head."""
    codes = width(format, shape.d) * (dtype.itemsize if format == "none" else 1)
    scale = 0 if format == "none" else 2
    return shape.t * shape.h * (2 * (shape.d * dtype.itemsize + codes + scale) + 4)


def index_put(k_thd, v_thd, slot_t, pages, position_t):
    """What a paged cache without compression does."""
    where = (slot_t // PAGE_SIZE, slice(None), slot_t % PAGE_SIZE)
    pages.k[where] = k_thd
    pages.v[where] = v_thd


RIVALS = {impl: partial(append_kv, impl=impl) for impl in (NATIVE[DEVICE], "reference")}
RIVALS["index_put"] = index_put


def measure(benchmark, run, shape, format, **info):
    def step():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    benchmark.extra_info.update(
        shape=str(shape), format=format, dtype=str(DTYPE), device=DEVICE,
        threads=torch.get_num_threads(), **info,
    )  # fmt: skip
    if benchmark.stats:
        benchmark.extra_info["bytes"] = nbytes(shape, format, DTYPE)
        benchmark.extra_info["GB/s"] = (
            nbytes(shape, format, DTYPE) / benchmark.stats["median"] / 1e9
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rival", RIVALS)
@torch.inference_mode()
def test_append_kv(benchmark, rival, format, shape):
    if rival == "index_put" and format != "none":
        pytest.skip("index_put only stores unquantised heads")
    args = inputs(shape, format, DTYPE, DEVICE)
    benchmark.group = f"append_kv {format} {shape}"
    measure(benchmark, lambda: RIVALS[rival](*args), shape, format, op="append_kv", impl=rival)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@torch.inference_mode()
def test_dequantize_kv(benchmark, impl, format, shape):
    k_thd, v_thd, *_ = inputs(shape, format, DTYPE, DEVICE)
    codes = quantize_kv(torch.stack([k_thd, v_thd]), format)
    benchmark.group = f"dequantize_kv {format} {shape}"

    def run():
        dequantize_kv(*codes, shape.d, dtype=DTYPE, impl=impl)

    measure(benchmark, run, shape, format, op="dequantize_kv", impl=impl)
