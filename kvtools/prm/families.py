"""Families of process reward models, each as its published reader lays it out and reads it.

What a step can do to the positions that are read, by what it holds:

| family | special tokens, chat turns | the family's own tag |
| --- | --- | --- |
| qwen, pqm | characters | characters if the tokenizer has it as a special token, else refused |
| math-shepherd, er-prm | characters | refused where it would be that token: "носки" is not |
| openr, versa | characters | refused: so many line breaks behind a blank |
| rlhflow | characters | a turn answered by "+": characters; refused without special tokens |
| reasoneval | characters | padding, a special token: characters |
| skywork, trl, prm800k, pure | characters | none: steps are tokenised apart; a separator is text |
| implicit | characters | none: steps are found by where they stand in the text |

"Characters": it is tokenised as it is written, not as a control token, which no published reader
needs in a step. "Refused": ValueError, naming family, step and text. The same holds for questions.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .heads import LogRatio, StepHead, TokenHead
from .layouts import HIDDEN, Encoded, Family, Pieces, Solution, Tagged


@dataclass
class QwenPRM(Tagged):
    """Qwen2.5-Math-PRM, and what shares its layout: Universal-PRM, ReasonFlux-PRM.

    Args:
        system: the system prompt; None for none.
        whole: a solution is one step, whose tag moves on as it grows ("model" aggregation).

    Quirks: a text that ends in a blank line has an empty step behind it, with a tag of its own
    (search-and-learn).
    """

    system: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    whole: bool = False

    tag: ClassVar[str] = "<extra_0>"
    special: ClassVar[bool] = False
    splits = "\n\n"

    def text(self, question: str, steps: Solution) -> str:
        answer = "".join(step + self.tag for step in steps)
        if self.whole and steps:
            answer = "\n\n".join(steps) + self.tag
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return self.render(messages)

    def head(self, model: Any, reference: Any = None) -> StepHead:
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Sequential) or len(score) != 3:
            self.refuse(
                f"{type(model).__name__} has no head of two layers (score)",
                "load the checkpoint with kvtools.prm.Qwen2ForProcessRewardModel",
            )
        return StepHead(self.wide(score[2], 2), [1, 0], body=score[:2])


@dataclass
class MathShepherd(Tagged):
    """Math-Shepherd; its steps begin with "Step 1: " and so on.

    Args:
        system: what the quirk puts before the question.

    Quirks: a system prompt and line breaks around the question, blank lines between steps, no tag
    for an empty last step (search-and-learn).
    """

    system: str = ""

    tag: ClassVar[str] = "ки"
    splits = "\n\n"
    reduce: ClassVar[str] = "min"

    def text(self, question: str, steps: Solution) -> str:
        if self.quirks:
            steps = steps[:-1] if steps and not steps[-1] else steps
            question = f"{self.system}\n{question}\n"
        separator = "\n\n" if self.quirks else "\n"
        tagged = separator.join(f"{step} {self.tag}" for step in steps)
        return f"{question} {tagged}" if steps else question

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.rows_of(model, "+", "-")


@dataclass
class OpenR(Tagged):
    """OpenR's math-psa, with its adapter merged."""

    tag: ClassVar[str] = " \n\n\n\n\n"

    def text(self, question: str, steps: Solution) -> str:
        return question + (" " if steps else "") + "".join(step + self.tag for step in steps)

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.rows_of(model, " +", " -")


@dataclass
class VersaPRM(Tagged):
    """VersaPRM and Llama-PRM800K."""

    tag: ClassVar[str] = " \n\n\n\n"
    reduce: ClassVar[str] = "min"

    def text(self, question: str, steps: Solution) -> str:
        return f"{question} \n\n" + "".join(step + self.tag for step in steps)

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.rows_of(model, "+", "-")


@dataclass
class ERPRM(Tagged):
    """ER-PRM (Llama-3.1-Math-PRM).

    Quirks: nothing between question and first step, and the probability of "+" among all tokens.
    """

    tag: ClassVar[str] = " ки"
    reduce: ClassVar[str] = "min"

    def text(self, question: str, steps: Solution) -> str:
        between = " " if steps and not self.quirks else ""
        return question + between + "".join(step + self.tag for step in steps)

    def head(self, model: Any, reference: Any = None) -> Any:
        if self.quirks:
            return TokenHead(self.lm_head(model), self.single(" +"))
        return self.rows_of(model, " +", " -")


@dataclass
class PQM(Tagged):
    """Process Q-value models; steps begin with "Step 1: " and so on. Scores are values."""

    tag: ClassVar[str] = "[PRM]"
    special: ClassVar[bool] = False
    link: ClassVar[str] = "identity"
    reduce: ClassVar[str] = "min"

    def text(self, question: str, steps: Solution) -> str:
        return (
            "Below is an instruction that describes a task.\nWrite a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{question}\n\n### Response: Let's think "
            "step by step\n"
        ) + "\n".join(f"{step} {self.tag}" for step in steps)

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.value_head(model)


@dataclass
class Skywork(Pieces):
    """Skywork-o1-Open-PRM.

    Quirks: every line is a step.
    """

    splits = "\n"

    def __post_init__(self) -> None:
        self.separator_ids = [self.single(self.separator)]

    def prompt(self, question: str) -> list[int]:
        return self.tokenize([f"{self.tokenizer.bos_token or ''}{question}\n"])[0]

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.value_head(model)


@dataclass
class TRL(Pieces):
    """Checkpoints of trl's PRMTrainer."""

    def prompt(self, question: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + super().prompt(question)

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.classifier(model, [1, 0])


@dataclass
class PRM800K(TRL):
    """Three classes as in PRM800K, in the order negative, neutral, positive, laid out as in trl;
    neutral steps count as right."""

    reduce: ClassVar[str] = "prod"

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.classifier(model, [0, 1, 2])


@dataclass
class PURE(Pieces):
    """PURE-PRM. Scores are p(right) - p(wrong)."""

    link: ClassVar[str] = "difference"
    reduce: ClassVar[str] = "softmin"

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.classifier(model, [1, 0])


@dataclass
class RLHFlow(Family):
    """RLHFlow's Llama3.1-8B-PRM: every step is a turn of the user, answered by "+", and read at the
    token before that."""

    splits = "\n\n"
    reduce: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        user = [{"role": "user", "content": "0"}]
        opened = self.render(user, add_generation_prompt=True)
        self.header = opened.removeprefix(self.render(user, add_generation_prompt=False))
        self.pattern = [*self.tokenize([self.header])[0], self.single("+")]

    def lay_out(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        texts = [self.render(self.messages(question, steps)) for steps in solutions]
        encoded = []
        for ids, steps in zip(self.tokenize(texts), solutions, strict=True):
            turns = self.answers(ids)
            for place, text in self.places(question, steps):
                if self.header.strip() in text and self.answers(self.tokenize([text])[0]):
                    self.refuse_step(text, f"{self.header.strip()}+", place)
            if len(turns) != len(steps):
                self.refuse(
                    f"{len(turns)} answers '+' found in the tokens of {len(steps)} steps",
                    "load the tokenizer that came with the PRM",
                )
            encoded.append(Encoded(ids, [(i, i + 1) for i in turns]))
        return encoded

    def answers(self, ids: list[int]) -> list[int]:
        """Where an answer "+" is read."""
        width = len(self.pattern)
        ends = range(width, len(ids) + 1)
        return [end - 2 for end in ends if ids[end - width : end] == self.pattern]

    def messages(self, question: str, steps: Solution) -> list[dict[str, str]]:
        if not steps:
            return [{"role": "user", "content": question}]
        return [
            {"role": role, "content": content}
            for turn in [f"{question} {steps[0]}", *steps[1:]]
            for role, content in (("user", turn), ("assistant", "+"))
        ]

    def head(self, model: Any, reference: Any = None) -> StepHead:
        return self.rows_of(model, "+", "-")


@dataclass
class ReasonEval(Family):
    """ReasonEval: padding tokens separate the steps for the tokenizer and are taken out again; read
    at each step's last token. Scores are validity, p(neutral) + p(positive).

    Args:
        redundancy: score p(neutral) instead; the authors rank by the greatest.
    """

    redundancy: bool = False

    reduce: ClassVar[str] = "min"

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.refuse("the tokenizer has no padding token", "load that of the PRM")

    def lay_out(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        pad = self.tokenizer.pad_token
        prompt = f"Question:\n{question}\nAnswer:\nLet's think step by step.\n{pad}"
        texts = [prompt + "".join(step + pad for step in steps) for steps in solutions]
        encoded = []
        for tokens, steps in zip(self.tokenize(texts, special=True), solutions, strict=True):
            ids, ends = tokens[:1], []  # the first may be a beginning of text that is also padding
            for token in tokens[1:]:
                if token == self.tokenizer.pad_token_id:
                    ends.append(len(ids))
                else:
                    ids.append(token)
            if len(ends) != len(steps) + 1:
                self.refuse(
                    f"{len(ends)} separators {pad!r} in the tokens of {len(steps)} steps",
                    "question and steps must not hold it",
                )
            encoded.append(Encoded(ids, [(end - 1, end) for end in ends[1:]]))
        return encoded

    def head(self, model: Any, reference: Any = None) -> StepHead:
        layer = getattr(model, "score_head", None)
        if layer is None:
            self.refuse(
                f"{type(model).__name__} has no score_head",
                "load the checkpoint with kvtools.prm.from_pretrained",
            )
        rows, sign = ([1, 0, 2], -1) if self.redundancy else ([0, 1, 2], 1)
        return StepHead(self.wide(layer, 3), rows, sign=sign)


@dataclass
class ImplicitPRM(Family):
    """Implicit PRMs (EurusPRM): a step's margin is the sum over its tokens of the policy's
    log-probability less the reference model's. Steps begin with "Step 1: " and so on.

    Args:
        coef: what margins are multiplied by.

    A step's tokens are those that begin after the step before it and not after its own end.

    Quirks: sums from the beginning of the answer, which start one token early and end one late.
    """

    coef: float = 0.001

    reduce: ClassVar[str] = "min"

    def lay_out(self, question: str, solutions: Sequence[Solution]) -> list[Encoded]:
        mark = chr(HIDDEN - 1)
        before = self.conversation(question, [mark]).partition(mark)[0]
        encoded = []
        for steps in solutions:
            text = self.conversation(question, steps)
            ids, begins = self.located(text)
            if self.quirks and steps:
                first, *lasts = (self.boundary(question, steps, k) for k in range(len(steps) + 1))
                encoded.append(Encoded(ids, [(first - 1, last + 1) for last in lasts]))
                continue
            if not text.startswith(before + "\n\n".join(steps)):
                self.refuse("the chat template changes the answer", "load that of the PRM")
            ends = [len(self.show(before))]
            for step in steps:
                ends.append(ends[-1] + len(self.show(step)) + (2 if len(ends) > 1 else 0))
            bounds = [bisect_left(begins, end) - 1 for end in ends]
            encoded.append(Encoded(ids, list(zip(bounds, bounds[1:], strict=False))))
        return encoded

    def conversation(self, question: str, steps: Solution) -> str:
        return self.render([
            {"role": "user", "content": question},
            {"role": "assistant", "content": "\n\n".join(steps)},
        ])  # fmt: skip

    def boundary(self, question: str, steps: Solution, k: int) -> int:
        """Where the published reader sees the end of the first `k` steps."""
        text = self.conversation(question, steps[:k]).strip()
        text += "\n\n" if 0 < k < len(steps) else ""
        return len(self.tokenize([text])[0]) - 2

    def head(self, model: Any, reference: Any = None) -> LogRatio:
        if reference is None:
            self.refuse("a reference model is needed", "pass reference=, the model it began as")
        return LogRatio(self.lm_head(model), self.lm_head(reference), self.coef)


FAMILIES: dict[str, type[Family]] = {
    "qwen": QwenPRM, "math-shepherd": MathShepherd, "rlhflow": RLHFlow, "skywork": Skywork,
    "openr": OpenR, "versa": VersaPRM, "er-prm": ERPRM, "prm800k": PRM800K,
    "reasoneval": ReasonEval, "trl": TRL, "pure": PURE, "pqm": PQM, "implicit": ImplicitPRM,
}  # fmt: skip
# What the name of a checkpoint holds.
NAMED = {
    "qwen2.5-math-prm": "qwen", "qwen2.5-math-7b-prm800k": "qwen", "universal-prm": "qwen",
    "reasonflux-prm": "qwen", "shepherd": "math-shepherd", "rlhflow": "rlhflow",
    "prm-mistral-data": "rlhflow", "prm-deepseek-data": "rlhflow", "math-psa": "openr",
    "versaprm": "versa",
    "llama-prm800k": "versa", "llama3.1-math-prm": "er-prm", "er-prm": "er-prm",
    "eurusprm": "implicit", "implicitprm": "implicit", "pure-prm": "pure", "pqm": "pqm",
}  # fmt: skip


def detect(model: Any, tokenizer: Any) -> str:
    """The family of a model, by its head and the name of its checkpoint."""
    folder = str(getattr(getattr(model, "config", None), "_name_or_path", "")).lower()
    named = next((family for part, family in NAMED.items() if part in folder), None)
    score = getattr(model, "score", None)
    if isinstance(score, nn.Sequential):
        return "qwen"
    if hasattr(model, "score_head"):
        return "reasoneval"
    if hasattr(model, "v_head"):
        return "pqm" if PQM.tag in tokenizer.get_vocab() else "skywork"
    if isinstance(score, nn.Linear):
        if score.out_features == 3:
            return "prm800k"
        return "pure" if named == "pure" else "trl"
    if named is None:
        raise ValueError(
            f"the family of {type(model).__name__} {folder!r} cannot be told; name it: "
            f"family= one of {', '.join(FAMILIES)}"
        )
    return named
