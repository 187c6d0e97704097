#!/usr/bin/env bash
# Triton 3.9.0: `(n - 8) // 3` rounds down where the argument n is 1, towards zero where it is
# not.
#
# An int argument that equals 1 is compiled as a Python number, not as an int32 (nobody asked for
# tl.constexpr). Division of Python numbers rounds down, division of int32 towards zero, so n = 1
# gives -3, and so would a constexpr, while every other n follows the other rule (n = 1 would give
# -2). The interpreter passes n = 1 as a tensor and answers -2: it disagrees with the compiler. No
# GPU is needed: what a launch would compile can be read in the Triton IR.
#
# Hurts: index arithmetic that can go below zero (windows, left padding, page of a position), and
# only at batch size 1, stride 1 or length 1. A test under the interpreter cannot see it.
# The right guess: keep numerators non-negative, or mark the argument `do_not_specialize`.
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

interpret = os.environ.get("TRITON_INTERPRET") == "1"
import torch
import triton
import triton.language as tl


@triton.jit
def divide(out_ptr, n):
    tl.store(out_ptr, (n - 8) // 3)


out = torch.zeros(1, dtype=torch.int32)
if interpret:
    divide[(1,)](out, 1)
    print("triton", triton.__version__, "interpreter, n = 1:", out.item())
    as_described = out.item() == -2
else:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(divide.signature, divide.params, backend)

    def lines(n):
        """The kernel's types as a launch with this n takes them, and its Triton IR."""
        types = [kind for kind, _ in bind(out, n)[1]]
        source = ASTSource(
            divide,
            dict(zip(divide.arg_names, types, strict=True)),
            {"n": n} if types[1] == "constexpr" else {},
        )
        options, context = backend.parse_options({}), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        module = source.make_ir(
            backend.target, options, functions, backend.get_module_map(), context
        )
        return types[1], str(module)

    (kind_1, ir_1), (kind_2, ir_2) = lines(1), lines(2)
    minus_3 = "arith.constant -3 : i32"
    for n, kind, text in ((1, kind_1, ir_1), (2, kind_2, ir_2)):
        print(f"compiled, n = {n}: {kind}; {minus_3}: {minus_3 in text}; divsi: {'divsi' in text}")
    as_described = minus_3 in ir_1 and "divsi" not in ir_1 and "divsi" in ir_2
raise SystemExit(0 if as_described else "no longer as described")
EOF
TRITON_INTERPRET=1 venv/bin/python -I case.py
TRITON_INTERPRET=0 venv/bin/python -I case.py
