#!/usr/bin/env bash
# transformers 5.24.0: generate_batch (continuous batching) ignores stop_strings, max_time and num_beams
# of its GenerationConfig.
#
# What it cannot do among logits processors, such as a repetition penalty, it names in a warning. What
# ends a text or searches is not looked at: with stop_strings no row ends, with max_time=0.0001 and
# num_beams=3 its tokens are those that it gives without, and no warning says so. generate, given the
# same configuration, stops, or searches, or asks for the tokenizer that stop strings need.
#
# Hurts: who speeds up generate by generate_batch: code that ends a step at an empty line or an answer
# at a tag gets whole texts and counts what follows.
# The right guess: what is not supported is refused, in a warning at least. Cut the texts afterwards.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 accelerate==1.15.0
cat >case.py <<'EOF'
import logging
import string
import warnings

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = string.ascii_letters + string.digits
letter_by_letter = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
letter_by_letter.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_by_letter)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(letters), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for x in model.parameters():
        if x.ndim > 1:
            x.mul_(4)
prompt = tokenizer.encode("abcde", add_special_tokens=False)
said = []


class Hear(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


for name in ("transformers", "ContinuousBatchingLogger"):
    logging.getLogger(name).addHandler(Hear(logging.WARNING))


def asked(**more):
    return GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=-1, **more)


def plain(**more):
    row = model.generate(torch.tensor([prompt]), generation_config=asked(**more), tokenizer=tokenizer)
    return tokenizer.decode(row[0, len(prompt) :])


def batched(**more):
    said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        [out] = model.generate_batch(
            [prompt], generation_config=asked(**more), progress_bar=False
        ).values()
    named = [x for x in said + [str(w.message) for w in caught] if any(word in x for word in more)]
    said_ = [x for x in said if "isn't supported" in x]
    return tokenizer.decode(out.generated_tokens), named + said_


print("transformers", transformers.__version__, "torch", torch.__version__)
(greedy, words), alone = batched(), plain()
print("without any:", "generate", alone, "generate_batch", greedy, words)
assert not words and alone[1:3] in greedy
as_described = True
for more in (dict(stop_strings=[alone[1:3]]), dict(max_time=1e-4), dict(num_beams=3)):
    one, (many, words) = plain(**more), batched(**more)
    print(f"{more}: generate {one}, generate_batch {many}, warnings: {words}")
    as_described &= one != alone and many == greedy and not words
many, words = batched(repetition_penalty=3.0)
print("repetition_penalty=3.0: generate_batch", many, words)
as_described &= bool(words)
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
