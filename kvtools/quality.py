"""How much a compressed cache changes what a model says: measured against the 16-bit cache."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import CacheConfig
from .hf import Session
from .results import claim, write
from .rollouts import Rollouts
from .tasks import Item, answer_of

# An answer of `compare`: what a contender did with one item.
METRICS = ("kl", "top1", "nll", "right")


class Contender(Protocol):
    """A cache under test, holding any number of prompts, each continued on its own.

    `fill` gets, per layer, queries and keys after RoPE and values of the prompt that was added
    last; `feed` gets the tokens that follow each prompt and returns the logits after each of them.
    """

    name: str

    def begin(self, model: Any) -> None: ...
    def add_prompt(self, length: int, copies: int = 1) -> None: ...
    def fill(self, layer: int, q_hld: Tensor, k_hld: Tensor, v_hld: Tensor, **how: Any) -> None: ...
    def feed(self, tokens: Sequence[Tensor]) -> list[Tensor]: ...
    def nbytes(self) -> int: ...


@dataclass
class Ours:
    """A `CacheConfig` as a contender."""

    name: str
    config: CacheConfig

    def begin(self, model: Any) -> None:
        self.session = Session(model, self.config)
        self.add_prompt, self.fill = self.session.kv.add_prompt, self.session.kv.fill

    def feed(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        counts = np.array([len(x) for x in tokens], np.int32)
        logits = self.session.extend(torch.cat(list(tokens)), counts, every=True)
        return list(logits.split(counts.tolist()))

    def nbytes(self) -> int:
        """Bytes held; what a float32 model leaves unquantised counts as if it were 16-bit."""
        kv = self.session.kv
        return kv.memory()["total"] - kv.wide_bytes() // 2


@dataclass
class _Fan:
    """Hands a prompt that is prefilled once to all contenders."""

    contenders: Sequence[Contender]
    rows: int = 0

    def transaction(self) -> AbstractContextManager:
        return nullcontext()  # what fails ends the comparison

    def add_prompt(self, lengths: Sequence[int], copies: Any, switched: bool) -> None:
        (length,) = lengths
        for contender in self.contenders:
            contender.add_prompt(length)

    def fill(self, *args: Any, **how: Any) -> None:
        for contender in self.contenders:
            contender.fill(*args, **how)

    def gather(self, index: Iterable[int]) -> None:
        pass


def compare(
    model: Any,
    items: Sequence[Item],
    contenders: Sequence[Contender],
    *,
    batch: int = 8,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, list[dict]]:
    """What each contender makes of each item, beside the 16-bit cache.

    Prompts are prefilled once for all contenders, exactly. What follows is teacher forced.

    Args:
        model: a causal transformers model.
        items: prompts and what follows them.
        contenders: caches under test.
        batch: items that are held at a time.
        progress: called after each batch of each contender.

    Returns:
        By contender name, a dict per item: `kl` (nats, from the 16-bit cache's distribution to this
        one's, mean over graded tokens), `top1` (share of graded tokens with the same most likely
        token), `nll` (nats per graded token), `right` (all graded tokens are the most likely ones),
        `tokens` (prompt and fed), `bytes` (held at the end; of a batch divided by tokens). The
        16-bit cache itself is "exact".
    """
    exact = Ours("exact", CacheConfig())
    results: dict[str, list[dict]] = {x.name: [] for x in [exact, *contenders]}
    for start in range(0, len(items), batch):
        chosen = items[start : start + batch]
        for contender in [exact, *contenders]:
            contender.begin(model)
        leader = Session(model, CacheConfig())
        leader.kv = leader.cache.kv = _Fan([exact, *contenders])
        for item in chosen:
            leader.prefill([torch.tensor(item.prompt, device=model.device)])
        fed = [torch.tensor(item.then[:-1], device=model.device) for item in chosen]
        seen = [len(item.prompt) + len(item.then) - 1 for item in chosen]
        truth: list[Tensor] = []
        for contender in [exact, *contenders]:
            for i, (item, logits) in enumerate(zip(chosen, contender.feed(fed), strict=True)):
                graded = torch.tensor(item.graded)
                x = logits[graded.to(logits.device) - 1].float().log_softmax(-1).cpu()
                if contender is exact:
                    truth.append(x)
                results[contender.name].append(
                    _grade(x, truth[i], torch.tensor(item.then)[graded])
                    | {"tokens": seen[i], "bytes": contender.nbytes() * seen[i] / sum(seen)}
                )
            progress()
    return results


def _grade(x_nv: Tensor, truth_nv: Tensor, target_n: Tensor) -> dict[str, float]:
    kl = (truth_nv.exp() * (truth_nv - x_nv)).sum(-1)
    best = x_nv.argmax(-1)
    return {
        "kl": max(0.0, kl.mean().item()),
        "top1": (best == truth_nv.argmax(-1)).float().mean().item(),
        "nll": -x_nv.gather(1, target_n[:, None]).mean().item(),
        "right": float((best == target_n).all()),
    }


def best_of(
    model: Any,
    tokenizer: Any,
    problems: Sequence[tuple[str, int]],
    config: CacheConfig,
    *,
    n: int = 16,
    temperature: float = 0.8,
    max_new_tokens: int = 48,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Worked answers of a model with this cache: greedy, and the best and the majority of `n`.

    Args:
        problems: prompts whose continuation up to a newline says "The answer is N", and N.
        n: samples per problem, at `temperature`, of a run with seed 0.

    Returns:
        Shares of problems with their 95 % intervals: `greedy`, `pass1` (of samples), `pass_n` (some
        sample is right), `majority` (the most frequent answer is); and `n` and `samples`.
    """
    prompts = [tokenizer.encode(text) for text, _ in problems]

    def answers(rows: Rollouts, copies: int) -> list[list[int | None]]:
        rows.prefill(prompts, copies)
        new = rows.generate(
            max_new_tokens, lambda tokens: "\n" in tokenizer.decode(tokens[-1:]), progress
        )
        found = [answer_of(tokenizer.decode(tokens)) for tokens in new]
        return [found[i : i + copies] for i in range(0, len(found), copies)]

    greedy = answers(Rollouts(model, config, temperature=0.0), 1)
    sampled = answers(Rollouts(model, config, temperature=temperature), n)
    right = [truth for _, truth in problems]
    shares: dict[str, list[float]] = {
        "greedy": [float(found == [truth]) for found, truth in zip(greedy, right, strict=True)],
        "pass1": [found.count(truth) / n for found, truth in zip(sampled, right, strict=True)],
        "pass_n": [float(truth in found) for found, truth in zip(sampled, right, strict=True)],
        "majority": [
            float(majority(found) == truth) for found, truth in zip(sampled, right, strict=True)
        ],
    }
    row: dict[str, Any] = {"n": len(problems), "samples": n}
    for name, values in shares.items():
        row |= {name: float(np.mean(values)), f"{name}_ci": list(interval(values))}
    return row


def majority(answers: Sequence[int | None]) -> int | None:
    """The most frequent answer; of equally frequent ones the first."""
    given = Counter(answer for answer in answers if answer is not None)
    return max(given, key=given.__getitem__, default=None)


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % confidence interval of the mean: Wilson's for zeros and ones, else bootstrap."""
    x = np.asarray(values, float)
    n, mean, z = len(x), float(x.mean()), 1.96
    if np.isin(x, (0, 1)).all():
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return middle - half, middle + half
    resampled = np.random.default_rng(0).choice(x, (draws, n)).mean(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def summary(model: Any, results: Sequence[dict]) -> dict[str, Any]:
    """One row of a table from the items of one contender: means, intervals, bytes.

    `bytes_per_token` divides all bytes held by all tokens seen, evicted ones too; `bits` is that
    per element of keys and values; `ratio` is 16 bits over it.
    """
    row: dict[str, Any] = {"n": len(results)}
    for metric in METRICS:
        values = [result[metric] for result in results]
        row[metric] = float(np.mean(values))
        row[f"{metric}_ci"] = list(interval(values))
    row["ppl"] = math.exp(row["nll"])
    row["bytes_per_token"] = sum(r["bytes"] for r in results) / sum(r["tokens"] for r in results)
    row["bits"] = 8 * row["bytes_per_token"] / elements(model)
    row["ratio"] = 16 / row["bits"]
    return row


def elements(model: Any) -> int:
    """Elements of keys and values that a token has, over all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * head_size(config) * config.num_hidden_layers


def head_size(config: Any) -> int:
    """Elements of one head's key."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def probe_items(ids: Sequence[int], windows: int = 3, length: int = 64) -> list[Item]:
    """A prompt of one's own, cut in `windows` places, and up to `length` tokens after each cut.

    Raises:
        ValueError: it has fewer than 32 tokens per window.
    """
    least = 32 * (windows + 1)
    if len(ids) < least:
        raise ValueError(f"the prompt has {len(ids)} tokens; a probe needs {least} or more")
    cuts = [len(ids) * (i + 1) // (windows + 1) for i in range(windows)]
    return [
        Item(
            tuple(ids[:cut]),
            tuple(ids[cut : cut + length]),
            tuple(range(1, len(ids[cut : cut + length]))),
        )
        for cut in cuts
    ]


# Mean divergence in nats up to which a cache is said to be so.
VERDICTS = ((0.002, "the same"), (0.02, "close"), (0.1, "differs"), (math.inf, "hurts"))


def verdict(kl: float) -> str:
    """A word for a divergence; NaN hurts."""
    return next((word for most, word in VERDICTS if kl <= most), VERDICTS[-1][1])


@dataclass
class Journal:
    """Results by task and contender, on disk after every task, so that a run can be resumed.

    Args:
        path: a JSON file; None keeps them in memory.
        header: what the file's results must have been made with: model, seed, and so on.
        stale: entries of the header that may differ: such results are replaced at the first save.

    Raises:
        ValueError: the file is something else, or was made with another header.
    """

    path: Path | None
    header: dict
    stale: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.cells: dict[str, dict] = {}
        if self.path is not None:
            old = claim(self.path, self.header, ["cells"], self.stale)
            self.cells = old["cells"] if old else {}
            self._known = self._held()

    def _held(self) -> bytes | None:
        return self.path.read_bytes() if self.path.is_file() else None

    def run(
        self,
        model: Any,
        task: str,
        items: Sequence[Item],
        contenders: Sequence[Contender],
        **how: Any,
    ) -> dict[str, dict]:
        """Rows by contender name; only what is not in the journal is measured."""
        row = self.cells.setdefault(task, {})
        missing = [x for x in contenders if x.name not in row]
        if missing or "exact" not in row:
            for name, results in compare(model, items, missing, **how).items():
                row[name] = summary(model, results)
            self.save()
        return {name: row[name] for name in ["exact", *(x.name for x in contenders)]}

    def save(self, **more: Any) -> None:
        """Write all; raises RuntimeError if the file was changed by something else meanwhile."""
        if self.path is None:
            return
        if self._held() != self._known:
            raise RuntimeError(f"{self.path} was changed while this ran: does another run use it?")
        text = json.dumps(self.header | {"cells": self.cells} | more, indent=1)
        write(self.path, text + "\n")
        self._known = self._held()
