#!/usr/bin/env bash
# transformers 5.24.0: with rope type "dynamic" the answer depends on what the model ran before.
#
# Dynamic NTK computes its frequencies from the length of the text. The module keeps those of the
# longest text so far and forgets them only at a text shorter than the original length. So a text
# of 40 tokens (original length 32) is computed with the frequencies of the 100-token text that
# ran before it. The same forward of the same model then gives other logits; eval mode, no cache,
# no randomness.
#
# Hurts: evaluation in an arbitrary order, servers, and comparisons of two implementations on one
# model object; a rerun of the failing example alone does not show it.
# The right guess: a forward is a function of its input. Run a text shorter than the original
# length in between, or take yarn.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 safetensors==0.8.0 tokenizers==0.23.3
cat >case.py <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=32,
    rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0),
)
model = LlamaForCausalLM(config).eval()
text, longer, short = (torch.randint(3, 128, (1, n)) for n in (40, 100, 8))


@torch.no_grad()
def change(between):
    """Greatest change of the text's logits when `between` runs between two forwards of it."""
    model(short)
    before = model(text).logits
    for ids in between:
        model(ids)
    return (model(text).logits - before).abs().max().item()


print("transformers", transformers.__version__, "torch", torch.__version__)
none, after_longer, after_short = change([]), change([longer]), change([longer, short])
print(f"nothing between: {none:.1e}")
print(f"100 tokens between: {after_longer:.1e}")
print(f"100 tokens, then 8, between: {after_short:.1e}")
as_described = none < 1e-4 and after_short < 1e-4 and after_longer > 0.1
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
