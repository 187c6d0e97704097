"""What the readers of process reward models have in common: layouts, tags, checks of heads.

A solution is laid out as token ids, of which some positions are read for each step. Tags are
resolved against the tokenizer when a family is made, heads against the model by `head`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .heads import StepHead

Solution = Sequence[str]


@dataclass(frozen=True)
class Encoded:
    """A solution as token ids.

    Attributes:
        ids: the question, the steps and what stands around them.
        reads: for each step the positions [begin, end) whose hidden states make its score; None
            for a step without one.
    """

    ids: list[int]
    reads: list[tuple[int, int] | None]


@dataclass
class Family:
    """What the readers have in common.

    Args:
        tokenizer: that of the checkpoint.
        quirks: do as the published reader does where it scores something else: empty steps are
            scored, white space stays, and what each family says. Those that take a solution as
            text, joined by blank lines, split it there.

    Attributes:
        link: from a margin to the score that the published reader gives, see `kvtools.step_scores`.
        reduce: from a rollout's scores to what its authors rank by.
    """

    tokenizer: Any
    quirks: bool = False

    link: ClassVar[str] = "sigmoid"
    reduce: ClassVar[str] = "last"
    whole = False  # whether the newest step alone has a score
    splits = ""  # where the published reader splits a text

    def encode(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        """Lay out solutions to a question."""
        raise NotImplementedError

    def head(self, model: Any, reference: Any = None) -> Any:
        """What reads the hidden states of `model`; raises ValueError if it has no such head."""
        raise NotImplementedError

    def clean(self, steps: Solution) -> list[str]:
        """The steps that are scored."""
        if not self.quirks:
            return [x for x in map(str.strip, steps) if x]
        return self.splits.join(steps).split(self.splits) if self.splits and steps else list(steps)

    def single(self, text: str) -> int:
        """The one token that `text` is."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            self.refuse(
                f"{text!r} must be one token, this tokenizer makes it {ids}",
                "load the tokenizer that came with the PRM",
            )
        return ids[0]

    def tokenize(self, texts: list[str], special: bool = False) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special).input_ids if texts else []

    def render(self, messages: list[dict[str, str]], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            self.refuse("the tokenizer has no chat template", "load that of the PRM")
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def rows_of(self, model: Any, *texts: str) -> StepHead:
        """Rows of the language-model head."""
        return StepHead(self.lm_head(model), [self.single(text) for text in texts])

    def lm_head(self, model: Any) -> nn.Linear:
        layer = getattr(model, "get_output_embeddings", lambda: None)()
        if layer is None:
            self.refuse(
                f"{type(model).__name__} has no language-model head",
                "load the checkpoint with AutoModelForCausalLM",
            )
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                self.refuse(f"the model changes its logits ({name})", "use a model that does not")
        return layer

    def classifier(self, model: Any, rows: list[int]) -> StepHead:
        """The head of a token classification model, with as many labels as `rows`."""
        layer = getattr(model, "score", None)
        if not type(model).__name__.endswith("ForTokenClassification") or layer is None:
            self.refuse(
                f"{type(model).__name__} is no token classification model",
                "load the checkpoint with AutoModelForTokenClassification",
            )
        return StepHead(self.wide(layer, len(rows)), rows)

    def wide(self, layer: Any, width: int) -> nn.Linear:
        """`layer`, if it is linear and as wide as it should be."""
        if not isinstance(layer, nn.Linear) or layer.out_features != width:
            self.refuse(
                f"the head must be a linear layer with {width} outputs, it is {layer}",
                "check that model and family belong together",
            )
        return layer

    def value_head(self, model: Any) -> StepHead:
        """The value head of a model wrapped as in trl: `pretrained_model` and `v_head.summary`."""
        layer = getattr(getattr(model, "v_head", None), "summary", None)
        if layer is None:
            self.refuse(
                f"{type(model).__name__} has no value head (v_head.summary)",
                "load the checkpoint with kvtools.prm.from_pretrained",
            )
        return StepHead(self.wide(layer, 1), [0])

    def refuse(self, what: str, remedy: str) -> None:
        raise ValueError(f"{type(self).__name__}: {what}; {remedy}")


@dataclass
class Tagged(Family):
    """Text with a tag behind every step, tokenised as a whole and read at the tags."""

    tag: ClassVar[str]
    special: ClassVar[bool] = True  # whether the tokenizer adds its special tokens

    def __post_init__(self) -> None:
        self.tag_id = self.single(self.tag)

    def text(self, question: str, steps: Solution) -> str:
        raise NotImplementedError

    def encode(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        texts = [self.text(question, steps) for steps in solutions]
        encoded = []
        for ids, steps in zip(self.tokenize(texts, self.special), solutions, strict=True):
            tags = [i for i, token in enumerate(ids) if token == self.tag_id]
            expected = min(len(steps), 1) if self.whole else len(steps)
            if len(tags) != expected and not self.quirks:
                self.refuse(
                    f"{len(tags)} tags {self.tag!r} in the tokens of {len(steps)} steps",
                    "question and steps must not hold it, nor merge with it",
                )
            reads: list = [(i, i + 1) for i in tags]
            if self.whole:
                reads = [None] * (len(steps) - 1) + reads
            encoded.append(Encoded(ids, reads))
        return encoded


@dataclass
class Pieces(Family):
    """Question and steps tokenised one by one, each step followed by the separator and read at its
    last token.

    Args:
        separator: behind every step.
    """

    separator: str = "\n"

    def __post_init__(self) -> None:
        self.separator_ids = self.tokenizer.encode(self.separator, add_special_tokens=False)
        if not self.separator_ids:
            self.refuse(f"separator {self.separator!r} gives no token", "name another one")

    def prompt(self, question: str) -> list[int]:
        return self.tokenize([question])[0]

    def encode(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        prompt = self.prompt(question)
        pieces = iter(self.tokenize([step for steps in solutions for step in steps]))
        encoded = []
        for steps in solutions:
            ids, reads = list(prompt), []
            for _ in steps:
                ids += next(pieces) + self.separator_ids
                reads.append((len(ids) - 1, len(ids)))
            encoded.append(Encoded(ids, reads))
        return encoded
