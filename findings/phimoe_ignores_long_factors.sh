#!/usr/bin/env bash
# transformers 5.24.0: Phi-3.5-MoE's (phimoe) rotary embedding never uses its longrope long
# factors.
#
# The module's inv_freq is switched to the long factors beyond the original length, but forward
# does not read it: it computes frequencies anew from the configuration without a length, which
# are the short ones. Only the magnitude (long_mscale) switches. Any long_factor gives the same
# cosines. phi3, with the same rope type, uses them.
#
# Hurts: long-context use of this model, and whoever ports or checks another implementation
# against it: the correct one, with long factors, looks wrong.
# The right guess: rope_parameters["long_factor"] decides the frequencies beyond the original
# length.
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
from transformers import Phi3Config, PhimoeConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding


def cosines(config_class, module_class, long_factor, length):
    """Cosines of the last of `length` positions; the original length is 32."""
    rope = dict(
        rope_type="longrope",
        rope_theta=10000.0,
        original_max_position_embeddings=32,
        short_factor=[1.0] * 4,
        long_factor=[long_factor] * 4,
    )
    if config_class is PhimoeConfig:
        rope.update(short_mscale=1.0, long_mscale=1.5)
    config = config_class(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        pad_token_id=0,
        rope_parameters=rope,
    )
    rotary = module_class(config)
    cos, _ = rotary(torch.zeros(1, length, 32), torch.arange(length)[None])
    return cos[0, -1, :4], rotary.inv_freq


print("transformers", transformers.__version__, "torch", torch.__version__)
used = {}
for name, classes in (
    ("phi3", (Phi3Config, Phi3RotaryEmbedding)),
    ("phimoe", (PhimoeConfig, PhimoeRotaryEmbedding)),
):
    (small, _), (large, inv_freq) = (cosines(*classes, factor, 64) for factor in (2.0, 16.0))
    print(name, "64 positions, long_factor 2: ", small.tolist())
    print(name, "64 positions, long_factor 16:", large.tolist(), "inv_freq", inv_freq.tolist())
    used[name] = not torch.allclose(small, large)
as_described = used == {"phi3": True, "phimoe": False}
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
