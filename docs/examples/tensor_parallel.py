"""Samples of a model that lies on several devices, each of which holds a part of every layer:
torchrun --nproc-per-node 2 tensor_parallel.py MODEL."""

import argparse

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvtools

PROMPT = "A story about a lighthouse keeper who counts ships.\n\n"


def main(name: str, n: int = 4, tokens: int = 64) -> tuple[list[list[int]], dict[str, int]]:
    """Tokens of each sample, and the bytes of this rank's store."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, tp_plan="auto")
    rollouts = kvtools.Rollouts(model, kvtools.CacheConfig.preset("balanced"), seed=0)
    rollouts.prefill([tokenizer.encode(PROMPT)], n=n)
    samples = rollouts.generate(max_new_tokens=tokens)
    if not dist.is_initialized() or dist.get_rank() == 0:  # all ranks have the same samples
        for sample in samples:
            print(tokenizer.decode(sample), end="\n---\n")
    return samples, rollouts.kv.memory()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    main(**vars(parser.parse_args()))
    if dist.is_initialized():
        dist.destroy_process_group()
