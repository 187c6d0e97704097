"""The head of a model by itself, and what logits say of given tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .door import Door, inner

TRIED = 4  # tokens that show whether a head can be run by itself


def likelihood(logits_tv: Tensor, target_t: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the targets, entropies, and 1 for the most likely tokens [t, 3]."""
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


def split(
    model: Any, door: Door, device: torch.device
) -> tuple[Any, Callable[[Tensor], Tensor] | None]:
    """The decoder of a model, and what makes logits [t, v] of its hidden states [t, m]: all else
    that the model does, around a decoder that says what it is told. None where these do not say
    what the model says of some tokens, the first time that it is called through these functions;
    and while an instance's own forward or hooks stand around it all, which may look at tokens."""
    core = inner(model)
    body = core._modules.get(core.base_model_prefix)
    called = tuple(type(x).forward for x in (model, core))
    if door.called not in ((), called):
        door.apart = None
    door.called = called
    around = any(
        "forward" in vars(x) or x._forward_hooks or x._forward_pre_hooks for x in (model, core)
    )
    if around or body is None or device.type == "meta" or door.apart is False:
        return None, None
    given, rest = _Given(), object.__new__(type(core))
    rest.__dict__ = dict(vars(core), _modules=core._modules | {core.base_model_prefix: given})

    def head(hidden_tm: Tensor) -> Tensor:
        given.out = door.apart(last_hidden_state=hidden_tm[None])
        ids = torch.zeros(1, len(hidden_tm), dtype=torch.int64, device=device)
        return rest(input_ids=ids, use_cache=False).logits[0]

    if door.apart is None:
        door.apart = False
        ids = torch.arange(1, TRIED + 1, device=device)[None]
        try:
            whole = model(input_ids=ids, use_cache=False).logits[0]
            out = body(input_ids=ids, use_cache=False)
            door.apart, hidden = type(out), out.last_hidden_state[0]
            ours = torch.cat([head(hidden[:1]), head(hidden[1:])])
            near, scale = 64 * torch.finfo(whole.dtype).eps, whole[whole.isfinite()].abs().max()
            if not torch.allclose(ours, whole, rtol=near, atol=near * float(scale)):
                door.apart = False
        except torch.OutOfMemoryError:
            door.apart = None
            raise
        except Exception:  # it looks at more of its decoder than what that says
            door.apart = False
    return (body, head) if door.apart else (None, None)
