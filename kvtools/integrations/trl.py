"""Generation of trl's trainers: GRPO, RLOO, online DPO and others that sample while they train.

with kvtools.integrations.trl.patch(trainer):
    trainer.train()
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig
from ..hf import logprobs as likelihood
from ..hf import patch as patch_model

# Options of a trainer by which it samples elsewhere, and what to do instead.
ELSEWHERE = {
    "use_vllm": "samples come from vLLM",
    "use_transformers_continuous_batching": "samples come from generate_batch",
    "use_transformers_paged": "samples come from generate_batch",
}


SCORES = "_get_per_token_logps_and_entropies"  # by which GRPO and RLOO score completions


@contextmanager
def patch(
    trainer: Any, config: CacheConfig | None = None, *, logprobs: bool = False, **options: Any
) -> Iterator[Any]:
    """Let the samples that a trainer draws of its model come through kvtools.

    A group's prompt is encoded and stored once for all its samples. With an exact cache, the
    default, they are distributed as without. A compressed one changes their distribution, and
    trainers compute log-probabilities of the model without it: nothing corrects for that.

    Args:
        trainer: one of trl's that samples with `generate`, and has been made.
        config: how keys and values are kept while it samples.
        logprobs: what GRPO and RLOO want no gradients of, old and reference log-probabilities, come
            through `kvtools.logprobs`, with an exact cache. They differ by rounding from the
            trainer's, and where a model tells positions otherwise than by their distance: the
            trainer counts the padding of prompts as positions. Calls with gradients, images or a
            router's loss stay the trainer's.
        options: as for `kvtools.patch`.

    Raises:
        TypeError: `trainer` has no model or no accelerator.
        ValueError: it samples elsewhere, names a cache of transformers or none, or cannot have its
            log-probabilities taken, by the name of the option; kvtools cannot run its model.

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
    if getattr(getattr(trainer, "generation_config", None), "use_cache", None) is False:
        raise ValueError(
            "use_cache=False of the trainer's generation config, which online DPO sets beside "
            "gradient_checkpointing=True: pass generation_kwargs={'use_cache': True}; a step's "
            "tokens are the same"
        )
    if logprobs and not hasattr(trainer, SCORES):
        raise ValueError(
            f"logprobs=True: a {type(trainer).__name__} has no {SCORES}, by which GRPO and RLOO "
            "score completions; leave it out"
        )
    if logprobs and getattr(trainer.args, "cast_lm_head_to_fp32", False):
        raise ValueError(
            "logprobs=True takes logits in the dtype of the model, and not by "
            "cast_lm_head_to_fp32=True: leave one of them out"
        )
    with patch_model(accelerator.unwrap_model(model), config, **options):
        before = vars(trainer).get(SCORES)
        try:
            if logprobs:
                setattr(trainer, SCORES, _Scores(trainer, getattr(trainer, SCORES)))
            yield trainer
        finally:
            vars(trainer).pop(SCORES, None)
            if before is not None:
                setattr(trainer, SCORES, before)


class _Scores:
    """In place of a trainer's method `SCORES`, which is `stock`."""

    def __init__(self, trainer: Any, stock: Any) -> None:
        self.trainer, self.stock = trainer, stock

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        more = any(x is not None for x in inputs.values())
        if torch.is_grad_enabled() or compute_aux_loss or more:
            return self.stock(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy,
                compute_aux_loss, **inputs,
            )  # fmt: skip
        rows: dict[tuple[int, ...], list[int]] = {}  # of each prompt
        tails, seen = [], attention_mask.bool()
        for i, (row, there) in enumerate(zip(input_ids, seen, strict=True)):
            prompt, tail = row[:-logits_to_keep], row[-logits_to_keep:]
            rows.setdefault(tuple(prompt[there[:-logits_to_keep]].tolist()), []).append(i)
            tails.append(tail[there[-logits_to_keep:]])
        with self.trainer.accelerator.autocast():
            found = likelihood(
                self.trainer.accelerator.unwrap_model(model), list(rows),
                [[tails[i] for i in each] for each in rows.values()],
                temperature=self.trainer.temperature,
            )  # fmt: skip

        def table(values: list[list[Tensor]]) -> Tensor:
            out = values[0][0].new_zeros(len(input_ids), logits_to_keep)
            for each, several in zip(rows.values(), values, strict=True):
                for i, x in zip(each, several, strict=True):
                    out[i, seen[i, -logits_to_keep:]] = x
            return out

        return table(found.logprobs), table(found.entropies) if compute_entropy else None, None
