"""kvtools: generation of many samples from one prompt, for Hugging Face models and other servers.

The prompt's KV cache is stored and read once, what rollouts keep is evicted and quantised,
reasoning steps are scored without full logits. Importing this needs torch only; `generate`,
`patch`, `Rollouts`, `prm` and `search` need transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import CacheConfig
from .ops.attention import Plan, merge_states, plan_from_block_table, tree_attention
from .ops.evict import compact_kv, key_scores, select_victims
from .ops.quant import KVPages, append_kv, dequantize_kv, quantize_kv
from .ops.sampling import sample
from .ops.scoring import step_scores, token_logprobs

if TYPE_CHECKING:
    from . import hf, models, policy, prm, quality, search, tasks
    from ._host import PoolExhausted
    from .cache import KVCache
    from .hf import generate, load_cache, logprobs, patch, save_cache
    from .prm import PRM
    from .rollouts import Rollouts

__version__ = "0.1.0"
__all__ = [
    "PRM",
    "CacheConfig",
    "KVCache",
    "KVPages",
    "Plan",
    "PoolExhausted",
    "Rollouts",
    "append_kv",
    "compact_kv",
    "dequantize_kv",
    "generate",
    "hf",
    "key_scores",
    "load_cache",
    "logprobs",
    "merge_states",
    "models",
    "patch",
    "plan_from_block_table",
    "policy",
    "prm",
    "quality",
    "quantize_kv",
    "sample",
    "save_cache",
    "search",
    "select_victims",
    "step_scores",
    "tasks",
    "testing",
    "token_logprobs",
    "tree_attention",
]

_LAZY = {
    "KVCache": "cache",
    "PRM": "prm",
    "PoolExhausted": "_host",
    "Rollouts": "rollouts",
    "generate": "hf",
    "hf": "hf",
    "load_cache": "hf",
    "logprobs": "hf",
    "models": "models",
    "patch": "hf",
    "policy": "policy",
    "prm": "prm",
    "quality": "quality",
    "save_cache": "hf",
    "search": "search",
    "tasks": "tasks",
    "testing": "testing",
}


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvtools' has no attribute {name!r}")
    try:
        module = import_module(f".{_LAZY[name]}", __name__)
        return module if name == _LAZY[name] else getattr(module, name)
    except ImportError as error:
        if error.name == "transformers":
            hint = "transformers is not installed: pip install kvtools[hf]"
        elif error.name == "kvtools._host":
            hint = error.msg
        else:
            raise
        raise ImportError(f"kvtools.{name} is not available: {hint}") from error
