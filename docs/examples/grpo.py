"""GRPO with trl, whose samples come through kvtools: python grpo.py MODEL."""

import argparse
import re
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from kvtools.integrations import trl as through

PROMPTS = [f"What is {a} + {b}? Answer with a number: " for a in range(3, 9) for b in range(11, 19)]


def right(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """1 for a sum that is right."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        a, b = map(int, re.findall(r"\d+", prompt)[:2])
        number = re.search(r"\d+", text)
        found.append(float(number is not None and int(number[0]) == a + b))
    return found


def main(name: str, steps: int = 20, tokens: int = 16, n: int = 8) -> list[float]:
    """Mean reward of each step."""
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            folder,
            max_steps=steps,
            num_generations=n,
            per_device_train_batch_size=2 * n,
            max_completion_length=tokens,
            logging_steps=1,
            bf16=False,
            report_to=[],
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(name),
            right,
            options,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=AutoTokenizer.from_pretrained(name),
        )
        with through.patch(trainer):
            trainer.train()
    return [x["reward"] for x in trainer.state.log_history if "reward" in x]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    print(main(**vars(parser.parse_args())))
