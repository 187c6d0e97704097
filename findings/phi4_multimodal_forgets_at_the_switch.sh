#!/usr/bin/env bash
# transformers 5.24.0 (5.17.0 too): Phi-4-multimodal's generate forgets the text once it is longer
# than original_max_position_embeddings.
#
# There prepare_inputs_for_generation drops the cache, so that the text can be encoded again with
# the other rotary factors, but leaves the number of new tokens at one: the model is then run on
# the newest token alone, without a cache, at this step and at every later one. Phi-3 has the same
# method and resets that number, so that the whole text is encoded again.
#
# Hurts: whoever generates with it past 4,096 tokens: fluent text that has nothing to do with what
# came before, and no error.
# The right guess: the whole text is encoded again, once, as Phi-3 does.
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
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
)

LIMIT = 24
SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    original_max_position_embeddings=LIMIT,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=10000.0,
        factor=4.0,
        original_max_position_embeddings=LIMIT,
        short_factor=[1.0] * 4,
        long_factor=[4.0] * 4,
    ),
)
PARTS = dict(
    vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, crop_size=28,
    ),
    audio_config=dict(hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2),
)


def tokens_fed(model):
    """Tokens of each forward while the text grows from 22 tokens past the limit."""
    fed = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = torch.arange(2, 24)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
    hook.remove()
    return fed


print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
phi3 = tokens_fed(Phi3ForCausalLM(Phi3Config(**SMALL)).eval())
phi4 = tokens_fed(Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**SMALL, **PARTS)).eval())
print("tokens of each forward, limit", LIMIT)
print("phi3:            ", phi3)
print("phi4_multimodal: ", phi4)
as_described = phi3 == [22, 1, 1, 25, 1, 1, 1] and phi4 == [22, 1, 1, 1, 1, 1, 1]
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I -W ignore case.py
