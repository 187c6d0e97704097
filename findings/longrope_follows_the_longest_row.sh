#!/usr/bin/env bash
# transformers 5.24.0: with rope type "longrope" a row's tokens depend on the longest row beside
# it.
#
# Longrope has short factors up to the original length and long ones beyond. The choice is made
# once for the batch, by its greatest position. A prompt of 20 tokens (original length 32) is
# computed with the short factors alone and with the long ones beside a prompt of 70, although
# left padding, attention mask and position_ids are all right. The default rope gives equal
# tokens.
#
# Hurts: batched evaluation of Phi-3 class models: the batch size, or the sort order of the
# prompts, changes answers of prompts that never come near the long context.
# The right guess: with correct padding a row does not see its neighbours. Batch by side of the
# switch.
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
row, long_row = torch.randint(3, 128, (1, 20)), torch.randint(3, 128, (1, 70))
batch = torch.cat([torch.cat([torch.zeros(1, 50, dtype=torch.long), row], 1), long_row])
options = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)


def tokens(rope):
    """Greedy tokens of the row alone, and of the row beside the long one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=128,
        rope_parameters=dict(rope_theta=10000.0, **rope),
    )
    model = LlamaForCausalLM(config).eval()
    alone = model.generate(row, attention_mask=torch.ones_like(row), **options)
    beside = model.generate(batch, attention_mask=(batch > 0).long(), **options)
    return alone[0, 20:].tolist(), beside[0, 70:].tolist()


print("transformers", transformers.__version__, "torch", torch.__version__)
default = tokens(dict(rope_type="default"))
longrope = tokens(
    dict(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=32,
        short_factor=[1.0] * 4,
        long_factor=[4.0] * 4,
    )
)
for name, (alone, beside) in (("default", default), ("longrope", longrope)):
    print(f"{name}: alone {alone} beside a row of 70 {beside}")
as_described = default[0] == default[1] and longrope[0] != longrope[1]
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
