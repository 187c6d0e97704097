"""A model over a cache of ours."""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import KVCache
from ..config import CacheConfig
from ..ops.sampling import sample
from ..ops.upload import on_device
from ..policy import Policy
from .door import Door, Unsupported, device_of, door_of, eager_of, inner, refusal
from .heads import Head, likelihood, split
from .parallel import Ranks, checksum, head_tokens, own_head
from .plug import CACHE, Forward, PagedCache, plugged, running
from .prefixes import alike, branches
from .probe import compare, output, whole
from .states import States

# Prompts share a forward. Padding costs what tokens cost, so at most this part of a row may be
# padding; and a forward needs no more memory than one of a prompt of so many tokens.
PADDING, TOKENS = 1 / 4, 8192
LOGITS = 1 << 24  # that are looked at together
AT_ONCE = 1024  # tokens of given texts in a forward; more take memory and are hardly faster
STRETCH = 32  # tokens with which prompts begin alike that are worth a node of their own


def check_model(model: Any, *, head: bool = True, probe: bool = True) -> Door:
    """Raise, naming the reason, if kvtools cannot run `model`.

    The first time, some tokens go through the first layers of every kind, by the model's own path
    and by ours, and are compared.

    Args:
        model: a decoder-only transformers model, or one whose text part is; wrappers of
            torch.compile and peft are looked through.
        head: it needs a language-model head.
        probe: False to believe in what its code says.

    Raises:
        TypeError: it is something else; the message says what to pass.
        Unsupported: a ValueError; the message says what it does that kvtools cannot follow.
    """
    door = door_of(model)
    if head and not hasattr(model, "generation_config"):
        raise TypeError(
            f"{type(model).__name__} has no language-model head: pass the whole model, not its "
            "decoder"
        )
    if probe and not door.probed:
        core, device = inner(model), device_of(model)

        def run(part: Any) -> Session:
            return Session.__new__(Session)._start(part, door, CacheConfig(), device)

        try:
            with whole(core):
                compare(core, door, run)
        except Unsupported as error:
            raise refusal(door.kind, error) from error.__cause__
    return door


def config_of(
    model: Any, cache: PagedCache | None, config: CacheConfig | None, names: tuple[str, str]
) -> CacheConfig:
    """How the rows are kept that a caller begins with, if any: those of `cache`. `names` are what
    they call that and `config`.

    Raises:
        TypeError: it is another kind of cache.
        ValueError: it is of another model or `config`, or its rows are not known.
    """
    name, own = names
    if cache is None:
        return CacheConfig() if config is None else config
    if not isinstance(cache, PagedCache):
        raise TypeError(
            f"{name} is a {type(cache).__name__}: pass one that kvtools.generate returned"
        )
    if cache.texts is None or len(cache.texts) != cache.kv.rows:
        raise ValueError(
            f"{name} does not know its texts: pass the one that generate returned with "
            "return_dict_in_generate=True; its gather renumbers rows, and Rollouts take them"
        )
    if cache.door is not door_of(model):
        raise ValueError(f"{name} was filled by another model, or by another attention of it")
    if config not in (None, cache.kv.config):
        raise ValueError(f"{own} differs from that of {name}: leave it out")
    return cache.kv.config


class Session:
    """A model over a `PagedCache`: prompts in, next-token logits out; then tokens in, logits out.

    Args:
        model: a decoder-only transformers model.
        config: how keys and values are kept.
        pages: pages per pool, fixed; None lets the pools grow.
        head: False to return final hidden states instead of logits.
        probe: see `check_model`.
        texts: tokens of a row, by its number; some models encode them again when a row outgrows
            their first rotary frequencies (longrope).
        compiled: what runs steps of one token per row instead of `model`.
        cache: one of an earlier session of this model, with its rows.
        parts: on several ranks logits may be those of this rank's tokens, which `sample` takes and
            `whole` makes whole.

    Of a model that torch.compile has been given, or a part of it, steps of one token per row run
    compiled; prompts, and steps of several tokens, do not. What cannot be compiled runs eagerly,
    with one RuntimeWarning that says why.
    """

    def __init__(
        self,
        model: Any,
        config: CacheConfig,
        *,
        pages: int | None = None,
        head: bool = True,
        probe: bool = True,
        texts: Callable[[int], Sequence[int]] | None = None,
        compiled: Callable | None = None,
        cache: PagedCache | None = None,
        parts: bool = False,
    ) -> None:
        if not isinstance(config, CacheConfig):
            raise TypeError(f"expected a kvtools.CacheConfig, got {config!r}")
        door = check_model(model, head=head, probe=probe)
        if door.shared and not config.exact:
            raise ValueError(
                f"{door.kind} shares keys and values between layers: kvtools runs it with an exact "
                "CacheConfig() only"
            )
        runner = model if head else model.base_model
        self._start(runner, door, config, device_of(model), pages, head, texts, compiled, cache)
        named = config.policy if isinstance(config.policy, str) else ""  # a function has no name
        self.agree("cache options", *(vars(config) | {"policy": named}).items(), pages, head)
        if head and door.ranks is not None:
            self._look_at_head(door.ranks, parts)

    def _start(
        self,
        runner: Any,
        door: Door,
        config: CacheConfig,
        device: torch.device,
        pages: int | None = None,
        head: bool = False,
        texts: Callable[[int], Sequence[int]] | None = None,
        compiled: Callable | None = None,
        cache: PagedCache | None = None,
    ) -> "Session":
        self._model, self.door, self.head, self._texts = runner, door, head, texts
        self._tokens: list[int] = []  # whose logits each rank makes; all make all where it is empty
        self._noted = 0
        self._config = config
        self._runner = eager_of(runner)
        self._decode = runner if compiled is None else compiled
        if self._decode is not self._runner and door.uncompiled:
            _warn(door.kind, door.uncompiled)
            self._decode = self._runner
        self.device = device
        if cache is None:
            judge = Policy.rank if door.ranks is None else door.ranks.judge
            states = States(device) if door.recurrent else None
            kv = KVCache(
                config, door.layers, device=device, pages=pages, judge=judge, states=states
            )
            cache = PagedCache(kv, door)
        self.cache, self.kv = cache, cache.kv
        return self

    @torch.no_grad()
    def _look_at_head(self, ranks: Ranks, parts: bool) -> None:
        core = inner(self._runner)
        if self.door.tokens is None:
            try:
                self.door.tokens = head_tokens(core, ranks)
            except Unsupported as error:
                raise refusal(self.door.kind, error) from None
        if parts and self.door.tokens and self._decode is self._runner is core:
            self._tokens = self.door.tokens
            self._runner = self._decode = own_head(core)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], copies: int | Sequence[int] = 1) -> list[Tensor]:
        """Run prompts through the model and add `copies` rows over each, in order.

        Prompts of similar lengths share a forward. Tokens with which prompts begin alike, at least
        `STRETCH`, are run once, stored once, and read once by all their rows; what follows reads
        them as they are stored. Prompts stay apart where the cache has a `prompt_budget`, which
        looks at a whole prompt, or where the model rotates tokens by the length of so long a text
        (longrope, dynamic rope) or counts positions itself.

        Args:
            prompts: token ids of each, at least one.
            copies: rows to add; one number, or one for each prompt.

        Returns:
            Of each prompt, logits after its last token [v]; or, without a head, hidden states of
            all its tokens [l, m].

        Raises:
            ValueError: a prompt is empty, or copies are not positive.

        If anything fails the cache is as it was.
        """
        begin = time.perf_counter()
        if not all(map(len, prompts)):
            raise ValueError("prompts holds an empty prompt: each needs at least one token")
        copies, lengths = np.broadcast_to(copies, len(prompts)), np.array([len(x) for x in prompts])
        apart = self._config.prompt_budget not in (None, 1.0) or self.door.stretches(lengths)
        with self.kv.transaction():
            fill = self._prefill if apart or len(prompts) < 2 or prompts[0].is_meta else self._grow
            out = fill(prompts, copies)
        self.cache.timing["prefill_s"] += time.perf_counter() - begin
        return [x[-1] for x in out] if self.head else out

    @torch.no_grad()
    def resume(self, prompts: Sequence[Tensor], copies: Sequence[int]) -> list[Tensor]:
        """As `prefill`, in place of all rows that there are: of a prompt, what begins as the text
        of one of them need not be run.

        Raises:
            ValueError: none of the prompts that are here begins like one of `prompts`, or that
                would have to be cut where tokens were evicted.

        If anything fails the cache is as it was.
        """
        begin, lengths, rows = time.perf_counter(), self.kv.lengths.numpy(), self.kv.rows
        held = [np.array(text[:n]) for text, n in zip(self.cache.texts, lengths, strict=True)]
        new, pick, keep = [x.cpu().numpy() for x in prompts], [], []
        for i, prompt in enumerate(new):
            common = np.array([alike(prompt, text) for text in held])
            best = int(common.argmax())
            if common[best] < min(len(prompt), self.kv.prompt_lengths[best]) or len(prompt) < 2:
                raise ValueError(
                    f"prompt {i} begins with none of those that the cache holds: leave out "
                    f"{CACHE}, or pass the cache of its own"
                )
            pick.append(best)
            keep.append(min(common[best], len(prompt) - 1))  # the last token is fed for its logits
        counts = np.concatenate(
            [np.zeros(rows), [len(x) - n for x, n in zip(new, keep, strict=True)]]
        )
        before, texts = self._texts, [*self.cache.texts, *(x.tolist() for x in new)]
        self._texts = texts.__getitem__
        try:
            with self.kv.transaction():
                self.kv.gather([*range(rows), *pick])
                self.kv.crop([*lengths, *keep])
                rest = np.concatenate([x[n:] for x, n in zip(new, keep, strict=True)])
                logits = self.extend(rest, counts)
                self.kv.gather(np.repeat(rows + np.arange(len(new)), copies))
        finally:
            self._texts = before
        self.cache.timing["prefill_s"] += time.perf_counter() - begin
        return list(logits)

    def _grow(self, prompts: Sequence[Tensor], copies: np.ndarray) -> list[Tensor]:
        """As `_prefill`, for prompts of which some begin alike."""
        texts = [x.cpu().numpy() for x in prompts]
        levels = branches(texts, max(STRETCH, self._config.sinks + 1))
        if all(len(x.prompts) == 1 for level in levels for x in level):
            return self._prefill(prompts, copies)
        roots, before = levels[0], self.kv.rows
        row = np.empty(len(prompts), np.int64)  # of each prompt
        row[np.concatenate([x.prompts for x in roots])] = before + np.arange(len(prompts))
        out = self._prefill(
            [prompts[x.prompts[0]][: x.end] for x in roots],
            np.array([len(x.prompts) for x in roots]),
        )
        parts: list[list[Tensor]] = [[] for _ in prompts]
        for level in levels:
            if level is not roots:
                first = sorted(level, key=lambda x: row[x.prompts[0]])
                out = self._branch(
                    [(row[x.prompts[0]], texts[x.prompts[0]][x.begin : x.end]) for x in first]
                )
                index = np.arange(self.kv.rows)
                for x in level:
                    index[row[x.prompts]] = row[x.prompts[0]]
                self.kv.gather(index)
                level = first
            for x, part in zip(level, out, strict=True):
                for i in x.prompts:
                    parts[i] = [part] if self.head else [*parts[i], part]
        self.kv.gather(np.concatenate([np.arange(before), np.repeat(row, copies)]))
        return [part[-1] if self.head else torch.cat(part) for part in parts]

    def _branch(self, texts: list[tuple[int, np.ndarray]]) -> list[Tensor]:
        """Give rows, ascending, more of their prompts, in forwards of `TOKENS` tokens at most: of
        each what `_fill` returns."""
        pieces = [
            (i, row, text[begin : begin + TOKENS])
            for i, (row, text) in enumerate(texts)
            for begin in range(0, len(text), TOKENS)
        ]
        out: list[list[Tensor]] = [[] for _ in texts]
        while pieces:
            long = np.array([len(text) for _, _, text in pieces])
            fits = long.cumsum() <= TOKENS
            if self.door.recurrent:
                fits &= (long == long[0]).cumprod().astype(bool)
            now = pieces[: max(1, int(fits.sum()))]
            pieces = pieces[len(now) :]
            counts = np.zeros(self.kv.rows, np.int32)
            counts[[row for _, row, _ in now]] = lengths = [len(text) for _, _, text in now]
            tokens = np.concatenate([text for _, _, text in now])
            x = self._step(tokens, counts, prompt=True, every=False)
            for (i, _, _), part in zip(
                now, x.split([1] * len(now) if self.head else lengths), strict=True
            ):
                out[i] = [part] if self.head else [*out[i], part]
        return [torch.cat(x) for x in out]

    def _prefill(
        self, prompts: Sequence[Tensor], copies: np.ndarray, switched: bool | None = None
    ) -> list[Tensor]:
        """Of each prompt what `_fill` returns. What is stored is rotated as past the switch, or as
        before it; None for what the length of a prompt says."""
        lengths, rows = np.array([len(x) for x in prompts], np.int64), self.kv.rows
        out, order = {}, []
        for batch in self._batches(lengths):
            side = self.door.past_switch(lengths[batch[0]]) if switched is None else switched
            filled = self._fill([prompts[i] for i in batch], copies[batch], bool(side))
            out.update(zip(batch, filled, strict=True))
            order += batch
        if order != sorted(order):
            parts = np.split(rows + np.arange(copies.sum()), np.cumsum(copies[order])[:-1])
            where = dict(zip(order, parts, strict=True))
            self.kv.gather(np.concatenate([np.arange(rows), *(where[i] for i in sorted(order))]))
        return [out[i] for i in range(len(prompts))]

    def _batches(self, lengths: np.ndarray) -> list[list[int]]:
        """Prompts that share a forward, the longest first."""
        batches: list[list[int]] = []
        for rows in self.door.groups(np.zeros_like(lengths), lengths):
            width, batch = 0, []
            for i in sorted(rows.tolist(), key=lambda i: -lengths[i]):
                least = (1 - PADDING) * width if self.door.masks else width
                if not batch or lengths[i] < least or width * (len(batch) + 1) > TOKENS:
                    width, batch = lengths[i], []
                    batches.append(batch)
                batch.append(i)
        return batches

    def _fill(self, prompts: list[Tensor], copies: np.ndarray, switched: bool) -> list[Tensor]:
        """Prefill in one forward: of each prompt its logits [1, v], or all hidden states [l, m].

        Padding goes to the left, as `generate` has it: so every row ends with its last token, after
        which alone logits are wanted, and where some models run their last layers alone.
        """
        lengths = [len(x) for x in prompts]
        # Perhaps some padding more, that is far enough to switch frequencies.
        width = max(lengths) + (switched and max(lengths) <= self.door.switch)
        ids = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in prompts])
        position = torch.arange(width, device=ids.device).expand(ids.shape)
        mask = tokens = None
        if sum(lengths) < ids.numel():
            position = position - width + torch.tensor(lengths, device=ids.device)[:, None]
            mask = position >= 0
            position = torch.where(mask, position, self.door.switch if switched else 0)
            ends = width * np.arange(1, len(lengths) + 1)
            tokens = np.concatenate(
                [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)]
            )
            tokens, mask = torch.from_numpy(tokens).to(ids.device), mask.long()
        self.kv.add_prompt(lengths, copies, switched)
        entry = np.repeat(np.arange(len(prompts)), copies)
        rows = np.arange(self.kv.rows - len(entry), self.kv.rows)
        forward = Forward(self.door, self.kv, True, 0, rows, entry, tokens, mask is not None)
        out = self._forward(ids, position, forward, mask=mask)
        return [x[-1:] if self.head else x[-n:] for x, n in zip(out, lengths, strict=True)]

    @torch.no_grad()
    def follow(
        self,
        rows: np.ndarray,
        texts: Sequence[Sequence[int]],
        before: Sequence[Tensor],
        *,
        temperature: float = 1.0,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Give rows texts but for the last token, which says nothing of those before, and tell how
        likely each token was where it stands.

        No more than about `LOGITS` logits are held at a time: their tokens go through the model
        alone, or, where it can be run without its head and its head by itself, with others.

        Args:
            rows: distinct, ascending.
            texts: tokens for each, perhaps none.
            before: logits [v] after what each row has.
            temperature: logits are divided by it.

        Returns:
            Of each row log-probabilities and entropies [n] of its tokens, in nats, fp32 (fp64 of
            logits that are), and whether each is the most likely one, bool.

        If anything fails the cache is as it was.
        """
        texts = [np.asarray(text, np.int64) for text in texts]
        vocabulary = sum(self._tokens) or (len(before[0]) if len(before) else 1)
        piece = max(1, LOGITS // max(vocabulary, 1))
        stats: list[list[Tensor]] = [[] for _ in texts]
        for some in np.array_split(np.arange(len(texts)), -(-len(texts) // piece) or 1):
            first = [i for i in some if len(texts[i])]
            if first:
                target = torch.tensor([texts[i][0] for i in first], device=self.device)
                logits = self.whole(torch.stack([before[i] for i in first]))
                seen = likelihood(logits, target, temperature)
                for i, x in zip(first, seen.split(1), strict=True):
                    stats[i].append(x)
        fed, ends = np.zeros(len(texts), np.int64), np.array([len(x) - 1 for x in texts])
        bare, head = self._split()
        with self.kv.transaction():
            most = piece if head is None else max(AT_ONCE, piece)
            while (live := np.flatnonzero(fed < ends)[:most]).size:
                width = np.minimum(max(1, most // len(live)), (ends - fed)[live])
                width = self.door.at_once(self.kv.lengths.numpy()[rows[live]], width)
                counts = np.zeros(self.kv.rows, np.int32)
                counts[rows[live]] = width
                spans = list(zip(live, fed[live], fed[live] + width, strict=True))
                x = bare.extend(
                    np.concatenate([texts[i][a:b] for i, a, b in spans]), counts, every=True
                )
                target = np.concatenate([texts[i][a + 1 : b + 1] for i, a, b in spans])
                target = torch.from_numpy(target).to(self.device)
                seen = None if head is None else head.likelihood(x, target, temperature)
                if seen is None:
                    pieces = [
                        likelihood(
                            self.whole(part if head is None else head(part)), each, temperature
                        )
                        for part, each in zip(x.split(piece), target.split(piece), strict=True)
                    ]
                    seen = torch.cat(pieces)
                for i, each in zip(live, seen.split(width.tolist()), strict=True):
                    stats[i].append(each)
                fed[live] += width
        nothing = torch.zeros(0, 3, dtype=self.float, device=self.device)
        out = [torch.cat(x) if x else nothing for x in stats]
        logprobs, entropies, best = ([x[:, i] for x in out] for i in range(3))
        return logprobs, entropies, [x > 0 for x in best]

    def _split(self) -> tuple["Session", Head | None]:
        """A session over the same cache of the model without its head, and that; itself and None
        where one cannot be run without the other."""
        body, head = split(self._runner, self.door, self.device)
        if head is None:
            return self, None
        bare = copy.copy(self)  # so that nothing has to be put back, whatever happens
        bare._runner, bare._decode, bare.head = body, body, False
        return bare, head

    @torch.no_grad()
    def extend(
        self,
        tokens: Tensor | np.ndarray,
        counts: np.ndarray | None = None,
        *more: Any,
        every: bool = False,
    ) -> Tensor:
        """Give the rows new tokens.

        Args:
            tokens: [rows] one token each; or, with `counts`, [sum(counts)] row by row. On the
                device, or an array, which is brought there with all that the step needs.
            counts: [rows] tokens per row, zero for rows that wait.
            more: records whose arrays are brought there, too; see `on_device`.
            every: return what follows every new token, not each row's last alone.

        Returns:
            Logits after the last new token of each row that got any [r, v], or after all new tokens
            [sum(counts), v]; without a head, hidden states of all new tokens [sum(counts), m].

        If anything fails the cache is as it was.
        """
        begin, before = time.perf_counter(), self.kv.lengths.numpy()
        counts = np.ones(self.kv.rows, np.int32) if counts is None else counts.astype(np.int32)
        if not counts.any():
            raise ValueError("counts gives no row a token")
        turned = self.door.turned(before + counts, counts, self.kv.switched)
        if self.kv.states is not None:
            turned |= (counts > 0) & self.kv.states.stale(before)
        groups = self.door.groups(before, np.where(turned, 0, counts))
        with self.kv.transaction():
            if len(groups) == 1 and not turned.any():
                out = self._step(tokens, counts, *more, every=every)
            else:
                record = _Tokens(tokens)
                on_device(self.device, record, *more)
                out = self._by_groups(record.tokens.long(), counts, groups, turned, every)
        timing = self.cache.timing
        timing["decode_s"] += time.perf_counter() - begin
        timing["steps"] += 1
        timing["tokens"] += len(tokens)
        return out

    def _by_groups(
        self, tokens: Tensor, counts: np.ndarray, groups: list[np.ndarray], turned: np.ndarray,
        every: bool,
    ) -> Tensor:  # fmt: skip
        """One forward for each group of rows; rows `turned` are encoded again before."""
        start, index = np.cumsum(counts) - counts, np.arange(len(counts))
        parts, places = [], []
        past = self.door.past_switch(self.kv.lengths.numpy() + counts)
        again = [np.flatnonzero(turned & (past == side)) for side in (False, True)]
        for rows in filter(len, [*again, *groups]):
            place = np.concatenate([np.arange(start[r], start[r] + counts[r]) for r in rows])
            new = tokens[torch.from_numpy(place).to(tokens.device)]
            if turned[rows[0]]:
                index[rows] = self.kv.rows + np.arange(len(rows))
                parts.append(self._again(rows, new, counts[rows], every))
            else:
                grow = np.zeros(self.kv.rows, np.int32)
                grow[rows] = counts[rows]
                parts.append(self._step(new, grow, every=every))
            places.append(rows if self.head and not every else place)
        if turned.any():  # at the end: what they were is not overwritten before all has gone well
            self.kv.gather(index)
        order = torch.from_numpy(np.argsort(np.concatenate(places))).to(tokens.device)
        return torch.cat(parts)[order]

    def _again(self, rows: np.ndarray, tokens: Tensor, counts: np.ndarray, every: bool) -> Tensor:
        """Encode `rows` and their new tokens, as new rows, with other rotary frequencies or because
        their states have seen more than they hold.

        Rows of one prompt share it again.
        """
        if self._texts is None:
            why = "that was rewound (recurrent layers)"
            if not self.door.recurrent:
                why = f"of over {self.door.switch} tokens (longrope)"
            raise Unsupported(
                f"{self.door.kind} encodes a text {why} again; this kind of session cannot"
            )
        total, lengths = self.kv.rows, self.kv.lengths.numpy()[rows]
        shared = np.minimum(self.kv.prompt_lengths[rows], lengths)
        texts = [list(self._texts(int(row)))[:n] for row, n in zip(rows, lengths, strict=True)]
        prompts: dict[tuple, list[int]] = {}
        for i, (text, n) in enumerate(zip(texts, shared, strict=True)):
            prompts.setdefault(tuple(text[:n]), []).append(i)
        switched = bool(self.door.past_switch(lengths[0] + counts[0]))
        self._prefill(
            [torch.tensor(prompt, device=tokens.device) for prompt in prompts],
            np.array([len(members) for members in prompts.values()]), switched,
        )  # fmt: skip
        order = np.array([i for members in prompts.values() for i in members])
        if (order != np.arange(len(rows))).any():
            self.kv.gather([*range(total), *(total + np.argsort(order))])
        own = [tokens.new_tensor(text[n:]) for text, n in zip(texts, shared, strict=True)]
        if self.door.recurrent:  # else tokens are rotated by the length of a forward: all at once
            self._regrow(total, own)
            own = [x[:0] for x in own]
        own = [torch.cat(x) for x in zip(own, tokens.split(counts.tolist()), strict=True)]
        grow = np.zeros(self.kv.rows, np.int32)
        grow[total:] = [len(x) for x in own]
        groups, still = self.door.groups(self.kv.lengths.numpy(), grow), np.zeros(len(grow), bool)
        out = self._by_groups(torch.cat(own), grow, groups, still, every)
        if self.head and not every:
            return out
        parts = out.split(grow[total:].tolist())
        return torch.cat([x[-n:] for x, n in zip(parts, counts, strict=True)])

    def _regrow(self, first: int, own: list[Tensor]) -> None:
        """Give rows from `first` on what they had beyond their prompts, in forwards of `TOKENS`
        tokens, of which no logits are held."""
        grow = np.zeros(self.kv.rows, np.int32)
        grow[first:] = [len(x) for x in own]
        for rows in self.door.groups(self.kv.lengths.numpy(), grow):
            width = max(1, TOKENS // max(1, len(rows)))
            for begin in range(0, grow[rows].max(initial=0), width):
                parts = [own[row - first][begin : begin + width] for row in rows]
                counts = np.zeros(self.kv.rows, np.int32)
                counts[rows] = len(parts[0])
                self._step(torch.cat(parts), counts, every=False)

    def decode(self, tokens: Tensor, skip_t: Tensor) -> Tensor:
        """Logits [t, v] after one token each of the rows that `kv.extend` has room for; nothing
        becomes of those that are skipped. For a model that takes positions."""
        self.kv.begin(skip_t)
        positions = self.kv.positions.clamp(min=0)[:, None].long()
        # A number would stay what it is where the step is captured.
        rows = np.zeros(0, np.int64)  # not known to what is captured
        forward = Forward(self.door, self.kv, False, positions.max(), rows, rows)
        return self._forward(tokens[:, None], positions, forward).flatten(0, 1)

    def ids(self, x: Any, name: str) -> list[int]:
        """Token ids as they came from a caller, who calls them `name`.

        Raises:
            TypeError: they are something else.
            ValueError: the model has no such token.
        """
        try:
            array = x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        except ValueError:  # ragged
            array = np.asarray(None)
        if array.ndim != 1:
            raise TypeError(f"{name}={x!r}: expected a list of token ids")
        if len(array) and array.dtype.kind not in "iu":
            raise TypeError(f"{name} holds something else than token ids")
        known = getattr(inner(self._model).get_input_embeddings(), "num_embeddings", None)
        for token in array[(array < 0) | (array >= (known or np.inf))]:
            raise ValueError(f"{name} holds {token}, which is no token of the model's {known}")
        return [int(token) for token in array.tolist()]

    @property
    def float(self) -> torch.dtype:
        """Of what is told of logits: fp32, or fp64 of a model that is."""
        return torch.promote_types(inner(self._model).dtype, torch.float32)

    def sample(
        self, logits_bv: Tensor, seed_b: Tensor, position_b: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `kvtools.sample`; ranks share out the rows, and all get all draws."""
        options["impl"], ranks = self.kv.config.impl, self.door.ranks
        if ranks is None:
            return sample(logits_bv, seed_b, position_b, **options)
        parts = self._tokens if logits_bv.shape[1] != sum(self._tokens) else []
        return ranks.draw(logits_bv, seed_b, position_b, parts, **options)

    def whole(self, logits_bv: Tensor) -> Tensor:
        """Logits of all tokens, where each rank has made those of its own."""
        if not self._tokens:
            return logits_bv
        return self.door.ranks.whole(logits_bv, self._tokens)

    def first(self, x: Tensor) -> Tensor:
        """`x`, and on several ranks that of the first, for what they might not find alike."""
        if self.door.ranks is None:
            return x
        return self.door.ranks.first(x.to(self.device)).to(x.device)

    def agree(self, what: str, *given: Any) -> None:
        """Raise RuntimeError, on all ranks, unless all have come here with the same."""
        if self.door.ranks is not None:
            self.door.ranks.agree(what, self.device, *given)

    def note(self, *given: Any) -> None:
        """What ranks have to do alike, and compare with the tokens that they run next."""
        if self.door.ranks is not None:
            self._noted = checksum(self._noted, *given)

    def modules(self) -> Iterator[torch.nn.Module]:
        """Of the model."""
        return inner(self._model).modules()

    def _step(
        self,
        tokens: Tensor | np.ndarray,
        counts: np.ndarray,
        *more: Any,
        prompt: bool = False,
        every: bool = True,
    ) -> Tensor:
        """One forward: what follows each new token; logits, unless `every`, after each row's last
        alone. `prompt`: see `KVCache.extend`."""
        rows, most = np.flatnonzero(counts), int(counts.max())
        if self.door.single and most > 1:
            on_device(self.device, *more)
            tokens, one = tokens.reshape(-1, most), counts.clip(max=1)
            steps: list[Tensor] = []
            for i in range(most):
                kept = steps if every or not self.head else []  # logits are large
                steps = [*kept, self._step(tokens[:, i], one, prompt=prompt)]
            return torch.stack(steps, 1).flatten(0, 1)
        past, live = int(self.kv.lengths.numpy()[rows].max()), len(rows)
        record = _Tokens(tokens)
        position_t = self.kv.extend(counts, record, *more, prompt=prompt)
        tokens, longest = record.tokens.long(), int(counts.max())
        # Ragged rows go in as one, without padding: attention alone tells rows apart.
        even = longest * live == len(tokens)
        width = longest if even else len(tokens)
        ids, positions = tokens.view(-1, width), position_t.view(-1, width)
        forward = Forward(self.door, self.kv, False, past, rows, np.arange(live))
        if not self.head or (every and longest > 1):
            return self._forward(ids, positions.long(), forward, 0).flatten(0, 1)
        shared = self.door.shared and longest > 1  # some run last layers for last tokens alone
        if even and not shared:
            return self._forward(ids, positions.long(), forward)[:, -1]
        ends = torch.from_numpy(counts[counts > 0].cumsum() - 1).to(ids.device)
        if shared:
            bare, head = self._split()
            x = bare._forward(ids, positions.long(), forward, 0).flatten(0, 1)[ends]
            return x if head is None else head(x)
        (out,) = self._forward(ids, positions.long(), forward, ends)
        return out if len(out) == len(ends) else out[ends]  # some keep all, whatever they are told

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        forward: Forward,
        keep: int | Tensor = 1,
        mask: Tensor | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {CACHE: self.cache, "use_cache": True}
        if self.door.positions:
            options["position_ids"] = positions
        if mask is not None:
            options["attention_mask"] = mask
        if self.head:
            options["logits_to_keep"] = keep  # 0 keeps all
        self.agree("tokens or rows", ids, positions, self._noted)
        self.door.renew()
        run = self._runner if forward.filling or ids.shape[1] > 1 else self._decode
        if run is not self._runner:  # one graph for any number of rows and tokens
            for x in (ids, positions):
                torch._dynamo.maybe_mark_dynamic(x, 0)
            forward.past = positions.max()
        states = self.cache.states(forward) if self.door.recurrent else nullcontext()
        with plugged(self.door), running(self.cache, forward), states:
            out = run(input_ids=ids, **options)
        return out.logits if self.head else output(out)


@dataclass
class _Tokens:
    tokens: Any


@cache
def _warn(kind: str, reason: str) -> None:
    """Say once that a compiled model runs eagerly."""
    warnings.warn(
        f"kvtools runs {kind} without torch.compile: {reason}", RuntimeWarning, stacklevel=5
    )
