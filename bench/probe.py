"""A step scorer of the policy's own: a logistic head on hidden states, trained on exact labels."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtools import CacheConfig, token_logprobs
from kvtools.hf import Session


@dataclass
class Probe:
    """A scorer: a logistic head on hidden states, read at the last token of each step.

    Args:
        model: a causal model, see `first_layers`.
        encode: token ids of a piece of text.
        between: text between two steps.
        opening: what of a question is encoded.
        likelihood: let the head see the log-probabilities of the step's tokens too, their sum and
            the least; for a model with all its layers.
        weight_m, bias: of the head; None until `fit`.
    """

    model: Any
    encode: Callable[[str], list[int]]
    between: str
    opening: Callable[[str], str] = lambda question: question
    likelihood: bool = False
    weight_m: Tensor | None = None
    bias: float = 0.0

    @property
    def head(self) -> bytes:
        """Weights and bias in float32."""
        return np.array([*self.weight_m.tolist(), self.bias], np.float32).tobytes()

    @head.setter
    def head(self, saved: bytes) -> None:
        *weight, self.bias = np.frombuffer(saved, np.float32).tolist()
        self.weight_m = torch.tensor(weight)

    def session(self, question: str, rows: int) -> "ProbeSession":
        return ProbeSession(self, question, rows)

    def features(self, question: str, solutions: Sequence[Sequence[str]]) -> list[Tensor]:
        """What the head sees of each solution's steps [steps, m]."""
        session = ProbeSession(self, question, len(solutions))
        found: list[list[Tensor]] = [[] for _ in solutions]
        for i in range(max(map(len, solutions))):
            new = [steps[i] if i < len(steps) else None for steps in solutions]
            for row, features_m in session.read(new).items():
                found[row].append(features_m)
        return [torch.stack(x) for x in found if x]

    def fit(self, features_sm: Tensor, right_s: Sequence[bool], decay: float = 1e-3) -> None:
        """Train the head: the likeliest labels, less `decay` times its squared weights."""
        x, y = features_sm.double(), torch.tensor(right_s, dtype=torch.float64)
        mean, scale = x.mean(0), x.std(0) + 1e-6
        x = (x - mean) / scale
        weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            margin = x @ weight[:-1] + weight[-1]
            value = torch.nn.functional.binary_cross_entropy_with_logits(margin, y)
            value = value + decay * weight[:-1].square().sum()
            value.backward()
            return value

        solver.step(loss)
        found = weight[:-1].detach() / scale
        self.weight_m, self.bias = found.float(), (weight[-1].detach() - mean @ found).item()

    def margin(self, features_sm: Tensor) -> Tensor:
        return features_sm.float() @ self.weight_m + self.bias


class ProbeSession:
    """Rows over a question: what they share is encoded once, and a step when it comes."""

    def __init__(self, probe: Probe, question: str, rows: int) -> None:
        self.probe = probe
        self.run = Session(probe.model, CacheConfig(), head=False)
        prompt = probe.encode(probe.opening(question))
        (hidden_tm,) = self.run.prefill([torch.tensor(prompt)], rows)
        self.tokens = len(prompt)
        self.margins: list[list[float]] = [[] for _ in range(rows)]
        # Tokens, and the last one's hidden state, after the question and after each step.
        self.ends = [[len(prompt)] for _ in range(rows)]
        self.states = [[hidden_tm[-1]] for _ in range(rows)]

    @property
    def rows(self) -> int:
        return len(self.ends)

    def read(self, steps: Sequence[str | None]) -> dict[int, Tensor]:
        """Give rows a step; returns what the head sees of it, by row."""
        new: dict[int, list[int]] = {}
        for row, step in enumerate(steps):
            if step is not None:
                between = self.probe.between if len(self.ends[row]) > 1 else ""
                new[row] = [*self.probe.encode(between), *self.probe.encode(step)]
        if not new:
            return {}
        counts = np.array([len(new.get(row, ())) for row in range(self.rows)])
        tokens = torch.tensor([token for x in new.values() for token in x])
        out_tm = self.run.extend(tokens, counts)
        self.tokens += len(tokens)
        found = {}
        pieces = zip(new, out_tm.split(counts[counts > 0].tolist()), strict=True)
        for row, hidden_tm in pieces:
            found[row] = hidden_tm[-1].float()
            if self.probe.likelihood:
                before_tm = torch.cat([self.states[row][-1][None], hidden_tm[:-1]])
                found[row] = torch.cat([found[row], self._likelihood(before_tm, new[row])])
            self.ends[row].append(self.ends[row][-1] + len(new[row]))
            self.states[row].append(hidden_tm[-1])
        return found

    def _likelihood(self, hidden_tm: Tensor, tokens: Sequence[int]) -> Tensor:
        head = self.probe.model.get_output_embeddings().weight.detach()
        logprob_t, _ = token_logprobs(hidden_tm, head, torch.tensor(tokens))
        return torch.stack([logprob_t.sum(), logprob_t.min()])

    def append(self, steps: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        for row, features_m in self.read(steps).items():
            self.margins[row].append(self.probe.margin(features_m).item())
        newest = torch.tensor([x[-1] if x else torch.nan for x in self.margins])
        return newest, newest.sigmoid()

    def gather(self, index: Sequence[int]) -> None:
        self.run.kv.gather(index)
        for name in ("margins", "ends", "states"):
            setattr(self, name, [list(getattr(self, name)[i]) for i in index])

    def crop(self, steps: Sequence[int]) -> None:
        self.margins = [x[:n] for x, n in zip(self.margins, steps, strict=True)]
        self.ends = [x[: n + 1] for x, n in zip(self.ends, steps, strict=True)]
        self.states = [x[: n + 1] for x, n in zip(self.states, steps, strict=True)]
        self.run.kv.crop([ends[-1] for ends in self.ends])


def first_layers(model: Any, layers: int) -> Any:
    """A causal model of the first layers of another."""
    short = copy.deepcopy(model)
    short.base_model.layers = short.base_model.layers[:layers]
    short.config.num_hidden_layers = layers
    return short


def area(margins: Sequence[float], right: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a right step is above a wrong one."""
    margins, right = np.asarray(margins), np.asarray(right, bool)
    ranks = np.argsort(np.argsort(margins)) + 1
    good, bad = right.sum(), (~right).sum()
    if not good or not bad:
        return float("nan")
    return float((ranks[right].sum() - good * (good + 1) / 2) / (good * bad))
