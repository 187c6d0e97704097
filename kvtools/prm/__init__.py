"""Process reward models: scores of reasoning steps, for whole solutions or while they grow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig
from ..hf import check_model
from ..hf.parallel import is_part
from ..ops.scoring import REDUCES, step_scores
from . import checkpoint
from .families import FAMILIES, detect
from .heads import StepHead
from .layouts import Family, Solution
from .qwen import Qwen2ForProcessRewardModel
from .session import PRMSession

__all__ = [
    "FAMILIES",
    "PRM",
    "PRMSession",
    "Qwen2ForProcessRewardModel",
    "Scores",
    "from_pretrained",
    "load",
]


@dataclass(frozen=True)
class Scores:
    """Scores of solutions and of their steps; all fp32, on the CPU.

    Attributes:
        margins: log-odds of each solution's steps, [steps] each.
        probs: the same under the family's link, as the published reader gives them.
        last, min, max, mean, sum, prod, gmean, sum_logit, softmin: [solutions] reduced as in
            `kvtools.step_scores`. NaN where there is no step; "prod" and "gmean" are NaN where a
            family's scores are no probabilities.
    """

    margins: list[Tensor]
    probs: list[Tensor]
    last: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor
    sum: Tensor
    prod: Tensor
    gmean: Tensor
    sum_logit: Tensor
    softmin: Tensor

    @classmethod
    def of(cls, margins: Sequence[Sequence[float]], link: str) -> "Scores":
        """From the margins of each solution's steps."""
        counts = torch.tensor([len(x) for x in margins], dtype=torch.int64)
        margin_s = torch.tensor([x for row in margins for x in row], dtype=torch.float32)
        cu_steps = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        reduced = {}
        for reduce in REDUCES:
            if link == "sigmoid" or reduce not in ("prod", "gmean"):
                prob_s, reduced[reduce] = _linked(margin_s, cu_steps, link, reduce)
            else:
                reduced[reduce] = torch.full((len(counts),), torch.nan)
        sizes = counts.tolist()
        return cls(list(margin_s.split(sizes)), list(prob_s.split(sizes)), **reduced)


class PRM:
    """A process reward model, read as its family reads it. Made by `load` and `from_pretrained`.

    Attributes:
        family: how solutions are laid out; `family.reduce` is what its authors rank by.
        head: what reads hidden states.
        backbones: the model without its head; the reference model's too, if there is one.
    """

    def __init__(self, family: Family, head: Any, backbones: list[Any]) -> None:
        self.family, self.head, self.backbones = family, head, backbones

    @property
    def device(self) -> torch.device:
        return self.backbones[0].device

    def score(
        self,
        question: str,
        solutions: Sequence[Solution],
        *,
        config: CacheConfig | None = None,
        batch: int = 16,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> Scores:
        """Score the steps of solutions. The question is encoded once, and full-vocabulary logits
        are never made.

        Args:
            question: what the solutions answer.
            solutions: the steps of each. White space around them is dropped, and so are empty ones,
                unless the quirks of published readers were asked for.
            config: how keys and values are kept; default exact.
            batch: solutions that are held at a time.
            progress: called after each batch with the number of its solutions.

        Raises:
            TypeError: a solution is a text instead of a list of steps, or a step is no text.
            ValueError: a step would be read for the family's tag, see `kvtools.prm.families`.
        """
        asked(question)
        if isinstance(solutions, str):
            raise TypeError("solutions is a text: pass a list of solutions, each a list of steps")
        if batch < 1:
            raise ValueError(f"batch={batch}: at least 1")
        cleaned = [self.family.clean(steps) for steps in solutions]
        session = PRMSession(self, question, 1, config)
        margins: list[list[float]] = [[] for _ in cleaned]
        order = sorted(range(len(cleaned)), key=lambda i: sum(map(len, cleaned[i])))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            session.gather([0] * (len(chosen) + 1))
            session.grow({row: cleaned[i] for row, i in enumerate(chosen, 1)})
            for i, scores in zip(chosen, session.margins[1:], strict=True):
                margins[i] = scores[-1:] if self.family.whole else scores
            session.gather([0])
            progress(len(chosen))
        return Scores.of(margins, self.family.link)

    def session(
        self, question: str, rows: int = 1, config: CacheConfig | None = None
    ) -> PRMSession:
        """Rows over a question, to be scored while they grow.

        Args:
            question: what the rows will answer; encoded and stored once.
            rows: how many to begin with.
            config: how keys and values are kept; default exact.

        Raises:
            ValueError: published quirks were asked for, which exist for whole solutions only.
        """
        asked(question)
        if rows < 1:
            raise ValueError(f"rows={rows}: at least 1")
        if self.family.quirks:
            raise ValueError("reference_quirks are of whole solutions: load the PRM without them")
        return PRMSession(self, question, rows, config)

    def link(self, margin_s: Tensor) -> Tensor:
        """Scores from margins."""
        cu_steps = torch.tensor([0, len(margin_s)])
        return _linked(margin_s, cu_steps, self.family.link, "last")[0]


def load(
    model: Any,
    tokenizer: Any,
    family: str | Callable[..., Family] = "auto",
    *,
    reference: Any = None,
    reference_quirks: bool = False,
) -> PRM:
    """Make a PRM of a model that is loaded already.

    Args:
        model: a transformers model, or a wrapper with `pretrained_model` and a value head; put into
            evaluation mode.
        tokenizer: the one that came with it.
        family: a name in `FAMILIES`; "auto" to tell by the model's head and its checkpoint's name;
            or a family with options, as `functools.partial(PURE, separator="...")`.
        reference: the reference model of an implicit PRM.
        reference_quirks: score as the published readers do where they differ: empty steps are
            scored, white space stays, and what the family's docstring says.

    Raises:
        ValueError: model, head or tokenizer are not those of the family; says what to do.
    """
    if isinstance(family, str):
        name = detect(model, tokenizer) if family == "auto" else family
        if name not in FAMILIES:
            raise ValueError(f"family {name!r} does not exist; expected {', '.join(FAMILIES)}")
        family = FAMILIES[name]
    made = family(tokenizer, quirks=reference_quirks)
    head = made.head(model, reference)
    read = [vars(head)[name] for name in ("layer", "reference") if name in vars(head)]
    if not isinstance(head, StepHead) and any(is_part(getattr(x, "weight", None)) for x in read):
        made.refuse(
            "its head looks at the whole vocabulary, of which each rank has a part",
            "load the model without a tp_plan",
        )
    backbones = [_backbone(x) for x in (model, reference) if x is not None]
    tried = made.encode("0", [["0", "0"]])[0]
    for backbone in backbones:
        check_model(backbone, head=False)
        known = backbone.get_input_embeddings().num_embeddings
        if max(tried.ids) >= known:
            made.refuse(
                f"token {max(tried.ids)} is outside the model's vocabulary of {known}",
                "load the tokenizer that came with the PRM",
            )
    return PRM(made, head, backbones)


def from_pretrained(
    name: str,
    family: str | Callable[..., Family] = "auto",
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    reference: str | None = None,
    reference_quirks: bool = False,
) -> PRM:
    """Load a PRM from a folder or the hub, without running code that came with it.

    Args:
        name: a folder or a name on the Hugging Face hub.
        dtype: a torch dtype, its name, or "auto" for that of the checkpoint.
        device: where the model goes.
        reference: folder or name of the reference model of an implicit PRM.
        family, reference_quirks: as for `load`.
    """
    model, tokenizer = checkpoint.read(name, dtype)
    other = None if reference is None else checkpoint.read(reference, dtype)[0].to(device)
    return load(
        model.to(device), tokenizer, family, reference=other, reference_quirks=reference_quirks
    )


def asked(question: str) -> None:
    """Raise TypeError unless a question is a text."""
    if not isinstance(question, str):
        raise TypeError(f"question={question!r}: a text is needed")


def _backbone(model: Any) -> Any:
    inner = getattr(model, "pretrained_model", model)
    if hasattr(inner, "merge_and_unload"):
        raise ValueError("the model has an adapter: merge it first, with model.merge_and_unload()")
    return inner.base_model.eval()


def _linked(margin_s: Tensor, cu_steps: Tensor, link: str, reduce: str) -> tuple[Tensor, Tensor]:
    """Linked margins and their reduction: a value head that hands margins through."""
    one = torch.ones(1, 1)
    _, prob_s, score_r = step_scores(
        margin_s[:, None], torch.arange(len(margin_s)), cu_steps, one, link=link,
        reduce=reduce,
    )  # fmt: skip
    return prob_s, score_r
