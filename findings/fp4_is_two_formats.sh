#!/usr/bin/env bash
# bitsandbytes 0.50.2 and ml_dtypes 0.6.0: "fp4" names two formats with different values.
#
# The 4-bit float of hardware and of the OCP microscaling formats (E2M1; ml_dtypes.float4_e2m1fn)
# has 0, 0.5, 1, 1.5, 2, 3, 4, 6: over its maximum, the smallest is 1/12. The fp4 of bitsandbytes
# agrees in the other seven magnitudes, but its smallest is 1/192, and the codes stand in another
# order. A weight of 1/12 of its block's maximum is exact in one and 16 times too small in the
# other.
#
# Hurts: whoever repacks bitsandbytes fp4 weights for hardware FP4, or quotes a quality measured
# with one for the other. It is not a matter of the order of bits alone: a value has no
# counterpart.
# The right guess: check the table of values, not the name. nf4 is a third format and says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins bitsandbytes==0.50.2 ml_dtypes==0.6.0 numpy==2.4.6
cat >case.py <<'EOF'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

for name in ("bitsandbytes", "ml_dtypes", "torch"):
    print(name, version(name))
fine = torch.linspace(0, 1, 64)  # one block, maximum 1
bnb = dequantize_4bit(*quantize_4bit(fine, blocksize=64, quant_type="fp4")).unique().numpy()
ocp = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32) / 6
print("magnitudes over the maximum, bitsandbytes:", bnb.round(4))
print("magnitudes over the maximum, E2M1:        ", ocp.round(4))

block = np.full(64, 1 / 12, dtype=np.float32)
block[0] = 1
once = dequantize_4bit(*quantize_4bit(torch.tensor(block), blocksize=64, quant_type="fp4"))
e2m1 = (block * 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) / 6
print("1/12 becomes:", once.flatten()[1].item(), "and", e2m1[1].item())
same = [bool(np.isclose(ocp, value, atol=1e-3).any()) for value in bnb]
as_described = (
    len(bnb) == 8
    and same == [True, False] + [True] * 6
    and np.isclose(once.flatten()[1].item(), 1 / 192, rtol=1e-2)
    and np.isclose(e2m1[1], 1 / 12)
)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
