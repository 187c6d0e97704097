#!/usr/bin/env bash
# transformers 5.24.0: a GGUF file whose way of splitting text is not in a table gets GPT-2's, without
# a word.
#
# Byte-level vocabularies are alike in a GGUF file; how text is cut before merges apply stands in
# tokenizer.ggml.pre alone. transformers knows some of its names (llama-bpe, qwen2, tekken, gpt-4o and
# others). Of the rest that llama.cpp knows (smollm, starcoder, command-r, refact, falcon,
# deepseek-llm, deepseek-v3 and more) it makes GPT-2's rule: no error, no warning. "smollm" means that
# each digit stands alone before GPT-2's rule is applied. So blanks before a number are other tokens:
# a token for two blanks never comes up there.
#
# Hurts: who loads SmolLM2 and others from GGUF files: ids differ from llama.cpp's and from those of
# the original tokenizer in code, tables and aligned sums.
# The right guess: load the tokenizer from the original repository beside the weights of the file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cat >case.py <<'EOF'
import transformers
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

BLANK = "Ġ"  # how a byte-level vocabulary writes a blank
TOKENS = [*bytes_to_unicode().values(), "<|end|>", 2 * BLANK]
MERGES = [f"{BLANK} {BLANK}"]
TEXT = "apples:  12"


def loaded(pre):
    out = GGUFWriter(f"{pre}.gguf", "llama")
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(TOKENS)
    out.add_token_types([1] * 256 + [3, 1])
    out.add_token_merges(MERGES)
    out.add_eos_token_id(256)
    out.add_vocab_size(len(TOKENS))
    out.add_context_length(64)
    out.add_embedding_length(8)
    out.add_block_count(1)
    out.add_head_count(1)
    out.add_feed_forward_length(8)
    out.add_layer_norm_rms_eps(1e-5)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return AutoTokenizer.from_pretrained(".", gguf_file=f"{pre}.gguf").tokenize(TEXT)


ids = {token: i for i, token in enumerate(TOKENS)}
meant = Tokenizer(models.BPE(ids, [tuple(x.split()) for x in MERGES]))
meant.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
])
print("transformers", transformers.__version__, "reads", repr(TEXT))
want, got, known = meant.encode(TEXT).tokens, loaded("smollm"), loaded("qwen2")
print("digits apart, then GPT-2's rule:", want)
print("pre = smollm:                   ", got)
print("pre = qwen2, which is known:    ", known)
as_described = 2 * BLANK in want and 2 * BLANK not in got and loaded("gpt-2") == got
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
