"""An eviction policy of one's own, measured beside others: python policy.py MODEL."""

import argparse

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtools import CacheConfig, quality, tasks
from kvtools.policy import Candidates


def mean_attention(c: Candidates) -> Tensor:
    """Least attention per step since it was written goes first: H2O's sum favours old tokens."""
    age = (c.now_n[:, None, None] - c.position_nhs).clamp(min=1)
    return c.mass_nhs / age


def main(name: str, prompt: int = 256, tokens: int = 256, budget: int = 96) -> dict[str, float]:
    """KL from the exact cache on text, for each policy, of rows that evict."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    items = tasks.text_items(tokenizer, tasks.texts("held"), prompt, tokens)
    policies = {"mean attention": mean_attention, "h2o": "h2o", "scissorhands": "scissorhands"}
    contenders = [
        quality.Ours(name, CacheConfig(bits=8, budget=budget, policy=policy))
        for name, policy in policies.items()
    ]
    results, found = quality.compare(model, items, contenders), {}
    for name in policies:
        found[name] = quality.summary(model, results[name])["kl"]
        print(f"{name}: {found[name]:.4f} nats")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    main(**vars(parser.parse_args()))
