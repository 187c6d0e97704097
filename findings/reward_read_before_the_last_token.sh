#!/usr/bin/env bash
# transformers 5.24.0: a sequence-classification head ignores attention_mask and reads by pad id.
#
# LlamaForSequenceClassification (and every model that shares its head) takes the score at the
# last token whose id is not config.pad_token_id. Where the pad token is the end-of-text token, as
# so often set, a text that ends with it is scored one token too early, although the attention
# mask says that this token counts. With another pad id the same weights and the same input give
# another score.
#
# Hurts: reward models and verifiers: best-of-N ranks by a score from the wrong position, and
# training and serving with different pad ids disagree. Nothing is raised.
# The right guess: the mask says which token is last. Give the pad token an id of its own.
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
from transformers import LlamaConfig, LlamaForSequenceClassification

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    num_labels=1,
    eos_token_id=2,
    pad_token_id=2,
)
model = LlamaForSequenceClassification(config).eval()
text = torch.cat([torch.randint(3, 128, (1, 6)), torch.tensor([[2]])], 1)  # ends with end-of-text


@torch.no_grad()
def score(pad_token_id):
    model.config.pad_token_id = pad_token_id
    return model(text, attention_mask=torch.ones_like(text)).logits.item()


print("transformers", transformers.__version__, "torch", torch.__version__)
with torch.no_grad():
    before, last = model.score(model.model(text).last_hidden_state)[0, -2:, 0].tolist()
shared, own = score(2), score(0)
print(f"head at the last token {last:.4f}, at the one before {before:.4f}")
print(f"score with pad = end of text {shared:.4f}, with a pad of its own {own:.4f}")
as_described = abs(shared - before) < 1e-5 and abs(own - last) < 1e-5 and abs(last - before) > 0.1
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
