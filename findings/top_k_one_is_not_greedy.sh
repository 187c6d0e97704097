#!/usr/bin/env bash
# transformers 5.24.0: top_k keeps all tokens that tie with the k-th, and in bfloat16 many do.
#
# Logits of a bfloat16 model have 8 bits: near 16 they lie 1/8 apart, so that several of 50,000
# tokens have the very same one. generate computes with them in float32, which does not part them
# again. top_k removes what is less than the k-th: do_sample=True, top_k=1 then draws among the best
# tokens that tie, where greedy search takes the first, and top_k=50 keeps more than 50. The same
# weights in float32 have no ties, and top_k=1 is greedy.
#
# Hurts: who asks for greedy tokens by top_k=1 inside a sampling call (trainers that always sample
# do), compares samplers token by token, or sizes buffers by k: kernels that keep exactly k draw
# from another distribution.
# The right guess: do_sample=False for greedy tokens; count ties where k matters.
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
import copy

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TopKLogitsWarper

VOCAB = 50_000
config = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
torch.manual_seed(0)
full = LlamaForCausalLM(config).eval()
prompts = torch.randint(1, VOCAB, (64, 8))
print("transformers", transformers.__version__, "torch", torch.__version__)
unlike, most = {}, {}
for dtype in (torch.float32, torch.bfloat16):
    model = copy.deepcopy(full).to(dtype)
    how = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=16)
    greedy = model.generate(prompts, do_sample=False, **how)
    torch.manual_seed(1)
    drawn = model.generate(prompts, do_sample=True, top_k=1, **how)
    unlike[dtype] = int((greedy != drawn).any(1).sum())
    with torch.no_grad():
        logits = model(prompts).logits[:, -1].float()
    kept = TopKLogitsWarper(50)(prompts, logits).isfinite().sum(1)
    most[dtype] = int(kept.max())
    print(f"{dtype}: {unlike[dtype]} of 64 rows unlike greedy; top_k=50 keeps up to {most[dtype]}")
as_described = (
    unlike[torch.float32] == 0
    and most[torch.float32] == 50
    and unlike[torch.bfloat16] > 0
    and most[torch.bfloat16] > 50
)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
