#!/usr/bin/env bash
# transformers 5.24.0: top_k=None as an argument switches top-k off, in a GenerationConfig it does
# not.
#
# generate(do_sample=True) keeps 50 tokens although nobody asked for top-k. generate(...,
# top_k=None) keeps the whole vocabulary. The same None in
# generate(generation_config=GenerationConfig(...)) is taken for "not set" and filled with 50
# again, so it cuts as before. top_k=0 works in both places.
#
# Hurts: rollouts for reinforcement learning and best-of-N, where tokens are taken for samples of
# the model's own distribution: log-probabilities no longer match, and pass@N is that of a
# truncated model.
# The right guess: one value, one meaning; and pure sampling unless something was asked for.
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
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 128, (1, 4))
common = dict(
    do_sample=True,
    max_new_tokens=1,
    pad_token_id=0,
    output_scores=True,
    return_dict_in_generate=True,
)


def kept(**options):
    """How many of the 128 tokens can still be drawn."""
    out = model.generate(prompt, **options)
    return torch.isfinite(out.scores[0]).sum().item()


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {
    "nothing said": kept(**common),
    "argument top_k=None": kept(top_k=None, **common),
    "GenerationConfig(top_k=None)": kept(generation_config=GenerationConfig(top_k=None, **common)),
    "argument top_k=0": kept(top_k=0, **common),
    "GenerationConfig(top_k=0)": kept(generation_config=GenerationConfig(top_k=0, **common)),
}
for name, count in found.items():
    print(f"{name}: {count} of 128 tokens")
as_described = list(found.values()) == [50, 128, 50, 128, 128]
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
