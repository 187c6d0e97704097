#!/usr/bin/env bash
# Triton 3.9.0: tl.cumsum of bfloat16 adds in bfloat16. Up to 3.8.0 it added in float32.
#
# The same kernel, not a letter changed: 3.8.0 converts the operand to float32, adds, and rounds each
# result once. 3.9.0 scans the operand as it is, so that every addition rounds to 8 bits. tl.sum of
# bfloat16 adds in bfloat16 in both versions. Read in the Triton IR; no GPU is needed.
#
# Hurts: prefix sums of probabilities, gates or log decays kept in bfloat16, which get worse with an
# upgrade, without a warning: beyond 256 bfloat16 cannot even count.
# The right guess: sums of 16-bit values are in float32, as torch's are. Say tl.cumsum(x.to(tl.float32)).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export TRITON_DEFAULT_FP_FUSION=1
cat >case.py <<'EOF'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def prefix_sums(x, out, total):
    i = tl.arange(0, 64)
    values = tl.load(x + i)
    tl.store(out + i, tl.cumsum(values, 0))
    tl.store(total, tl.sum(values, 0))


types = {"x": "*bf16", "out": "*bf16", "total": "*bf16"}
text = triton.compile(ASTSource(prefix_sums, types, {}), target=GPUTarget("cuda", 90, 32)).asm["ttir"]
adds = [line.split(" loc(")[0].split()[-1] for line in text.splitlines() if "arith.addf" in line]
print("triton", triton.__version__, "cumsum adds in", adds[0], "and sum in", adds[1])
EOF
for version in 3.8.0 3.9.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/python" -m pip install -q --no-compile --disable-pip-version-check \
        "triton==$version" setuptools
    TRITON_CACHE_DIR="$work/cache-$version" "venv-$version/bin/python" case.py | tee -a seen
done
diff - seen <<'EOF' || { echo "no longer as described" >&2; exit 1; }
triton 3.8.0 cumsum adds in f32 and sum in bf16
triton 3.9.0 cumsum adds in bf16 and sum in bf16
EOF
