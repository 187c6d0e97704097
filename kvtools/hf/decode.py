"""Decode steps without the host: a token per row is fed, sampled and judged on the device."""

import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.sampling import sample
from ..ops.upload import Room, seed_words, seeds_of
from .session import Session

Graph = Literal["auto", False]
_capturing = threading.Lock()  # of all threads one at a time may


def capturer(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What runs a step once and returns what repeats it; None where there are no graphs."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Of the model's device, not of the current one, whose stream would see nothing of it.
        with _capturing, torch.cuda.device(device):
            how = dict(pool=pool, stream=torch.cuda.Stream(device))
            with torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                run()
        graph.replay()
        return graph.replay

    return capture


def check_graph(graph: Graph) -> None:
    if graph not in ("auto", False):
        raise ValueError(f"graph={graph!r}: expected 'auto' or False")


def usable(session: Session, graph: Graph) -> bool:
    """Whether steps of `session` may run ahead of the host; a model that cannot is named, once."""
    check_graph(graph)
    door = session.door
    if not graph or door.uncaptured or capturer(session.device) is None:
        return False
    if door.ranks is not None:  # which look at tokens before they run them
        return False
    if door.ropes or door.dynamic or door.counted:
        what = "positions" if door.counted else "rotary frequencies"
        _refuse(session, f"its {what} depend on how long rows are, which the host has to look at")
    if door.uncaptured:
        return False
    if hooked := _hooked(session):
        _warn(door.kind)
    return not hooked


def _refuse(session: Session, why: str) -> None:
    session.door.uncaptured = True
    warnings.warn(
        f"{session.door.kind} is run step by step, not as a CUDA graph: {why}", stacklevel=2
    )


@dataclass
class Flight:
    """A step that was launched.

    Attributes:
        rows: [n] that it was launched for.
        live: [n] of those, the ones that had not stopped before.
        stops: see `Decoder`.
    """

    rows: np.ndarray
    live: np.ndarray
    stops: frozenset[int]
    _host: Tensor  # [2, n or more] tokens, and the bits of their log-probabilities
    _event: Any

    @property
    def live_rows(self) -> np.ndarray:
        return self.rows[self.live]

    def of(self, rows: Collection[int]) -> np.ndarray:
        """Those of `rows` that are live in it."""
        return self.live_rows[np.isin(self.live_rows, list(rows))]

    def without(self, rows: Collection[int]) -> "Flight":
        """It, of which `rows` have stopped before."""
        return replace(self, live=self.live & ~np.isin(self.rows, list(rows)))

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The live rows, their tokens and log-probabilities, as `sample` gives them; waits for the
        device."""
        if self._event is not None:
            self._event.synchronize()
        token, bits = self._host.numpy()[:, self.live]
        return self.live_rows, token, bits.view(np.float64)


@dataclass
class _Inputs:
    """Of a step's tokens: where each comes from, the place of one sampled before or -1 - id; and
    the seed of its row."""

    from_t: Any
    seed_t: Any


@dataclass
class _Step:
    """What steps of as many tokens have in common."""

    room: Room
    addresses: tuple = ()
    replay: Callable[[], None] | None = None


class Decoder:
    """Steps of one token per row, sampled on the device, of which the host reads when it likes.

    All that a step needs comes to fixed addresses in one copy. The second step of its kind is
    captured, and those that follow are replays, until something lies elsewhere: pools have grown,
    prompts were added, the model's parameters were replaced.

    Args:
        session: whose rows get tokens.
        filters: of `sample`.
        stops: tokens after which a row stands still, whatever it is launched with.
    """

    def __init__(
        self, session: Session, filters: dict[str, float], stops: Collection[int] = ()
    ) -> None:
        self.session, self._filters, self.stops = session, dict(filters), frozenset(stops)
        self._capture = capturer(session.device)
        with torch.inference_mode(False):
            self._stops = torch.tensor(sorted(stops), device=session.device, dtype=torch.int64)
        self._steps: dict[tuple, _Step] = {}
        self._model: tuple = ()
        self._state: tuple[Tensor, ...] = ()
        self._last: Flight | None = None

    def begin(self) -> None:
        """Look at the model before steps are launched: what changes meanwhile is not seen."""
        model, self._last = _fingerprint(self.session), None
        if model != self._model:
            self._steps, self._model = {}, model  # in this order: no step of another model stays

    def launch(self, rows: np.ndarray, tokens: np.ndarray, seeds: np.ndarray) -> Flight:
        """Feed each of `rows` a token and sample what follows it.

        Args:
            rows: [n] ascending.
            tokens: [n] ids, or -1 for the one that the step before has sampled for the row.
            seeds: [n] of the rows, int64.
        """
        kv, size = self.session.kv, _bucket(len(rows))
        before = np.zeros(0, np.int64) if self._last is None else self._last.rows
        place = np.where(tokens < 0, np.searchsorted(before, rows), -1 - tokens)
        counts = np.zeros(kv.rows, np.int32)
        counts[rows] = 1
        # What autocast keeps between calls, weights of another dtype, is not there for replays.
        modes = _modes(kv.device.type)
        autocast = torch.autocast(*modes, cache_enabled=False) if modes else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), autocast:
            if not self._state or len(self._state[0]) < size:
                self._grow(size)
            step = self._steps.setdefault((size, *kv.kinds(counts)), _Step(Room(size, kv.device)))
            inputs = _Inputs(place, seed_words(seeds))
            kv.extend(counts, inputs, room=step.room)
            self._run(step, lambda: self._body(inputs, size))
            self._last = self._flight(rows)
        return self._last

    def _grow(self, size: int) -> None:
        """Make room for what a step leaves to the next: tokens, whether rows stand still, and both
        with log-probabilities for the host."""
        token, stopped, out = (
            torch.zeros(*shape, dtype=dtype, device=self.session.device)
            for shape, dtype in (((size,), torch.int64), ((size,), torch.bool),
                                 ((2, size), torch.int64))
        )  # fmt: skip
        for new, old in zip((token, stopped), self._state, strict=False):
            new[: len(old)] = old
        self._state = token, stopped, out

    def _body(self, inputs: _Inputs, size: int) -> None:
        token, stopped, out = self._state
        kv, place = self.session.kv, inputs.from_t
        last = place.clamp(min=0).long()
        ids = torch.where(place < 0, -1 - place, token[last])
        skip_t = (kv.positions < 0) | ((place >= 0) & stopped[last])
        logits = self.session.decode(ids, skip_t)
        drawn, logprob, _ = sample(
            logits, seeds_of(inputs.seed_t), kv.positions.clamp(min=0) + 1,
            **self._filters, impl=kv.config.impl,
        )  # fmt: skip
        stopped[:size] = skip_t | (drawn[:, None] == self._stops).any(1)
        token[:size] = drawn.clamp(min=0)
        out[0, :size], out[1, :size] = drawn, logprob.double().view(torch.int64)

    def _run(self, step: _Step, body: Callable[[], None]) -> None:
        own = [(x.data_ptr(), len(x)) for x in self._state]
        addresses = *self.session.kv.addresses(), *own, step.room.made
        if step.addresses != addresses:
            # Kernels are compiled and libraries set up in a run that is not captured.
            step.replay = None
            body()
            step.addresses = addresses
        elif step.replay is not None:
            step.replay()
        elif self.session.door.uncaptured:
            body()
        else:
            try:
                with self.session.kv.unnoted():  # nothing runs before all is recorded
                    step.replay = self._capture(body)
            except (RuntimeError, NotImplementedError) as error:
                _refuse(self.session, f"a step cannot be captured ({error})")
                body()

    def _flight(self, rows: np.ndarray) -> Flight:
        out, live = self._state[2][:, : len(rows)], np.ones(len(rows), bool)
        if not out.is_cuda:
            return Flight(rows, live, self.stops, out.clone(), None)
        host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        host.copy_(out, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(out.device))
        return Flight(rows, live, self.stops, host, event)


def _bucket(rows: int) -> int:
    """Tokens of a step for so many rows: a power of two, from 64 on multiples of 64. Weights take
    as long to read for fewer."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def _fingerprint(session: Session) -> tuple:
    """What a captured step takes from the model and from torch, but for values of tensors."""
    own = vars(torch.nn.Module())
    found: list[Any] = [*_modes(session.device.type), torch.get_default_dtype()]
    found += [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()]
    for config in session.door.configs:
        found += _values(vars(config))
    for module in session.modules():
        found.append((id(module), module.training, *map(id, module._modules.values())))
        found += _values({name: x for name, x in vars(module).items() if name not in own})
        for tensors in (module._parameters, module._buffers):
            found += (None if x is None else _where(x) for x in tensors.values())
    return tuple(found)


def _values(attributes: dict[str, Any]) -> Iterator[Any]:
    """What tells attributes from others of the same names: numbers and the like by value, all else
    by identity, and what lists and dictionaries hold by either."""
    plain = bool, int, float, str, type(None), torch.dtype
    for name, x in attributes.items():
        items = [*x.keys(), *x.values()] if isinstance(x, dict) else x
        yield name
        for each in items if isinstance(x, (list, tuple, dict)) else [x]:
            yield each if isinstance(each, plain) else id(each)


def _where(x: Tensor) -> tuple:
    """Where a tensor lies, and how; of one that is made of others, these."""
    if is_traceable_wrapper_subclass(x):
        return tuple(_where(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _modes(device: str) -> tuple:
    """Arguments of the autocast that is in force, if one is."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return ()
    return device, torch.get_autocast_dtype(device), True


def _hooked(session: Session) -> bool:
    """Whether Python that is not the model's is called between its modules."""
    every = torch.nn.modules.module
    tables = [every._global_forward_hooks, every._global_forward_pre_hooks]
    for module in session.modules():
        tables += module._forward_hooks, module._forward_pre_hooks
    return any(
        not getattr(hook, "__module__", "").startswith("transformers.")  # by which it is asked
        for table in tables
        for hook in table.values()
    )


@cache
def _warn(kind: str) -> None:
    warnings.warn(
        f"{kind} is run step by step while it has forward hooks: a CUDA graph would not call them",
        stacklevel=4,
    )
