#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: a tensor parallel model that samples mixes several texts.
#
# With tp_plan="auto" each rank holds a part of every layer, and `generate` runs on all of them. Each
# draws its next token from torch's generator of its own process. Where those are not in step, as
# after torch.manual_seed(seed + rank), which is right for data parallel, ranks append different
# tokens, and from then on each layer adds up what one rank's heads say of one text and another's of
# another. Nothing raises: every rank returns a sample, of a distribution that is nobody's. Here
# their last tokens have a log-probability of -8 and less under the model, where samples have -1.8.
#
# Hurts: sampling under torchrun in scripts that seed by rank, or in which a rank alone has drawn
# before (a shuffle, a log line with a random name).
# The right guess: one rank draws for all, or ranks compare. Seed all ranks alike right before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 safetensors==0.8.0 tokenizers==0.23.3 accelerate==1.15.0
cat >case.py <<'EOF'
import warnings

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore", FutureWarning)  # of tp_plan=, which is to get another name
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 0:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained("model")
dist.barrier()
model = AutoModelForCausalLM.from_pretrained("model", tp_plan="auto").eval()
whole = AutoModelForCausalLM.from_pretrained("model").eval()
prompt = torch.arange(1, 9)[None]


def said(do_sample):
    """Of each rank: the tokens that its `generate` returns, and the mean log-probability that the
    whole model gives the last eight of them."""
    torch.manual_seed(rank)
    out = model.generate(prompt, do_sample=do_sample, top_k=0, max_new_tokens=24, min_new_tokens=24)
    with torch.no_grad():
        logp = whole(out).logits[0, :-1].log_softmax(-1)
    mean = logp.gather(1, out[0, 1:, None])[-8:].mean().item()
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (out[0, 8:].tolist(), mean))
    return every


greedy, sampled = said(False), said(True)
torch.manual_seed(0)
alone = whole.generate(prompt.repeat(64, 1), do_sample=True, top_k=0, max_new_tokens=24)
with torch.no_grad():
    logp = whole(alone).logits[:, :-1].log_softmax(-1)
usual = logp.gather(2, alone[:, 1:, None])[:, -8:].mean().item()
if rank == 0:
    print("transformers", transformers.__version__, "torch", torch.__version__)
    print("greedy: all ranks return the same:", greedy[0][0] == greedy[1][0])
    for i, (tokens, mean) in enumerate(sampled):
        print(f"sampled, rank {i} returns {tokens[:8]}..., log-probability of its last {mean:.2f}")
    print(f"samples of the whole model: {usual:.2f}")
worse = max(mean for _, mean in sampled) < usual - 1
apart = greedy[0][0] == greedy[1][0] and sampled[0][0] != sampled[1][0]
dist.destroy_process_group()
raise SystemExit(0 if apart and worse else "no longer as described")
EOF
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 case.py
