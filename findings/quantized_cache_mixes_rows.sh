#!/usr/bin/env bash
# transformers 5.24.0: `axis_key=0` means opposite things to QuantizedCache's two backends.
#
# With optimum-quanto 0.2.7 axis 0 (the default) makes groups of 64 neighbours: one head of one
# token. With hqq 0.2.8.post1 axis 0 (also the default) takes each group with a stride through the
# whole tensor, so tokens and rows of the batch share scales. Alone and beside three others, a row
# has the same logits under quanto, and others, by far more than rounding, under hqq.
#
# Hurts: whoever switches backends and compares, and whoever samples or scores in batches on hqq:
# a prompt's answer depends on which other prompts it met.
# The right guess: the same argument groups the same elements, and rows of a batch are
# independent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 safetensors==0.8.0 tokenizers==0.23.3
install -c pins --no-deps hqq==0.2.8.post1 einops termcolor optimum-quanto==0.2.7
cat >case.py <<'EOF'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
model = LlamaForCausalLM(config).eval()
row, others = torch.randint(3, 128, (1, 96)), torch.randint(3, 128, (3, 96))


@torch.no_grad()
def last_logits(ids, backend, axis):
    cache = QuantizedCache(backend, config, nbits=4, axis_key=axis, axis_value=axis)
    model(ids[:, :-1], cache=cache)
    return model(ids[:, -1:], cache=cache).logits[0, -1]


def moved(backend, axis):
    alone = last_logits(row, backend, axis)
    return (alone - last_logits(torch.cat([row, others]), backend, axis)).abs().max().item()


for name in ("transformers", "torch", "hqq", "optimum-quanto"):
    print(name, version(name))
quanto, hqq, inside = moved("quanto", 0), moved("hqq", 0), moved("hqq", 1)
print("a row's logits, alone against in a batch of 4, greatest difference:")
print(f"quanto, axis 0: {quanto:.1e}   hqq, axis 0: {hqq:.1e}   hqq, axis 1: {inside:.1e}")
as_described = quanto < 1e-3 and inside < 1e-3 and hqq > 0.1
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
