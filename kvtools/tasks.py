"""Real text and tasks with checkable answers, to show what a compressed KV cache costs."""

import importlib.util
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """A prompt, and what follows it token by token.

    An item is answered right where the most likely token at every graded position is that token,
    which is greedy decoding being right.

    Args:
        prompt: token ids prefilled exactly and then compressed.
        then: token ids fed afterwards (teacher forced).
        graded: indices into `then`, at least 1, of the tokens that must be predicted: `then[i]`
            after `then[i - 1]` was fed.
    """

    prompt: tuple[int, ...]
    then: tuple[int, ...]
    graded: tuple[int, ...]


# Help topics of pydoc, and modules whose source is the text; no topic contains another one here.
TEXTS = {
    "tune": (("compound", "formatstrings", "typesseq"), ("argparse", "heapq")),
    "held": (
        ("debugger", "specialnames", "string-methods", "types"),
        ("difflib", "inspect", "tarfile"),
    ),
}


def texts(split: str) -> dict[str, str]:
    """Texts that come with CPython, by name: "tune" to choose settings, "held" to report."""
    if split not in TEXTS:
        raise ValueError(f"split {split!r}: one of {', '.join(TEXTS)}")
    from pydoc_data.topics import topics

    entries, modules = TEXTS[split]
    found = {name: topics[name] for name in entries}
    for name in modules:
        found[f"{name}.py"] = Path(importlib.util.find_spec(name).origin).read_text("utf-8")
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one piece of a longer text."""
    return tokenizer.encode(text, add_special_tokens=False)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    return tokenizer.encode("")


def text_items(
    tokenizer: Any, texts: dict[str, str], prompt: int, length: int, per_text: int = 1
) -> list[Item]:
    """Consecutive windows of each text: `prompt` tokens, then `length`, of which all but the first
    are graded."""
    start = opening(tokenizer)
    step = prompt + length - len(start)
    items = []
    for name, text in texts.items():
        ids = encode(tokenizer, text)
        if len(ids) < per_text * step:
            raise ValueError(f"text {name!r} has {len(ids)} tokens; {per_text * step} are needed")
        for i in range(per_text):
            window = start + ids[i * step : (i + 1) * step]
            items.append(
                Item(tuple(window[:prompt]), tuple(window[prompt:]), tuple(range(1, length)))
            )
    return items


COLORS = ("amber", "black", "blue", "brown", "golden", "green", "grey", "orange", "pink", "purple",
           "red", "silver", "white", "yellow")  # fmt: skip
ANIMALS = ("bear", "camel", "cat", "dog", "eagle", "fox", "goat", "horse", "lion", "monkey",
           "owl", "rabbit", "snake", "tiger", "wolf", "zebra")  # fmt: skip
NEEDLE = "The special code of the {} is {}."
QUESTION = (
    "\n\nQuestion: What is the special code of the {0}?\nAnswer: The special code of the {0} is"
)


class Passages:
    """A text as sentences and lines, from which stretches of a given number of tokens are cut."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        text = text.strip() + "\n"
        self.parts = [part for part in re.split(r"(?<=\n)|(?<=[.?!]\s)", text) if part]
        ends = [0, *accumulate(len(encode(tokenizer, part)) for part in self.parts)]
        # Together they are fewer: tokens cross the cuts, mostly where lines are blank or indented.
        scale = len(encode(tokenizer, text)) / ends[-1]
        self.ends = [end * scale for end in ends]

    def draw(self, tokens: int, rng: random.Random) -> range:
        """Parts of about `tokens` tokens together, at least one, from a random one on."""
        starts = sum(self.ends[-1] - end >= max(tokens, 1) for end in self.ends)
        if not starts:
            raise ValueError(f"the text has {self.ends[-1]:.0f} tokens; {tokens} are needed")
        start = rng.randrange(starts)
        stop = start + 1
        while stop < len(self.parts) and self.ends[stop + 1] - self.ends[start] <= tokens:
            stop += 1
        return range(start, stop)

    def insert(self, span: range, sentences: dict[float, str]) -> str:
        """The parts of `span`, with each sentence after the given share of their tokens."""
        out, todo = [], sorted(sentences.items())
        for i in span:
            out.append(self.parts[i])
            done = self.ends[i + 1] - self.ends[span.start]
            while todo and done >= todo[0][0] * (self.ends[span.stop] - self.ends[span.start]):
                out.append(todo.pop(0)[1] + self.parts[i][-1])
        return "".join(out)


def spread(count: int) -> list[float]:
    """`count` depths from 5 % to 95 %."""
    return [0.05 + 0.9 * (i / (count - 1) if count > 1 else 0.5) for i in range(count)]


def needle_items(
    tokenizer: Any,
    text: str,
    length: int,
    count: int,
    seed: int,
    keys: int = 1,
    seen: bool = True,
) -> list[Item]:
    """Codes hidden in a text, and a question for one of them; its digits are graded.

    Args:
        text: where the haystacks are cut from.
        length: tokens of haystack and needles, about; the question comes on top.
        keys: needles per item, at most 14. One lies deeper from item to item; several are spread
            evenly and asked in turn.
        seen: the prompt ends with the question, save its last token if the answer starts with a
            graded one; otherwise all of the question follows the prompt.
    """
    rng = random.Random(seed)
    passages = Passages(tokenizer, text)
    items = []
    for i in range(count):
        names = zip(rng.sample(COLORS, keys), rng.sample(ANIMALS, keys), strict=True)
        codes = {f"{a} {b}": f"{rng.randrange(10000, 100000)}" for a, b in names}
        depths = spread(keys) if keys > 1 else [spread(count)[i]]
        sentences = dict(zip(depths, (NEEDLE.format(*pair) for pair in codes.items()), strict=True))
        cost = sum(len(encode(tokenizer, s + "\n")) for s in sentences.values())
        span = passages.draw(length - cost, rng)
        name, code = list(codes.items())[i % keys]
        hay = opening(tokenizer) + encode(tokenizer, passages.insert(span, sentences).rstrip())
        question = encode(tokenizer, QUESTION.format(name))
        answer = encode(tokenizer, f" {code}")
        blank = not tokenizer.decode(answer[:1]).strip()  # before the digits, not graded
        early = len(question) - (not blank) if seen else 0
        then = question[early:] + answer
        graded = range(len(then) - len(answer) + blank, len(then))
        items.append(Item(tuple(hay + question[:early]), tuple(then), tuple(graded)))
    return items


NAMES = ("Alice", "Clara", "David", "Emma", "George", "Henry", "Laura", "Martin", "Oscar", "Peter",
         "Sarah", "Thomas")  # fmt: skip
# What follows "My", and the values. Questions that a small model answers: the answer repeats the
# statement, and only a value can follow it.
FACTS = (
    ("sister's name is", NAMES),
    ("favorite color is", ("black", "blue", "brown", "green", "orange", "pink", "purple", "red",
                           "white", "yellow")),
    ("home town is", ("Berlin", "Boston", "Chicago", "Dublin", "London", "Madrid", "Paris", "Rome",
                      "Tokyo")),
    ("favorite animal is the", ("cat", "dog", "hamster", "horse", "lizard", "parrot", "rabbit",
                                "snake", "turtle")),
    ("favorite food is", ("bread", "cheese", "chicken", "fish", "pasta", "pizza", "rice", "soup")),
    ("room number is", tuple(map(str, range(123, 987, 7)))),
)  # fmt: skip
REQUESTS = ("Tell me something about Python.", "Tell me more.", "What else should I know?",
            "Please go on.", "And then?")  # fmt: skip


def turns_items(
    tokenizer: Any,
    text: str,
    count: int,
    seed: int,
    turns: int = 5,
    passage: int = 60,
    own: bool = False,
) -> list[Item]:
    """Facts in the first turn of a chat, and a question for one after `turns` turns about
    something else; the fact is graded.

    Args:
        own: a greeting alone is the prompt; the facts follow it.
        text: where the answers of the turns between are cut from.
        turns: turns between.
        passage: tokens of each such answer, about.
    """
    rng = random.Random(seed)
    passages = Passages(tokenizer, text)
    items = []
    for i in range(count):
        facts = [(fact, rng.choice(values)) for fact, values in rng.sample(FACTS, len(FACTS))]
        told = " ".join(f"My {fact} {value}." for fact, value in facts)
        first = f"User: Hello! Let me tell you about myself. {told}"
        if own:
            first, told = "User: Hello! Let me tell you about myself.", f" {told}"
        chat = [told] * own + ["\nAssistant: Nice to meet you! I will remember that."]
        for j in range(turns):
            span = passages.draw(passage, rng)
            said = " ".join(passages.insert(span, {}).split())
            chat.append(f"\nUser: {REQUESTS[j % len(REQUESTS)]}\nAssistant: {said}")
        fact, value = facts[i % len(facts)]
        topic = fact.partition(" is")[0]
        chat.append(f"\nUser: What did I tell you about my {topic}?")
        chat.append(f"\nAssistant: You told me: My {fact}")
        before = encode(tokenizer, "".join(chat))
        answer = encode(tokenizer, f" {value}")
        items.append(
            Item(
                tuple(opening(tokenizer) + encode(tokenizer, first)),
                tuple(before + answer),
                tuple(range(len(before), len(before) + len(answer))),
            )
        )
    return items


THINGS = ("apples", "balls", "books", "cards", "coins", "cookies", "marbles", "pencils", "shells",
          "stamps")  # fmt: skip


def problem(rng: random.Random) -> tuple[str, str, int]:
    """A two-step word problem, its worked answer, and the answer."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    has, gets = rng.randint(2, 9), rng.randint(2, 9)
    gives = rng.randint(1, has + gets - 1)
    left = has + gets - gives
    question = (
        f"Q: {name} has {has} {things} and gets {gets} more. Then {name} gives away {gives}. "
        f"How many {things} are left?\nA:"
    )
    worked = f" {has} + {gets} = {has + gets}, then {has + gets} - {gives} = {left}."
    return question, f"{worked} The answer is {left}", left


def problem_items(count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts of four worked two-step problems and a fifth to be solved, with its answer."""
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        *shots, (question, _, answer) = [problem(rng) for _ in range(5)]
        shown = "".join(f"{asked}{worked}\n\n" for asked, worked, _ in shots)
        items.append((shown + question, answer))
    return items


def answer_of(text: str) -> int | None:
    """The N of "The answer is N" in a continuation, up to its first newline or "Q:"; an integer,
    with or without commas between thousands."""
    said = re.split(r"\n|Q:", text, maxsplit=1)[0]
    number = r"(-?(?:\d{1,3}(?:,\d{3})+|\d+))(?![.,]?\d|[%\w])"
    found = re.search(f"The answer is {number}", said)
    return int(found[1].replace(",", "")) if found else None


LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"


@lru_cache
def held_bytes() -> bytes:
    """The text that the byte models were not trained on."""
    from pydoc_data.topics import topics

    joined = "\n".join(text for _, text in sorted(topics.items()))
    text = " ".join(joined.split()).encode("latin1", "replace")
    return text[int(len(text) * 0.9) :]


def key_values(count: int, values: str, rng: random.Random) -> dict[str, str]:
    """Keys of two capitals, each with a random value."""
    keys = rng.sample([a + b for a in LETTERS for b in LETTERS], count)
    return {key: rng.choice(values) for key in keys}


def document(size: int, pairs: dict[str, str], rng: random.Random) -> bytes:
    """English with `<` key value `>` at random places, then a newline: `size` bytes."""
    text = held_bytes()
    room = size - 5 * len(pairs) - 1
    if not 0 <= room <= len(text):
        raise ValueError(f"{size} bytes for {len(pairs)} needles; {len(text)} bytes of text")
    start = rng.randint(0, len(text) - room)
    body = text[start : start + room]
    cuts = [0, *sorted(rng.randint(0, room) for _ in pairs), room]
    tags = [f"<{key}{value}>".encode() for key, value in pairs.items()] + [b"\n"]
    return b"".join(body[a:b] + tag for (a, b), tag in zip(pairwise(cuts), tags, strict=True))


def recall_items(
    count: int, seed: int, length: int = 512, needles: int = 24, queries: int = 16
) -> list[Item]:
    """Bytes: English with needles `<QX7>`, then queries `?QX7` for distinct keys; the values are
    graded.

    Args:
        length: bytes of prompt and queries together.
    """
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        pairs = key_values(needles, DIGITS + LETTERS.lower(), rng)
        then = "".join(f"?{key}{pairs[key]}" for key in rng.sample(list(pairs), queries)).encode()
        prompt = document(length - len(then), pairs, rng)
        items.append(Item(tuple(prompt), tuple(then), tuple(range(3, len(then), 4))))
    return items


def sums_items(
    count: int,
    seed: int,
    length: int = 512,
    needles: int = 20,
    terms: Sequence[int] = (2, 3, 4),
) -> list[Item]:
    """Bytes: English with needles `<AB7>`, then `?AB+CD=` and `AB7:07,CD3:10;`, which is graded.

    Args:
        length: bytes of prompt and sum together.
        terms: numbers of terms, taken in turn.
    """
    rng = random.Random(seed)
    items = []
    for i in range(count):
        pairs = key_values(needles, DIGITS, rng)
        keys = rng.sample(list(pairs), terms[i % len(terms)])
        totals = accumulate(int(pairs[key]) for key in keys)
        asked = f"?{'+'.join(keys)}="
        steps = (f"{key}{pairs[key]}:{total:02}" for key, total in zip(keys, totals, strict=True))
        then = f"{asked}{','.join(steps)};".encode()
        prompt = document(length - len(then), pairs, rng)
        items.append(Item(tuple(prompt), tuple(then), tuple(range(len(asked), len(then)))))
    return items
