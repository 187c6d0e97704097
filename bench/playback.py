"""What spares a benchmark tokens: prompts that stay prefilled, and samples that are played back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from kvtools import Rollouts


class Kept:
    """Rollouts for one search after another over the same prompts, which stay prefilled.

    A spare row of each prompt, behind all others, waits for the next `prefill`.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        self.inner, self.prompts = rollouts, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def filters(self) -> dict:
        return self.inner.filters

    @filters.setter
    def filters(self, filters: dict) -> None:
        self.inner.filters = filters

    @property
    def spares(self) -> int:
        return len(self.prompts or ())

    @property
    def rows(self) -> int:
        return self.inner.rows - self.spares

    @property
    def prompt_lengths(self) -> np.ndarray:
        return self.inner.prompt_lengths[: self.rows]

    def prefill(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        prompts = [list(prompt) for prompt in prompts]
        if prompts != self.prompts:
            self.inner.gather([])
            self.inner.prefill(prompts)
            self.prompts = prompts
        spares = range(self.spares)
        self.inner.gather([*np.repeat(spares, n), *spares])

    def generate(self, limit: Any, until: Any = None, progress: Any = None) -> list[list[int]]:
        most = np.zeros(self.inner.rows, np.int64)
        most[: self.rows] = limit
        return self.inner.generate(most, until, progress)[: self.rows]

    def gather(self, index: Sequence[int]) -> None:
        self.inner.gather([*index, *range(self.rows, self.inner.rows)])

    def crop(self, lengths: Sequence[int]) -> None:
        self.inner.crop([*lengths, *map(len, self.inner.tokens[self.rows :])])


class Recorded:
    """Samples that were drawn before, in place of a policy: what `best_of_n` wants of one.

    Args:
        samples: tokens of samples by prompt. Row i of a prompt says what its sample first + i says.
        eos: tokens that finish a row.
    """

    def __init__(
        self,
        samples: Mapping[tuple[int, ...], Sequence[Sequence[int]]],
        eos: Collection[int],
        first: int = 0,
    ) -> None:
        self.samples, self.eos, self.first = samples, set(eos), first
        self.gather([])

    def gather(self, index: Sequence[int]) -> None:
        self.said = [self.said[i] for i in index]
        self.at = [self.at[i] for i in index]
        self.finished = self.finished[list(index)]
        self.seeds = self.seeds[list(index)]

    said: Sequence[Sequence[int]] = ()
    at: Sequence[int] = ()
    finished, seeds = np.zeros(0, bool), np.zeros(0, np.int64)

    @property
    def rows(self) -> int:
        return len(self.said)

    def prefill(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        rows = range(self.first, self.first + n)
        self.said = [self.samples[tuple(prompt)][i] for prompt in prompts for i in rows]
        self.at = [0] * self.rows
        self.finished, self.seeds = np.zeros(self.rows, bool), np.zeros(self.rows, np.int64)

    def generate(
        self, limit: Any, until: Callable[[list[int]], bool], progress: Any = None
    ) -> list[list[int]]:
        most, begin = np.broadcast_to(limit, self.rows), list(self.at)
        live = [i for i in range(self.rows) if not self.finished[i] and most[i] > 0]
        while live:
            going = []
            for i in live:
                token = self.said[i][self.at[i]]
                self.at[i] += 1
                self.finished[i] = token in self.eos
                new = self.said[i][begin[i] : self.at[i]]
                if not (self.finished[i] or len(new) >= most[i] or until(new)):
                    going.append(i)
            live = going
        return [list(x[a:b]) for x, a, b in zip(self.said, begin, self.at, strict=True)]
