"""A process reward model over rollouts that grow: nothing that it has read is encoded again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..cache import Index
from ..config import CacheConfig
from ..hf import Session, branches, check_model
from .layouts import Encoded

if TYPE_CHECKING:
    from . import PRM

TOKENS = 4096  # of one forward, or those of one row
STRETCH = 32  # tokens to come that rows must have in common to be encoded once


@dataclass(frozen=True)
class _Row:
    steps: tuple[str, ...]
    ids: list[int]  # what the cache holds, and the tokens behind that values depend on
    held: int  # tokens that the cache holds
    values: dict[int, float]  # what was read of what the cache holds, by position
    ends: tuple[int, ...]  # tokens to hold for the first k steps
    history: tuple[tuple[float, ...], ...]  # margins when there were k steps

    @property
    def margins(self) -> tuple[float, ...]:
        return self.history[-1]

    def rewound(self, held: int, lag: int) -> "_Row":
        values = {p: value for p, value in self.values.items() if p < held}
        return replace(self, ids=self.ids[: held + lag], held=held, values=values)


@dataclass(frozen=True)
class _Job:
    """What one row needs: tokens [keep, need) encoded, `reads` of them read."""

    row: int
    keep: int
    need: int
    ids: list[int]
    reads: list[int]


class PRMSession:
    """Rows of a question's solutions, scored step by step. Made by `PRM.session`.

    New steps alone are encoded: a row's tokens are compared with what the cache holds, which is
    rewound to where they differ (a tag that moves, a token that merged), and nothing behind the
    newest step's read position is ever encoded. Of rows that hold the same, equal tokens to come
    are encoded once, those that they begin with alike from 32 on.

    Attributes:
        tokens: tokens encoded so far, the question's included.

    Nothing is changed by a call that raises, but for what the cache holds.
    """

    def __init__(self, prm: "PRM", question: str, rows: int, config: CacheConfig | None) -> None:
        self._prm, self._question = prm, question
        self._lag = prm.head.lag
        # States that cannot be rewound are made again. Not so keys that a length turns otherwise:
        # what was read of them before would have to be read again.
        texts = [
            (lambda row: self._rows[row].ids) if check_model(x, head=False).recurrent else None
            for x in prm.backbones
        ]
        self._runs = [
            Session(x, config or CacheConfig(), head=False, texts=each)
            for x, each in zip(prm.backbones, texts, strict=True)
        ]
        family = prm.family
        empty, begun = family.encode(question, [[], ["0"]])
        prompt = empty.ids[: _agree(empty.ids, begun.ids)]
        held = len(prompt) - self._lag
        if held < 1:
            raise ValueError("the question gives no token; ask something")
        for run in self._runs:
            run.prefill([torch.tensor(prompt[:held], device=prm.device)], rows)
        self.tokens = held
        self._rows = [_Row((), prompt, held, {}, (held,), ((),))] * rows

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def margins(self) -> list[list[float]]:
        """Of each row, the margins of all its steps."""
        return [list(row.margins) for row in self._rows]

    @property
    def probs(self) -> list[list[float]]:
        """Of each row, the scores of all its steps under the family's link."""
        counts = [len(row.margins) for row in self._rows]
        flat = torch.tensor([x for row in self._rows for x in row.margins], dtype=torch.float32)
        return [x.tolist() for x in self._prm.link(flat).split(counts)]

    def memory(self) -> dict[str, int]:
        """Bytes held; see `KVCache.memory`."""
        held = [run.kv.memory() for run in self._runs]
        return {name: sum(x[name] for x in held) for name in held[0]}

    def append(self, steps: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Give rows a step more.

        Args:
            steps: of each row, the text of its new step; None, or white space alone, for none.

        Returns:
            Margin and score of each row's newest step [rows], fp32, on the CPU; NaN where there is
            none yet.

        Raises:
            TypeError: steps is a text, or an entry is neither a text nor None.
            ValueError: a step would be read for the family's tag, see `kvtools.prm.families`.
        """
        if isinstance(steps, str):
            raise TypeError("steps is a text: pass a list with the new step of each row, or None")
        if len(steps) != self.rows:
            raise ValueError(f"steps has {len(steps)} entries; there are {self.rows} rows")
        new = [[] if step is None else self._prm.family.clean([step]) for step in steps]
        self.grow({i: [*self._rows[i].steps, *added] for i, added in enumerate(new) if added})
        newest = [row.margins[-1] if row.margins else np.nan for row in self._rows]
        margin = torch.tensor(newest, dtype=torch.float32)
        return margin, self._prm.link(margin)

    def gather(self, index: Index) -> None:
        """Make the rows rows[index]: fork, prune, reorder, select, resample."""
        for run in self._runs:
            run.kv.gather(index)
        self._rows = [self._rows[int(i)] for i in index]

    def crop(self, steps: Sequence[int]) -> None:
        """Rewind each row to its first `steps` steps, and their scores to what they were then."""
        counts = [int(n) for n in steps]
        present = [len(row.steps) for row in self._rows]
        if len(counts) != self.rows or any(
            not 0 <= n <= most for n, most in zip(counts, present, strict=True)
        ):
            raise ValueError(f"steps must hold a number for each row, at most {present}")
        self._rewind({
            i: min(row.held, row.ends[n])
            for i, (row, n) in enumerate(zip(self._rows, counts, strict=True)) if n < len(row.steps)
        })  # fmt: skip
        self._rows = [
            replace(row, steps=row.steps[:n], ends=row.ends[: n + 1], history=row.history[: n + 1])
            for row, n in zip(self._rows, counts, strict=True)
        ]

    @torch.no_grad()
    def grow(self, wanted: dict[int, list[str]]) -> None:
        """Bring rows to these steps, which begin with those that they have."""
        if not wanted:
            return
        encoded = self._prm.family.encode(self._question, list(wanted.values()))
        first: dict[tuple, int] = {}
        source, jobs = np.arange(self.rows), []
        for row, new in zip(wanted, encoded, strict=True):
            if not any(new.reads):
                continue
            job = self._job(row, new)
            source[row] = first.setdefault((*job.ids, *new.reads), row)
            if source[row] == row:
                jobs.append(job)
        self._rewind({job.row: job.keep for job in jobs})
        for level in self._levels([job for job in jobs if job.keep < job.need]):
            for batch in _batches(sorted((job for job, _ in level), key=lambda job: job.row)):
                self._run(batch)
            alike = np.arange(self.rows)
            for job, rows in level:
                alike[rows] = job.row
            self._hold_as(alike)
        self._hold_as(source)
        rows = list(self._rows)
        for (i, steps), new in zip(wanted.items(), encoded, strict=True):
            rows[i] = _scored(self._rows[i], tuple(steps), new)
        self._rows = rows

    def _job(self, row: int, new: Encoded) -> _Job:
        old = self._rows[row]
        need = max((read[1] for read in new.reads if read), default=0)
        keep = min(old.held, _agree(old.ids, new.ids) - self._lag, need)
        positions = [p for read in new.reads if read for p in range(*read)]
        reads = [p for p in positions if p >= keep or p not in old.values]
        return _Job(row, min([keep, *reads]), need, new.ids[: need + self._lag], reads)

    def _levels(self, jobs: list[_Job]) -> list[list[tuple[_Job, list[int]]]]:
        """What is to be run, one after the other: jobs of one row, and the rows that hold the same
        afterwards."""
        same: dict[tuple, list[_Job]] = {}
        for job in jobs:
            same.setdefault((job.keep, *job.ids[: job.keep]), []).append(job)
        levels: list[list[tuple[_Job, list[int]]]] = []
        for group in same.values():
            start = group[0].keep
            forest = branches([np.array(job.ids[start:]) for job in group], STRETCH + self._lag)
            levels += [[] for _ in range(len(forest) - len(levels))]
            for level, parts in zip(levels, forest, strict=False):
                for part in parts:
                    some = [group[i] for i in part.prompts]
                    # The last tokens are not encoded, but those before are read by them.
                    keep = start + max(part.begin - self._lag, 0)
                    need = start + part.end - self._lag
                    reads = sorted({p for job in some for p in job.reads if keep <= p < need})
                    rows = [job.row for job in some]
                    ids = some[0].ids[: need + self._lag]
                    level.append((_Job(rows[0], keep, need, ids, reads), rows))
        return levels

    def _hold_as(self, source: np.ndarray) -> None:
        """Let each row hold what row source[row] does; its steps and scores stay its own."""
        if (source == np.arange(self.rows)).all():
            return
        for run in self._runs:
            run.kv.gather(source)
        self._rows = [
            replace(row, ids=held.ids, held=held.held, values=held.values)
            for row, held in zip(self._rows, [self._rows[i] for i in source], strict=True)
        ]

    def _rewind(self, held: dict[int, int]) -> None:
        """Let rows hold so many tokens."""
        lengths = np.array([held.get(i, row.held) for i, row in enumerate(self._rows)], np.int64)
        if all(length == row.held for length, row in zip(lengths, self._rows, strict=True)):
            return
        for run in self._runs:
            try:
                run.kv.crop(lengths)
            except ValueError as error:
                raise ValueError(
                    "a step changes how the question's end is tokenised, and a prompt that was "
                    "compressed cannot be rewound: keep it whole (prompt_budget=None)"
                ) from error
        self._rows = [row.rewound(int(n), self._lag)
                      for row, n in zip(self._rows, lengths, strict=True)]  # fmt: skip

    def _run(self, batch: list[_Job]) -> None:
        """Encode and read what the rows of `batch` need."""
        counts = np.zeros(self.rows, np.int32)
        new, reads, targets = [], [], []
        for job in batch:
            counts[job.row] = job.need - job.keep
            reads += [len(new) + p - job.keep for p in job.reads]
            targets += [job.ids[p + 1] if self._lag else 0 for p in job.reads]
            new += job.ids[job.keep : job.need]
        tokens, read_s, target_s = (
            torch.tensor(x, dtype=torch.int64, device=self._prm.device)
            for x in (new, reads, targets)
        )
        try:
            hidden = [run.extend(tokens, counts) for run in self._runs]
            values = iter(self._prm.head(hidden, read_s, target_s).tolist())
        except BaseException:
            for run in self._runs:
                run.kv.crop([row.held for row in self._rows])
            raise
        self.tokens += len(new)
        for job in batch:
            row = self._rows[job.row]
            read = {p: next(values) for p in job.reads}
            self._rows[job.row] = replace(row, ids=job.ids, held=job.need, values=row.values | read)


def _scored(old: _Row, steps: tuple[str, ...], new: Encoded) -> _Row:
    """A row with more steps, whose margins come from what was read."""
    margins = [
        sum(old.values[p] for p in range(*read)) if read
        else old.margins[i] if i < len(old.margins) else np.nan
        for i, read in enumerate(new.reads)
    ]  # fmt: skip
    ends, history = list(old.ends), list(old.history)
    for k in range(len(old.steps), len(new.reads)):
        read = new.reads[k]
        ends.append(read[1] if read else old.held)
        history.append(tuple(margins[: k + 1]))
    history[-1] = tuple(margins)
    return replace(old, steps=steps, ends=tuple(ends), history=tuple(history))


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)))  # fmt: skip


def _batches(jobs: list[_Job]) -> Iterator[list[_Job]]:
    """Jobs that are run together."""
    batch: list[_Job] = []
    tokens = 0
    for job in jobs:
        tokens += job.need - job.keep
        if batch and tokens > TOKENS:
            yield batch
            batch, tokens = [], job.need - job.keep
        batch.append(job)
    if batch:
        yield batch
