#!/usr/bin/env bash
# torch 2.13.0: torch.library.opcheck never shows an operator the expanded input that it was
# given.
#
# opcheck runs the operator on copies of its arguments, and a copy of an expanded tensor (stride
# 0) is contiguous. An operator that fails on stride 0 in eager mode passes all four checks on the
# very arguments that make it fail, and what it saw were ordinary strides.
#
# Hurts: authors of kernels. Expanded tensors are everywhere (heads of grouped-query attention, a
# prompt shared by many rows, masks), a kernel that writes through them or assumes distinct rows
# is wrong, and the check made for operators, fed with exactly such an input, reports success.
# The right guess: opcheck checks the registration, not the layouts. Test strides by direct calls.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install --no-deps numpy==2.4.6
cat >case.py <<'EOF'
import torch

strides = set()


@torch.library.custom_op("findings::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    strides.add(x.stride())
    if 0 in x.stride():
        raise ValueError("double: an expanded tensor")
    return x + x


@double.register_fake
def _(x):
    return torch.empty(x.shape, dtype=x.dtype)


print("torch", torch.__version__)
x = torch.randn(1, 4).expand(3, 4)
try:
    double(x)
    eager = "runs"
except ValueError as error:
    eager = f"raises: {error}"
print("strides given:", x.stride(), "- a call", eager)
strides.clear()
checks = torch.library.opcheck(double, (x,), raise_exception=False)
print("opcheck on the same argument:", checks)
print("strides that the operator saw in it:", strides)
as_described = (
    eager.startswith("raises")
    and len(checks) == 4
    and set(checks.values()) == {"SUCCESS"}
    and strides == {(4, 1)}
)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
