"""Models whose parameters lie on several ranks: what those agree on, and what they draw together.

A rank is a process that holds its part of each layer and is called as all others are. Nothing is
decided by one alone: tokens that one has drawn go to all.

A head of which each rank has some tokens' rows makes logits of those. Ranks exchange them so that
each has all of some rows, and draws for these: a part of the vocabulary could tell neither a top-p
nor a sum.
"""

import sys
import zlib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.sampling import sample
from ..policy import Candidates, Policy
from .plug import Unsupported

TRIED = 4  # tokens that show whether a head's logits do without each other


@dataclass(frozen=True)
class Ranks:
    """The ranks of a model, seen from one of them.

    Attributes:
        group: of their processes.
        size: how many there are.
        rank: which of them this is.
        heads: KV heads of a layer, on all ranks together.
    """

    group: Any
    size: int
    rank: int
    heads: int

    def first(self, x: Tensor) -> Tensor:
        """What the first rank has here."""
        x = x.contiguous()
        dist.broadcast(x.view(torch.uint8) if x.dtype == torch.bool else x, group=self.group,
                       group_src=0)  # fmt: skip
        return x

    def agree(self, what: str, device: torch.device, *given: Any) -> None:
        """Raise RuntimeError on all ranks unless all have come here with the same."""
        found = torch.tensor([checksum(*given)], device=device)
        self._same(what, self.each(found)[:, 0])

    def draw(
        self,
        logits_bv: Tensor,
        seed_b: Tensor,
        position_b: Tensor,
        tokens: list[int],
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `kvtools.sample`: each rank draws for some of the rows. Logits are of this rank's
        tokens, of which `tokens` says how many each has; where it is empty, of all."""
        rows = len(logits_bv)
        most = -(-rows // self.size)
        bounds = [min(i * most, rows) for i in range(self.size + 1)]
        own = slice(bounds[self.rank], bounds[self.rank + 1])
        each = {k: x[own] if isinstance(x, Tensor) else x for k, x in options.items()}
        if not tokens:
            logits_bv = logits_bv[own]
        else:
            counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
            logits_bv = self._exchange(logits_bv, counts, tokens)
        drawn = torch.stack([
            x.double() for x in sample(logits_bv, seed_b[own], position_b[own], **each)
        ])  # fmt: skip
        # One message, in which numbers and tokens are exact: the draws, and what they were of.
        said = drawn.new_tensor([checksum(seed_b, position_b, *options.items())])
        part = torch.nn.functional.pad(drawn, (0, most - drawn.shape[1])).flatten()
        every = self.each(torch.cat([part, said]))
        self._same("seeds, positions or filters", every[:, -1])
        every = every[:, :-1].view(self.size, 3, most).transpose(0, 1).flatten(1)[:, :rows]
        dtype = torch.promote_types(logits_bv.dtype, torch.float32)
        return every[0].long(), every[1].to(dtype), every[2].to(dtype)

    def whole(self, part_bv: Tensor, tokens: list[int]) -> Tensor:
        """All logits, of those that each rank has of its own tokens."""
        spare = max(tokens) - part_bv.shape[1]
        every = self.each(torch.nn.functional.pad(part_bv, (0, spare)))
        return torch.cat([x[:, :n] for x, n in zip(every, tokens, strict=True)], 1)

    def _exchange(self, part_bv: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
        """All logits of this rank's rows; `rows` and `tokens` are how many each rank has."""
        mine = rows[self.rank]
        got = part_bv.new_empty(mine * sum(tokens))
        dist.all_to_all_single(
            got, part_bv.flatten(), [mine * n for n in tokens],
            [n * part_bv.shape[1] for n in rows], group=self.group,
        )  # fmt: skip
        parts = got.split([mine * n for n in tokens])
        return torch.cat([x.view(mine, n) for x, n in zip(parts, tokens, strict=True)], 1)

    def judge(self, policy: Policy, candidates: Candidates) -> tuple[Tensor, Tensor | None]:
        """As `Policy.rank`, for the heads of this rank. A policy that looks at heads together is
        shown those of all."""
        held = candidates.position_nhs.shape[1]
        if not policy.across or held == self.heads:
            return policy.rank(candidates)
        if held * self.size != self.heads:
            raise Unsupported(
                f"a policy that looks at heads together needs to know where they are: a rank holds "
                f"{held} of {self.heads}, on {self.size} ranks. Use another policy, as scissorhands"
            )
        by_head = {
            x.name: getattr(candidates, x.name) for x in fields(Candidates) if "_nh" in x.name
        }
        whole = {
            name: self.each(x).transpose(0, 1).flatten(1, 2)
            for name, x in by_head.items()
            if x is not None
        }
        own = slice(self.rank * held, (self.rank + 1) * held)
        worth, tie = policy.rank(replace(candidates, **whole))
        return worth[:, own], None if tie is None else tie[:, own]

    def each(self, x: Tensor) -> Tensor:
        """What each rank has [ranks, ...], of one shape."""
        every = x.new_empty(self.size * x.numel())
        dist.all_gather_into_tensor(every, x.flatten(), group=self.group)
        return every.view(self.size, *x.shape)

    def _same(self, what: str, found: Tensor) -> None:
        if (found != found[0]).any():
            raise RuntimeError(
                f"the {self.size} ranks of the model were given different {what}: it runs on all "
                "of them at once, so call it on each with the same prompts, options and seeds; for "
                "prompts of its own on each rank, load a whole model there"
            )


class _Own(torch.nn.Module):
    """A linear layer's own part, without what its ranks do together."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = [layer]  # no module of ours: it lies where it did

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (own_part(x) for x in (self.layer[0].weight, self.layer[0].bias))
        return torch.nn.functional.linear(x, weight, bias)


def own_part(x: Tensor | None) -> Tensor | None:
    """What this rank has of a tensor."""
    return x.to_local() if is_part(x) else x


def is_part(x: Any) -> bool:
    """Whether ranks have parts of a tensor (a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def own_head(model: Any) -> Any:
    """`model`, making logits of this rank's tokens alone; all else is shared."""
    head = model.get_output_embeddings()
    own = object.__new__(type(model))
    names = [name for name, x in model._modules.items() if x is head]
    own.__dict__ = dict(vars(model), _modules=model._modules | {names[0]: _Own(head)})
    return own


def head_tokens(model: Any, ranks: Ranks) -> list[int]:
    """How many tokens' logits each rank makes in `own_head`; empty where that is not what the model
    says: its head is whole, is no linear layer, or its logits depend on each other.

    Raises:
        Unsupported: the model itself has logits of a rank's own tokens alone.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not is_part(weight) or hasattr(model, "unshard"):
        return []
    if type(head) is not torch.nn.Linear or not weight.placements[0].is_shard(0):
        return []
    if not any(x is head for x in model._modules.values()):
        return []
    width = torch.tensor([weight.to_local().shape[0]], device=weight.device)
    tokens = ranks.each(width)[:, 0].tolist()
    ids = torch.arange(1, TRIED + 1, device=weight.device)[None]
    want, found = (x(input_ids=ids, use_cache=False).logits[0] for x in (model, own_head(model)))
    if is_part(want) or want.shape[1] == tokens[ranks.rank] < sum(tokens):
        raise Unsupported(
            "its head leaves each rank the logits of some tokens: in its tp_plan give it the style "
            "'colwise_gather_output'"
        )
    if sum(tokens) != want.shape[1] or found.shape[1] != tokens[ranks.rank]:
        return []
    near, scale = 4 * torch.finfo(want.dtype).eps, float(want[want.isfinite()].abs().max())
    same = torch.isclose(ranks.whole(found, tokens), want, rtol=near, atol=near * scale)
    return tokens if ranks.first(same.all()) else []


def checksum(*given: Any) -> int:
    """A checksum of tensors, and of other things by what they print."""
    found = 0
    for x in given:
        x = x.detach().cpu().contiguous().numpy() if isinstance(x, Tensor) else repr(x).encode()
        found = zlib.crc32(x, found)
    return found


def ranks_of(core: torch.nn.Module) -> Ranks | None:
    """The ranks that a model's parameters lie on; None if it is whole.

    Raises:
        Unsupported: layers lie on different ranks, or it is shared out in more than one way.
    """
    layout = getattr(core.config, "distributed_config", None)
    if getattr(core, "_device_mesh", None) is not None and getattr(layout, "pp_size", 1) > 1:
        raise Unsupported(
            "its layers lie on different ranks (pipeline parallel): load it with tp_plan='auto', "
            "which gives each rank a part of every layer"
        )
    parts = [x for x in core.parameters() if is_part(x)]
    meshes = list({x.device_mesh for x in parts if x.device_mesh.size() > 1})
    if not meshes:
        return None
    mesh = meshes[0]
    if any(x.ndim > 1 or x.mesh.tolist() != mesh.mesh.tolist() for x in meshes):
        raise Unsupported(
            "its parameters are shared out in more than one way (tensor parallel together with "
            "FSDP, HSDP or another number of experts' ranks): load it with tp_plan='auto' alone"
        )
    plan = getattr(core, "_tp_plan", None) or {}
    if "sequence_parallel" in plan.values():
        raise Unsupported(
            "its ranks share out tokens (sequence_parallel): leave that out of its tp_plan"
        )
    config = core.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cut = any(x.endswith("k_proj") and style == "colwise" for x, style in plan.items())
    if cut and heads % mesh.size():
        raise Unsupported(
            f"its {heads} KV heads cannot be shared out among {mesh.size()} ranks: load it on a "
            "number of ranks that divides them"
        )
    return Ranks(mesh.get_group(), mesh.size(), mesh.get_local_rank(), heads)
