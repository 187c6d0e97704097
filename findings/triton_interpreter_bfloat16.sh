#!/usr/bin/env bash
# Triton 3.9.0: under TRITON_INTERPRET=1, sums of bfloat16 are sums of bit patterns.
#
# The interpreter keeps bfloat16 as uint16 and adds what it keeps: 1.0 + 1.0 gives 1.7e38, and
# tl.sum of 1024 ones gives 0. There is neither an error nor a warning. float16 and float32 are
# right, and the compiler makes a floating-point addition (arith.addf on bf16) of the same line.
#
# Hurts: whoever tests kernels without a GPU. Models are bfloat16, so this is the dtype one tries
# first, and a test that compares two interpreted kernels with each other even passes.
# The right guess: compute in float32 (`x.to(tl.float32)`) before any arithmetic, or test in
# float16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install --no-deps triton==3.9.0 numpy==2.4.6
cat >case.py <<'EOF'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def double_and_sum(x_ptr, double_ptr, sum_ptr, N: tl.constexpr, UPCAST: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    if UPCAST:
        x = x.to(tl.float32)
    tl.store(double_ptr + offs, x + x)
    tl.store(sum_ptr, tl.sum(x, 0))


def run(dtype, upcast=False):
    x = torch.ones(1024, dtype=dtype)
    double, total = torch.zeros(1024), torch.zeros(1)
    double_and_sum[(1,)](x, double, total, 1024, upcast)
    return double[0].item(), total.item()


print("triton", triton.__version__, "torch", torch.__version__)
half, brain, cast = run(torch.float16), run(torch.bfloat16), run(torch.bfloat16, upcast=True)
print("1 + 1 and the sum of 1024 ones, float16:            ", *half)
print("1 + 1 and the sum of 1024 ones, bfloat16:           ", *brain)
print("1 + 1 and the sum of 1024 ones, bfloat16 as float32:", *cast)
as_described = half == cast == (2.0, 1024.0) and brain[0] > 1e38 and brain[1] == 0.0
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
