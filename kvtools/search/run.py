"""A search under way: rows of all problems, grown, scored, selected and rewound together."""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..config import is_int, is_number
from ..rollouts import Rollouts
from .result import Candidate, Event, Result, Rows, growing
from .scorers import Session, TextSession, append, scores, session, sigmoid

# A text, or a function (question, text so far) -> text or token ids.
Prompt = str | Callable[[str, str], str | Sequence[int]]


class Tokenizer(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Steps:
    """How text is cut into steps, and when a solution is complete.

    Args:
        tokenizer: the policy's.
        delimiters: a step ends with one of these, after some text.
        step_tokens: most tokens of a step.
        tokens: most tokens of a solution.
        depth: selections; afterwards solutions go on undisturbed to their end.
        done: whether a text is complete, asked at the end of each step; an EOS token always is.
        prompt: tokens of a question; default the tokenizer's.
        progress: called after each token with the number of rows that still grow.
    """

    tokenizer: Tokenizer
    delimiters: Sequence[str] = ("\n\n",)
    step_tokens: int = 256
    tokens: int = 2048
    depth: int = 40
    done: Callable[[str], bool] = lambda text: False
    prompt: Callable[[str], Sequence[int]] | None = None
    progress: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        found = () if isinstance(self.delimiters, str) else tuple(self.delimiters)
        if not found or not all(isinstance(x, str) and x for x in found):
            raise ValueError(
                f"delimiters={self.delimiters!r}: a list of strings, at least one and none empty"
            )
        object.__setattr__(self, "delimiters", found)
        for name in ("step_tokens", "tokens", "depth"):
            whole(name, getattr(self, name), 1)
        for name in ("encode", "decode"):
            if not callable(getattr(self.tokenizer, name, None)):
                raise TypeError(f"tokenizer={self.tokenizer!r} has no method {name}")
        for name in ("done", "prompt", "progress"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "done"):
                raise TypeError(f"{name}={value!r}: a function is needed")

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether a step ends with the last of its tokens."""
        # No token is empty, so a delimiter that is new lies within as many as it has bytes.
        reach = max(len(x.encode()) for x in self.delimiters) + 1
        tail = self.tokenizer.decode(tokens[-reach:])
        if not any(x in tail for x in self.delimiters):
            return False
        return bool(self.tokenizer.decode(tokens).strip())


def whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless an argument is an integer of at least `least`."""
    if not is_int(value) or value < least:
        raise ValueError(f"{name}={value!r}: an integer of at least {least}")


def within(name: str, value: Any, least: float, most: float) -> None:
    """Raise ValueError unless an argument is a number from `least` to `most`."""
    if not is_number(value) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}: a number from {least:g} to {most:g}")


# Nearer to zero a softmax is the maximum but for rounding; log-weights stay finite down to this.
TEMPERATURES = (1e-6, 1e6)


class Run:
    """Rows of several questions: the policy's cache and the scorer's move by the same indices.

    Rows are lists of candidates, one list per question. Those that finish leave the caches, unless
    `keep` is set. Draws of a question depend on `seed` and its text only.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        questions: Sequence[str],
        scorer: Any,
        steps: Steps,
        n: int,
        seed: int,
        keep: bool = False,
    ) -> None:
        if rollouts.rows:
            raise ValueError(f"rollouts holds {rollouts.rows} rows: a search starts without any")
        if isinstance(questions, str):
            raise TypeError("questions is a string: give a list of them")
        self.questions = list(questions)
        for i, question in enumerate(self.questions):
            if not isinstance(question, str):
                raise TypeError(f"questions[{i}]={question!r}: each must be a string")
        scores(scorer)
        whole("seed", seed, 0)
        whole("n", n, 1)
        self.rollouts, self.scorer, self.steps, self.keep = rollouts, scorer, steps, keep
        self.n = n
        entropy = [(seed, zlib.crc32(question.encode())) for question in self.questions]
        self.draws = [np.random.default_rng(x) for x in entropy]
        states = [np.random.SeedSequence(x).generate_state(1, np.uint64) for x in entropy]
        self._next_seed = [int(x[0] >> np.uint64(2)) for x in states]
        self.sessions: list[Session] = []
        self._counts = [0] * len(self.questions)  # rows in the caches
        self.trace: list[Event] = []
        self.spent = [0] * len(self.questions)  # tokens generated
        self._grown = [0] * len(self.questions)  # steps
        self.seconds = dict.fromkeys(("policy", "scorer", "caches"), 0.0)
        self._begin = time.perf_counter()

    def start(self) -> Rows:
        """`n` empty rows of each question."""
        n = self.n
        encode = self.steps.prompt or self.steps.tokenizer.encode
        with self._timed("policy"):
            self.rollouts.prefill([encode(question) for question in self.questions], n)
        with self._timed("scorer"):
            self.sessions = [session(self.scorer, question, n) for question in self.questions]
        self._counts = [n] * len(self.questions)
        rows = [[Candidate(origin=i, row=i) for i in range(n)] for _ in self.questions]
        self.reseed(rows)
        return rows

    def grow(self, rows: Rows, whole: bool = False) -> None:
        """Give every row that neither ended nor waits a step, and its score; or, `whole`, all steps
        to its end."""
        self._grown = [
            count + growing([some]) for count, some in zip(self._grown, rows, strict=True)
        ]
        with self._timed("policy"):
            limit = np.full(sum(self._counts), self.steps.tokens)
            for _, row, c in self._cached(rows):
                limit[row] = 0 if c.waits else limit[row] - (len(c.tokens) - c.start)
            if not whole:
                limit = np.minimum(limit, self.steps.step_tokens)
            until = self._complete() if whole else self.steps.ended
            new = self.rollouts.generate(limit, until, self.steps.progress)
        self._count(new)
        added: list[list[list[str]]] = [[[] for _ in range(n)] for n in self._counts]
        for question, row, c in self._cached(rows):
            if c.finished or c.waits:
                continue
            added[question][c.row] = self._take(c, new[row], whole)
            if self.rollouts.finished[row]:
                c.finished = "eos"
            elif self.steps.done(c.text):
                c.finished = "done"
            elif len(c.tokens) - c.start >= self.steps.tokens:
                c.finished = "length"
            self.rollouts.finished[row] = bool(c.finished)
        self._score(rows, added)

    def ahead(self, rows: Rows, steps: int, reduce: str = "last") -> list[list[float]]:
        """Scores of the rows after `steps` more greedy ones, which are then forgotten."""
        if not steps or not growing(rows):
            return [[c.score(reduce) for c in some] for some in rows]
        copies, filters = [[c.copy() for c in some] for some in rows], self.rollouts.filters
        self.rollouts.filters = filters | {"temperature": 0.0}
        grown = self._grown
        try:
            for _ in range(steps):
                self.grow(copies)
        finally:
            self.rollouts.filters, self._grown = filters, grown
        self.rewind(rows)
        return [[c.score(reduce) for c in some] for some in copies]

    def probe(self, rows: Rows, ask: Sequence[int], good: int, bad: int) -> list[list[float]]:
        """The policy's probability of the token `good` against `bad` after `ask`; of finished
        and waiting rows NaN. The rows stay as they are."""
        live = [(row, c) for _, row, c in self._cached(rows) if not (c.finished or c.waits)]
        found: dict[int, float] = {}
        if live:
            with self._timed("policy"):
                logits = self.rollouts.peek(ask, [row for row, _ in live])[:, [good, bad]].double()
            margins = (logits[:, 0] - logits[:, 1]).tolist()
            found = {id(c): sigmoid(x) for (_, c), x in zip(live, margins, strict=True)}
        return [[found.get(id(c), math.nan) for c in some] for some in rows]

    def select(
        self,
        rows: Rows,
        kept: Sequence[Sequence[int]],
        values: Sequence[Sequence[float]],
        why: Sequence[str],
    ) -> Rows:
        """The rows kept[question] of each question, repeats allowed, in that order. A question
        without a reason leaves no trace."""
        selected = []
        for question, (some, index) in enumerate(zip(rows, kept, strict=True)):
            ended = tuple(i for i, c in enumerate(some) if c.finished)
            if why[question]:
                step, judged = self._grown[question], tuple(values[question])
                self.trace.append(Event(step, question, judged, tuple(index), ended, why[question]))
            selected.append([some[i].copy() for i in index])
        with self._timed("caches"):
            self._gather(selected)
        return selected

    def rewind(self, rows: Rows) -> None:
        """Make the caches what the candidates are."""
        with self._timed("caches"):
            lengths = self.rollouts.prompt_lengths.copy()
            steps = [[0] * n for n in self._counts]
            for question, row, c in self._cached(rows):
                lengths[row] += len(c.tokens)
                steps[question][c.row] = len(c.steps)
            self.rollouts.crop(lengths)
            for held, counts in zip(self.sessions, steps, strict=True):
                held.crop(counts)

    def cut(self, c: Candidate, steps: int) -> None:
        """Take a candidate back to its first `steps` steps; its row waits for `rewind`."""
        for name in ("steps", "margins", "scores", "ends"):
            del getattr(c, name)[steps:]
        del c.tokens[c.ends[-1] if steps else c.start :]
        c.text, c.finished = self._text(c.tokens[c.start :]), ""

    def give(
        self, rows: Rows, name: str, prompt: Prompt, texts: dict[int, str] | None = None
    ) -> None:
        """Append what a prompt says to each of some rows, which then go on. It becomes the
        beginning of their next step, unless a new solution begins there.

        Args:
            name: what the caller's caller calls the prompt.
            texts: by id of a candidate, what a prompt that is a function is called with; default
                its text.

        Raises:
            TypeError: the function returns neither a text nor a list of token ids.
            ValueError: the model has no such token.
        """
        with self._timed("policy"):
            for question, row, c in self._cached(rows):
                text = c.text if texts is None else texts[id(c)]
                found = prompt(self.questions[question], text) if callable(prompt) else prompt
                encode = self.steps.tokenizer.encode
                tokens = encode(found) if isinstance(found, str) else found
                before = len(self.rollouts.tokens[row])
                try:
                    self.rollouts.append([tokens], [row])
                except TypeError:
                    raise TypeError(
                        f"{name} returned {found!r}: a text or a list of token ids is needed"
                    ) from None
                except ValueError as error:
                    raise ValueError(f"{name} returned {found!r}: {error}") from None
                self.rollouts.finished[row], c.finished = False, ""
                c.tokens += self.rollouts.tokens[row][before:]

    def say(self, rows: Rows, most: int) -> dict[int, str]:
        """Let some rows, of which alone any may grow, say up to `most` tokens that are no steps;
        returns the texts by id of a candidate."""
        with self._timed("policy"):
            limit = np.zeros(sum(self._counts), np.int64)
            cached = list(self._cached(rows))
            limit[[row for _, row, _ in cached]] = most
            new = self.rollouts.generate(limit, None, self.steps.progress)
        self._count(new)
        said = {}
        for _, row, c in cached:
            c.tokens += new[row]
            said[id(c)] = self._text(new[row])
        return said

    def begin(self, c: Candidate) -> None:
        """Begin another solution behind what a row has; the scorer's row waits for `rewind`."""
        for name in ("steps", "margins", "scores", "ends"):
            getattr(c, name).clear()
        c.start, c.text = len(c.tokens), ""

    def reseed(self, rows: Rows) -> None:
        """Give rows other draws than before, also at positions where they have been."""
        for question, row, _ in self._cached(rows):
            self._reseed(question, row)

    def result(self, candidates: Rows, **more: Any) -> Result:
        encoded = sum(held.tokens for held in self.sessions)
        seconds = self.seconds | {"all": time.perf_counter() - self._begin}
        return Result(
            self.questions, candidates, self.trace, sum(self.spent), encoded, seconds,
            spent=self.spent, **more,
        )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self.rollouts.gather([])

    def _count(self, new: Sequence[Sequence[int]]) -> None:
        """Add the new tokens of all rows to what their questions were given."""
        first = 0
        for question, count in enumerate(self._counts):
            self.spent[question] += sum(map(len, new[first : first + count]))
            first += count

    def _cached(self, rows: Rows) -> Iterator[tuple[int, int, Candidate]]:
        """Question, row in the policy's cache and candidate, of those that have a row."""
        first = 0
        for question, (some, count) in enumerate(zip(rows, self._counts, strict=True)):
            for c in some:
                if c.row is not None:
                    yield question, first + c.row, c
            first += count

    def _gather(self, rows: Rows) -> None:
        index, first = [], 0
        for question, some in enumerate(rows):
            own = []
            for c in some:
                if c.row is not None and (self.keep or not c.finished):
                    own.append(c.row)
                    c.row = len(own) - 1
                else:
                    c.row = None
            index += [first + i for i in own]
            first += self._counts[question]
            held = self.sessions[question]
            if own != list(range(self._counts[question])):
                held.gather(own)
            self._counts[question] = len(own)
        if index == list(range(first)):
            return
        self.rollouts.gather(index)
        taken: set[int] = set()
        for (question, row, _), i in zip(self._cached(rows), index, strict=True):
            if i in taken:
                self._reseed(question, row)
            taken.add(i)

    def _reseed(self, question: int, row: int) -> None:
        self.rollouts.seeds[row] = self._next_seed[question]
        self._next_seed[question] += 1

    def _take(self, c: Candidate, tokens: list[int], whole: bool) -> list[str]:
        """Move new tokens to a candidate; returns the texts of the steps that they make."""
        cuts = self._cuts(tokens[:-1]) if whole else []
        steps, start = [], 0
        for end in [*cuts, len(tokens)]:
            c.tokens += tokens[start:end]
            text = self._text(c.tokens[c.start :])
            step, c.text, start = text[len(c.text) :], text, end
            if step.strip():
                c.steps.append(step)
                c.ends.append(len(c.tokens))
                steps.append(step)
        return steps

    def _score(self, rows: Rows, added: list[list[list[str]]]) -> None:
        with self._timed("scorer"):
            for some, held, new in zip(rows, self.sessions, added, strict=True):
                if not any(new):
                    continue
                if not isinstance(held, TextSession):  # it joins steps in its own way
                    new = [[self._bare(step) for step in steps] for steps in new]
                found = append(held, new)
                for c in some:
                    for margin, score in found[c.row] if c.row is not None else ():
                        c.margins.append(margin)
                        c.scores.append(score)

    def _bare(self, step: str) -> str:
        ends = [x for x in self.steps.delimiters if step.endswith(x)]
        bare = step.removesuffix(max(ends, key=len, default=""))
        return bare if bare.strip() else step

    def _text(self, tokens: Sequence[int]) -> str:
        ended = bool(tokens) and tokens[-1] in self.rollouts.eos
        return self.steps.tokenizer.decode(tokens[:-1] if ended else tokens)

    def _cuts(self, tokens: Sequence[int]) -> list[int]:
        """Where steps end in what a row has grown by."""
        cuts, start = [], 0
        for end in range(1, len(tokens) + 1):
            if end - start == self.steps.step_tokens or self.steps.ended(tokens[start:end]):
                cuts.append(end)
                start = end
        return cuts

    def _complete(self) -> Callable[[list[int]], bool]:
        """What tells whether a solution is complete with the last token that its row has grown by:
        a step ends there, as it would if rows grew step by step, and `done` says so."""
        # Of rows as they were a token ago, and as they are: where the step to come begins.
        before: dict[tuple[int, ...], int] = {}
        now = {(): 0}

        def complete(tokens: list[int]) -> bool:
            nonlocal before, now
            text = tuple(tokens)
            if text not in now and text[:-1] in now:
                before, now = now, {}
            start = before.get(text[:-1])
            if start is None:
                start = max(self._cuts(tokens[:-1]), default=0)
            step = tokens[start:]
            ends = len(step) == self.steps.step_tokens or self.steps.ended(step)
            now[text] = len(text) if ends else start
            return ends and self.steps.done(self.steps.tokenizer.decode(tokens))

        return complete

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin
