"""Tiny random models for the tests: one per architecture, float32, with lively greedy tokens."""

import functools
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from kvtools.hf import check_model

VOCAB, LAYERS, HEADS, KV_HEADS, D, WINDOW, PROMPT = 256, 4, 4, 2, 16, 16, 40
COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
SLIDING = dict(head_dim=D, sliding_window=WINDOW)
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=D),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **COMMON, **SLIDING, query_pre_attn_scalar=D, attn_logit_softcapping=5.0,
        attn_implementation="eager",  # sdpa knows no soft cap; transformers 5.17 takes it anyway
    ),
    "gemma3": lambda: Gemma3TextConfig(**COMMON, **SLIDING, query_pre_attn_scalar=D),
    "gemma4": lambda: Gemma4TextConfig(  # whose last layers may run for a prompt's last token alone
        **COMMON, **SLIDING, num_kv_shared_layers=2, global_head_dim=D,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "phi3": lambda: Phi3Config(**COMMON),
    "gptoss": lambda: GptOssConfig(
        **COMMON, **SLIDING, num_local_experts=4, num_experts_per_tok=2
    ),
}  # fmt: skip


def scaled(model):
    """Larger weights: greedy tokens of a model as initialised repeat at once."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(3 if "embed" in name or "lm_head" in name else 10)
    return model.eval()


def fresh_model(name="llama"):
    torch.manual_seed(0)
    return scaled(AutoModelForCausalLM.from_config(CONFIGS[name]()).float())


@functools.cache
def tiny_model(name="llama"):
    """Shared by all tests: it must be left as it was found."""
    return fresh_model(name)


def random_ids(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, shape, generator=generator)


def padded_prompts(lengths=(33, 20, 40), seed=1):
    """Prompts of these lengths, left-padded, and their mask."""
    ids = random_ids(len(lengths), max(lengths), seed=seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids.masked_fill(mask == 0, 0), mask


@dataclass
class Counter:
    """Counts tokens that pass a model's embedding: one entry per forward, and one per token id."""

    model: torch.nn.Module

    def __enter__(self):
        check_model(self.model, head=False)  # whose probe does not count
        self.forwards, self.ids = [], []
        embedding = self.model.get_input_embeddings()
        self._hook = embedding.register_forward_hook(self._count)
        return self

    def _count(self, module, args, output):
        self.forwards.append(args[0].numel())
        self.ids.append(args[0].flatten().tolist())

    def __exit__(self, *error):
        self._hook.remove()
