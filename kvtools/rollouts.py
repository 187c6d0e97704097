"""Rollouts of a model: rows over shared prompts that can be stepped, forked, pruned and rewound."""

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .cache import Index
from .config import CacheConfig
from .hf import Session, plugged
from .ops.sampling import row_seeds, sample

Until = Collection[int] | Callable[[list[int]], bool]
Processor = Callable[[list[list[int]], Tensor], Tensor]


class Rollouts:
    """Sampled continuations of prompts, one per row.

    Args:
        model: a decoder-only transformers model.
        config: how keys and values are kept; default exact.
        temperature, top_k, top_p, min_p: as for `kvtools.sample`; temperature 0 is greedy.
        eos_token_id: tokens that finish a row; default those of the model's generation config, ()
            for none.
        seed: of the run: rows get `row_seeds(seed, ...)` of `kvtools.ops.sampling` in the order in
            which they are added or copied, so that runs with other seeds share none. A row's tokens
            depend on its own seed and text only.
        processor: called with the tokens of the rows that sample, and their logits [r, v]; returns
            logits.
        pages: pages per pool, fixed; None lets the pools grow.
        probe: see `kvtools.generate`.

    Attributes:
        tokens: of each row, prompt included.
        prompt_lengths: [rows] tokens of each row that are its prompt.
        logprobs: log-probabilities of each row's sampled tokens, before filters.
        seeds: [rows] int64; set them after forking if copies of a row shall differ at equal
            positions.
        finished: [rows] bool, rows that ended with an EOS token; set it to end others.
        filters: temperature, top_k, top_p and min_p of the steps to come.
        eos: tokens that finish a row.
        kv: the `KVCache`.

    Nothing is changed by a call that raises; a step that failed in `processor` can be taken again.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: CacheConfig | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        processor: Processor | None = None,
        pages: int | None = None,
        probe: bool = True,
    ) -> None:
        self._session = Session(
            model, config or CacheConfig(), pages=pages, probe=probe,
            texts=lambda row: self.tokens[row],
        )  # fmt: skip
        self.kv, self.device = self._session.kv, self._session.device
        self.filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if eos_token_id is None:
            eos_token_id = model.generation_config.eos_token_id
        self.eos = set(np.atleast_1d([] if eos_token_id is None else eos_token_id).tolist())
        self._processor, self._seed, self._seeded = processor, seed, 0  # rows that got a seed
        self.tokens: list[list[int]] = []
        self.logprobs: list[list[float]] = []
        self.prompt_lengths = np.zeros(0, np.int64)
        self.seeds = np.zeros(0, np.int64)
        self.finished = np.zeros(0, bool)
        # Logits [n, v] and which of them, of rows whose last token has been fed.
        self._ready: list[tuple[Tensor, int] | None] = []
        self._first: list[Tensor] = []  # logits [v] after the prompt, one tensor per prompt

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def prefill(self, prompts: Iterable[Sequence[int] | Tensor], n: int = 1) -> None:
        """Add `n` rows for each prompt, in order; each distinct prompt of this call is run and
        stored once.

        Args:
            prompts: token ids, without padding.
            n: rows per prompt.

        Raises:
            ValueError: a prompt is empty, or `n` is not positive.
        """
        ids = [p.tolist() if isinstance(p, Tensor) else list(p) for p in prompts]
        if n < 1:
            raise ValueError(f"n={n}: at least one rollout per prompt is needed")
        if not all(ids):
            raise ValueError("prompts holds an empty prompt: each needs at least one token")
        before, distinct = self.rows, list(dict.fromkeys(map(tuple, ids)))
        logits, start, at = {}, {}, before
        try:
            for prompt in distinct:
                copies = n * sum(tuple(p) == prompt for p in ids)
                logits[prompt] = self._session.prefill(
                    torch.tensor(prompt, device=self.device), copies
                )
                start[prompt], at = at, at + copies
        except BaseException:
            self.kv.gather(range(before))
            raise
        order = list(range(before))
        for prompt in map(tuple, ids):
            order += range(start[prompt], start[prompt] + n)
            start[prompt] += n
        self.kv.gather(order)
        for prompt in map(tuple, ids):
            self.tokens += [list(prompt) for _ in range(n)]
            self._ready += [(logits[prompt][None], 0)] * n
            self._first += [logits[prompt]] * n
        added = n * len(ids)
        self.logprobs += [[] for _ in range(added)]
        self.prompt_lengths = np.concatenate(
            [self.prompt_lengths, np.repeat([len(p) for p in ids], n)]
        )
        self.seeds = np.concatenate([self.seeds, row_seeds(self._seed, added, self._seeded)])
        self.finished = np.concatenate([self.finished, np.zeros(added, bool)])
        self._seeded += added

    def step(self, rows: Index | None = None) -> None:
        """Sample one token for each unfinished row.

        Args:
            rows: only these; default all.

        Raises:
            IndexError: a number is not a row.
        """
        chosen = np.arange(self.rows) if rows is None else np.unique(np.asarray(rows, np.int64))
        for row in chosen[(chosen < 0) | (chosen >= self.rows)]:
            raise IndexError(f"rows holds {row}; there are rows 0 to {self.rows - 1}")
        active = chosen[~self.finished[chosen]]
        if not len(active):
            return
        self._feed(active)
        logits = _logits([self._ready[row] for row in active])
        if self._processor is not None:
            logits = self._processor([list(self.tokens[row]) for row in active], logits)
        position = torch.tensor([len(self.tokens[row]) for row in active], device=self.device)
        seed = torch.from_numpy(self.seeds[active]).to(self.device)
        token, logprob, _ = sample(logits, seed, position, **self.filters, impl=self.kv.config.impl)
        tokens, logprobs = token.tolist(), logprob.tolist()
        for row, token, logprob in zip(active, tokens, logprobs, strict=True):
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            self._ready[row] = None
            self.finished[row] = token in self.eos

    def generate(
        self,
        max_new_tokens: int | Index,
        until: Until | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Let every unfinished row grow until it finishes, `until` holds, or it has grown by
        `max_new_tokens`.

        Args:
            max_new_tokens: per row, counted from this call; one number, or one for each row.
            until: token ids that pause a row once sampled, or a callable on the tokens that the row
                has got in this call.
            progress: called after each step with the number of rows that still grow.

        Returns:
            The new tokens of each row.
        """
        start = [len(tokens) for tokens in self.tokens]
        most = np.broadcast_to(np.asarray(max_new_tokens, np.int64), self.rows)
        growing = np.flatnonzero(~self.finished & (most > 0))
        with plugged(self._session.door):
            step = 0
            while len(growing):
                self.step(growing)
                step += 1
                growing = np.array(
                    [r for r in growing if step < most[r] and not self._pauses(r, start[r], until)],
                    np.int64,
                )
                if progress is not None:
                    progress(len(growing))
        return [tokens[begin:] for tokens, begin in zip(self.tokens, start, strict=True)]

    def gather(self, index: Index) -> None:
        """Make the rows rows[index]: fork, prune, reorder, select, resample. See `KVCache.gather`.

        Copies of a row get seeds of their own but for the first, so that they diverge.
        """
        self.kv.gather(index)
        index = [int(i) for i in index]
        self.tokens = [list(self.tokens[i]) for i in index]
        self.logprobs = [list(self.logprobs[i]) for i in index]
        self._ready = [self._ready[i] for i in index]
        self._first = [self._first[i] for i in index]
        self.prompt_lengths, self.finished = self.prompt_lengths[index], self.finished[index]
        self.seeds = self.seeds[index]
        copies = np.setdiff1d(np.arange(len(index)), np.unique(index, return_index=True)[1])
        self.seeds[copies] = row_seeds(self._seed, len(copies), self._seeded)
        self._seeded += len(copies)

    def crop(self, lengths: Index) -> None:
        """Rewind each row to its own number of tokens, prompt included. See `KVCache.crop`."""
        lengths = np.asarray(lengths, np.int64)
        present = np.array([len(tokens) for tokens in self.tokens])
        if (
            lengths.shape != present.shape
            or (lengths < self.prompt_lengths).any()
            or (lengths > present).any()
        ):
            raise ValueError(
                f"lengths must hold one length for each of {self.rows} rows, from its prompt's to "
                "its present one"
            )
        cut, at_prompt = lengths < present, lengths == self.prompt_lengths
        # The last token is fed again, for its logits; those of a prompt are still at hand.
        fed = np.where(at_prompt, lengths, lengths - 1)
        self.kv.crop(np.minimum(np.where(cut, fed, present), self.kv.lengths.numpy()))
        for row in np.flatnonzero(cut):
            length = int(lengths[row])
            self.tokens[row] = self.tokens[row][:length]
            self.logprobs[row] = self.logprobs[row][: length - int(self.prompt_lengths[row])]
            self._ready[row] = (self._first[row][None], 0) if at_prompt[row] else None
            self.finished[row] = False

    def peek(self, tokens: Sequence[int], rows: Index) -> Tensor:
        """Logits [r, v] that would follow `tokens` after each of `rows`, distinct and ascending;
        all rows stay as they are."""
        lengths = self.kv.lengths.numpy()
        counts, fed = np.zeros(self.rows, np.int32), []
        for row in np.asarray(rows, np.int64):
            new = [*self.tokens[row][lengths[row] :], *tokens]
            counts[row] = len(new)
            fed += new
        logits = self._session.extend(torch.tensor(fed, device=self.device), counts)
        self.kv.crop(lengths)
        return logits

    def _feed(self, active: np.ndarray) -> None:
        """Run what the model has not seen of rows `active`; then their logits are ready."""
        lengths = self.kv.lengths.numpy()
        counts = np.zeros(self.rows, np.int32)
        for row in active:
            if self._ready[row] is None:
                counts[row] = len(self.tokens[row]) - lengths[row]
        fed = np.flatnonzero(counts)
        if not len(fed):
            return
        new = [token for row in fed for token in self.tokens[row][lengths[row] :]]
        logits = self._session.extend(torch.tensor(new, device=self.device), counts)
        for i, row in enumerate(fed):
            self._ready[row] = logits, i

    def _pauses(self, row: int, start: int, until: Until | None) -> bool:
        if self.finished[row]:
            return True
        if until is None:
            return False
        new = self.tokens[row][start:]
        return bool(until(new)) if callable(until) else new[-1] in until


def _logits(ready: list[tuple[Tensor, int]]) -> Tensor:
    """One row of logits for each; the tensor itself where it is those rows in order."""
    tensor = ready[0][0]
    same = all(x is tensor for x, _ in ready)
    if same and [i for _, i in ready] == list(range(len(tensor))):
        return tensor
    return torch.stack([x[i] for x, i in ready])
