"""The cache of a model: prompts once, rollouts as rows over them, everything in pages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import CacheConfig
from .ops.attention import limits, tree_attention
from .ops.evict import key_scores, select_victims
from .ops.quant import KVPages, append_kv, fitting
from .ops.upload import Room, at_once, on_device
from .policy import Candidates, Judge, Policy, policy_of
from .recent import Recent
from .store import Pass, Store
from .transaction import SIGNALS, Journal, Transaction, state_of

PROTECTED = 0.1  # share of a prompt budget kept at each end of the prompt (arXiv:2605.18053)

# Tokens of every row that pools grow for when captured steps need more: they are captured anew.
AHEAD = 64

Index = Tensor | np.ndarray | Sequence[int]


@contextmanager
def _storing() -> Iterator[None]:
    """Tensors that are made are no inference tensors: those could not be written outside of the
    inference mode that a caller is in now."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def _change(method: Callable) -> Callable:
    """A method that changes nothing if it raises."""

    @wraps(method)
    def change(self: "KVCache", *args: Index | int, **kwargs: int) -> Tensor | None:
        with _storing(), self.transaction():
            return method(self, *args, **kwargs)

    return change


@dataclass(frozen=True)
class _Prompt:
    length: int
    sinks: int  # first tokens, kept apart unquantised
    in_order: bool  # nothing was evicted in any layer
    switched: bool


class KVCache:
    """Keys and values of rows (rollouts) over shared prompts, for all layers of a model.

    Use it in two moves. `add_prompt`, then `fill` once per layer: a prompt is compressed and stored
    once for all its rows. `extend`, then `attend` once per layer: every row gets new tokens and
    attends to its path.

    Args:
        config: how keys and values are kept.
        layers: number of layers.
        device: where the pages live.
        pages: pages per pool, fixed; None lets the pools grow as needed. There is a pool for each
            distinct factor of `layer_budget`, and one for sinks.
        judge: how a policy ranks tokens, where this cache holds some of the heads alone.
        states: what rows hold besides keys and values; of it rows are gathered, steps with `room`
            are planned, a transaction takes it back, and its `tensors()` count as rows' memory.

    Rows are numbered 0..rows-1 in the order in which they were added; `gather` renumbers them.

    `add_prompt`, `extend`, `gather` and `crop` change nothing if they raise. What of the second
    move fails is for the caller to undo, who opens a `transaction` before the first.
    """

    def __init__(
        self,
        config: CacheConfig,
        layers: int,
        *,
        device: torch.device | str = "cpu",
        pages: int | None = None,
        judge: Judge = Policy.rank,
        states: Any = None,
    ) -> None:
        self.config, self.layers, self.device = config, layers, torch.device(device)
        self.states = states
        self._judge = judge
        factors = config.factors(layers)
        self._journal = Journal()
        stores = {
            factor: Store(config, factor, pages, self._journal, self.device, judge)
            for factor in set(factors)
        }
        self.stores = list(stores.values())
        self._store = [stores[factor] for factor in factors]
        self._sinks = None
        if config.sinks and not config.exact:
            plain = CacheConfig(page_size=config.sinks, impl=config.impl)
            self._sinks = Store(plain, 1.0, pages, self._journal, self.device, judge)
        self._prompts: list[_Prompt] = []
        self._prompt = np.zeros(0, np.int64)  # by row
        self._recent = None
        if config.recent_formats is not None:
            self._recent = Recent(config.recent, *config.recent_formats, self.device, self._journal)
        self._frame: dict[int, Tensor] = {}  # [prompts, 2, heads, D] by layer, see `_add_frames`
        self._seen = np.zeros(0, np.int32)
        self._prompt_lengths = np.zeros(0, np.int32)
        self.positions: Tensor | None = None  # [t] of the step's tokens, -1 for those skipped
        self._passes: dict[Store, list[Pass]] = {}
        self._filling: _Filling | None = None

    @property
    def rows(self) -> int:
        return len(self._seen)

    @property
    def lengths(self) -> Tensor:
        """[rows] tokens each row has seen, evicted ones too; int32, on the CPU."""
        return torch.from_numpy(self._seen.copy())

    @property
    def prompt_lengths(self) -> np.ndarray:
        """[rows] tokens of each row that are its prompt's."""
        return self._prompt_lengths.astype(np.int64)

    @property
    def switched(self) -> np.ndarray:
        """[rows] what `add_prompt` was told of each row's prompt."""
        return np.array([prompt.switched for prompt in self._prompts], bool)[self._prompt]

    def transaction(self) -> Transaction:
        """Open a transaction, which undoes what comes next: prompts that are added and filled,
        `extend` with its `attend`s, `gather`, `crop`. Only the last of them may drop rows, or
        tokens of rows: their pages could be written to.

        In a `with` block it is undone if the block raises, and kept otherwise. By hand: `undo()`,
        at any time before the next change; a transaction that is dropped is kept. Rows are then
        what they were, bit by bit. While one is open a layer that evicts holds a copy of what it
        overwrites, importance and history included.
        """
        states = [state_of(self)]
        for store in filter(None, [*self.stores, self._sinks]):
            states.append(state_of(store, _plan=None, _plan_key=None, _in_table=None))
        states += [state_of(x) for x in (self._recent, self.states) if x]
        return Transaction(self._journal, states)

    @_change
    def add_prompt(
        self,
        length: int | Sequence[int],
        copies: int | Sequence[int] = 1,
        switched: bool = False,
    ) -> None:
        """Add `copies` rows over a new prompt of `length` tokens, or over each of several; `fill`
        must follow for every layer. `switched` is a mark that their rows keep, for who stores keys
        of two kinds.

        Raises:
            ValueError: `length` or `copies` is not positive.
            PoolExhausted: a fixed pool has too few pages. Nothing has changed.
        """
        lengths = np.atleast_1d(np.asarray(length, np.int64))
        copies = np.broadcast_to(np.asarray(copies, np.int64), len(lengths))
        if lengths.min() < 1:
            raise ValueError(f"length={lengths.min()}: a prompt needs at least one token")
        if copies.min() < 1:
            raise ValueError(f"copies={copies.min()}: a prompt needs at least one row")
        sinks = np.minimum(self.config.sinks if self._sinks else 0, lengths)
        kept = {store: np.array([store.kept(n) for n in lengths.tolist()]) - sinks
                for store in self.stores}  # fmt: skip
        wanted = {**kept, **({self._sinks: sinks} if self._sinks else {})}
        for store, slots in wanted.items():
            store.reserve(int((-(-slots // store.config.page_size)).sum()))
        filling = _Filling(len(self._prompts), lengths, sinks, kept)
        slots = []
        for store, n in wanted.items():
            base = sinks if store is not self._sinks else np.zeros_like(sinks)
            each = zip(n.tolist(), base.tolist(), copies.tolist(), strict=True)
            slots.append(np.concatenate([store.insert(*prompt) for prompt in each]))
        filling.slot = np.concatenate(slots)
        if self._recent:
            start, filling.ring = self._recent.add(lengths, sinks, copies)
            filling.tail = filling.tokens(start, lengths)
            filling.row = np.repeat(np.arange(len(lengths)), copies)
        on_device(self.device, filling)
        filling.slots = dict(zip(wanted, filling.slot.split([len(x) for x in slots]), strict=True))
        self._filling = filling
        in_order = np.all([n + sinks == lengths for n in kept.values()], axis=0)
        self._prompts = self._prompts + [
            _Prompt(*prompt, switched)
            for prompt in zip(lengths.tolist(), sinks.tolist(), in_order.tolist(), strict=True)
        ]
        number = np.arange(filling.first, len(self._prompts))
        self._prompt = np.concatenate([self._prompt, np.repeat(number, copies)])
        each = np.repeat(lengths, copies).astype(np.int32)
        self._seen = np.concatenate([self._seen, each])
        self._prompt_lengths = np.concatenate([self._prompt_lengths, each])

    @_storing()
    def fill(
        self,
        layer: int,
        q_hld: Tensor,
        k_hld: Tensor,
        v_hld: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sliding: int = 0,
        sink_h: Tensor | None = None,
    ) -> None:
        """Store the last added prompt's keys and values of one layer, compressed as configured.

        Args:
            layer: index of the layer.
            q_hld: queries of the prompt after RoPE; they judge which tokens are worth keeping.
            k_hld, v_hld: keys after RoPE, and values. Of several prompts that were added together,
                one after another.
            scale, softcap, sliding, sink_h: as for `tree_attention`.
        """
        store, filling = self._store[layer], self._filling
        heads, length, d = k_hld.shape
        expected = 0 if filling is None else filling.length
        if length != expected:
            raise ValueError(f"k_hld has {length} tokens, the prompt was announced with {expected}")
        for each in filter(None, (store, self._sinks)):
            each.heads = heads, q_hld.shape[0] // heads
            each.limits = limits(self.device, *each.heads, self.config.impl)
            each.pages_of(layer, heads, d, k_hld.dtype)
        if self.config.k_format != "none":
            self._add_frames(layer, q_hld, k_hld, softcap, sink_h)
        if self._sinks:
            self._write(layer, self._sinks, k_hld, v_hld, filling.sinks)
        if self._recent:
            prompt = filling.prompt[filling.tail]
            append = partial(self._append, layer, prompt=prompt)
            tail = (x[:, filling.tail] for x in (k_hld, v_hld))
            self._recent.fill(layer, *tail, filling.ring, filling.row, append)
        kept = filling.kept[store]
        parts = list(zip(kept, filling.parts, strict=True))
        if all(n == end - begin - sinks for n, (begin, end, sinks) in parts):
            self._write(layer, store, k_hld, v_hld, filling.rest)
            return
        how = dict(scale=scale, softcap=softcap, sliding=sliding, sink_h=sink_h)
        index = [
            begin
            + self._worth(
                layer, part, *(x[:, begin:end] for x in (q_hld, k_hld, v_hld)), sinks, n, **how
            )
            for part, (n, (begin, end, sinks)) in enumerate(parts)
        ]
        self._write(layer, store, k_hld, v_hld, torch.cat(index, 1))

    def _worth(
        self,
        layer: int,
        part: int,
        q_hld: Tensor,
        k_hld: Tensor,
        v_hld: Tensor,
        sinks: int,
        kept: int,
        **how: Any,
    ) -> Tensor:
        """Which `kept` tokens [heads, kept] of a prompt each head keeps behind its sinks."""
        config, policy = self.config, policy_of(self.config.policy)
        heads, length, _ = k_hld.shape
        position = torch.arange(length, device=k_hld.device, dtype=torch.int32)
        candidates = position[sinks:].expand(1, heads, -1)
        if kept == length - sinks:
            return candidates[0].long()
        mass = k_hld.new_zeros(1, heads, length, dtype=torch.float32)
        low = torch.zeros_like(mass, dtype=torch.int32)
        if policy.observe:
            queries = {"all": length, "last": 1, "window": min(config.window, length)}[
                policy.observe
            ]
            mass, low = key_scores(
                q_hld[None, :, -queries:], k_hld[None], sinks=sinks, group=config.group,
                impl=config.impl, **how,
            )  # fmt: skip
        mass, low = (x[:, :, sinks:] for x in (mass, low))
        now = candidates.new_full((1,), length)
        prompt = True, k_hld[None], v_hld[None], part
        score, tie = self._judge(
            policy, Candidates(candidates, mass, low, low, now, layer, *prompt)
        )
        edge = int(PROTECTED * (kept + sinks)) if policy.protect else 0
        recent = max(config.recent, edge) if policy.protect else 0
        victims = select_victims(
            score, candidates, length - sinks - kept, tie_nhs=tie,
            protect_below_n=now.new_full((1,), max(config.sinks, edge)),
            protect_from_n=now - recent, impl=config.impl,
        )  # fmt: skip
        keep = torch.ones_like(candidates, dtype=torch.bool).scatter_(2, victims.long(), False)
        return keep[0].nonzero()[:, 1].view(heads, kept) + sinks

    @_change
    def extend(
        self, counts: Index, *more: Any, room: Room | None = None, prompt: bool = False
    ) -> Tensor:
        """Give every row `counts` new tokens; `attend` must follow for every layer.

        Args:
            counts: [rows] new tokens per row, not negative.
            prompt: they are more of the prompts, of rows that have not grown yet: kept whole, and
                read once for all copies of a row.
            more: records whose arrays are brought to the device with all that this step needs.
            room: where to, for at most one token per row: then `begin` must follow, and what of a
                step runs from there on can be captured and replayed.

        Returns:
            Their true positions [sum(counts)], row by row, int32; with `room`, as many as it has
            room for, -1 where there is no token.

        Raises:
            PoolExhausted: a fixed pool has too few pages. Nothing has changed.
        """
        counts = _to_numpy(counts, "counts", self.rows)
        if len(counts) and counts.min() < 0:
            raise ValueError(f"counts must not be negative, got {counts.min()}")
        grown = (counts > 0) & (self._seen > self._prompt_lengths)
        if prompt and grown.any():
            raise ValueError(f"prompt: row {np.argmax(grown)} has grown beyond its prompt")
        for store in self.stores:
            needed = store.pages_needed(counts, prompt)
            store.reserve(needed, store.pages_needed(counts * AHEAD) if room else 0)
        ahead = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        position = np.repeat(self._seen, counts) + ahead
        self._seen = self._seen + counts
        if prompt:
            self._prompt_lengths = np.where(counts > 0, self._seen, self._prompt_lengths)
        version = counts.tobytes(), self._sinks and self._sinks.forest.version
        self._passes, self._filling = {}, None
        for store in self.stores:
            beside = partial(self._beside, store, counts)
            self._passes[store] = store.passes(
                counts, position, beside, version, whole=room is not None, prompt=prompt
            )
        self._step = self._recent.step(counts, position) if self._recent else None
        if self.states and room:
            more = *more, self.states.step(np.flatnonzero(counts))
        self._tokens = _Tokens(position, np.repeat(self._prompt, counts))
        passes = [x for each in self._passes.values() for x in each]
        plans = [x.arrays for x in passes if x.arrays is not None]
        parts = [self._tokens, *filter(None, [self._step]), *passes, *more]
        if counts.max(initial=0) > 1:  # the plan is kept, and the rest is large
            on_device(self.device, *plans)
            plans = []
        on_device(self.device, *parts, *plans, room=room)
        on_device(self.device, *(x.select for x in passes if x.select is not None))
        for store, (first, *_) in self._passes.items():
            if first.cursor_t is not None:
                store.renew(first, store.layers)
        self.positions = self._tokens.position_t
        if room is None:
            self.begin()
        return self.positions

    def begin(self, skip_t: Tensor | None = None) -> None:
        """Let the layers attend in the step that `extend` has prepared; nothing is stored of the
        tokens that are skipped [t], and they see nothing."""
        tokens, step = self._tokens, self._step
        self.positions = tokens.position_t
        if skip_t is not None:
            self.positions = torch.where(skip_t, -1, tokens.position_t)
        named = dict(position_t=self.positions, frame_t=tokens.frame_t)
        if step:
            self._recent.begin(step, self.positions, skip_t)
            named |= dict(before_t=step.before_t, also_t=step.write_t)
        for store, passes in self._passes.items():
            store.begin(passes, skip_t, **named)

    def selects(self, counts: np.ndarray) -> bool:
        """Whether rows would choose new victims for so many tokens, at most one each."""
        return any(store.selects(counts > 0) for store in self.stores)

    def kinds(self, counts: np.ndarray) -> tuple[bool, ...]:
        """What tells steps apart that are made of other operations: whether each store evicts."""
        return tuple(bool(store.full(counts > 0).any()) for store in self.stores)

    def addresses(self) -> list[tuple[int, torch.Size]]:
        """And shapes of all that a step reads or writes besides what it makes."""
        stores = [*self.stores, *filter(None, [self._sinks, self._recent])]
        found = [*self._frame.values(), *(x for each in stores for x in each.lasting())]
        for each in stores:
            for pages in each.layers.values():
                found += (x for x in pages.tensors() if x is not None)
        if self.states:
            found += self.states.lasting()
        return [(x.data_ptr(), x.shape) for x in found]

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """What is written here is not put back by a transaction that is open."""
        with self._journal.closed():
            yield

    @_change
    def retract(self, rows: np.ndarray) -> None:
        """Take back what the last step gave `rows`, whose tokens `begin` has skipped."""
        for store in self.stores:
            store.retract(rows)
        if self._recent:
            self._recent.retract(rows)
        if self.states:
            self.states.retract(rows)
        self._seen = self._seen.copy()
        self._seen[rows] -= 1

    def _beside(self, store: Store, counts: np.ndarray, active: np.ndarray) -> list[dict]:
        """Plans of what rows read besides the pages of `store`, for `active` of the new tokens."""
        plans = [self._sinks.forest.plan(active, **store.limits)] if self._sinks else []
        return plans + (self._recent.plans(counts, active, **store.limits) if self._recent else [])

    @_storing()
    def attend(
        self,
        layer: int,
        q_thd: Tensor,
        k_thd: Tensor,
        v_thd: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sliding: int = 0,
        sink_h: Tensor | None = None,
    ) -> Tensor:
        """Store the new tokens of one layer, and attend from each to its row.

        Args:
            layer: index of the layer.
            q_thd, k_thd, v_thd: of the tokens that `extend` announced, in its order, after RoPE.
            scale, softcap, sliding, sink_h: as for `tree_attention`.

        Returns:
            out_thd.
        """
        config, store = self.config, self._store[layer]
        pages = store.layers[layer]
        stores = [pages, *([self._sinks.layers[layer]] if self._sinks else [])]
        stores += self._recent.stores(layer, k_thd) if self._recent else []
        options = dict(
            scale=scale, softcap=softcap, sliding=sliding, sink_h=sink_h, group=config.group,
            window=config.window if pages.history is not None else 0, impl=config.impl,
        )  # fmt: skip
        passes = self._passes[store]
        self._journal.note(pages, SIGNALS)
        out_thd = torch.empty_like(q_thd) if len(passes) > 1 else None
        for step in passes:
            q, k, v = (step.of(x) for x in (q_thd, k_thd, v_thd))
            also, before_t = None, step.tokens.get("before_t")
            slot = store.slots(layer, step)
            step.forget(pages.importance)
            if self._recent:
                also = step.tokens["also_t"], stores[-1]
            position_t, frames = step.tokens["position_t"], {}
            if layer in self._frame:
                frames = dict(frame=self._frame[layer], frame_t=step.tokens["frame_t"])
            append_kv(k, v, slot, pages, position_t, also=also, impl=config.impl, **frames)
            out, _ = tree_attention(
                q, position_t, stores, step.ready, before_t=before_t, **frames, **options
            )
            if out_thd is not None:
                out_thd[step.token] = out
        if self._recent:
            self._recent.keep(layer, stores[-1])
        return out if out_thd is None else out_thd

    def attend_again(self, layer: int, q_thd: Tensor, **options: Any) -> Tensor:
        """Attend once more to what `attend` has stored in this step, for layers that share it.

        Args:
            layer: index of the layer that stored.
            q_thd: of the same tokens.
            options: scale, softcap, sliding and sink_h as for `attend`.

        The cache must be exact: what it evicts or keeps finer would be judged by one layer alone.
        """
        assert self.config.exact
        store = self._store[layer]
        (step,), pages = self._passes[store], store.layers[layer]
        options = dict(options, impl=self.config.impl)
        return tree_attention(q_thd, step.tokens["position_t"], pages, step.ready, **options)[0]

    @_change
    def gather(self, index: Index) -> None:
        """Make the rows rows[index]: fork, prune, reorder, select, resample.

        Without a `budget` nothing is copied. With one, a row that appears k times has its own
        tokens, at most `budget`, copied k - 1 times, because each row evicts on its own.

        Args:
            index: present row numbers, repeats allowed.

        Raises:
            IndexError: a number is not a row.
            PoolExhausted: a fixed pool has too few pages. Nothing has changed.
        """
        index = _to_numpy(index, "index").astype(np.int64)
        bad = index[(index < 0) | (index >= self.rows)]
        if len(bad):
            raise IndexError(f"index holds {bad[0]}; there are rows 0 to {self.rows - 1}")
        rows = index.astype(np.int32)
        for store in self.stores:
            if store.budget is not None:
                store.reserve(store.forest.gather_pages_needed(rows))
        for store in [*self.stores, *filter(None, [self._sinks])]:
            store.gather(rows)
        for part in filter(None, [self._recent, self.states]):
            part.gather(rows)
        known = len(self._prompts)
        alive, self._prompt = np.unique(self._prompt[index], return_inverse=True)
        self._prompts = [self._prompts[i] for i in alive]
        self._seen, self._prompt_lengths = self._seen[index], self._prompt_lengths[index]
        if len(alive) < known:
            (alive,) = at_once([alive], self.device)
            self._frame = {layer: frame[alive.long()] for layer, frame in self._frame.items()}

    @_change
    def crop(self, lengths: Index) -> None:
        """Rewind each row to its own length.

        Tokens evicted meanwhile do not come back, attention that the cropped tokens gave stays
        counted, and of recent tokens the finer copies that were overwritten are gone: those are
        read as the pages hold them.

        Args:
            lengths: [rows] tokens to keep per row, prompt included; at most the present lengths.

        Raises:
            ValueError: a length is out of range, or cuts into a prompt of which tokens were evicted
                or the sinks.
        """
        lengths = _to_numpy(lengths, "lengths", self.rows)
        prompts = [self._prompts[i] for i in self._prompt]
        for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            least = max(1, prompt.sinks) if prompt.in_order else prompt.length
            if not least <= length <= self._seen[row]:
                raise ValueError(
                    f"lengths[{row}]={length} is out of range: this row can be cropped to "
                    f"{least}..{self._seen[row]} tokens"
                )
        cut = lengths < self._seen
        for store in self.stores:
            # What a path lacks against the true length: the sinks, and what the prompt lost.
            own = np.maximum(lengths - [p.length for p in prompts], 0)
            kept = [min(store.kept(p.length), n) for p, n in zip(prompts, lengths, strict=True)]
            slots = np.array(kept, np.int64) - [p.sinks for p in prompts] + own
            store.crop(lengths, slots, cut)
        if self._recent:
            self._recent.crop(lengths)
        self._seen = lengths.astype(np.int32)
        self._prompt_lengths = np.minimum(self._prompt_lengths, self._seen)

    def memory(self) -> dict[str, int]:
        """Bytes held, over the storage of all tensors.

        Returns:
            `prefix`: keys, values and scales of prompts; `suffix`: those of rows, free slots, the
                finer copies of recent tokens and recurrent states included; `metadata`: positions,
                importance, history, victims, frames of keys and plans; `total`: their sum.
        """
        prefix = suffix = 0
        metadata = list(self._frame.values())
        for store in [*self.stores, *filter(None, [self._sinks])]:
            share = store.forest.prefix_pages() / max(store.forest.num_pages, 1)
            for pages in store.layers.values():
                content = _nbytes(pages.tensors()[:4])
                prefix += round(content * share)
                suffix += content - round(content * share)
                metadata += pages.tensors()[4:]
            metadata += store.tensors()
        if self._recent:
            for pages in self._recent.layers.values():
                suffix += _nbytes(pages.tensors()[:4])
            metadata += self._recent.tensors()
        if self.states:
            suffix += _nbytes(self.states.tensors())
        if self._filling:
            metadata.append(self._filling.position)  # in one with all that it has
        parts = {"prefix": prefix, "suffix": suffix, "metadata": _nbytes(metadata)}
        return parts | {"total": sum(parts.values())}

    def packed(self) -> dict[str, Tensor]:
        """All that it holds between two steps, for `unpack`: copies on the CPU, of pools the pages
        in use."""
        prompts = [(x.length, x.sinks, x.in_order, x.switched) for x in self._prompts]
        host = dict(prompt=self._prompt, seen=self._seen, prompt_lengths=self._prompt_lengths)
        parts = {name: torch.from_numpy(x.copy()) for name, x in host.items()}
        parts["prompts"] = torch.tensor(prompts, dtype=torch.int64).view(-1, 4)
        parts |= {f"frame.{layer}": x.cpu() for layer, x in self._frame.items()}
        for prefix, part in self._parts():
            parts |= {f"{prefix}.{name}": x for name, x in part.packed().items()}
        return parts

    @_storing()
    def unpack(self, parts: dict[str, Tensor]) -> None:
        """Hold what another cache of this configuration and as many layers had packed; it must be
        empty. Everything is copied: a file may be mapped, and be written over later.

        Raises:
            KeyError, ValueError: it is something else; the cache is of no use then.
        """
        assert not self.rows
        rows, known = len(parts["seen"]), len(parts["prompts"])
        self._prompts = [
            _Prompt(length, sinks, bool(in_order), bool(switched))
            for length, sinks, in_order, switched in parts["prompts"].tolist()
        ]
        prompt = fitting(parts, "prompt", (rows,), torch.int64).numpy().copy()
        if rows and not 0 <= prompt.min() <= prompt.max() < known:
            raise ValueError("rows have prompts that are not there")
        self._prompt = prompt
        self._seen = fitting(parts, "seen", (rows,), torch.int32).numpy().copy()
        self._prompt_lengths = fitting(parts, "prompt_lengths", (rows,), torch.int32).numpy().copy()
        for name, x in parts.items():
            if name.startswith("frame."):
                frame = fitting(parts, name, (known, *x.shape[1:]), x.dtype)
                self._frame[int(name.removeprefix("frame."))] = frame.to(self.device, copy=True)
        for prefix, part in self._parts():
            begin = f"{prefix}."
            part.unpack({
                name.removeprefix(begin): x for name, x in parts.items() if name.startswith(begin)
            })  # fmt: skip
            there = part.forest.num_rows if isinstance(part, Store) else len(part.start)
            if there != rows:
                raise ValueError(f"{prefix} has {there} rows, not {rows}")
            if isinstance(part, Store):
                part.limits = limits(self.device, *part.heads, self.config.impl)

    def _parts(self) -> list[tuple[str, Any]]:
        """What holds pages, by names that do not depend on the process."""
        stores = sorted(self.stores, key=lambda store: store.factor)
        parts = [(f"store{i}", store) for i, store in enumerate(stores)]
        parts += [("sinks", self._sinks)] if self._sinks else []
        return parts + ([("recent", self._recent)] if self._recent else [])

    def wide_bytes(self) -> int:
        """Bytes of `memory` that are in the model's own dtype, where that is wider than 16 bits."""
        stores = [*self.stores, *filter(None, [self._sinks, self._recent])]
        content = [x for s in stores for pages in s.layers.values() for x in (pages.k, pages.v)]
        wide = (torch.float32, torch.float64)
        return _nbytes(x for x in [*content, *self._frame.values()] if x.dtype in wide)

    def kept(self, layer: int, row: int) -> list[list[int]]:
        """True positions that each KV head of a layer still holds of a row, ascending; an empty
        list of a layer without attention."""
        store, prompt = self._store[layer], self._prompts[self._prompt[row]]
        if layer not in store.layers:
            return []
        pages = store.layers[layer]
        slots = torch.from_numpy(store.forest.row_slots(row).astype(np.int64)).to(pages.k.device)
        sinks = list(range(prompt.sinks))
        if pages.position is None:
            return [sinks + list(range(prompt.sinks, prompt.sinks + len(slots)))] * pages.k.shape[1]
        position = pages.position[slots // pages.page_size, :, slots % pages.page_size]
        seen = int(self._seen[row])
        return [sinks + sorted(p for p in head if p < seen) for head in position.T.tolist()]

    def _add_frames(
        self, layer: int, q_hld: Tensor, k_hld: Tensor, softcap: float, sink_h: Tensor | None
    ) -> None:
        """Choose how keys over each of the last prompts are stored, as (k - center) * gain.

        The center is the prompt's mean key, which softmax does not see once it is taken off all
        keys; zero where scores are compared with something else than each other: a soft cap, a sink
        logit. The gain, by which queries are divided, evens out what the error of a channel weighs:
        (E q² / E k²) ** 1/4, as in SmoothAttention (QServe, arXiv:2405.04532), but as a power of
        two, which rounds nothing.
        """
        frames = []
        dtype = torch.promote_types(k_hld.dtype, torch.float32)
        for begin, end, sinks in self._filling.parts:
            rest = k_hld[:, begin + sinks : end]
            center = rest.mean(1)
            if softcap or sink_h is not None or not rest.shape[1]:
                center = torch.zeros_like(k_hld[:, 0])
            q2 = q_hld[:, begin:end].to(dtype).square().mean(1)
            q2 = q2.unflatten(0, (len(k_hld), -1)).mean(1)
            k2 = (rest - center[:, None]).to(dtype).square().sum(1) / max(rest.shape[1], 1)
            octaves = torch.log2(q2 / k2) / 4
            octaves = torch.where((q2 > 0) & (k2 > 0), octaves, 0).round().clamp(-6, 6)
            frames.append(torch.stack([center, torch.exp2(octaves).to(center.dtype)]))
        new = torch.stack(frames)
        held = self._frame.get(layer, new[:0])
        # A filling that failed may have left this layer a prompt behind or ahead.
        held = held[: self._filling.first]
        missing = new.new_ones(self._filling.first - len(held), *new.shape[1:])
        self._frame[layer] = torch.cat([held, missing, new])

    def _append(
        self,
        layer: int,
        k_hld: Tensor,
        v_hld: Tensor,
        slot: Tensor,
        pages: KVPages,
        position: Tensor | None = None,
        *,
        prompt: Tensor,
    ) -> None:
        """Write tokens of prompts, whose numbers `prompt` has."""
        frames = {}
        if layer in self._frame:
            frames = dict(frame=self._frame[layer], frame_t=prompt)
        k_thd, v_thd = k_hld.transpose(0, 1), v_hld.transpose(0, 1)
        append_kv(k_thd, v_thd, slot, pages, position, impl=self.config.impl, **frames)

    def _write(
        self, layer: int, store: Store, k_hld: Tensor, v_hld: Tensor, index: slice | Tensor
    ) -> None:
        """Write tokens `index` of what `fill` got: [heads, kept], or for all heads alike."""
        pages, filling = store.layers[layer], self._filling
        slots, position = filling.slots[store], filling.position[index]
        if position.dim() == 1:
            k, v, prompt = k_hld[:, index], v_hld[:, index], filling.prompt[index]
            position = position.expand(k.shape[0], -1)
        else:
            wide = index[..., None].expand(-1, -1, k_hld.shape[-1])
            k, v, prompt = k_hld.gather(1, wide), v_hld.gather(1, wide), filling.prompt[index[0]]
        first = None if pages.position is None else position[0]
        self._append(layer, k, v, slots, pages, first, prompt=prompt)
        if pages.position is not None:  # heads keep different tokens
            slots = slots.long()
            pages.position[slots // pages.page_size, :, slots % pages.page_size] = position.T


class _Filling:
    """Prompts that were added together, whose tokens `fill` gets one after another; `on_device`
    brings the arrays there.

    Attributes:
        first: number of the first prompt.
        length: tokens of all.
        parts: of each its first token, its end, and how many are sinks.
        kept: of each the tokens that a store keeps besides the sinks.
        position: of each token.
        prompt: of each token, the number of its prompt.
        sinks, rest, tail: tokens that are sinks, that are not, and that are recent.
        slot: of all that is kept, store by store, and so are `slots`.
        ring: slots of recent tokens.
        row: of each new row, which of these prompts it has.
    """

    def __init__(
        self, first: int, lengths: np.ndarray, sinks: np.ndarray, kept: dict[Store, np.ndarray]
    ) -> None:
        self.first, self.length = first, int(lengths.sum())
        ends = lengths.cumsum()
        parts = (ends - lengths).tolist(), ends.tolist(), sinks.tolist()
        self.parts = list(zip(*parts, strict=True))
        self.kept = {store: n.tolist() for store, n in kept.items()}
        self.position = np.concatenate([np.arange(n) for n in lengths])
        self.prompt = first + np.repeat(np.arange(len(lengths)), lengths)
        self.sinks = self.tokens(np.zeros_like(sinks), sinks)
        self.rest = self.tokens(sinks, lengths)

    def tokens(self, begin: np.ndarray, end: np.ndarray) -> slice | np.ndarray:
        """Those at positions [begin, end) of each prompt; a slice where it can be one."""
        start = [part[0] for part in self.parts]
        index = np.concatenate(
            [np.arange(*x) for x in zip(start + begin, start + end, strict=True)]
        )
        if len(index) and index[-1] - index[0] < len(index):
            return slice(int(index[0]), int(index[-1]) + 1)
        return index


@dataclass
class _Tokens:
    """Of the new tokens of a step: arrays, which `on_device` brings there."""

    position_t: Any
    frame_t: Any


def _to_numpy(x: Index, name: str, length: int | None = None) -> np.ndarray:
    array = x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of integers, got {array.dtype} {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries; there are {length} rows")
    return array.astype(np.int32)


def _nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Of what holds them; tensors may share that, be it under storages of their own."""
    storages = (x.untyped_storage() for x in tensors if x is not None)
    total, last = 0, {}
    for begin, size, device in sorted((x.data_ptr(), x.nbytes(), str(x.device)) for x in storages):
        end = begin + size
        total += max(0, end - max(begin, last.get(device, 0)))
        last[device] = max(end, last.get(device, 0))
    return total
