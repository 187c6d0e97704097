#!/usr/bin/env bash
# transformers 5.24.0: Mamba, FalconMamba and Jamba begin anew where a cache gets several tokens at once.
#
# Their recurrent layers go on from the cached state only where a single token comes. Several, as the
# next turn of a chat, a chunk of a long prompt (prefill_chunk_size) or drafts to be verified, are
# computed as if nothing had been before, and their state takes the place of the old one. There is no
# error and no warning. Mamba2, and the hybrids that have its layer, go on from the state.
#
# Hurts: who continues a conversation or chunks a prompt: in Jamba the attention layers still see the
# old tokens, so that the text looks sane and is another model's.
# The right guess: give such models the whole text again, or what is new token by token.
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
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
)

sizes = dict(vocab_size=256, hidden_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=None)
configs = {
    "Mamba": MambaConfig(num_hidden_layers=3, **sizes),
    "FalconMamba": FalconMambaConfig(num_hidden_layers=3, **sizes),
    "Jamba": JambaConfig(
        num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=1, num_experts=1,
        num_experts_per_tok=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        **sizes,
    ),
    "Mamba2": Mamba2Config(num_hidden_layers=3, num_heads=8, head_dim=16, **sizes),
}  # fmt: skip
torch.manual_seed(0)
ids = torch.randint(1, 256, (1, 24))
at = torch.arange(24)[None]


@torch.no_grad()
def in_parts(model, cuts):
    """Logits of the last token, after a forward of each part."""
    more, bounds = {}, [0, *cuts, 24]
    for begin, end in zip(bounds, bounds[1:]):
        if model.config.model_type == "jamba":
            more["position_ids"] = at[:, begin:end]
        out = model(ids[:, begin:end], use_cache=True, **more)
        more["cache"] = out.cache
    return out.logits[0, -1]


print("transformers", transformers.__version__, "torch", torch.__version__)
off = {}
for name, config in configs.items():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim > 1:
                x.mul_(3)
    whole = in_parts(model, [])
    one, several = (
        float((in_parts(model, cuts) - whole).abs().max() / whole.std())
        for cuts in (range(12, 24), [12])
    )
    off[name] = several
    print(f"{name}: 12 tokens after 12, one by one: off by {one:.0e} of the logits' spread, "
          f"at once: {several:.0e}")  # fmt: skip
    assert one < 1e-3, one
forget = all(off[name] > 1e-3 for name in ("Mamba", "FalconMamba", "Jamba"))
raise SystemExit(0 if forget and off["Mamba2"] < 1e-4 else "no longer as described")
EOF
venv/bin/python -I case.py
