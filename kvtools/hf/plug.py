"""What a model sees of kvtools during a forward: a cache, an attention and a mask function.

Nothing here belongs to the process. The configs of a model name our functions while a call of ours
runs, under the name of what they stand in for ("kvtools_sdpa"). Anything but our cache that comes
to them, such as a forward of another thread, is handed to that unchanged.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache import KVCache

if TYPE_CHECKING:
    from .door import Door

PREFIX = "kvtools_"
# Attributes in which transformers' own cache layers hold a state, whatever is in there.
HELD = tuple(vars(LinearAttentionLayer()))
OWN_MASKS = "it makes attention masks of its own"
# What a cache is called in arguments and outputs: "past_key_values" before transformers 5.24.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


class Unsupported(ValueError):
    """What a model does that kvtools cannot follow."""


@dataclass
class Forward:
    """One forward of ours.

    Attributes:
        door: of the model.
        kv: where keys and values go.
        filling: the prefill of prompts; afterwards rows attend to what is stored.
        past: tokens that the longest row had before; a tensor where it is no part of a graph.
        rows: of the store, that go in, or that prompts are filled for; none in a step ahead of the
            host, which may be captured.
        entry: which of the texts that go in each of them is.
        tokens: in a prefill, those of prompts among all that go in, row by row; None for all.
        padded: others go in with them, which a mask has to hide.
        given: in a loose door, layer of the last update, until an attention takes it.
        masks: by storage, each mask made in this forward and its window, or why it has none.
    """

    door: "Door"
    kv: KVCache
    filling: bool
    past: int | Tensor
    rows: np.ndarray
    entry: np.ndarray
    tokens: Tensor | None = None
    padded: bool = False
    given: int | None = None
    masks: dict[int, tuple[int | Unsupported, Any]] = field(default_factory=dict)


_here = threading.local()  # forward: what this thread runs


class _Handle:
    """What the cache returns for keys and values, which no model can read: the attention function
    takes it from there. Only in a loose door the cache returns the new tensors themselves."""

    __slots__ = ("forward", "layer", "k", "v", "taken")

    def __init__(self, forward: Forward, layer: int, k: Tensor, v: Tensor) -> None:
        self.forward, self.layer, self.k, self.v, self.taken = forward, layer, k, v, False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's and the compiler's own questions
            raise AttributeError(name)
        _touched(name)

    def __getitem__(self, index: Any) -> NoReturn:
        _touched("indexing")

    @classmethod
    def __torch_function__(cls, function: Callable, *args: Any, **kwargs: Any) -> NoReturn:
        _touched(getattr(function, "__name__", str(function)))


class Touched(Unsupported):
    """Keys and values are read between cache and attention."""


def _touched(how: str) -> NoReturn:
    raise Touched(
        f"it reads keys and values back from the cache ({how}), so they are latent (MLA) or "
        "changed after caching"
    )


class _Layer(CacheLayerMixin):
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, index: int, flow: "_Flow") -> None:
        super().__init__()
        self.index, self.flow, self.is_initialized = index, flow, False  # holds no tensors

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        forward = self.flow.forward
        if forward is None:
            _not_a_cache("update")
        if forward.door.loose:
            forward.given = self.index
            return key_states, value_states
        handle = _Handle(forward, self.index, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int | Tensor:
        if self.flow.forward is not None:
            return self.flow.forward.past
        return int(self.flow.kv.lengths.max()) if self.flow.kv.rows else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Masks are made for prefill only, and then over the prompt alone.
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # transformers before 5.20


class _Both(_Layer, LinearAttentionLayer):
    """Of a layer with attention and a state, which is kept as transformers does."""

    lazy_initialization = LinearAttentionLayer.lazy_initialization

    def __init__(self, index: int, flow: "_Flow", empty: LinearAttentionLayer) -> None:
        super().__init__(index, flow)
        vars(self).update(_held(vars(empty)))


def _held(attributes: dict[str, Any]) -> dict[str, Any]:
    """The state among the attributes of a layer, in dictionaries of its own."""
    return {name: copy.copy(attributes[name]) for name in HELD}


@dataclass
class _Flow:
    """What the layers of a cache share; they do not know the cache, so that nothing keeps it alive
    after its call."""

    kv: KVCache
    forward: Forward | None = None


def _not_a_cache(what: str) -> NoReturn:
    raise TypeError(
        f"kvtools' cache cannot be used outside of kvtools ({what}): it reports memory and what "
        "was kept; to go on from it, fork or rewind, use kvtools.Rollouts"
    )


class PagedCache(Cache):
    """A transformers cache over a `KVCache`; forwards of a `Session` alone fill it.

    Attributes:
        kv: the store.
        door: of the model.
        texts: tokens of each row, of a cache that `generate` has returned, from which it and
            `Rollouts` can go on. The last one was not fed yet.
        prompt_lengths: how many of them are its prompt.
        timing: seconds of prefill and decoding, decode steps, and tokens fed in them.
    """

    def __init__(self, kv: KVCache, door: "Door") -> None:
        self._flow = _Flow(kv)
        layers = [self._layer(i, door.recurrent.get(i)) for i in range(kv.layers)]
        super().__init__(layers=layers)
        self.kv, self.door = kv, door
        self.texts: list[list[int]] | None = None
        self.prompt_lengths: list[int] = []
        self.timing = {"prefill_s": 0.0, "decode_s": 0.0, "steps": 0, "tokens": 0}

    def _layer(self, index: int, empty: LinearAttentionLayer | None) -> Any:
        if empty is None:
            return _Layer(index, self._flow)
        if isinstance(empty, CacheLayerMixin):
            return _Both(index, self._flow, empty)
        return copy.deepcopy(empty)

    def memory(self) -> dict[str, int]:
        """Bytes held; see `KVCache.memory`."""
        return self.kv.memory()

    @contextmanager
    def states(self, forward: Forward) -> Iterator[None]:
        """For a forward, recurrent layers hold the states of its rows; these are replaced by what
        it has left there, unless it raises."""
        none = {i: vars(empty) for i, empty in forward.door.recurrent.items()}
        states, ahead = self.kv.states, not len(forward.rows)
        if forward.filling:
            begin = none
        elif ahead:
            begin = states.read()
        else:
            begin = states.take(forward.rows)
        try:
            self._hold(begin)
            yield
            left = {i: _held(vars(self.layers[i])) for i in begin}
            if ahead:
                states.write(left, self.kv.positions < 0)
            else:
                seen = self.kv.lengths.numpy()[forward.rows]
                states.put(forward.rows, forward.entry, seen, left)
        finally:
            self._hold(none)

    def _hold(self, layers: dict[int, dict[str, Any]]) -> None:
        for i, attributes in layers.items():
            vars(self.layers[i]).update(_held(attributes))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.gather(beam_idx)

    def gather(self, index: Any) -> None:
        """See `KVCache.gather`."""
        self.kv.gather(index)
        if self.texts is not None:
            self.texts = [list(self.texts[int(i)]) for i in index]
            self.prompt_lengths = [self.prompt_lengths[int(i)] for i in index]

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        _not_a_cache("crop")

    def reset(self, *args: Any, **kwargs: Any) -> NoReturn:
        _not_a_cache("reset")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        _not_a_cache("batch_repeat_interleave")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        _not_a_cache("batch_select_indices")

    def __deepcopy__(self, memo: dict) -> NoReturn:
        _not_a_cache("deepcopy")

    def __reduce__(self) -> NoReturn:
        _not_a_cache("pickle")


def attention_of(stock: str, module: torch.nn.Module) -> Callable:
    """The attention function that `module` runs under the name `stock`."""
    if stock != "eager":
        return ALL_ATTENTION_FUNCTIONS[stock]
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise Unsupported(f"no eager_attention_forward stands beside {type(module).__name__}")


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | _Handle,
    value: Tensor | _Handle,
    attention_mask: Any,
    *,
    stock: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention for all but the rows of our cache."""
    forward, layer, first = getattr(_here, "forward", None), None, True
    if isinstance(key, _Handle):
        if value is not key:
            _touched("keys and values are told apart")
        layer, first, key.taken = key.layer, not key.taken, True
        forward, key, value = key.forward, key.k, key.v
        if not first:
            forward.door.shared = True
    elif forward is not None and forward.door.loose:
        layer, forward.given = forward.given, None
        if layer is None:
            raise Unsupported("an attention takes keys and values that did not come from the cache")
    out = None
    if layer is None or forward.filling:
        if layer is not None and forward.padded and attention_mask is None:
            raise Unsupported("its attention sees padding: pass prompts one by one")
        own = attention_of(stock, module)
        out = own(module, query, key, value, attention_mask, **kwargs)
        if layer is None:
            return out
    # Layers that share, at the end of a prefill, may be run for its last token alone.
    if key.shape[2] != query.shape[2] and not (forward.filling and not first):
        _touched("other tokens")
    options = _options(stock, layer, forward, attention_mask, query, kwargs)
    q, k, v = query, key, value
    place = q.device.type
    autocast = place != "meta" and torch.is_autocast_enabled(place)
    if autocast:  # as products under it would take them
        q, k, v = (x.to(torch.get_autocast_dtype(place)) for x in (q, k, v))
    wide, d = max(k.shape[-1], v.shape[-1]), v.shape[-1]
    if d != wide or q.shape[-1] != wide or k.shape[-1] != wide:
        # Zeros change neither scores nor the part of the output that is returned.
        q, k, v = (torch.nn.functional.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    with torch.autocast(place, enabled=False) if autocast else nullcontext():
        if forward.filling:
            if first:
                q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
                if forward.tokens is not None:
                    q, k, v = (x[:, forward.tokens] for x in (q, k, v))
                forward.kv.fill(layer, q, k, v, **options)
            return out
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [rows, tokens, heads, D]
        attend = _OPERATOR if torch.compiler.is_compiling() else _attend_rows
        out_thd = attend(layer, first, *(x.flatten(0, 1) for x in (q, k, v)), **options)
    return out_thd.view(*q.shape[:3], wide)[..., :d], None


def _attend_rows(
    layer: int, first: bool, q_thd: Tensor, k_thd: Tensor, v_thd: Tensor, **options: Any
) -> Tensor:
    """Attention of new tokens in the forward that this thread runs. Of layers that share keys and
    values the first stores them."""
    kv = _here.forward.kv
    if first:
        return kv.attend(layer, q_thd, k_thd, v_thd, **options).contiguous()
    return kv.attend_again(layer, q_thd, **options).contiguous()


# What torch.compile sees of it: the cache behind it is no part of a graph, so that neither rows nor
# lengths are. A step must not be dropped, nor replayed without the host, which plans it. Layers
# need no order besides their own: each takes hidden states that come from those before it.
_LIBRARY = torch.library.Library("kvtools", "FRAGMENT")
_LIBRARY.define(
    "attend_rows(int layer, bool first, Tensor q_thd, Tensor k_thd, Tensor v_thd, *, float scale, "
    "int sliding, float softcap, Tensor? sink_h) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_LIBRARY.impl("attend_rows", _attend_rows, "CompositeExplicitAutograd")
_OPERATOR = torch.ops.kvtools.attend_rows.default
torch.fx.node.has_side_effect(_OPERATOR)


@torch.library.register_fake("kvtools::attend_rows", lib=_LIBRARY)
def _(layer: int, first: bool, q_thd: Tensor, *args: Any, **options: Any) -> Tensor:
    return q_thd.new_empty(q_thd.shape)


def _options(
    stock: str,
    layer: int,
    forward: Forward,
    mask: Any,
    query: Tensor,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """What the stock attention would do with its arguments, in the words of `KVCache.attend`."""
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.is_floating_point() and name != "s_aux":
            raise Unsupported(f"it gives attention a tensor {name!r}")
    if kwargs.get("dropout"):
        raise ValueError(
            "the model is in training mode with attention dropout: call model.eval() before"
        )
    scale = kwargs.get("scaling")
    options = dict(scale=query.shape[-1] ** -0.5 if scale is None else scale)
    options["sliding"] = forward.door.window(layer, forward, mask, kwargs.get("sliding_window"))
    # sdpa knows neither: 5.17 drops a soft cap in silence (so do we), 5.23 raises at prefill.
    known = stock != "sdpa"
    options["softcap"] = (kwargs.get("softcap") or 0.0) if known else 0.0
    options["sink_h"] = kwargs.get("s_aux") if known else None
    return options


def _mask(*args: Any, stock: str, **kwargs: Any) -> Any:
    """The stock mask; while rows attend there is none, because positions tell who sees whom."""
    forward = getattr(_here, "forward", None)
    make = ALL_MASK_ATTENTION_FUNCTIONS[stock]
    if forward is None:
        return make(*args, **kwargs)
    if not forward.filling:
        return None
    try:
        window = forward.door.mask_window(kwargs)
    except Unsupported as error:  # unless no layer of ours gets it
        window = error
    if window:  # a mask that is left out could not be told from one that shows all before
        for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
            kwargs[name] = False
    mask = make(*args, **kwargs)
    forward.masks[_identity(mask)] = window, mask
    return mask


def _identity(mask: Any) -> int:
    """The same for a mask and its views."""
    return mask.untyped_storage()._cdata if isinstance(mask, Tensor) else id(mask)


def window_of(forward: Forward, mask: Any) -> int:
    """Window of the mask that a layer got; 0 for none."""
    if mask is None:
        return 0
    window, _ = forward.masks.get(_identity(mask), (Unsupported(OWN_MASKS), None))
    if isinstance(window, Unsupported):
        raise window
    return window


_lock = threading.Lock()
_plugged: dict[int, tuple[Any, str, int]] = {}  # by id of a config: it, its stock name, how often


@contextmanager
def plugged(door: "Door") -> Iterator[None]:
    """Name our functions in the model's configs. May be nested and overlap with other threads': the
    last to leave puts the names back, so that a loop of forwards pays for it once."""
    with _lock:
        for config in door.configs:
            stock = config._attn_implementation.removeprefix(PREFIX)
            _, stock, uses = _plugged.get(id(config), (config, stock, 0))
            _plugged[id(config)] = config, stock, uses + 1
            # Not by set_attn_implementation, which walks over all modules.
            config._attn_implementation = _register(stock)
    try:
        yield
    finally:
        with _lock:
            for config in door.configs:
                _, stock, uses = _plugged.pop(id(config))
                if uses > 1:
                    _plugged[id(config)] = config, stock, uses - 1
                elif config._attn_implementation == PREFIX + stock:
                    config._attn_implementation = stock


def _register(stock: str) -> str:
    name = PREFIX + stock
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def attention(module, query, key, value, attention_mask=None, **kwargs):
            return _attend(module, query, key, value, attention_mask, stock=stock, **kwargs)

        def mask(*args, **kwargs):
            return _mask(*args, stock=stock, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    return name


@contextmanager
def running(cache: PagedCache, forward: Forward) -> Iterator[None]:
    """In this thread, forwards over `cache` are `forward`."""
    before = getattr(_here, "forward", None)
    _here.forward = cache._flow.forward = forward
    try:
        yield
    finally:
        _here.forward, cache._flow.forward = before, None
