"""How likely models hold given completions of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import CacheConfig, is_int, is_number
from .session import Session

Ids = Sequence[int] | Tensor


@dataclass(frozen=True)
class Likelihood:
    """Of each prompt, and each of its completions in order, one tensor [n] over its tokens.

    Attributes:
        logprobs: log-probability of each token after the prompt and those before it, in nats.
        entropies: entropy of the distribution that the token is one draw of, in nats.
        greedy: whether the token is the most likely one, bool.

    The others are fp32, or fp64 of a model that is; on the device of the model.
    """

    logprobs: list[list[Tensor]]
    entropies: list[list[Tensor]]
    greedy: list[list[Tensor]]


def logprobs(
    model: Any,
    prompts: Sequence[Ids],
    completions: Sequence[Sequence[Ids]],
    config: CacheConfig | None = None,
    *,
    temperature: float = 1.0,
    rows: int = 64,
    probe: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Log-probabilities and entropies of given completions, of any number of them for a prompt.

    A prompt is encoded once for all its completions, and what prompts have in common once for all
    of them. Logits are made for some tokens at a time and never kept; in float32 on a CPU, where a
    matrix product is the last that the model does, they are not made at all.

    In float32 the error is that of the model's own forward: sums in another order differ by some
    1e-5 from it, as it does from float64. A float64 model's are its own to 1e-5.

    Args:
        model: a decoder-only transformers model; or a list of them, a policy and its reference.
        prompts: token ids of each, at least one; without padding.
        completions: of each prompt, a list of its completions, ragged; a completion may be empty.
        config: how keys and values are kept meanwhile; default exact.
        temperature: logits are divided by it.
        rows: how many prompts, and how many completions, are held at a time.
        probe: see `kvtools.generate`.
        progress: called with the number of completions that are done, as they are.

    Returns:
        A `Likelihood`; of a list of models, a list with one for each.

    Raises:
        TypeError: `model` is no transformers model, or a completion is no list of token ids.
        ValueError: a prompt is empty, sizes do not fit, the model has no such token, or an option
            is out of range.
        Unsupported: a ValueError; kvtools cannot run a model.

    In modes and without gradients as `model` is called: put a model that trains with dropout in
    evaluation mode before, if its noise is not wanted.
    """
    if isinstance(model, (list, tuple)):
        return [
            logprobs(
                x, prompts, completions, config, temperature=temperature, rows=rows, probe=probe,
                progress=progress,
            )
            for x in model
        ]  # fmt: skip
    if not is_number(temperature) or not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be a positive number")
    if not is_int(rows) or rows < 1:
        raise ValueError(f"rows={rows!r} must be a whole number of at least 1")
    if len(completions) != len(prompts):
        raise ValueError(
            f"completions has {len(completions)} entries for {len(prompts)} prompts: pass a list "
            "of completions for each"
        )
    held: list[list[int]] = []  # tokens of each row
    session = Session(model, config or CacheConfig(), probe=probe, texts=lambda row: held[row])
    heads = [tuple(session.ids(prompt, f"prompts[{i}]")) for i, prompt in enumerate(prompts)]
    if not all(heads):
        raise ValueError(f"prompts[{heads.index(())}] is empty: it needs at least one token")
    tails = [
        [session.ids(x, f"completions[{i}][{j}]") for j, x in enumerate(_several(each, i))]
        for i, each in enumerate(completions)
    ]
    empty = torch.zeros(0, dtype=session.float, device=session.device)
    found = Likelihood(*([[x] * len(each) for each in tails] for x in (empty, empty, empty.bool())))
    distinct = list(dict.fromkeys(head for head, each in zip(heads, tails, strict=True) if each))
    done = 0
    for begin in range(0, len(distinct), rows):
        block = {head: row for row, head in enumerate(distinct[begin : begin + rows])}
        held[:] = map(list, block)
        before = session.prefill([torch.tensor(x, device=session.device) for x in held])
        jobs = [
            (len(tail), i, j)
            for i, (head, each) in enumerate(zip(heads, tails, strict=True)) if head in block
            for j, tail in enumerate(each)
        ]  # fmt: skip
        jobs.sort(reverse=True)  # rows of a step are of like lengths
        for first in range(0, len(jobs), rows):
            some = [(block[heads[i]], i, j) for _, i, j in jobs[first : first + rows]]
            base = np.arange(len(block))
            session.kv.gather([*base, *(row for row, _, _ in some)])
            new = [tails[i][j] for _, i, j in some]
            held[len(block) :] = [
                held[row] + tail for (row, _, _), tail in zip(some, new, strict=True)
            ]
            each = session.follow(
                len(block) + np.arange(len(some)), new, [before[row] for row, _, _ in some],
                temperature=temperature,
            )  # fmt: skip
            for (_, i, j), logprob, entropy, greedy in zip(some, *each, strict=True):
                found.logprobs[i][j], found.entropies[i][j] = logprob, entropy
                found.greedy[i][j] = greedy
            session.kv.gather(base)
            del held[len(block) :]
            done += len(some)
            if progress is not None:
                progress(done)
        session.kv.gather([])
    return found


def _several(each: Any, i: int) -> Any:
    if isinstance(each, (str, bytes)) or not isinstance(each, (Sequence, Tensor, np.ndarray)):
        raise TypeError(f"completions[{i}]={each!r}: expected a list of completions")
    return each
