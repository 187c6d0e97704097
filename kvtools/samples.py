"""Any number of samples of prompts, some rows at a time."""

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

# Steps after which rows that have ended give their places away; looking at each step would keep
# steps from running ahead of the host.
CHUNK = 8

Until = Collection[int] | Callable[[list[int]], bool]


@dataclass(frozen=True)
class Sample:
    """A finished continuation.

    Attributes:
        prompt: which prompt it continues.
        number: which of that prompt's samples it is.
        tokens: those sampled.
        logprobs: of each, before filters.
        why: "eos"; "until"; "length", it has `max_new_tokens`; or "budget", it was cut off by
            `max_tokens` or `max_seconds`.
        seed: of its noise.
        text: its tokens as text, without special ones, if there is a tokenizer.
    """

    prompt: int
    number: int
    tokens: list[int]
    logprobs: list[float]
    why: Literal["eos", "until", "length", "budget"]
    seed: int
    text: str | None = None


def samples(
    rollouts: Any,
    prompts: Sequence[Sequence[int] | Tensor],
    n: int | Sequence[int],
    rows: int,
    max_new_tokens: int,
    until: Until | None,
    enough: Callable[[Sample], bool] | None,
    skip: Collection[tuple[int, int]],
    max_tokens: int | None,
    max_seconds: float | None,
    tokenizer: Any,
) -> Iterator[Sample]:
    """`Rollouts.sample`, which has the words."""
    run = _Run(rollouts, prompts, n, rows, {(prompt, number) for prompt, number in skip})
    run.check()
    spent, started = 0, time.monotonic()
    try:
        while run.refill():
            before = len(run.held)
            if callable(until):
                rollouts.step(np.arange(before, rollouts.rows))
                spent += len(run.live)
            else:
                left = [max_new_tokens - len(rollouts.logprobs[row]) for row in run.rows]
                new = rollouts.generate([0] * before + [min(CHUNK, x) for x in left], until)
                spent += sum(map(len, new))
            over = max_tokens is not None and spent >= max_tokens
            if max_seconds is not None:
                over = rollouts.agreed(over or time.monotonic() - started >= max_seconds)
            ended = []
            for row, job in zip(run.rows, run.live, strict=True):
                tokens = rollouts.tokens[row][rollouts.prompt_lengths[row] :]
                hit = until(tokens) if callable(until) else tokens[-1] in (until or ())
                why = (
                    "eos" if rollouts.finished[row]
                    else "until" if hit
                    else "length" if len(tokens) >= max_new_tokens
                    else "budget" if over
                    else None
                )  # fmt: skip
                if why is not None:
                    text = None
                    if tokenizer is not None:
                        text = tokenizer.decode(tokens, skip_special_tokens=True)
                    values = list(rollouts.logprobs[row]), why, int(rollouts.seeds[row])
                    ended.append((job, Sample(*job, tokens, *values, text)))
            run.end({job for job, _ in ended})
            run.left = run.seen()
            for _, sample in ended:
                if sample.prompt in run.done:
                    continue
                yield sample
                if enough is not None and enough(sample):
                    run.drop(sample.prompt)
            if over:
                return
    finally:
        rollouts.gather([])


class _Run:
    """Rows: one for each prompt of which samples are still to begin, which waits; then `live` ones.

    Prompts come in blocks of at most as many as there are rows; within a block they take turns.
    Nobody else may touch the rows meanwhile: they would be taken for what they are not.
    """

    def __init__(
        self,
        rollouts: Any,
        prompts: Sequence,
        n: int | Sequence[int],
        rows: int,
        skip: set[tuple[int, int]],
    ) -> None:
        counts = np.broadcast_to(np.asarray(n, np.int64), len(prompts))
        self.rollouts, self.prompts, self.most = rollouts, prompts, rows
        seeds = iter(rollouts.new_seeds(int(counts.sum())))
        self.seeds = {(p, i): next(seeds) for p, count in enumerate(counts) for i in range(count)}
        self.wanted = {
            p: [i for i in range(count) if (p, i) not in skip] for p, count in enumerate(counts)
        }
        some = [p for p, numbers in self.wanted.items() if numbers]
        self.blocks = [some[i : i + rows] for i in range(0, len(some), rows)][::-1]
        self.jobs: list[tuple[int, int]] = []  # of this block, those to come, the last first
        self.held: list[int] = []  # prompts
        self.live: list[tuple[int, int]] = []
        self.kept: list[int] = []  # rows of `live` ones
        self.done: set[int] = set()
        self.left: Any = [], []  # the rows when others last could do something

    @property
    def rows(self) -> range:
        return range(len(self.held), self.rollouts.rows)

    def seen(self) -> tuple[list, list[int]]:
        """What tells that rows have changed: a list that is made anew, and their lengths."""
        return self.rollouts.tokens, [len(tokens) for tokens in self.rollouts.tokens]

    def check(self) -> None:
        tokens, lengths = self.seen()
        before, known = self.left
        if lengths != known or (lengths and tokens is not before):
            raise RuntimeError(
                "rows were changed while sample() draws: give it, and each other iterator, "
                "Rollouts of its own"
            )

    def refill(self) -> bool:
        """Let samples begin where rows are free; False if all is done."""
        self.check()
        r = self.rollouts
        if not self.jobs and self.blocks and len(self.live) < self.most:
            block = self.blocks.pop()
            turns = itertools.zip_longest(*([(p, i) for i in self.wanted[p]] for p in block))
            self.jobs = [job for turn in turns for job in turn if job is not None][::-1]
            first = r.rows
            r.prefill([self.prompts[p] for p in block])
            place = {p: first + i for i, p in enumerate(block)}
        else:
            place = {p: i for i, p in enumerate(self.held)}
        new = [self.jobs.pop() for _ in range(min(len(self.jobs), self.most - len(self.live)))]
        wanted = {p for p, _ in self.jobs}
        held = [p for p in place if p in wanted]
        index = [*(place[p] for p in held), *self.kept, *(place[p] for p, _ in new)]
        if index != list(range(r.rows)):
            r.gather(index)
        self.held, self.live = held, self.live + new
        self.kept = list(self.rows)
        if new:
            fresh = r.rows - len(new)
            r.seeds[fresh:] = [self.seeds[job] for job in new]
        return bool(self.live)

    def end(self, jobs: set[tuple[int, int]]) -> None:
        """These have what they wanted."""
        stay = [i for i, job in enumerate(self.live) if job not in jobs]
        self.kept, self.live = [self.kept[i] for i in stay], [self.live[i] for i in stay]

    def drop(self, prompt: int) -> None:
        """No more of a prompt."""
        self.done.add(prompt)
        self.jobs = [job for job in self.jobs if job[0] != prompt]
        self.end({job for job in self.live if job[0] == prompt})
