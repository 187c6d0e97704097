"""The head of a model by itself, and what logits say of given tokens."""

from typing import Any

import torch
from torch import Tensor

from ..ops.scoring import token_logprobs
from .door import Door, inner

TRIED = 4  # tokens that show whether a head can be run by itself
NEAR = 1 << 20  # logits that a processor keeps near while they are looked at several times


def likelihood(logits_tv: Tensor, target_t: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the targets, entropies, and 1 for the most likely tokens [t, 3]."""
    some = max(1, NEAR // logits_tv.shape[1])
    if logits_tv.device.type == "cpu" and len(logits_tv) > some:
        pieces = zip(logits_tv.split(some), target_t.split(some), strict=True)
        return torch.cat([likelihood(x, target, temperature) for x, target in pieces])
    logits_tv = logits_tv.to(torch.promote_types(logits_tv.dtype, torch.float32))
    if temperature != 1.0:
        logits_tv = logits_tv / temperature
    best_t = (logits_tv.argmax(-1) == target_t).to(logits_tv.dtype)
    logp_tv = logits_tv.log_softmax(-1)
    logprob_t = logp_tv.gather(1, target_t[:, None])[:, 0]
    p_tv = logp_tv.exp()
    # Not as the mean logit taken off their logsumexp: these are large, and the p that stand between
    # them do not add up to one exactly. And p log p is 0 where p is, of tokens ruled out by -inf.
    logp_tv.clamp_(min=torch.finfo(logp_tv.dtype).min)
    return torch.stack([logprob_t, -p_tv.mul_(logp_tv).sum(-1), best_t], 1)


class _Given(torch.nn.Module):
    """Stands for a decoder that has been run."""

    out: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.out


class _Product(torch.nn.Module):
    """Stands for a last matrix product, which is left out: of logits there are none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.calls = size, 0

    def forward(self, x: Tensor) -> Tensor:
        self.x, self.calls = x, self.calls + 1
        with torch.inference_mode(False):  # in which no tensor tells that it was written to
            self.out = torch.empty(*x.shape[:-1], self.size, dtype=x.dtype, device="meta")
        return self.out

    def is_all(self, logits: Any) -> bool:
        """Whether these came of it, and nothing came after."""
        return self.calls == 1 and logits is self.out and not self.out._version


class Head:
    """What makes logits [t, v] of hidden states [t, m]: all that a model does but for its decoder,
    around one that says what it is told.

    Args:
        core: the model.
        kind: of what its decoder returns.
        door: of the model, where it is noted whether `likelihood` says what the logits say.
    """

    def __init__(self, core: Any, kind: type, door: Door) -> None:
        self._core, self._kind, self._door = core, kind, door

    def __call__(self, hidden_tm: Tensor) -> Tensor:
        return self._run(hidden_tm)[0]

    def _run(self, hidden_tm: Tensor, **parts: torch.nn.Module) -> Any:
        core, given, rest = self._core, _Given(), object.__new__(type(self._core))
        given.out = self._kind(last_hidden_state=hidden_tm[None])
        parts[core.base_model_prefix] = given
        rest.__dict__ = dict(vars(core), _modules=core._modules | parts)
        ids = torch.zeros(1, len(hidden_tm), dtype=torch.int64, device=hidden_tm.device)
        return rest(input_ids=ids, use_cache=False).logits

    def likelihood(self, hidden_tm: Tensor, target_t: Tensor, temperature: float) -> Tensor | None:
        """`likelihood` of what follows hidden states, without logits: in float32 on a CPU, where a
        matrix product is the last that the model does: the first time, that is what logits of some
        tokens say. None elsewhere."""
        last = self._product(hidden_tm)
        if last is None or self._door.product is False:
            return None
        name, linear = last
        product = _Product(len(linear.weight))
        try:
            logits = self._run(hidden_tm, **{name: product})
        except Exception:  # it looks at logits; all else fails where they are made as well
            return None
        if not product.is_all(logits):
            return None
        bias_v = None if linear.bias is None else linear.bias / temperature
        logprob_t, _, entropy_t, greedy_t = token_logprobs(
            product.x.flatten(0, -2) / temperature, linear.weight, target_t, bias_v, entropies=True
        )
        found = torch.stack([logprob_t, entropy_t, greedy_t.float()], 1)
        if self._door.product is None:  # it may write to logits in ways that no tensor tells
            logits = self(hidden_tm[:TRIED]).to(found.dtype) / temperature
            want = likelihood(logits, target_t[:TRIED], 1.0)
            near, scale = 64 * torch.finfo(found.dtype).eps, 1 + float(_largest(logits))
            self._door.product = torch.allclose(
                found[:TRIED, :2], want[:, :2], rtol=near, atol=near * scale, equal_nan=True
            )
        return found if self._door.product else None

    def _product(self, hidden_tm: Tensor) -> tuple[str, torch.nn.Linear] | None:
        """The language-model head and its name, if it is but a product in float32 on a CPU."""
        if hidden_tm.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        last = self._core.get_output_embeddings()
        names = [name for name, x in self._core._modules.items() if x is last]
        if type(last) is not torch.nn.Linear or len(names) != 1:
            return None
        if "forward" in vars(last) or last._forward_hooks or last._forward_pre_hooks:
            return None
        own = [hidden_tm, last.weight.data, *([] if last.bias is None else [last.bias.data])]
        if any(type(x) is not Tensor or x.dtype != torch.float32 for x in own):
            return None
        return names[0], last


def _largest(x: Tensor) -> Tensor:
    x = x[x.isfinite()].abs()
    return x.max() if len(x) else x.new_zeros(())


def split(model: Any, door: Door, device: torch.device) -> tuple[Any, Head | None]:
    """The decoder of a model and its head. None where these do not say what the model says of some
    tokens, the first time that it is called through these functions; and while an instance's own
    forward or hooks stand around it all, or hooks around all modules, which may look at tokens."""
    core = inner(model)
    body = core._modules.get(core.base_model_prefix)
    called = tuple(type(x).forward for x in (model, core))
    if door.called not in ((), called):
        door.apart = door.product = None
    door.called = called
    around = torch.nn.modules.module._has_any_global_hook() or any(
        "forward" in vars(x) or x._forward_hooks or x._forward_pre_hooks for x in (model, core)
    )
    if around or body is None or device.type == "meta" or door.apart is False:
        return None, None
    if door.apart is None:
        door.apart = False
        ids = torch.arange(1, TRIED + 1, device=device)[None]
        try:
            whole = model(input_ids=ids, use_cache=False).logits[0]
            out = body(input_ids=ids, use_cache=False)
            head, hidden = Head(core, type(out), door), out.last_hidden_state[0]
            ours = torch.cat([head(hidden[:1]), head(hidden[1:])])
            near, scale = 64 * torch.finfo(whole.dtype).eps, _largest(whole)
            if torch.allclose(ours, whole, rtol=near, atol=near * float(scale)):
                door.apart = type(out)
        except torch.OutOfMemoryError:
            door.apart = None
            raise
        except Exception:  # it looks at more of its decoder than what that says
            door.apart = False
    return (body, Head(core, door.apart, door)) if door.apart else (None, None)
