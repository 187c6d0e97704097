"""Rollouts of a model: rows over shared prompts that can be stepped, forked, pruned and rewound."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._host import PoolExhausted
from .cache import Index
from .config import CacheConfig, is_int
from .hf import Decoder, Flight, Graph, PagedCache, Session, config_of, plugged, usable
from .ops.sampling import check_filters, drawn, row_seeds
from .ops.upload import on_device, seed_words, seeds_of
from .samples import Sample, Until, samples
from .transaction import Transaction

Processor = Callable[[list[list[int]], Tensor], Tensor]
# What a call may change.
STATE = (
    "tokens", "logprobs", "prompt_lengths", "given", "seeds", "finished", "_ready", "_first",
    "_seeded", "_flights",
)  # fmt: skip


class Rollouts:
    """Sampled continuations of prompts, one per row.

    Args:
        model: a decoder-only transformers model; given to torch.compile, steps of one token per row
            run compiled.
        config: how keys and values are kept; default exact.
        temperature, top_k, top_p, min_p: as for `kvtools.sample`; temperature 0 is greedy.
        eos_token_id: tokens that finish a row; default those of the model's generation config, ()
            for none.
        seed: of the run: rows get `row_seeds(seed, ...)` of `kvtools.ops.sampling` in the order in
            which they are added or copied, so that runs with other seeds share none. A row's tokens
            depend on its own seed and text only; in a compressed cache also on which beginnings
            its prompt shared, which are read as they are stored.
        processor: called with the tokens of the rows that sample, and their logits [r, v]; returns
            logits.
        pages: pages per pool, fixed; None lets the pools grow.
        cache: rows to start from, which `kvtools.generate` or `kvtools.load_cache` has returned.
            They go on where they ended. The cache is these rollouts' then: `generate` cannot go on
            from it any more.
        probe: see `kvtools.generate`.
        graph: "auto" lets `generate` run ahead of the host on a CUDA device: its steps are captured
            in CUDA graphs, and their tokens are read while the next one runs. With a `processor`,
            or for a model that cannot be captured or has forward hooks (a warning says why), steps
            run one by one, as they do with False. Tokens are the same. What a model takes from
            elsewhere than its modules, their attributes and its config is what it was when its step
            was captured.

    Attributes:
        tokens: of each row, prompt included.
        prompt_lengths: [rows] tokens of each row that are its prompt.
        logprobs: log-probabilities of each row's tokens after the prompt, before filters; NaN of
            those that `append` gave unless it was asked for them, and of those that came with a
            cache.
        given: of each row, the spans [begin, end) of its tokens that `append` gave, ascending.
        seeds: [rows] int64; set them after forking if copies of a row shall differ at equal
            positions.
        finished: [rows] bool, rows that ended with an EOS token; set it to end others.
        filters: temperature, top_k, top_p and min_p of the steps to come.
        eos: tokens that finish a row.
        kv: the `KVCache`.

    Nothing is changed by a call that raises, whether by an error, an interrupt or the end of
    memory: rows go on as if it had not been made. Of `generate`, which is a loop of steps, the
    steps before stay.
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
        cache: PagedCache | None = None,
        probe: bool = True,
        graph: Graph = "auto",
    ) -> None:
        # All options before anything is taken: a cache is the caller's while one of them is bad.
        self.filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        check_filters(**self.filters)
        seed = _whole_number("seed", seed)
        if processor is not None and not callable(processor):
            raise TypeError(f"processor={processor!r}: expected a function (tokens, logits)")
        config = config_of(model, cache, config, ("cache", "config"))
        if cache is not None and pages is not None:
            raise ValueError(f"pages={pages}: the pools of cache are what they are: leave it out")
        self._session = Session(
            model, config, pages=pages, probe=probe, texts=lambda row: self.tokens[row],
            cache=cache, parts=True,
        )  # fmt: skip
        usable(self._session, graph)
        self._graph, self._decoder = graph, None  # with what it was made for
        self._flights: list[Flight] = []  # launched, not yet read
        self.kv, self.device = self._session.kv, self._session.device
        if eos_token_id is None:
            eos_token_id = model.generation_config.eos_token_id
        eos = np.atleast_1d([] if eos_token_id is None else eos_token_id).tolist()
        self.eos = {_whole_number("eos_token_id", x) for x in eos}
        self._processor, self._seed, self._seeded = processor, seed, 0  # rows that got a seed
        self.tokens: list[list[int]] = []
        self.logprobs: list[list[float]] = []
        self.prompt_lengths = np.zeros(0, np.int64)
        self.given: list[tuple[tuple[int, int], ...]] = []
        self.seeds = np.zeros(0, np.int64)
        self.finished = np.zeros(0, bool)
        # Logits [n, v] and which of them, of rows whose last token has been fed.
        self._ready: list[tuple[Tensor, int] | None] = []
        # Logits [v] after the prompt, one tensor per prompt; None of rows that came with a cache.
        self._first: list[Tensor | None] = []
        # While a call changes something: what there was before.
        self._before: tuple[Transaction, dict[str, Any], list[int]] | None = None
        if cache is not None:
            self._take(cache)

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def _take(self, cache: PagedCache) -> None:
        """Make the rows those of `cache`, which forgets them."""
        texts, begin = cache.texts, np.array(cache.prompt_lengths, np.int64)
        new = [len(text) - n for text, n in zip(texts, begin.tolist(), strict=True)]
        seeds = row_seeds(self._seed, len(texts), 0)
        ended = [n > 0 and text[-1] in self.eos for text, n in zip(texts, new, strict=True)]
        self._commit(
            tokens=[list(text) for text in texts], logprobs=[[math.nan] * n for n in new],
            prompt_lengths=begin, given=[()] * len(texts), seeds=seeds,
            finished=np.array(ended, bool), _ready=[None] * len(texts),
            _first=[None] * len(texts), _seeded=len(texts),
        )  # fmt: skip
        cache.texts = None

    def prefill(self, prompts: Iterable[Sequence[int] | Tensor], n: int = 1) -> None:
        """Add `n` rows for each prompt, in order. What prompts of this call have in common, a
        beginning of 32 tokens or all, is run and stored once; those of similar lengths are run in
        one forward.

        Args:
            prompts: token ids, without padding.
            n: rows per prompt.

        Raises:
            TypeError: a prompt is no list of token ids.
            ValueError: a prompt is empty or holds what is no token, or `n` is not positive.
        """
        if n < 1:
            raise ValueError(f"n={n}: at least one rollout per prompt is needed")
        ids = self._whole(prompts)
        with self._change():
            copies = {prompt: n * count for prompt, count in Counter(map(tuple, ids)).items()}
            filled = self._session.prefill(
                [torch.tensor(prompt, device=self.device) for prompt in copies], [*copies.values()]
            )
            # Copies: one row that stays must not keep the logits of all prompts.
            logits = {prompt: x.clone() for prompt, x in zip(copies, filled, strict=True)}
            end = self.rows + np.cumsum([*copies.values()], dtype=int)
            start = dict(zip(copies, (end - [*copies.values()]).tolist(), strict=True))
            order = list(range(self.rows))
            for prompt in map(tuple, ids):
                order += range(start[prompt], start[prompt] + n)
                start[prompt] += n
            self.kv.gather(order)
            new = [tuple(p) for p in ids for _ in range(n)]
            lengths = np.array([len(prompt) for prompt in new], np.int64)
            seeds = row_seeds(self._seed, len(new), self._seeded)
            self._commit(
                tokens=self.tokens + [list(prompt) for prompt in new],
                logprobs=self.logprobs + [[] for _ in new],
                prompt_lengths=np.concatenate([self.prompt_lengths, lengths]),
                given=self.given + [()] * len(new),
                seeds=np.concatenate([self.seeds, seeds]),
                finished=np.concatenate([self.finished, np.zeros(len(new), bool)]),
                _ready=self._ready + [(logits[prompt][None], 0) for prompt in new],
                _first=self._first + [logits[prompt] for prompt in new],
                _seeded=self._seeded + len(new),
            )

    def step(self, rows: Index | None = None) -> None:
        """Sample one token for each unfinished row.

        Args:
            rows: only these; default all.

        Raises:
            IndexError: a number is not a row.
            ValueError: a row's logits are no distribution: they hold NaN or +inf, or are all -inf.
        """
        self._settle()
        chosen = np.arange(self.rows) if rows is None else self._distinct(rows)[0]
        active = chosen[~self.finished[chosen]]
        if not len(active):
            return
        with self._change():
            position = np.array([len(self.tokens[row]) for row in active])
            draw = _Draw(position, seed_words(self.seeds[active]))
            ready = self._fed(active, draw)
            logits = _logits([ready[row] for row in active])
            if self._processor is not None:
                logits = self._session.whole(logits)
                logits = self._processor([list(self.tokens[row]) for row in active], logits)
            token, logprob, _ = self._session.sample(
                logits, seeds_of(draw.seed_t), draw.position_t, **self.filters
            )
            steps = [len(self.logprobs[row]) for row in active]
            tokens, logprobs = torch.stack([token.double(), logprob.double()]).tolist()
            tokens = drawn(tokens, steps, active.tolist())
            finished = self.finished.copy()
            for row, token, logprob in zip(active, tokens, logprobs, strict=True):
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                ready[row] = None
                finished[row] = token in self.eos
            self._commit(_ready=ready, finished=finished)

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

        Callables are waited for: of rows that they look at, all tokens are there, and what they
        change of `finished`, `seeds`, `filters` and `eos` counts from the next step on.

        Returns:
            The new tokens of each row.
        """
        self._settle()
        start = [len(tokens) for tokens in self.tokens]
        most = np.broadcast_to(np.asarray(max_new_tokens, np.int64), self.rows)

        def grows(row: int) -> bool:
            new = self.tokens[row][start[row] :]
            if self.finished[row] or len(new) >= most[row]:
                return False
            return not (new and self._pauses(new, until))

        growing = [row for row in range(self.rows) if grows(row)]
        seen = callable(until) or progress is not None
        with plugged(self._session.door):
            ahead = self._ahead(until) if growing else None
            self._session.agree("rows to grow", growing, sorted(self.eos))
            while growing:
                if ahead is None or self._behind(growing):
                    self.step(growing)
                else:
                    self._launch(ahead, growing, start, most, wait=seen)
                growing = [row for row in growing if grows(row)]
                self._session.agree("rows to grow", growing)
                if progress is not None:
                    progress(len(growing))
                if seen and ahead is not None and self._decoder[0] != self._key(until):
                    ahead = self._ahead(until)
            self._land_all()
        return [tokens[begin:] for tokens, begin in zip(self.tokens, start, strict=True)]

    def _ahead(self, until: Until | None) -> Decoder | None:
        """What runs ahead of the host until rows have got one of these tokens; None if nothing
        can."""
        if self._processor is not None or not usable(self._session, self._graph):
            return None
        key = self._key(until)
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = key, Decoder(self._session, self.filters, key[0])
        self._decoder[1].begin()
        return self._decoder[1]

    def _key(self, until: Until | None) -> tuple:
        """What a decoder is made for: tokens after which rows stop, and filters."""
        stops = self.eos.union(() if until is None or callable(until) else until)
        return tuple(sorted(stops)), tuple(self.filters.items())

    def _behind(self, rows: list[int]) -> bool:
        """Whether a row waits for something else than what follows its last token."""
        lengths, flying = self.kv.lengths.numpy(), self._flying()
        if self.kv.states and self.kv.states.stale(lengths)[rows].any():
            return True
        return any(
            self._ready[row] is not None
            or len(self.tokens[row]) + (row in flying) != lengths[row] + 1
            for row in rows
        )

    def _flying(self) -> set[int]:
        """Rows with a token to come from steps that were launched."""
        return {row for flight in self._flights for row in flight.live_rows.tolist()}

    def _launch(
        self, decoder: Decoder, growing: list[int], start: list[int], most: np.ndarray, wait: bool
    ) -> None:
        """Launch a step of the rows that grow, and then read the one before; or this alone, where
        more cannot be known before. `wait`: read it as well, for who looks at rows."""
        flying = self._flying()
        rows = [
            row for row in growing
            if not self.finished[row]
            and len(self.tokens[row]) - start[row] + (row in flying) < most[row]
        ]  # fmt: skip
        rows = np.array(rows, np.int64)
        counts = np.zeros(self.rows, np.int32)
        counts[rows] = 1
        before = self._flights
        try:
            if len(rows) and not (before and self.kv.selects(counts)):
                # Rows that stop need no pages: that has to be known before there are too few.
                with suppress(*[PoolExhausted] if before else []), self._change(landed=False):
                    tokens = [-1 if row in flying else self.tokens[row][-1] for row in rows]
                    flight = decoder.launch(rows, np.array(tokens), self.seeds[rows])
                    # At once: what the device has done is not undone on the host.
                    self._commit(_flights=[*before, flight])
            if before:
                self._land()
            if wait and self._flights:
                self._land()
        except BaseException:
            self._land_all()
            raise

    def _land(self) -> None:
        """Read what the first step that was launched has drawn, and take rows that stopped from
        those launched after it."""
        with self._change(landed=False):
            flight, *after = self._flights
            finished = self.finished.copy()
            rows, tokens, logprobs = (x.tolist() for x in flight.read())
            drawn(tokens, [len(self.logprobs[row]) for row in rows], rows)
            for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                finished[row] = token in self.eos
            stopped = [
                row for row, token in zip(rows, tokens, strict=True) if token in flight.stops
            ]
            if stopped:
                for later in after:
                    self.kv.retract(later.of(stopped))
                after = [later.without(stopped) for later in after]
            self._commit(_flights=[x for x in after if x.live.any()], finished=finished)

    def _land_all(self) -> None:
        """Read what was launched. Where a row's logits are no distribution, its step and those
        after it are taken back."""
        while self._flights:
            if -1 not in self._flights[0].read()[1]:
                self._land()
                continue
            with self._change(landed=False):
                lengths = self.kv.lengths.numpy()
                for flight in self._flights:
                    lengths[flight.live_rows] -= 1
                self.kv.crop(lengths)
                self._commit(_flights=[])

    def _settle(self) -> None:
        """What was interrupted is undone, and what was launched is read."""
        self._recover()
        self._land_all()

    def sample(
        self,
        prompts: Iterable[Sequence[int] | Tensor],
        n: int | Sequence[int],
        *,
        max_new_tokens: int,
        rows: int = 64,
        until: Until | None = None,
        enough: Callable[[Sample], bool] | None = None,
        skip: Collection[tuple[int, int]] = (),
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        tokenizer: Any = None,
    ) -> Iterator[Sample]:
        """Draw any number of samples, some at a time, and hand each on as it finishes.

        Rows that finish give their places to samples still to come, for which prompts take turns,
        as many at a time as there are rows. A sample has the seed, and so the tokens, of the row
        that `prefill(prompts, n)` would give it, however many rows there are.

        Args:
            prompts: token ids of each, without padding.
            n: samples per prompt; one number, or one for each.
            max_new_tokens: of a sample.
            rows: that grow at a time. Besides, each prompt with samples still to begin is held.
            until: token ids that end a sample once drawn, or a callable on the tokens it has.
            enough: called with each finished sample; True ends all others of its prompt, which
                are not handed on.
            skip: (prompt, number) of samples that are not wanted, because they are there already.
            max_tokens, max_seconds: after so many tokens of all samples, or so long, those under
                way are handed on as they are, with `why` "budget", and no more begin.
            tokenizer: for the texts of samples.

        Returns:
            An iterator over `Sample`s in the order in which they finish. The rows are gone when it
            ends or is closed, as a loop that is left early does.

        Raises:
            TypeError: a prompt is no list of token ids.
            ValueError: there are rows, a prompt is empty or holds what is no token, or a number is
                out of range.
            RuntimeError: from the iterator, which then ends: others have changed the rows.
        """
        prompts = self._whole(prompts)
        if self.rows:
            raise ValueError("there are rows already: sample with Rollouts of its own")
        if np.ndim(n) and len(n) != len(prompts):
            raise ValueError(f"n has {len(n)} entries for {len(prompts)} prompts")
        least = dict(n=(n, 0), rows=(rows, 1), max_new_tokens=(max_new_tokens, 1))
        for name, (value, at_least) in least.items():
            values = np.asarray(value)
            if values.size and values.dtype.kind not in "iu":
                raise ValueError(f"{name}={value} must be a whole number")
            if values.min(initial=at_least) < at_least:
                raise ValueError(f"{name}={values.min()} must be at least {at_least}")
        return samples(
            self, prompts, n, rows, max_new_tokens, until, enough, skip, max_tokens, max_seconds,
            tokenizer,
        )  # fmt: skip

    def agreed(self, found: bool) -> bool:
        """What the first rank of the model has found, for what ranks might not find alike."""
        return bool(self._session.first(torch.tensor(found)))

    def new_seeds(self, count: int) -> np.ndarray:
        """Seeds [count] that no row of this run has or gets."""
        seeds = row_seeds(self._seed, count, self._seeded)
        self._seeded += count
        return seeds

    def append(
        self, tokens: Sequence[Sequence[int]], rows: Index | None = None, *, logprobs: bool = False
    ) -> None:
        """Give rows tokens that they did not sample: what a tool, a user or a judge says between
        their turns. Rows that had finished go on.

        They are a row's own as sampled ones are: they are quantised and evicted, and `crop` takes
        them back.

        Args:
            tokens: token ids for each of the rows; none leaves a row as it is.
            rows: which, once each; default all.
            logprobs: how likely the row held each of them, at its temperature, goes to `logprobs`.
                The model then sees them at once, but the last, and otherwise with the next step.

        Raises:
            IndexError: a number is not a row.
            TypeError: what a row is given is no list of token ids.
            ValueError: there is not one list for each row, a row is there twice, or the model has
                no such token.
        """
        self._settle()
        chosen = np.arange(self.rows) if rows is None else np.asarray(rows, np.int64)
        texts = [self._session.ids(x, f"tokens[{i}]") for i, x in enumerate(tokens)]
        distinct, order = self._distinct(chosen)
        if len(distinct) < len(chosen):
            raise ValueError("rows holds a row twice: each is given tokens once")
        if len(texts) != len(chosen):
            raise ValueError(f"tokens has {len(texts)} entries for {len(chosen)} rows")
        texts = [(int(chosen[i]), texts[i]) for i in np.argsort(chosen) if texts[i]]
        if not texts:
            return
        active = np.array([row for row, _ in texts])
        with self._change():
            ready, worth = list(self._ready), [[math.nan] * len(text) for _, text in texts]
            if logprobs:
                ready = self._fed(active, _Draw(active, seed_words(self.seeds[active])))
                before = [ready[row][0][ready[row][1]] for row in active]
            for row, text in texts:
                self.tokens[row] += text  # before they are encoded, which may look at texts
            if logprobs:
                new = [text for _, text in texts]
                temperature = self.filters["temperature"] or 1.0
                found, *_ = self._session.follow(active, new, before, temperature=temperature)
                worth = [x.tolist() for x in found]
            finished, given = self.finished.copy(), list(self.given)
            for (row, text), each in zip(texts, worth, strict=True):
                self.logprobs[row] += each
                end = len(self.tokens[row])
                given[row] = _spans(given[row], end - len(text), end)
                ready[row], finished[row] = None, False
            self._commit(_ready=ready, finished=finished, given=given)

    def fork(self, row: int, n: int) -> np.ndarray:
        """Add `n` copies of a row, with seeds of their own.

        Returns:
            Their numbers [n], which are the last.

        Raises:
            IndexError: there is no such row.
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        before = self.rows
        self.gather([*range(before), *[row] * n])
        return before + np.arange(n)

    def gather(self, index: Index) -> None:
        """Make the rows rows[index]: fork, prune, reorder, select, resample. See `KVCache.gather`.

        Copies of a row get seeds of their own but for the first, so that they diverge.
        """
        with self._change():
            self.kv.gather(index)
            index = [int(i) for i in index]
            if index:  # an iterator that is closed drops its rows, whenever that is
                self._session.note(index)
            seeds = self.seeds[index]
            copies = np.setdiff1d(np.arange(len(index)), np.unique(index, return_index=True)[1])
            seeds[copies] = row_seeds(self._seed, len(copies), self._seeded)
            self._commit(
                tokens=[list(self.tokens[i]) for i in index],
                logprobs=[list(self.logprobs[i]) for i in index],
                prompt_lengths=self.prompt_lengths[index],
                given=[self.given[i] for i in index],
                seeds=seeds,
                finished=self.finished[index],
                _ready=[self._ready[i] for i in index],
                _first=[self._first[i] for i in index],
                _seeded=self._seeded + len(copies),
            )

    def crop(self, lengths: Index) -> None:
        """Rewind each row to its own number of tokens, prompt included. See `KVCache.crop`."""
        self._settle()
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
        known = np.array([x is not None for x in self._first], bool)
        cut, at_prompt = lengths < present, (lengths == self.prompt_lengths) & known
        # The last token is fed again, for its logits; those of a prompt are still at hand.
        fed = np.where(at_prompt, lengths, lengths - 1)
        with self._change():
            self.kv.crop(np.minimum(np.where(cut, fed, present), self.kv.lengths.numpy()))
            self._session.note(lengths.tolist())
            tokens, logprobs, ready = list(self.tokens), list(self.logprobs), list(self._ready)
            given = list(self.given)
            for row in np.flatnonzero(cut):
                length = int(lengths[row])
                tokens[row] = tokens[row][:length]
                logprobs[row] = logprobs[row][: length - int(self.prompt_lengths[row])]
                given[row] = tuple((a, min(b, length)) for a, b in given[row] if a < length)
                ready[row] = (self._first[row][None], 0) if at_prompt[row] else None
            self._commit(
                tokens=tokens, logprobs=logprobs, finished=self.finished & ~cut, given=given,
                _ready=ready,
            )  # fmt: skip

    def peek(self, tokens: Sequence[int], rows: Index) -> Tensor:
        """Logits that would follow `tokens` after rows; all rows stay as they are, bit by bit.

        It costs a forward over `tokens`, and the last token of each row where that was not fed yet.

        Args:
            tokens: token ids, at least one.
            rows: in any order, repeats allowed.

        Returns:
            Logits [len(rows), v], in the order of `rows`.

        Raises:
            ValueError: `tokens` is empty.
            IndexError: a number is not a row.
        """
        if not len(tokens):
            raise ValueError("tokens is empty: peek needs at least one")
        distinct, order = self._distinct(rows)
        if not len(distinct):
            raise ValueError("rows is empty: peek needs at least one")
        with self._change() as change:
            logits = self._session.whole(self._extend(distinct, tokens))
            change.undo()
            self._commit()
        return logits[torch.from_numpy(order).to(logits.device)]

    @contextmanager
    def _change(self, landed: bool = True) -> Iterator[Transaction]:
        """What happens inside is undone unless it is committed: at once, or where an interrupt hits
        just that, when the next change begins. Steps that were launched are read before."""
        self._recover()
        if landed:
            self._land_all()
        state = {name: vars(self)[name] for name in STATE}
        transaction = self.kv.transaction()
        self._before = before = transaction, state, [len(tokens) for tokens in self.tokens]
        try:
            yield transaction
        except BaseException:
            if self._before is before:  # an interrupt may have left this to be closed much later
                self._recover()
            raise

    def _commit(self, **changed: Any) -> None:
        vars(self).update(changed, _before=None)  # one call: no interrupt comes between

    def _recover(self) -> None:
        if self._before is None:
            return
        transaction, state, lengths = self._before
        transaction.undo()
        # Of what a call changes, these lists alone are written in place.
        rows = zip(
            state["tokens"], state["logprobs"], state["prompt_lengths"], lengths, strict=True
        )
        for tokens, logprobs, prompt, length in rows:
            del tokens[length:], logprobs[length - prompt :]
        vars(self).update(state)
        self._before = None

    def _whole(self, prompts: Iterable[Sequence[int] | Tensor]) -> list[list[int]]:
        ids = [self._session.ids(x, f"prompts[{i}]") for i, x in enumerate(prompts)]
        if not all(ids):
            raise ValueError("prompts holds an empty prompt: each needs at least one token")
        return ids

    def _distinct(self, rows: Index) -> tuple[np.ndarray, np.ndarray]:
        """The rows, ascending and once each, and where each of `rows` is among them."""
        distinct, order = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        for row in distinct[(distinct < 0) | (distinct >= self.rows)]:
            raise IndexError(f"rows holds {row}; there are rows 0 to {self.rows - 1}")
        return distinct, order

    def _fed(self, active: np.ndarray, draw: "_Draw") -> list[tuple[Tensor, int] | None]:
        """`_ready` once the model has seen all of rows `active`; brings `draw` to the device."""
        ready = list(self._ready)
        unfed = np.array([row for row in active if ready[row] is None], np.int64)
        if not len(unfed):
            on_device(self.device, draw)
            return ready
        logits = self._extend(unfed, (), draw)
        for i, row in enumerate(unfed):
            ready[row] = logits, i
        return ready

    def _extend(self, rows: np.ndarray, tokens: Sequence[int], *more: Any) -> Tensor:
        """Run what the model has not seen of `rows`, and then `tokens`: logits [len(rows), v]."""
        lengths = self.kv.lengths.numpy()
        new = [[*self.tokens[row][lengths[row] :], *tokens] for row in rows]
        counts = np.zeros(self.rows, np.int32)
        counts[rows] = [len(some) for some in new]
        flat = np.array([token for some in new for token in some])
        return self._session.extend(flat, counts, *more)

    def _pauses(self, new: list[int], until: Until | None) -> bool:
        if until is None:
            return False
        return bool(until(new)) if callable(until) else new[-1] in until


def _whole_number(name: str, x: Any) -> int:
    if not is_int(x):
        raise TypeError(f"{name}={x!r}: expected a whole number")
    return int(x)


@dataclass
class _Draw:
    """What a draw needs of its rows: arrays, which `on_device` brings there."""

    position_t: Any  # of the token that is drawn
    seed_t: Any


def _spans(spans: tuple[tuple[int, int], ...], begin: int, end: int) -> tuple[tuple[int, int], ...]:
    """With one more behind them."""
    if spans and spans[-1][1] == begin:
        *spans, (begin, _) = spans
    return (*spans, (begin, end))


def _logits(ready: list[tuple[Tensor, int]]) -> Tensor:
    """One row of logits for each; the tensor itself where it is those rows in order, and a
    processor may write to it."""
    tensor = ready[0][0]
    same = all(x is tensor for x, _ in ready)
    in_order = same and [i for _, i in ready] == list(range(len(tensor)))
    if in_order and tensor.is_inference() == torch.is_inference_mode_enabled():
        return tensor
    return torch.stack([x[i] for x, i in ready])
