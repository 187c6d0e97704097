#!/usr/bin/env bash
# torch 2.13.0: compiled with dynamic=True, in-place additions to two views that lie alternately in
# one storage leave half of the elements as they were, without a word.
#
# x[..., 0] and x[..., 1] of a tensor [20, 3, 16, 2] share a storage and no element. A function that
# adds to both in place is right eagerly, with dynamic=False, and with the default, whose first
# compilation is for the very shape. With dynamic=True and the aot_eager backend only a part of each
# view is written, and nothing is raised; inductor raises an error of its own making. Where another
# axis has 2 entries, as the last one has, the compilation fails in aot_eager, too. Two tensors of
# their own are always right.
#
# Hurts: caches that keep two small values of a slot side by side (scales of a key and a value, sums
# and counts) and update them in a compiled step with any number of rows.
# The right guess: views of one tensor may be written in a compiled function as eagerly. Give each
# its own storage, or write to the whole tensor.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0
cat >case.py <<'EOF'
import torch


def add(a, b):
    a.add_(1)
    b.add_(2)


def outcome(size, backend, dynamic, apart=False):
    """What two views [20, size, 16] hold after it, or the name of what is raised."""
    torch.compiler.reset()
    both = torch.zeros(20, size, 16, 2)
    a, b = both[..., 0], both[..., 1]
    if apart:
        a, b = a.clone(), b.clone()
    try:
        torch.compile(add, fullgraph=True, dynamic=dynamic, backend=backend)(a, b)
    except Exception as error:
        return type(error).__name__
    return a.unique().tolist(), b.unique().tolist()


print("torch", torch.__version__)
right = ([1.0], [2.0])
found = {
    "eager backend": outcome(3, "eager", True),
    "fixed shapes": outcome(3, "aot_eager", False),
    "two storages": outcome(3, "aot_eager", True, apart=True),
    "any shape, 3 entries": outcome(3, "aot_eager", True),
    "any shape, 2 entries": outcome(2, "aot_eager", True),
}
for name, x in found.items():
    print(f"{name}: {x}")
*good, part, failed = found.values()
as_described = (
    all(x == right for x in good)
    and part == ([0.0, 1.0], [0.0, 2.0])
    and failed == "BackendCompilerFailed"
)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python case.py
