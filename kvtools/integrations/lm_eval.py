"""A model type of lm-evaluation-harness: `--model kvtools`.

    python -m kvtools.integrations.lm_eval run --model kvtools \\
        --model_args pretrained=NAME,bits=4 --tasks gsm8k --batch_size 16

is lm_eval's own command line, which looks at no plugins, with this model registered. In Python,
`import kvtools.integrations.lm_eval` does that for `lm_eval.simple_evaluate(model="kvtools", ...)`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM, eval_logger

from ..config import CacheConfig
from ..hf import check_model, logprobs, patch

OPTIONS = {x.name for x in fields(CacheConfig)}
ROWS = 64  # that likelihoods are taken of together where lm_eval chooses the size of batches


class KVToolsLM(HFLM):
    """`HFLM` whose tokens and likelihoods come through kvtools.

    What the requests of a batch begin with in common is encoded and stored once, and so is a
    context for all its continuations. With an exact cache, the default, results are those of
    `HFLM`; likelihoods are fp32 whatever `softmax_dtype` says.

    Args:
        pretrained, kwargs: as for `HFLM`; options of `CacheConfig` say how keys and values are
            kept, in `generate_until` and in likelihoods alike.
        preset: the `CacheConfig.preset` that those options change.

    Raises:
        ValueError: an option of the cache is out of range, or kvtools cannot run the model.
    """

    def __init__(self, pretrained: Any, *, preset: str | None = None, **kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
        self.kv_config = (
            CacheConfig(**chosen) if preset is None else CacheConfig.preset(preset, **chosen)
        )
        super().__init__(pretrained, **kwargs)
        check_model(self.model)
        if self.batch_size == 1:
            eval_logger.warning(
                "batch_size=1: no request shares its beginning with another, pass --batch_size 16"
            )

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with patch(self.model, self.kv_config):
            return super()._model_generate(context, *args, **kwargs)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        texts: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        keys = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than "
                    f"max_length={self.max_length}"
                )
            if len(context) > room:
                eval_logger.warning(
                    f"A context of {len(context)} tokens is cut on the left to {room}: with its "
                    f"continuation it is longer than max_length={self.max_length}"
                )
            keys.append((tuple(context[-room:]), tuple(continuation)))
            tails = texts.setdefault(keys[-1][0], {})
            tails.setdefault(keys[-1][1], len(tails))
        contexts = sorted(texts)  # those that begin alike beside one another
        rows = override_bs or self.batch_size
        with self._autocast():
            found = logprobs(
                self.model, contexts, [list(texts[x]) for x in contexts], self.kv_config,
                rows=rows if isinstance(rows, int) else ROWS,
            )  # fmt: skip
        place = {context: i for i, context in enumerate(contexts)}
        answers = []
        for (name, _, _), (context, continuation) in zip(requests, keys, strict=True):
            i, j = place[context], texts[context][continuation]
            answer = float(found.logprobs[i][j].sum()), bool(found.greedy[i][j].all())
            answers.append(answer)
            if name is not None:  # those of a rolling likelihood are parts of a request
                self.cache_hook.add_partial("loglikelihood", name, answer)
        return answers

    def _autocast(self) -> AbstractContextManager:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


# By name: this module may also be the one that python -m runs.
model_registry.register("kvtools", target="kvtools.integrations.lm_eval:KVToolsLM")

if __name__ == "__main__":
    cli_evaluate()
