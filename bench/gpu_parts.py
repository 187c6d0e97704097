"""The parts of bench.gpu, in the order in which they run.

A part is a generator of (cell's name, function that measures it): inputs are made inside of the
function, so that one cell's memory is free before the next. `bench` is a `bench.gpu.Bench`.
"""

from bench.gpu_checks import sanitizers, smoke, tests
from bench.gpu_kernels import attention, evict, quant, rates, sampling, scoring, tree, tune
from bench.gpu_model import end_to_end

PARTS = {
    "smoke": smoke, "tests": tests, "rates": rates, "attention": attention, "tree": tree,
    "quant": quant, "evict": evict, "sampling": sampling, "scoring": scoring,
    "end_to_end": end_to_end, "tune": tune, "sanitizers": sanitizers,
}  # fmt: skip
