"""Problems for two policies, each step of which a program can check."""

import re
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import quality
from kvtools import models, search, tasks


@dataclass(frozen=True)
class Task:
    """Problems for one policy, each step of which a program can check.

    Args:
        load: the policy and its tokenizer.
        questions: (count, seed) -> questions.
        truth: a question's answer.
        check: whether a text may still become, or is, a right solution of a question.
        answer: the answer that a text gives, or None.
        numbers: what tells a question from others; no tested one is trained on.
        opening: what of a question the trained scorer reads.
        layers: of the policy, that the trained scorer reads.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]
    questions: Callable[[int, int], list[str]]
    truth: Callable[[str], Hashable]
    check: Callable[[str, str], bool]
    answer: Callable[[str], Hashable | None]
    numbers: Callable[[str], Hashable]
    opening: Callable[[str], str]
    layers: int
    temperature: float
    delimiters: tuple[str, ...]
    end: str

    def steps(self, tokenizer: Any) -> search.Steps:
        return search.Steps(
            tokenizer, self.delimiters, step_tokens=24, tokens=48, done=lambda x: self.end in x
        )


def asked(question: str) -> str:
    """A word problem without the worked ones before it."""
    return question.rpartition("\n\n")[2]


def numbers(question: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", asked(question))))


def left_over(question: str) -> int:
    has, gets, gives = numbers(question)
    return has + gets - gives


def two_steps(question: str, text: str) -> bool:
    """Whether each equation adds up two numbers that are left, and the answer is right."""
    has, gets, gives = numbers(question)
    left = [has, gets, -gives]
    for a, sign, b, c in re.findall(r"(\d+) ([-+]) (\d+) = (\d+)", text):
        terms, total = [int(a), int(sign + b)], int(c)
        for term in terms:
            if term not in left:
                return False
            left.remove(term)
        if sum(terms) != total:
            return False
        left.append(total)
    answer = re.search(r"answer is (-?\d+)\b", text, re.IGNORECASE)
    return answer is None or int(answer[1]) == left_over(question)


class Bytes:
    """The byte-level model's tokenizer."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin1"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("latin1")


def sums(count: int, seed: int) -> list[str]:
    """Documents with needles `<AB7>`, and a sum of four of them."""
    items = [bytes([*x.prompt, *x.then]) for x in tasks.sums_items(count, seed, terms=(4,))]
    return [text[: text.rindex(b"=") + 1].decode("latin1") for text in items]


def worked(question: str) -> str:
    """The solution of such a sum."""
    document, _, keys = question.rpartition("?")
    values = dict(re.findall(r"<([A-Z]{2})(\d)>", document))
    steps, total = [], 0
    for key in keys.removesuffix("=").split("+"):
        total += int(values[key])
        steps.append(f"{key}{values[key]}:{total:02}")
    return ",".join(steps) + ";"


def total(text: str) -> str | None:
    found = re.search(r":(\d\d);", text)
    return found[1] if found else None


TASKS = (
    Task(
        "word problems", lambda: models.load("smollm2", torch.float32),
        lambda count, seed: [question for question, _ in tasks.problem_items(count, seed)],
        left_over, two_steps, tasks.answer_of, numbers, asked, layers=22, temperature=0.8,
        delimiters=(",", ".", "\n"), end="\n",
    ),
    Task(
        "worked sums", lambda: (quality.load("worked-sums")[0], Bytes()),
        sums, lambda question: total(worked(question)),
        lambda question, text: worked(question).startswith(text), total, worked,
        lambda question: question, layers=4, temperature=1.9, delimiters=(",", ";"), end=";",
    ),
)  # fmt: skip


def chance(question: str, solutions: list[list[str]]) -> list[list[float]]:
    """A number for each step that depends on the text alone."""
    return [
        [
            (zlib.crc32("".join(steps[: i + 1]).encode()) % 9973 + 0.5) / 9973
            for i in range(len(steps))
        ]
        for steps in solutions
    ]
