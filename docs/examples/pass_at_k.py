"""pass@k of a model on sums with known answers: python pass_at_k.py MODEL."""

import argparse
from math import comb

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtools import CacheConfig, Rollouts, search

QUESTIONS = {
    "What is 17 + 26? End with: The answer is N.": 43,
    "Tom has 3 bags of 4 apples and eats 2. How many are left? End with: The answer is N.": 10,
}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, of which `right` are right, hold a right one; unbiased."""
    return 1 - comb(n - right, k) / comb(n, k)


def main(name: str, n: int = 16, tokens: int = 256) -> dict[int, float]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    rollouts = Rollouts(model, CacheConfig.preset("lossless"), temperature=0.8, seed=0)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": x}], add_generation_prompt=True)
        for x in QUESTIONS
    ]
    right = [0] * len(prompts)
    answers = list(QUESTIONS.values())
    ids = [x["input_ids"] for x in prompts]
    for x in rollouts.sample(ids, n, max_new_tokens=tokens, tokenizer=tokenizer):
        right[x.prompt] += search.final_number(x.text) == answers[x.prompt]
    found = {}
    for k in (k for k in (1, 4, 16) if k <= n):
        found[k] = sum(pass_at_k(n, count, k) for count in right) / len(right)
        print(f"pass@{k}: {found[k]:.2f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    main(**vars(parser.parse_args()))
