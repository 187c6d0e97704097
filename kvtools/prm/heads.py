"""What reads a PRM's hidden states: a few rows of a head, or the log-probabilities of tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..hf.parallel import is_part
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
        if _plain(self.layer) or is_part(getattr(self.layer, "weight", None)):
            weight, bias = (
                None if x is None else _of(x, self.rows)
                for x in (self.layer.weight, self.layer.bias)
            )
        else:
            hidden_tm = self.layer(hidden_tm.index_select(0, read_s))[:, self.rows]
            read_s = torch.arange(len(read_s), device=hidden_tm.device)
            weight, bias = torch.eye(len(self.rows)).to(hidden_tm), None
        ends = read_s.new_tensor([0, len(read_s)])
        margin_s, _, _ = step_scores(hidden_tm.contiguous(), read_s, ends, weight, bias)
        return margin_s * self.sign


def _of(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a matrix or a bias; of what lies on several ranks, without the other rows."""
    if not is_part(x):
        return x[rows]
    from torch.distributed.tensor import DTensor, Replicate

    index = torch.tensor(rows, device=x.device)
    index = DTensor.from_local(index, x.device_mesh, [Replicate()], run_check=False)
    found = nn.functional.embedding(index, x if x.ndim > 1 else x[:, None]).full_tensor()
    return found if x.ndim > 1 else found[:, 0]


@dataclass
class TokenHead:
    """The log-odds of one token among all."""

    layer: nn.Linear
    token: int
    lag: ClassVar[int] = 0

    def __call__(self, hidden: list[Tensor], read_s: Tensor, target_s: Tensor) -> Tensor:
        target = torch.full_like(target_s, self.token)
        logprob_s = _logprobs(self.layer, hidden[0].index_select(0, read_s), target)
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
        if not (_plain(self.layer) and _plain(self.reference)):
            ratio_s = _logprobs(self.layer, policy_tm, target_s)
            return (ratio_s - _logprobs(self.reference, reference_tm, target_s)) * self.coef
        ratio_s, _ = token_logprobs(
            policy_tm, self.layer.weight, target_s, self.layer.bias, ref_hidden_tm=reference_tm,
            ref_weight_vm=self.reference.weight, ref_bias_v=self.reference.bias,
        )  # fmt: skip
        return ratio_s * self.coef


def _plain(layer: nn.Module) -> bool:
    """Whether a layer has a matrix that operators read; one that a package has quantised is asked
    itself, for all of its rows."""
    weight = getattr(layer, "weight", None)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _logprobs(layer: nn.Module, hidden_tm: Tensor, target_t: Tensor) -> Tensor:
    if _plain(layer):
        return token_logprobs(hidden_tm, layer.weight, target_t, layer.bias)[0]
    return layer(hidden_tm).float().log_softmax(-1).gather(1, target_t[:, None].long())[:, 0]
