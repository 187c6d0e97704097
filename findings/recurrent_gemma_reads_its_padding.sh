#!/usr/bin/env bash
# transformers 5.24.0: RecurrentGemma reads the padding to the left of a prompt, whatever the mask
# says.
#
# Its recurrent blocks begin with a convolution over four tokens, which gets no attention mask. The
# first tokens of a left-padded row are mixed with the embeddings of padding, and the state carries
# that on: a prompt's logits depend on whether a longer one is beside it. Shown with rows that are
# padded by an ordinary token, as the end of text often is; in a model made anew, as here, the
# embedding of config.pad_token_id is zero and would hide it, which a checkpoint's need not be. Jamba,
# whose recurrent layers set masked tokens to zero, has the same logits alone and in a batch.
#
# Hurts: who generates in batches of prompts of unequal length: tokens are not those of a prompt alone,
# without a warning. Log-probabilities of padded batches are off in the same way.
# The right guess: batches of prompts of equal length, or one prompt at a time.
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
from transformers import AutoModelForCausalLM, JambaConfig, RecurrentGemmaConfig

END = 5
sizes = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=1,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=None,
)
configs = {
    "RecurrentGemma": RecurrentGemmaConfig(num_hidden_layers=3, head_dim=16, lru_width=64, **sizes),
    "Jamba": JambaConfig(
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
        num_experts_per_tok=1, **sizes,
    ),
}  # fmt: skip
torch.manual_seed(0)
long, short = torch.randint(10, 256, (1, 20)), torch.randint(10, 256, (1, 13))
mask = torch.ones(2, 20, dtype=torch.long)
mask[1, :7] = 0


batch = torch.cat([long, torch.cat([torch.full((1, 7), END), short], 1)])
position = (mask.cumsum(1) - 1).clamp(min=0)


def new(model, ids, attention_mask):
    out = model.generate(ids, attention_mask=attention_mask, max_new_tokens=12, do_sample=False)
    return out[-1, ids.shape[1] :].tolist()


print("transformers", transformers.__version__, "torch", torch.__version__)
off, same = {}, {}
for name, config in configs.items():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim > 1:
                x.mul_(5)
        alone = model(short).logits[0, -1]
        beside = model(batch, attention_mask=mask, position_ids=position).logits[1, -1]
    off[name] = float((beside - alone).abs().max() / alone.std())
    same[name] = new(model, short, torch.ones_like(short)) == new(model, batch, mask)
    print(f"{name}: logits beside a longer prompt differ by {off[name]:.1e} of their spread; "
          f"tokens equal: {same[name]}")  # fmt: skip
ok = off["Jamba"] < 1e-4 and same["Jamba"]
gone = off["RecurrentGemma"] < 1e-3 or same["RecurrentGemma"]
raise SystemExit(0 if ok and not gone else "no longer as described")
EOF
venv/bin/python -I case.py
