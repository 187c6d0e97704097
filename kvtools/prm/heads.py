"""What reads a PRM's hidden states: a few rows of a head, or the log-probabilities of tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.scoring import step_scores, token_logprobs


@dataclass
class StepHead:
    """One, two or three rows of a linear layer, in the order of `kvtools.step_scores`.

    Args:
        layer: the layer.
        rows: which of its rows.
        body: what comes before it.
        sign: -1 turns margins round.
    """

    layer: nn.Linear
    rows: list[int]
    body: nn.Module | None = None
    sign: int = 1
    lag: ClassVar[int] = 0  # how many tokens behind a position its value depends on

    def __call__(self, hidden: list[Tensor], read_s: Tensor, target_s: Tensor) -> Tensor:
        """Margins at rows `read_s` of the hidden states."""
        (hidden_tm,) = hidden
        if self.body is not None:
            first = next(self.body.parameters())
            hidden_tm = self.body(hidden_tm.index_select(0, read_s).to(first.dtype))
            read_s = torch.arange(len(read_s), device=hidden_tm.device)
        weight, bias = self.layer.weight, self.layer.bias
        margin_s, _, _ = step_scores(
            hidden_tm, read_s, read_s.new_tensor([0, len(read_s)]), _of(weight, self.rows),
            None if bias is None else _of(bias[:, None], self.rows)[:, 0],
        )  # fmt: skip
        return margin_s * self.sign


def is_part(weight: Tensor) -> bool:
    """Whether other ranks have the rest of it (a DTensor)."""
    return hasattr(weight, "full_tensor")


def _of(weight: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a matrix; of one that lies on several ranks, without the others of its rows."""
    if not is_part(weight):
        return weight[rows]
    from torch.distributed.tensor import DTensor, Replicate

    index = torch.tensor(rows, device=weight.device)
    index = DTensor.from_local(index, weight.device_mesh, [Replicate()], run_check=False)
    return nn.functional.embedding(index, weight).full_tensor()


@dataclass
class TokenHead:
    """The log-odds of one token among all."""

    layer: nn.Linear
    token: int
    lag: ClassVar[int] = 0

    def __call__(self, hidden: list[Tensor], read_s: Tensor, target_s: Tensor) -> Tensor:
        target = torch.full_like(target_s, self.token)
        logprob_s, _ = token_logprobs(
            hidden[0].index_select(0, read_s), self.layer.weight, target, self.layer.bias
        )
        return logprob_s - torch.log(-torch.expm1(logprob_s))


@dataclass
class LogRatio:
    """Log-probability of the token behind each position, less the reference model's."""

    layer: nn.Linear
    reference: nn.Linear
    coef: float
    lag: ClassVar[int] = 1

    def __call__(self, hidden: list[Tensor], read_s: Tensor, target_s: Tensor) -> Tensor:
        policy_tm, reference_tm = (x.index_select(0, read_s) for x in hidden)
        ratio_s, _ = token_logprobs(
            policy_tm, self.layer.weight, target_s, self.layer.bias, ref_hidden_tm=reference_tm,
            ref_weight_vm=self.reference.weight, ref_bias_v=self.reference.bias,
        )  # fmt: skip
        return ratio_s * self.coef
