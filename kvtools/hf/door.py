"""Whether kvtools can run a model, decided by what its code does and not by lists of names.

What can be read off the model is read here; the rest is decided by masks that it makes (in its
first prefill), and by `probe`.
"""

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .parallel import Ranks, ranks_of
from .plug import CACHE, OWN_MASKS, PREFIX, Forward, Unsupported, window_of

# A dummy stands for a layer that takes what another has cached, or caches nothing.
Dummy = getattr(cache_utils, "DummyLayer", type(None))  # before transformers 5.2x there was none
KEPT = (
    DynamicLayer, DynamicSlidingWindowLayer, Dummy, LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer,
)  # fmt: skip
# kvpress wraps all attention functions when it is imported, for caches of its own alone.
OWN = "transformers.", "kvpress.attention_patch"
FAR = 1 << 20  # masks are looked at from here
BACK = (1, 2, 3, 7, 64, 1000, 4096, FAR // 2, FAR)  # and so far back, to tell one without a window


@dataclass(eq=False)
class Door:
    """What a model's code says of how it wants to be run.

    Attributes:
        kind: what messages call the model.
        configs: those that its attention and masks look at, whose names are switched.
        stock: name of its own attention function.
        positions: its forward takes `position_ids`.
        masks: its forward takes `attention_mask`, which hides padding.
        counted: it counts positions from the cache instead, so that a forward may hold rows of one
            length only. Found by the probe.
        cached: by layer, the window within which its own cache keeps tokens; 0 for all, None for
            layers that cache no keys and values of their own.
        recurrent: by layer, transformers' own cache layer, empty, of those with a state. Rows in a
            forward must get as many tokens each: padding would go into their states.
        windows: by layer, the window within which tokens see others; 0 for all. Found by masks.
        ropes: of lengths; rows whose values differ have other frequencies.
        dynamic: modules whose frequencies must be new in each forward.
        switch: a row that grows past this length is encoded again.
        ranks: that its parameters lie on, if it is not whole here.
        tokens: how many tokens' logits each of them can make by itself, see `head_tokens`. None
            until that is needed.
        single: its recurrent layers go on from a state only where they get one token, unless the
            probe has found that they do anyway.
        loose: it computes keys and values that attention takes from those that it caches, token by
            token. Found by the probe.
        shared: layers take what others have cached.
        probed: the model has been compared with itself.
        uncaptured: no CUDA graph can hold a step of it.
        apart: what its decoder returns, if logits come of that alone, so that its head can be run
            by itself; False if not. None until that is needed.
        product: whether that head is a matrix product and nothing else. None until it is tried.
        called: the functions that the model was called through when these were found.
    """

    kind: str
    configs: list[Any]
    stock: str
    positions: bool
    masks: bool
    cached: list[int | None]
    ropes: list[Callable[[np.ndarray], np.ndarray]]
    dynamic: list[torch.nn.Module]
    switch: float
    recurrent: dict[int, LinearAttentionLayer]
    ranks: Ranks | None = None
    tokens: list[int] | None = None
    counted: bool = False
    single: bool = False
    loose: bool = False
    shared: bool = False
    probed: bool = False
    uncaptured: bool = False
    apart: type | bool | None = None
    product: bool | None = None
    called: tuple[Callable, ...] = ()
    windows: dict[int, int] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many there are to cache."""
        return len(self.cached)

    @property
    def uncompiled(self) -> str | None:
        """Why a forward over our cache cannot be compiled, if so."""
        if self.dynamic:
            return "its rotary frequencies are computed anew as texts grow (dynamic rope)"
        if self.loose:
            return "its attention takes keys and values that it computes from the cached ones"
        if self.recurrent:
            return "it has recurrent layers, whose states are no part of a graph"
        return None

    def groups(self, before: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """Rows that may share a forward, among those with a token to come."""
        rows = np.flatnonzero(counts)
        after = before[rows] + counts[rows]
        keys = self._rotations(after)
        if self.counted or self.recurrent:
            keys.append(counts[rows])
        if self.counted:
            keys.append(before[rows])
        if not keys or not len(rows):
            return [rows]
        _, group = np.unique(np.stack(keys, 1), axis=0, return_inverse=True)
        return [rows[group.reshape(-1) == i] for i in range(group.max() + 1)]

    def stretches(self, lengths: np.ndarray) -> bool:
        """Whether tokens of texts of such lengths depend on how long those are, or have to come all
        at once."""
        here, short = map(self._rotations, (lengths, np.ones_like(lengths)))
        changed = [a != b for a, b in zip(here, short, strict=True)]
        return self.counted or self.single or bool(np.any(changed))

    def at_once(self, before: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How many of `counts` tokens, one at least, rows may be given so that each is rotated as
        if it were the last."""
        most = counts.copy()
        for i, (first, count) in enumerate(zip(before + 1, counts, strict=True)):
            for key in self._rotations(first + np.arange(count)):
                most[i] = min(most[i], np.argmin(np.append(key == key[0], False)))
        return most

    def _rotations(self, length: np.ndarray) -> list[np.ndarray]:
        """What tells texts of such lengths apart whose tokens are rotated otherwise."""
        switch = [self.past_switch] if self.switch < math.inf else []
        return [f(length) for f in (*self.ropes, *switch)]

    def past_switch(self, length: Any) -> Any:
        """Whether a text of `length` tokens is rotated as past the switch."""
        return length > self.switch

    def turned(self, after: np.ndarray, counts: np.ndarray, switched: np.ndarray) -> np.ndarray:
        """Rows whose stored keys are on the other side of the switch than `after`."""
        return (counts > 0) & (self.past_switch(after) != switched)

    def renew(self) -> None:
        """Let frequencies depend on the next forward alone, and not on those before it."""
        for module in self.dynamic:
            for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
                prefix = name.removesuffix("max_seq_len_cached")
                if hasattr(module, f"{prefix}original_inv_freq"):
                    original = getattr(module, f"{prefix}original_inv_freq")
                    device = getattr(module, f"{prefix}inv_freq").device
                    module.register_buffer(f"{prefix}inv_freq", original.to(device), False)
                setattr(module, name, module.original_max_seq_len)

    def mask_window(self, wanted: dict[str, Any]) -> int:
        """Window of a mask that is to be made; 0 for none, or where windows are known."""
        known = len(self.windows) == self.layers - self.cached.count(None)
        if known or "flash" in self.stock:
            return 0
        zero = torch.zeros((), dtype=torch.int64)

        def seen(query: int | torch.Tensor, back: torch.Tensor) -> torch.Tensor:
            at = torch.as_tensor(query)
            try:
                seen = wanted["mask_function"](zero, zero, at, at - back)
            except Exception as error:
                raise Unsupported(f"its masks depend on more than positions ({error})") from error
            return seen.expand(back.shape)

        # One call tells causal masks: of tokens ahead, itself, and behind, seen from two positions.
        back = torch.tensor([-1, 0, *BACK, *BACK])
        query = torch.tensor([FAR] * (2 + len(BACK)) + [FAR + 5] * len(BACK))
        ahead, *behind = seen(query, back).tolist()
        if not ahead and behind[0]:
            if all(behind):
                return 0
            back = torch.arange(FAR // 2)
            window = int(seen(FAR, back).sum())
            if all(
                bool((seen(FAR + i, back) == (back < window)).all()) for i in (0, window // 2 + 1)
            ):
                return window
        raise Unsupported("its masks are neither causal nor causal within a window")

    def window(self, layer: int, forward: Forward, mask: Any, keyword: int | None) -> int:
        """Window of `layer`, found by the mask that it is given in its first prefill."""
        if not forward.filling:
            if mask is not None:
                raise Unsupported(OWN_MASKS)
            return self.windows[layer]
        if layer in self.windows:
            return self.windows[layer]
        if "flash" in self.stock:
            window = keyword or 0
        else:
            window = window_of(forward, mask)
            if keyword and window and keyword != window:
                raise Unsupported(f"layer {layer} is told a window of {keyword}, its mask {window}")
        held = self.cached[layer]
        if held and held != window:
            raise Unsupported(
                f"layer {layer} keeps {held} tokens in its own cache and sees {window or 'all'}"
            )
        self.windows[layer] = window
        return window


_doors: "weakref.WeakKeyDictionary[Any, Door]" = weakref.WeakKeyDictionary()


def inner(model: Any) -> Any:
    """What a wrapper that looks like the model holds: torch.compile's, peft's."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def eager_of(module: Any) -> Any:
    """`module` without what torch.compile put around it or around a part of it; everything else is
    shared. Itself where nothing is compiled.

    torch.compiler.set_stance would count in other threads.
    """
    if hasattr(module, "_orig_mod"):
        return eager_of(module._orig_mod)
    held = module._modules
    parts = {name: x if x is None else eager_of(x) for name, x in held.items()}
    forward = vars(module).get("forward")
    stock = getattr(forward, "_torchdynamo_orig_callable", forward)
    same = stock is forward and module._compiled_call_impl is None
    if same and all(x is held[name] for name, x in parts.items()):
        return module
    bare = object.__new__(type(module))
    bare.__dict__ = dict(vars(module), _modules=parts, _compiled_call_impl=None)
    if getattr(stock, "__self__", None) is module:
        bare.forward = stock.__func__.__get__(bare)
    elif stock is not None:
        bare.forward = stock
    return bare


def device_of(model: Any) -> torch.device:
    """Where the model wants its input."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((x for x in found if x is not None), device))


def door_of(model: Any) -> Door:
    """What can be read off `model`; kept as long as it and its attention are the same.

    Raises:
        TypeError: it is no transformers model, or a wrapper; the message says what to pass.
        Unsupported: kvtools cannot run it; the message says why.
    """
    core = inner(model)
    if not isinstance(core, PreTrainedModel):
        remedy = ""
        if isinstance(getattr(core, "module", None), torch.nn.Module):
            remedy = f": pass the model inside {type(core).__name__}, its .module"
        raise TypeError(f"expected a transformers model, got {type(core).__name__}{remedy}")
    config = core.config.get_text_config(decoder=True)
    stock = str(config._attn_implementation).removeprefix(PREFIX)
    # A wrapper such as peft's may prepare inputs of its own: it has a door of its own.
    known = _doors.get(model)
    if known is not None and known.stock == stock and known.configs[0] is config:
        return known
    kind = getattr(core.config, "model_type", None) or type(core).__name__
    try:
        door = _door(model, core, config, kind, stock)
    except Unsupported as error:
        raise refusal(kind, error) from error.__cause__
    _doors[model] = door
    return door


def refusal(kind: str, error: Unsupported) -> Unsupported:
    return Unsupported(
        f"kvtools cannot run {kind}: {error}. Use the model without kvtools, or pass another"
    )


def _door(model: Any, core: PreTrainedModel, config: Any, kind: str, stock: str) -> Door:
    if core.config.is_encoder_decoder:
        raise Unsupported("it is an encoder-decoder model")
    decoder = decoder_of(core)
    if not decoder._can_set_attn_implementation():
        raise Unsupported("it does not use transformers' attention interface")
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        function = table.get(stock) if stock in table else None
        own = getattr(function, "__module__", "transformers.").startswith(OWN)
        if (stock != "eager" and function is None) or not own:
            raise Unsupported(
                f"its attention {stock!r} is not transformers' own: set_attn_implementation('sdpa')"
            )
    places = {str(x) for x in (getattr(core, "hf_device_map", None) or {}).values()}
    if len(places - {"cpu", "disk"}) > 1:
        raise Unsupported(f"it lies on several devices ({', '.join(sorted(places))})")
    layers = DynamicCache(config=core.config).layers
    for layer in layers:
        if type(layer) not in KEPT:
            raise Unsupported(f"it has layers of another kind ({type(layer).__name__})")
    found = {id(config): config}
    ropes, dynamic, limits = [], [], {getattr(config, "original_max_position_embeddings", None)}
    for module in _modules(decoder):
        each, kinds = vars(module).get("config"), vars(module).get("rope_type")
        if each is not None and id(each) not in found:
            found[id(each)] = each
        for layer_type, rope in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if rope == "longrope":
                limit = _longrope_limit(module.config, layer_type)
                ropes.append(lambda length, limit=limit: length > limit)
                limits.add(limit)
            elif rope is not None and "dynamic" in rope:
                limit = module.original_max_seq_len
                ropes.append(lambda length, limit=limit: np.maximum(length, limit))
                dynamic.append(module)
    stateful = {i: x for i, x in enumerate(layers) if isinstance(x, LinearAttentionLayer)}
    cached = [
        getattr(x, "sliding_window", None if type(x) in (Dummy, LinearAttentionLayer) else 0)
        for x in layers
    ]
    takes = inspect.signature(core.forward).parameters
    ranks, switch = ranks_of(core), _switch(model, sorted(limits - {None}))
    if stateful and CACHE not in takes:  # Mamba before transformers 5.24
        raise Unsupported(f"its forward takes no {CACHE}")
    if stateful and ranks is not None:
        raise Unsupported("it has recurrent layers, and lies on several ranks: load it whole")
    if stateful and switch < math.inf:
        raise Unsupported(
            "it has recurrent layers, and pads prompts to be past a length (longrope)"
        )
    door = Door(
        kind, [x for x in found.values() if getattr(x, "_attn_implementation", None)], stock,
        "position_ids" in takes, "attention_mask" in takes,
        cached or [0] * config.num_hidden_layers, ropes, dynamic, switch, stateful, ranks,
    )  # fmt: skip
    door.single = bool(stateful)
    return door


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that embeds tokens and runs the layers."""
    found = model.get_decoder()  # some call their head a decoder
    return found if isinstance(found, PreTrainedModel) else model.base_model


def _modules(part: torch.nn.Module) -> list[torch.nn.Module]:
    """`part.modules()`, which spends most of its time on names, in another order."""
    found, todo = {}, [part]
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            todo += module._modules.values()
    return list(found.values())


def _longrope_limit(config: Any, layer_type: str | None) -> int:
    rope = config.rope_parameters
    rope = rope if layer_type is None else rope[layer_type]
    limit = rope.get("original_max_position_embeddings")
    limit = limit or getattr(config, "original_max_position_embeddings", None)
    return limit or config.max_position_embeddings


class _Past(CacheLayerMixin):
    """A cache layer of which only the length is asked."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.is_initialized = length, True

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported("it writes to the cache before its forward")

    lazy_initialization = update


def _switch(model: Any, limits: list[int]) -> float:
    """The length past which `prepare_inputs_for_generation` drops the cache, if at any of `limits`.

    A method that is not transformers' own is asked what it would do: with a prompt, a step, and
    steps at the limits. It may choose nothing else than that.
    """
    method = getattr(model, "prepare_inputs_for_generation", None)
    stock = GenerationMixin.prepare_inputs_for_generation
    if method is None or getattr(method, "__func__", None) is stock:
        return math.inf
    switch = math.inf
    for past, length in [(0, 4), (4, 5), *((limit, limit + 1) for limit in limits)]:
        ids = torch.ones(1, length, dtype=torch.int64)
        positions = torch.arange(length)[None]
        cache = Cache(layers=[_Past(past)])
        try:
            out = method(
                input_ids=ids, next_sequence_length=length - past, attention_mask=ids,
                position_ids=positions, use_cache=True, is_first_iteration=past == 0,
                **{CACHE: cache},
            )  # fmt: skip
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(
                f"its own prepare_inputs_for_generation fails ({type(error).__name__}: {error})"
            ) from error
        if past in limits and out.get(CACHE) is None:
            if out["input_ids"].shape[1] < length:
                raise Unsupported(
                    f"past {past} tokens its own prepare_inputs_for_generation drops the cache and "
                    "hands on the newest token alone"
                )
            switch = past
            continue
        new = {"input_ids": ids[:, past:], "position_ids": positions[:, past:]}
        for name, x in out.items():
            same = x is None or name in ("attention_mask", "use_cache")
            if isinstance(x, torch.Tensor) and not same:
                want = new.get(name, torch.zeros(()))  # token types of a text are zero
                x = x.cpu() if x.device.type != "meta" else want
                same = x.shape[-1:] == want.shape[-1:] and bool((x == want).all())
                same |= name not in new and not x.any()
            elif not same:
                same = x is cache if name == CACHE else not isinstance(x, (list, tuple, dict))
            if not same:
                raise Unsupported(f"its own prepare_inputs_for_generation changes {name}")
        if out.get("input_ids") is None or out.get(CACHE) is not cache:
            raise Unsupported("its own prepare_inputs_for_generation hands on other inputs")
    return switch
