#!/usr/bin/env bash
# Triton 3.9.0: a kernel that says tl.dot(..., input_precision="tf32") compiles for NVIDIA and for
# AMD's gfx942 (MI300), and is an error for gfx950 (MI350): also where the operands are bfloat16, for
# which the option changes nothing.
#
# The names that `input_precision` takes are those of the target, checked when the kernel is compiled
# for it and whatever the operands are. "tf32" and "tf32x3" are documented values, "tf32" is what
# NVIDIA takes by itself; gfx950 takes "ieee", "bf16x3" and "bf16x6" alone, and gfx942 lacks "tf32x3".
#
# Hurts: kernels written once for fp32 and 16 bits with the option always given; they pass on one AMD
# generation and fail on the next.
# The right guess: a precision that a target lacks is replaced, or at least ignored for 16-bit operands.
# Give "ieee" on AMD, or the option for fp32 operands only. Nothing runs here: kernels are compiled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export TRITON_CACHE_DIR="$work/cache" TRITON_DEFAULT_FP_FUSION=1
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile --disable-pip-version-check triton==3.9.0 setuptools
cat >case.py <<'EOF'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

N = tl.constexpr(32)


@triton.jit
def product(a, b, out, precision: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=precision))


def compiled(dtype, precision, target):
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32", "precision": "constexpr"}
    try:
        triton.compile(ASTSource(product, types, {(3,): precision}), target=target)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[-1]}"
    return "compiles"


print("triton", triton.__version__)
targets = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
found = {}
for dtype in ("bf16", "fp32"):
    for precision in ("ieee", "tf32", "tf32x3"):
        for name, target in targets.items():
            said = compiled(dtype, precision, target)
            found[dtype, precision, name] = said == "compiles"
            print(dtype, precision, name, said)
refused = {(precision, name) for (_, precision, name), fine in found.items() if not fine}
same = all(found["bf16", p, t] == found["fp32", p, t] for _, p, t in found)
as_described = same and refused == {("tf32", "gfx950"), ("tf32x3", "gfx942"), ("tf32x3", "gfx950")}
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python case.py
