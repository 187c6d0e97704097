"""Generation of trl's trainers: GRPO, RLOO, online DPO and others that sample while they train.

with kvtools.integrations.trl.patch(trainer):
    trainer.train()
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import CacheConfig
from ..hf import patch as patch_model

# Options of a trainer by which it samples elsewhere, and what to do instead.
ELSEWHERE = {
    "use_vllm": "samples come from vLLM",
    "use_transformers_continuous_batching": "samples come from generate_batch",
    "use_transformers_paged": "samples come from generate_batch",
}


@contextmanager
def patch(trainer: Any, config: CacheConfig | None = None, **options: Any) -> Iterator[Any]:
    """Let the samples that a trainer draws of its model come through kvtools.

    A group's prompt is encoded and stored once for all its samples. With an exact cache, the
    default, they are distributed as without. A compressed one changes their distribution, and
    trainers compute log-probabilities of the model without it: nothing corrects for that.

    Args:
        trainer: one of trl's that samples with `generate`, and has been made.
        config: how keys and values are kept.
        options: as for `kvtools.patch`.

    Raises:
        TypeError: `trainer` has no model or no accelerator.
        ValueError: it samples elsewhere or names a cache of transformers, by the name of the
            option; kvtools cannot run its model.

    Undone on exit, also after an error.
    """
    accelerator, model = (getattr(trainer, name, None) for name in ("accelerator", "model"))
    if accelerator is None or model is None:
        raise TypeError(
            f"trainer is a {type(trainer).__name__}: pass a trainer of trl's, or give its model to "
            "kvtools.patch"
        )
    for name, where in ELSEWHERE.items():
        if getattr(trainer.args, name, False):
            raise ValueError(f"{name}=True: {where} and not from kvtools; leave it out")
    cache = getattr(trainer.args, "cache_implementation", None) or (
        getattr(trainer.args, "generation_kwargs", None) or {}
    ).get("cache_implementation")
    if cache is not None:
        raise ValueError(
            f"cache_implementation={cache!r} of the trainer's arguments: kvtools brings its own "
            "cache, leave it out"
        )
    with patch_model(accelerator.unwrap_model(model), config, **options):
        yield trainer
