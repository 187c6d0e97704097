"""Particle filtering and particle Gibbs: step margins are log-weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..rollouts import Rollouts
from .result import NOTHING, Candidate, Result, Rows, growing
from .run import TEMPERATURES, Run, Steps, whole, within


def resample(
    weights: Sequence[float], n: int, rng: np.random.Generator, how: str = "multinomial"
) -> np.ndarray:
    """`n` indices, each i on average n * weights[i] times.

    Args:
        weights: sum to one.
        how: "multinomial" draws independently, as `Generator.choice`; "systematic" with one draw u,
            at (j + u) / n, so that counts differ from their mean by less than one.
    """
    if how == "multinomial":
        return rng.choice(len(weights), n, p=weights)
    if how != "systematic":
        raise ValueError(f"resampling={how!r}: multinomial or systematic")
    total = np.cumsum(weights)
    places = (np.arange(n) + rng.random()) / n * total[-1]
    return np.minimum(np.searchsorted(total, places, side="right"), len(total) - 1)


def effective_size(weights: Sequence[float]) -> float:
    """1 / sum(w^2) of weights that sum to one: that many equal ones would do."""
    return float(1 / np.square(weights).sum())


def particle_filter(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    resampling: str = "multinomial",
    temperature: float = 1.0,
    ess: float | None = None,
    seed: int = 0,
) -> Result:
    """Particle filtering: after each step rows are resampled by softmax(margin / temperature).

    A finished particle stays among the others at its last weight.

    Args:
        n: particles of each question.
        resampling: "multinomial" or "systematic".
        temperature: what margins are divided by, from 1e-6 to 1e6.
        ess: resample only where the effective sample size is under ess * n, from 0 to 1; weights
            multiply up until then. None resamples after every step.

    Returns:
        The `n` particles of each question as candidates, with their log-weights, and the evidence.

    Reference: arXiv:2502.01618.
    """
    return particle_gibbs(
        rollouts, questions, scorer, steps, n=n, iterations=1, resampling=resampling,
        temperature=temperature, ess=ess, seed=seed,
    )  # fmt: skip


def particle_gibbs(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 16,
    iterations: int = 4,
    resampling: str = "multinomial",
    temperature: float = 1.0,
    ess: float | None = None,
    seed: int = 0,
) -> Result:
    """Particle filters in turn, each with one particle that is a solution drawn from the last.

    That one, the reference, is not resampled but takes part: rows may fork off its earlier steps.
    All caches are kept to the end, so that the prompt is prefilled once. Multinomial resampling
    leaves the posterior as it is; systematic resampling, here of all but the reference, nearly so.

    Args:
        n: particles of each question, the reference among them.
        iterations: particle filters.
        resampling, temperature, ess: as for `particle_filter`.

    Returns:
        The particles of all iterations as candidates, each iteration's reference last; and the
        evidence, of the first.

    Reference: Andrieu, Doucet and Holenstein, 2010; arXiv:2502.01618.
    """
    whole("iterations", iterations, 1)
    whole("n", n, 1)
    if iterations > 1 and n < 2:
        raise ValueError(f"n={n}, iterations={iterations}: too few particles")
    within("temperature", temperature, *TEMPERATURES)
    if ess is not None:
        within("ess", ess, 0, 1)
    if resampling not in ("multinomial", "systematic"):
        raise ValueError(f"resampling={resampling!r}: multinomial or systematic")
    with Run(rollouts, questions, scorer, steps, n, seed, keep=iterations > 1) as run:
        particles = _Filter(run, resampling, temperature, ess)
        found, evidence = particles.sweep(run.start(), n)
        rows = found
        for _ in range(1, iterations):
            rows, _ = particles.sweep(particles.restart(rows), n - 1)
            found = [[*some, *more] for some, more in zip(found, rows, strict=True)]
        return run.result(found, log_evidence=evidence)


@dataclass
class _Filter:
    run: Run
    resampling: str
    temperature: float
    ess: float | None

    def sweep(self, rows: Rows, free: int) -> tuple[Rows, list[float]]:
        """Grow all rows to their ends and resample the first `free` of each question; returns them
        and the log evidence."""
        evidence, step = [0.0] * len(rows), 0
        while growing(rows):
            live = [growing([some]) for some in rows]
            self.run.grow(rows)
            step += 1
            while step >= self.run.steps.depth and growing(rows):
                self.run.grow(rows)
            kept, why, fresh = [], [], []
            for question, some in enumerate(rows):
                index, reason, drawn = list(range(len(some))), "", False
                if live[question]:
                    self._weigh(some, step)
                    index, reason, drawn = self._draw(question, some, free)
                    if drawn or not growing([some]):
                        evidence[question] += _log_mean([c.log_weight for c in some])
                kept.append(index)
                why.append(reason)
                fresh.append(drawn)
            values = [[c.log_weight for c in some] for some in rows]
            rows = self.run.select(rows, kept, values, why)
            drawn = [some if new else [] for some, new in zip(rows, fresh, strict=True)]
            for c in (c for some in drawn for c in some):
                c.log_weight = 0.0
            self._shorten(rows, [some[:free] for some in drawn], step)
        return rows, evidence

    def restart(self, rows: Rows) -> Rows:
        """Empty rows, and last the reference: a row drawn by weight."""
        values = [[c.log_weight for c in some] for some in rows]
        drawn = [
            int(resample(_softmax(x), 1, rng)[0])
            for x, rng in zip(values, self.run.draws, strict=True)
        ]
        kept = [[i] * len(some) for i, some in zip(drawn, rows, strict=True)]
        rows = self.run.select(rows, kept, values, ["reference of the next filter"] * len(rows))
        for some in rows:
            for i, c in enumerate(some):
                c.log_weight, c.origin = 0.0, i
        self._shorten(rows, [some[:-1] for some in rows], 0)
        return rows

    def _weigh(self, some: list[Candidate], step: int) -> None:
        for c in some:
            margin = c.margins[min(step, len(c.margins)) - 1] if c.margins else NOTHING
            c.log_weight += margin / self.temperature

    def _draw(self, question: int, some: list[Candidate], free: int) -> tuple[list[int], str, bool]:
        """Rows to go on with, why, and whether they were drawn."""
        weights = _softmax([c.log_weight for c in some])
        size = effective_size(weights)
        why = f"effective size {size:.2f} of {len(some)}"
        if not growing([some]) or (self.ess is not None and size >= self.ess * len(some)):
            return list(range(len(some))), why, False
        drawn = resample(weights, free, self.run.draws[question], self.resampling)
        return [*drawn.tolist(), *range(free, len(some))], f"{why}: {self.resampling}", True

    def _shorten(self, rows: Rows, drawn: Rows, steps: int) -> None:
        """Cut copies of a reference that are ahead of the others."""
        ahead = [[c for c in some if len(c.steps) > steps] for some in drawn]
        if any(ahead):
            for c in (c for some in ahead for c in some):
                self.run.cut(c, steps)
            self.run.reseed(ahead)
            self.run.rewind(rows)


def _softmax(x: Sequence[float]) -> np.ndarray:
    weights = np.exp(np.asarray(x) - np.max(x))
    return weights / weights.sum()


def _log_mean(x: Sequence[float]) -> float:
    """Log of the mean of exp(x)."""
    top = np.max(x)
    return float(top + np.log(np.mean(np.exp(np.asarray(x) - top))))
