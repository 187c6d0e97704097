#!/usr/bin/env bash
# transformers 5.24.0: Jamba's Mamba layers start from nothing whenever several tokens come at once.
#
# A forward of one token goes on from the recurrent state in the cache. A forward of more runs the
# scan from a state of zeros, and overwrites the cached one with where that ends: the convolution
# goes on, the attention layers see everything, and nothing is raised. Qwen3-Next, beside it, hands
# the state on.
#
# Hurts: who prefills in chunks (generate's prefill_chunk_size), continues a chat from its cache, or
# verifies drafted tokens in one forward: all that the Mamba layers knew is gone.
# The right guess: with a cache, feed Jamba a whole prompt at once and then single tokens; compare a
# chunked forward with a whole one before you trust a recurrent model with it.
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
from transformers import AutoModelForCausalLM, DynamicCache, JambaConfig, Qwen3NextConfig

SIZES = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=1,
    num_experts_per_tok=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
KINDS = ["linear_attention", "full_attention"] * 2
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, mlp_only_layers=[0, 1, 2, 3])
CONFIGS = {
    "jamba": JambaConfig(**SIZES, attn_layer_period=2, attn_layer_offset=1),
    "qwen3_next": Qwen3NextConfig(**SIZES, **LINEAR, layer_types=KINDS),
}
transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__)
found = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:  # larger weights: greedy tokens of fresh ones repeat at once
                weight.mul_(3 if "embed" in key or "lm_head" in key else 10)
    text = torch.randint(3, 256, (1, 24))
    for chunks in ([12] + [1] * 12, [12, 12]):
        cache, begin = DynamicCache(config=config), 0
        with torch.no_grad():
            whole = model(text, use_cache=False).logits[0, 12:]
            for n in chunks:
                ids = text[:, begin : begin + n]
                out = model(ids, cache=cache, use_cache=True).logits
                begin += n
        error = float((out[0, -1] - whole[-1]).norm() / whole[-1].norm())
        found[name, len(chunks)] = error
        what = "one by one" if len(chunks) > 2 else "at once"
        print(f"{name}: 12 tokens, then 12 {what}: last logits off by {error:.1%}")
    tokens = [
        model.generate(text, do_sample=False, max_new_tokens=12, **how)[0, -12:].tolist()
        for how in ({}, {"prefill_chunk_size": 8})
    ]
    found[name, "generate"] = tokens[0] != tokens[1]
    print(f"{name}: prefill_chunk_size=8 changes greedy tokens: {found[name, 'generate']}")
as_described = (
    found["jamba", 13] < 1e-3
    and found["jamba", 2] > 0.01
    and found["jamba", "generate"]
    and max(found["qwen3_next", 13], found["qwen3_next", 2]) < 1e-3
    and not found["qwen3_next", "generate"]
)
raise SystemExit(0 if as_described else "no longer as described")
