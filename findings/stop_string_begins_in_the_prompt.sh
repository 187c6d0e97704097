#!/usr/bin/env bash
# transformers 5.24.0: stop_strings are looked for in the prompt's end and the new text together.
#
# generate(stop_strings=["\n\n"]) ends as soon as the whole sequence ends with the string. A prompt
# that ends with one line break, and a first new token that is one, make two: the row stops after
# a single token, although the text that it wrote holds no empty line. The same model, the same new
# tokens, after a prompt without the trailing line break, go on.
#
# Hurts: search and scoring by steps, which end at an empty line and put a line break after the
# question or after the step before: rows give up with an empty step, some rows of a batch and not
# others. Nothing is raised, and the finish looks like any other.
# The right guess: do not let a prompt end with the beginning of a stop string, or look for it in
# the new text by a criterion of your own.
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
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = ["<unk>", *"abcdefgh \n"]
core = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, [], unk_token="<unk>"))
core.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
config = LlamaConfig(
    vocab_size=len(letters),
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()


def written(prompt):
    """What follows a prompt where the model may say nothing but a line break, then letters."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        stop_strings=["\n\n"],
        tokenizer=tokenizer,
        prefix_allowed_tokens_fn=lambda row, seen: [
            letters.index("\n") if len(seen) == length else letters.index("a")
        ],
    )
    return tokenizer.decode(out[0, length:])


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {prompt: written(prompt) for prompt in ("abc", "abc\n")}
for prompt, text in found.items():
    print(f"after {prompt!r}: {text!r}")
as_described = found == {"abc": "\naaaaa", "abc\n": "\n"}
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
