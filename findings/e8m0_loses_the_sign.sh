#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0: a scale that is no positive number becomes one in torch.
#
# float8_e8m0fnu, the shared scale of the OCP microscaling formats, holds powers of two from
# 2**-127 to 2**127 and NaN: neither a sign nor zero. ml_dtypes turns 0 and negative numbers into
# NaN, so that whatever is scaled by them shows it. torch drops the sign, makes 2**-127 of zero, and
# says nothing. Positive numbers agree: both round to the nearest power, up from 1.5 on.
#
# Hurts: whoever takes scales from code that may give a negative one (a signed extreme instead of
# the greatest magnitude, or a scale that was learned) or zero for an empty block: with torch the
# block decodes with its signs flipped, or to something tiny but not zero, and checks for NaN pass.
# The right guess: take the greatest magnitude, treat zero apart, and check before converting.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins ml_dtypes==0.6.0 numpy==2.4.6
cat >case.py <<'EOF'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch

for name in ("torch", "ml_dtypes"):
    print(name, version(name))
scales = np.array([0.75, 1.4, 1.5, 3.0, 0.0, -0.0, -1.0, -3.0], dtype=np.float32)
ours = torch.from_numpy(scales).to(torch.float8_e8m0fnu).float().numpy()
theirs = scales.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
for scale, a, b in zip(scales, ours, theirs):
    print(f"{scale:>5g}: torch {a:g}, ml_dtypes {b:g}")
least = np.float32(2.0**-127)
as_described = (
    np.array_equal(ours, np.array([1, 1, 2, 4, least, least, 1, 4], dtype=np.float32))
    and np.array_equal(theirs[:4], ours[:4])
    and np.isnan(theirs[4:]).all()
)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
