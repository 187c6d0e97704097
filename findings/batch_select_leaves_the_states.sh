#!/usr/bin/env bash
# transformers 5.24.0: Cache.batch_select_indices picks keys and values, not the recurrent states
# beside them.
#
# Falcon-H1's layers have attention and a recurrent part; one cache layer holds both. reorder_cache
# moves all of it. batch_select_indices, which says that it keeps the given rows of the cache, is
# inherited from the attention layer: keys and values follow, states of the convolution and the
# recurrence stay with the old rows. As many rows as before raise nothing: each goes on with its own
# attention and another text's state.
#
# Hurts: particle filters and searches by steps, which copy the best rows over the worst.
# The right guess: both methods select rows. Use reorder_cache, which takes repeated indices, too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0
cat >case.py <<'EOF'
import torch
import transformers
from transformers import AutoModelForCausalLM, FalconH1Config

torch.manual_seed(0)
config = FalconH1Config(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4,
    mamba_d_head=16, mamba_d_state=16, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config).eval()
with torch.no_grad():
    for x in model.parameters():
        if x.ndim > 1:
            x.mul_(3)
ids = torch.randint(1, 256, (4, 13))
rows = torch.tensor([2, 2, 0, 3])


@torch.no_grad()
def off_after(method):
    """How far each row is from a forward of its whole text, in units of the logits' spread."""
    cache = model(ids[:, :12], use_cache=True).cache
    getattr(cache, method)(rows)
    logits = model(ids[rows, 12:], cache=cache).logits[:, -1]
    whole = model(ids[rows]).logits[:, -1]
    return ((logits - whole).abs().amax(1) / whole.std()).tolist()


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {method: off_after(method) for method in ("reorder_cache", "batch_select_indices")}
for method, off in found.items():
    print(f"{method}({rows.tolist()}): rows are off by", *(f"{x:.0e}" for x in off))
right = max(found["reorder_cache"]) < 1e-4
# Rows 0 to 2 now hold another row's text; the last one is where it was.
*moved, stayed = found["batch_select_indices"]
raise SystemExit(0 if right and stayed < 1e-4 and min(moved) > 1e-2 else "no longer as described")
EOF
venv/bin/python -I case.py
