"""Other people's KV caches behind one interface, each storing packed codes and scales.

Every rival is driven token by token, as transformers drives its caches. Bytes are those of the
storage held, except that floats wider than 16 bits count 2 bytes per element: what a rival leaves
unquantised is float32 only because our models run in float32 on a CPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from kvtools.hf import CACHE


class Rival:
    """One method: a transformers Cache per prompt, made by `make(model)`."""

    def __init__(self, name: str, make: Callable[[Any], Cache]) -> None:
        self.name = name
        self.make = make

    def begin(self, model: Any) -> None:
        """Forget all prompts."""
        self.model, self.caches, self.lengths = model, [], []

    def add_prompt(self, length: int) -> None:
        """A new prompt of `length` tokens, still to be filled."""
        self.caches.append(self.make(self.model))
        self.lengths.append(length)

    def fill(
        self, layer: int, q_hld: Tensor | None, k_hld: Tensor, v_hld: Tensor, **options: Any
    ) -> None:
        """One layer of the last prompt, keys after RoPE. Queries and options go unused."""
        self.caches[-1].update(k_hld[None], v_hld[None], layer)

    @torch.no_grad()
    def feed(self, tokens: list[Tensor], progress: Callable[[], Any] | None = None) -> list[Tensor]:
        """Append each prompt's tokens one at a time; the logits after each, [n, v] per prompt."""
        logits = []
        for row, (cache, ids) in enumerate(zip(self.caches, tokens, strict=True)):
            logits_nv = torch.empty(len(ids), self.model.get_output_embeddings().out_features)
            for step, token in enumerate(ids.to(self.model.device)):
                out = self.model(
                    input_ids=token.view(1, 1),
                    **{CACHE: cache},
                    position_ids=token.new_full((1, 1), self.lengths[row]),
                    use_cache=True,
                )
                logits_nv[step] = out.logits[0, -1]
                self.lengths[row] += 1
                if progress is not None:
                    progress()
            logits.append(logits_nv)
        return logits

    def nbytes(self) -> int:
        """Bytes held over all prompts; floats wider than 16 bits count as 16 bits."""
        storages = {}
        for tensor in held(self.caches):
            storage = tensor.untyped_storage()
            wide = tensor.is_floating_point() and tensor.itemsize > 2
            count = storage.nbytes() * 2 // tensor.itemsize if wide else storage.nbytes()
            storages[storage.data_ptr()] = count
        return sum(storages.values())


def held(thing: Any) -> Iterator[Tensor]:
    """The plain tensors in caches, layers and containers; wrapper subclasses are taken apart."""
    if isinstance(thing, Tensor):
        if not hasattr(thing, "__tensor_flatten__"):
            yield thing
            return
        thing = [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
    elif isinstance(thing, (Cache, CacheLayerMixin, Groups)):
        thing = vars(thing)
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        for item in thing:
            yield from held(item)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes, 8 // bits to a byte along the last axis, lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2)


def quantize(x_bhsd: Tensor, bits: int, axis: int, group: int | None) -> tuple[Tensor, ...]:
    """Round to nearest between the minimum and maximum of each group.

    Args:
        axis: where the groups lie: -2 for tokens (one scale per channel), -1 for channels.
        group: elements per group, which divides that axis; None for the whole axis.

    Returns:
        Packed codes, and fp16 scales and minima with one entry per group along `axis`.
    """
    grouped = x_bhsd.float().unflatten(axis, (-1, group or x_bhsd.shape[axis]))
    top = 2**bits - 1
    zero = grouped.amin(axis, keepdim=True)
    scale = ((grouped.amax(axis, keepdim=True) - zero) / top).half()
    # Codes are chosen for the scale and zero that are stored, in which a constant group has none.
    scale, zero = scale.masked_fill(scale == 0, 1), zero.half()
    codes = ((grouped - zero.float()) / scale.float()).round().clamp(0, top)
    codes = codes.to(torch.uint8).flatten(axis - 1, axis)
    return pack(codes, bits), scale.squeeze(axis), zero.squeeze(axis)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, axis: int) -> Tensor:
    """Float32 values of what `quantize` returned."""
    grouped = unpack(codes, bits).unflatten(axis, (scale.shape[axis], -1)).float()
    x = grouped * scale.unsqueeze(axis).float() + zero.unsqueeze(axis).float()
    return x.flatten(axis - 1, axis)


class Groups:
    """Keys or values of one layer: quantised groups, then the newest tokens as they came.

    Args:
        bits, axis, group: as in `quantize`.
        block: tokens are quantised in multiples of this.
        window: newest tokens that are never quantised.
    """

    def __init__(self, bits: int, axis: int, group: int | None, block: int = 1, window: int = 0):
        self.bits, self.axis, self.group = bits, axis, group
        self.block, self.window = block, window
        self.quantized: tuple[Tensor, ...] | None = None
        self.fresh: Tensor | None = None

    def append(self, x_bhsd: Tensor) -> None:
        fresh = x_bhsd[..., :0, :] if self.fresh is None else self.fresh
        self.fresh = torch.cat([fresh, x_bhsd], -2)

    def flush(self) -> None:
        """Quantise what is complete."""
        length = (self.fresh.shape[-2] - self.window) // self.block * self.block
        if length <= 0:
            return
        new = quantize(self.fresh[..., :length, :], self.bits, self.axis, self.group)
        if self.quantized is not None:
            new = tuple(torch.cat(pair, -2) for pair in zip(self.quantized, new, strict=True))
        self.quantized = new
        self.fresh = self.fresh[..., length:, :].clone()

    def read(self) -> Tensor:
        if self.quantized is None:
            return self.fresh
        past = dequantize(*self.quantized, self.bits, self.axis).to(self.fresh.dtype)
        return torch.cat([past, self.fresh], -2)


class GroupedLayer(DynamicLayer):
    """A cache layer over two `Groups`. The prompt attends to itself unquantised.

    With a window of values, as in KIVI, a step attends before it quantises; without one it
    quantises first, so that it attends to what is stored.
    """

    is_croppable = False

    def __init__(self, key: Groups, value: Groups) -> None:
        super().__init__()
        self.sides = (key, value)
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            side.append(states)
            if not self.sides[1].window:
                side.flush()
        seen = key_states, value_states
        if self.length:
            seen = tuple(side.read() for side in self.sides)
        for side in self.sides:
            side.flush()
        self.length += key_states.shape[-2]
        self.is_initialized = True
        return seen

    def get_seq_length(self) -> int:
        return self.length


def kivi(bits: int) -> GroupedLayer:
    """KIVI with groups of 32 and a residual of 128, arXiv:2402.02750."""
    return GroupedLayer(Groups(bits, -2, 32, block=128), Groups(bits, -1, 32, window=128))


def kivi_g64(bits: int) -> GroupedLayer:
    """KIVI's layout without its residual: only an incomplete group of 64 keys is not quantised."""
    return GroupedLayer(Groups(bits, -2, 64, block=64), Groups(bits, -1, 32))


def rtn(bits: int) -> GroupedLayer:
    """Plain asymmetric rounding, one scale and zero per token and head."""
    return GroupedLayer(Groups(bits, -1, None), Groups(bits, -1, None))


def grouped(model: Any, layer: Callable[[int], GroupedLayer], bits: int) -> Cache:
    config = model.config.get_text_config(decoder=True)
    return Cache(layers=[layer(bits) for _ in range(config.num_hidden_layers)])


def packaged(model: Any, backend: str, **options: Any) -> Cache:
    return QuantizedCache(backend, config=model.config, **options)


def available(name: str) -> str:
    """Why a rival cannot run here; empty if it can."""
    if name.startswith("quanto") and not is_optimum_quanto_available():
        return "optimum-quanto is not installed"
    if name.startswith("hqq") and not is_hqq_available():
        return "hqq is not installed"
    if name.startswith("fp8") and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        return "this transformers has no fp8 cache"
    return ""


def rivals() -> dict[str, Rival]:
    """All rivals by name, "dynamic" (nothing quantised) first; ask `available` before running."""
    makes = {
        "dynamic": lambda model: DynamicCache(config=model.config),
        "kivi4": partial(grouped, layer=kivi, bits=4),
        "kivi2": partial(grouped, layer=kivi, bits=2),
        "kivi4-g64": partial(grouped, layer=kivi_g64, bits=4),
        "rtn4": partial(grouped, layer=rtn, bits=4),
        "rtn8": partial(grouped, layer=rtn, bits=8),
        "quanto4": partial(packaged, backend="quanto", nbits=4),
        "quanto2": partial(packaged, backend="quanto", nbits=2),
        "hqq4": partial(packaged, backend="hqq", nbits=4),
        # The axis that hqq's README recommends; the default is 0.
        "hqq4-axis1": partial(packaged, backend="hqq", nbits=4, axis_key=1, axis_value=1),
        "fp8-tensor": partial(packaged, backend="fp8"),
    }
    return {name: Rival(name, make) for name, make in makes.items()}
