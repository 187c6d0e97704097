#!/usr/bin/env bash
# transformers 5.24.0 with safetensors 0.8.0: a model on a CPU goes on reading its checkpoint file.
#
# from_pretrained in the dtype of the checkpoint maps the file and keeps it as the parameters; so do
# safe_open and load_file. Whoever then copies a newer checkpoint of the same sizes over the file,
# in place, changes the weights of every process that has loaded the old one, in the middle of what
# it does, without an error. torch.load copies unless it is told mmap=True.
#
# Hurts: reference models and servers that outlive a training run which copies its checkpoints over
# one another (cp, rsync --inplace); caches and tensors kept in safetensors files. A file that gets
# shorter ends the process. save_pretrained itself is harmless: it writes a new file and renames it.
# The right guess: replace checkpoints by renaming, or clone what must stay as it was.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6
cat >case.py <<'EOF'
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
)
for seed, folder in enumerate(("old", "new")):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


@torch.no_grad()
def says(model):
    return round(model.eval()(torch.arange(5)[None]).logits.sum().item(), 4)


old, new = (LlamaForCausalLM.from_pretrained(x) for x in ("old", "new"))
file = Path("old/model.safetensors")
tensors = load_file(file)
before = says(old)
name = "model.embed_tokens.weight"
held = tensors[name].clone()
content = Path("new/model.safetensors").read_bytes()
assert len(content) == file.stat().st_size
with open(file, "r+b") as target:  # in place, as rsync --inplace does
    target.write(content)
print("transformers", transformers.__version__, "safetensors", safetensors.__version__)
print("the loaded model says", before, "and, after its file was written over,", says(old))
print("the model of the other file says", says(new))
print("a tensor of load_file has changed, too:", not torch.equal(tensors[name], held))
as_described = before != says(old) == says(new) and not torch.equal(tensors[name], held)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
