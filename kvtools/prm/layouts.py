"""What the readers of process reward models have in common: layouts, tags, checks of heads.

A solution is laid out as token ids, of which some positions are read for each step. Tags are
resolved against the tokenizer when a family is made, heads against the model by `head`.

Question and steps are text, whatever they say: where they hold a special token of the tokenizer
(an end of turn, a beginning of text, padding), it is tokenised as the characters that it is written
with, never as the control token that the layout itself uses. `families` has a table of what each
family does with a step that holds its tag.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from .heads import StepHead

Solution = Sequence[str]
HIDDEN = 0x10F000  # private characters from here on stand for special tokens in question and steps


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
        """Lay out solutions to a question.

        Raises:
            ValueError: a step would be read for the family's tag; names the step.
        """
        hidden = [[self.hide(step) for step in steps] for steps in solutions]
        return self.lay_out(self.hide(question), hidden)

    def lay_out(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        """As `encode`, of texts whose special tokens are hidden."""
        raise NotImplementedError

    def head(self, model: Any, reference: Any = None) -> Any:
        """What reads the hidden states of `model`; raises ValueError if it has no such head."""
        raise NotImplementedError

    def clean(self, steps: Solution) -> list[str]:
        """The steps that are scored.

        Raises:
            TypeError: that is no list of texts.
        """
        if isinstance(steps, str) or not isinstance(steps, Iterable):
            remedy = (
                "split it: text.split('\\n\\n')" if isinstance(steps, str) else "pass its steps"
            )
            raise TypeError(f"a solution is a list of steps, not {shortened(steps)}; {remedy}")
        steps = list(steps)
        for i, step in enumerate(steps):
            if not isinstance(step, str):
                raise TypeError(f"step {i} is {shortened(step)}; a step is a text")
        if not self.quirks:
            return [x for x in map(str.strip, steps) if x]
        return self.splits.join(steps).split(self.splits) if self.splits and steps else steps

    def single(self, text: str) -> int:
        """The one token that `text` is."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            self.refuse(
                f"{text!r} must be one token, this tokenizer makes it {ids}",
                "load the tokenizer that came with the PRM",
            )
        return ids[0]

    @cached_property
    def controls(self) -> list[str]:
        """The special tokens of the tokenizer, those that hold others first."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        found = {x.content for x in added if x.special} | {*self.tokenizer.all_special_tokens}
        return sorted(filter(None, found), key=lambda text: (-len(text), text))

    def hide(self, text: str) -> str:
        """`text` with a private character for each special token."""
        for i, control in enumerate(self.controls):
            text = text.replace(control, chr(HIDDEN + i))
        return text

    def show(self, text: str) -> str:
        """The text that was hidden."""
        last = chr(HIDDEN + len(self.controls) - 1) if self.controls else ""
        if not last or not re.search(f"[{chr(HIDDEN)}-{last}]", text):
            return text
        for i, control in enumerate(self.controls):
            text = text.replace(chr(HIDDEN + i), control)
        return text

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """`text` in pieces to be tokenised one by one, and whether special tokens count in each.
        What was hidden is shown, and does not."""
        if self.show(text) == text:
            return [(text, True)]
        # Tokenizers split at special tokens first, too.
        parts = re.split(f"({'|'.join(map(re.escape, self.controls))})", text)
        return [(self.show(x), i % 2 == 1) for i, x in enumerate(parts) if x]

    def tokenize(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Token ids of texts in which special tokens of question and steps may be hidden.

        Args:
            special: whether the tokenizer adds what it puts around a text.
        """
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=special).input_ids
        before, after = self.around if special else ([], [])
        for i, text in enumerate(texts):
            pieces = self.pieces(text)
            if pieces != [(text, True)]:
                found[i] = [*before, *self.located(text)[0], *after]
        return found

    def located(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and where in the shown text each begins; nothing is put around them."""
        ids, begins, start = [], [], 0
        for piece, special in self.pieces(text):
            found = self.tokenizer(
                piece, add_special_tokens=False, split_special_tokens=not special,
                return_offsets_mapping=True,
            )  # fmt: skip
            ids += found.input_ids
            begins += [start + begin for begin, _ in found.offset_mapping]
            start += len(piece)
        return ids, begins

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text."""
        bare, full = (self.tokenizer("0", add_special_tokens=x).input_ids for x in (False, True))
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:at], full[at + len(bare) :]

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

    def places(self, question: str, steps: Solution) -> list[tuple[str, str]]:
        """All texts that are not the layout's, with their names."""
        return [("the question", question), *((f"step {i}", x) for i, x in enumerate(steps))]

    def refuse_step(self, text: str, tag: str, place: str) -> None:
        """Refuse a question or a step whose own text would be read for a tag."""
        self.refuse(
            f"{place} {shortened(self.show(text))} holds {tag!r}, which would be read as the end "
            "of a step",
            "question and steps must not hold it",
        )


@dataclass
class Tagged(Family):
    """Text with a tag behind every step, tokenised as a whole and read at the tags."""

    tag: ClassVar[str]
    special: ClassVar[bool] = True  # whether the tokenizer adds its special tokens

    def __post_init__(self) -> None:
        self.tag_id = self.single(self.tag)

    def text(self, question: str, steps: Solution) -> str:
        raise NotImplementedError

    def lay_out(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        texts = [self.text(question, steps) for steps in solutions]
        encoded = []
        for text, ids, steps in zip(
            texts, self.tokenize(texts, self.special), solutions, strict=True
        ):
            tags = [i for i, token in enumerate(ids) if token == self.tag_id]
            expected = min(len(steps), 1) if self.whole else len(steps)
            self.check(text, question, steps)
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

    def check(self, text: str, question: str, steps: Solution) -> None:
        """Refuse a question or a step whose text would be read for a tag.

        Only what holds the tag's letters can ("ки" ends many a Russian word, which may be another
        token). Of such a text each tag that is found must end a text that ends with a tag of ours.
        """
        core = self.tag.lstrip() or self.tag
        suspects = [(place, x) for place, x in self.places(question, steps) if core in x]
        if not suspects:
            return
        (ids,) = self.tokenize([text])
        begun = [self.text(question, steps[: k + 1]) for k in range(len(steps))]
        begun = begun[-1:] if self.whole else begun
        begun = [x[: x.rindex(self.tag.strip() or self.tag)] + core for x in begun]
        ends = [len(x) - 1 for x in self.tokenize(begun)]
        if [i for i, token in enumerate(ids) if token == self.tag_id] == ends:
            return
        alone = self.tokenize([f"{x} " for _, x in suspects])
        found = [x for x, y in zip(suspects, alone, strict=True) if self.tag_id in y]
        place, culprit = (found or suspects)[0]
        self.refuse_step(culprit, self.tag, place)


def shortened(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


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

    def lay_out(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
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
