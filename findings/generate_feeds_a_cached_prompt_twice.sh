#!/usr/bin/env bash
# transformers 5.24.0: a cache that already holds the whole prompt makes `generate` feed it again.
#
# Run the model over a prompt with a cache, then call generate(prompt, cache=cache) to go on. The
# tokens still to be fed are cut out as the last (length - cached) ones, and the last 0 of a list
# are all of it: the prompt is appended a second time behind itself. Tokens differ from a plain
# generate, and the cache ends longer by the prompt; there is no error or warning. With the last
# token left out of the first run, all is right.
#
# Hurts: shared prefixes, chat turns and searches that prefill once and sample many times. Nothing
# fails, so it is seen late.
# The right guess: one would expect the answer of plain generate, or an error. Cache all but the
# last token of what generate will be given.
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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

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
prompt = torch.randint(3, 128, (1, 16))
options = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)


def go_on(cached):
    """Greedy tokens where `cached` tokens of the prompt were run before; the cache's length."""
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(prompt[:, :cached], cache=cache)
    out = model.generate(prompt, cache=cache, **options)
    return out[0, 16:].tolist(), cache.get_seq_length()


print("transformers", transformers.__version__, "torch", torch.__version__)
plain = model.generate(prompt, **options)[0, 16:].tolist()
(most, most_length), (whole, whole_length) = go_on(15), go_on(16)
print("plain:                       ", plain)
print("15 of 16 prompt tokens cached:", most, "cache length", most_length)
print("16 of 16 prompt tokens cached:", whole, "cache length", whole_length)
as_described = most == plain and whole != plain and whole_length == most_length + 16
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
