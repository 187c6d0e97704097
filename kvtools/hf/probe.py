"""The probe: whether a model's first layers say through us what they say by themselves."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .door import Door, Unsupported, decoder_of, device_of, eager_of
from .plug import CACHE, Touched

PROBE = 4  # tokens
FEW = 256  # of a window that the probe goes past


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """FSDP2 (`fully_shard`) has parameters whole in forwards of the model, the first of which finds
    out what belongs together; the probe runs parts."""
    sharded = hasattr(model, "unshard")
    if sharded:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)))
        model.unshard()
    try:
        yield
    finally:
        if sharded:
            model.reshard()


@torch.no_grad()
def compare(model: Any, door: Door, run: Callable[[Any], Any]) -> None:
    """Raise Unsupported if the first layers say something else through us than by themselves.
    `run` gives a Session of a part."""
    decoder, device = decoder_of(model), device_of(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    window = min(filter(None, door.cached), default=0)
    length = PROBE + (window if window <= FEW else 0)  # so that it is seen, where that is cheap
    ids = (torch.arange(1, length + 1, device=device) * 7919) % vocabulary
    part, plain = eager_of(_first_layers(decoder, door)), None
    noisy = any(isinstance(x, torch.nn.Dropout) and x.training and x.p for x in part.modules())
    if device.type != "meta" and not noisy:  # else there is nothing to compare
        try:
            plain = _by_itself(part, model, door, ids)
        except (IndexError, KeyError):  # it does not do with fewer layers
            part = eager_of(decoder)
            plain = _by_itself(part, model, door, ids)
    singles = (False, True) if plain is not None else (True,)
    wrong: int | Unsupported | None = None
    for counted in [False, True] if door.positions else [True]:
        for loose in (False, True) if plain is not None else (False,):
            for single in singles if door.recurrent else (False,):
                door.counted, door.loose, door.single = counted, loose, single
                wrong = _first_wrong(part, run(part), ids, plain)
                if wrong is None:
                    door.probed = plain is not None
                    return
                if isinstance(wrong, Unsupported):
                    break
            if not isinstance(wrong, Touched):
                break
    door.counted, door.loose, door.single = False, False, bool(door.recurrent)
    if isinstance(wrong, Unsupported):
        raise wrong
    if any(getattr(getattr(x, "state", None), "threshold", 0) for x in part.modules()):
        raise Unsupported(
            "its 8-bit layers take outliers by all tokens of a forward, so that other batches say "
            "other things: load it with llm_int8_threshold=0.0, or pass probe=False"
        )
    raise Unsupported(
        f"through kvtools it says something else than by itself from token {wrong} on"
    )


def _by_itself(part: Any, model: Any, door: Door, ids: Tensor) -> Tensor:
    """What it says on its own path: without a cache, or with its own one where that forgets."""
    position = torch.arange(len(ids), device=ids.device)[None]
    door.renew()

    def run(begin: int, end: int, **options: Any) -> Tensor:
        if door.positions:
            options["position_ids"] = position[:, begin:end]
        return output(part(input_ids=ids[None, begin:end], **options))[0]

    if not any(door.cached):
        return run(0, len(ids), use_cache=False)
    options = {CACHE: DynamicCache(config=model.config), "use_cache": True}
    steps = [(0, len(ids) - 2), (len(ids) - 2, len(ids) - 1), (len(ids) - 1, len(ids))]
    return torch.cat([run(*step, **options) for step in steps])


def _first_wrong(
    part: Any, session: Any, ids: Tensor, plain: Tensor | None
) -> int | Unsupported | None:
    """First position at which two rows of a prompt, one ahead, are not as `plain` says."""
    try:
        n = len(ids) - 2
        parts = [(torch.arange(n), *session.prefill([ids[:n]], 2))]
        where = torch.tensor([n, n, n + 1])
        parts.append((where, session.extend(ids[where.to(ids.device)], np.array([1, 2]))))
    except Unsupported as error:
        return error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failed = Unsupported(f"its forward fails ({type(error).__name__}: {error})")
        failed.__cause__ = error
        return failed
    if plain is None:
        return None
    where, ours = torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])
    want = plain[where.to(plain.device)].float()
    error = (ours.float() - want).square().mean(-1).sqrt() / want.square().mean(-1).sqrt()
    dtypes = [p.dtype for p in part.parameters() if p.is_floating_point()] + [plain.dtype]
    if torch.is_autocast_enabled(plain.device.type):
        dtypes.append(torch.get_autocast_dtype(plain.device.type))
    allowed = min(0.05, max(1e-3, 64 * max(torch.finfo(x).eps for x in dtypes)))
    wrong = where[(~(error <= allowed)).cpu()]
    return int(wrong.min()) if len(wrong) else None


def _first_layers(decoder: Any, door: Door) -> Any:
    """`decoder` with the fewest first layers that show each kind once, sharing all parameters;
    itself if there is no list of layers."""
    decoder = getattr(decoder, "_orig_mod", decoder)
    stacks = [
        (name, list(stack)) for name, stack in decoder.named_children()
        if isinstance(stack, torch.nn.ModuleList) and len(stack) == door.layers
    ]  # fmt: skip
    if len(stacks) != 1 or "forward" in vars(decoder):
        return decoder
    ((name, layers),) = stacks
    types = getattr(door.configs[0], "layer_types", None) or [None] * len(layers)
    kinds: dict[tuple, int] = {}
    for i, layer in enumerate(x._modules.get("_orig_mod", x) for x in layers):
        parts = map(type, layer._modules.values())
        kinds.setdefault((door.cached[i], types[i], type(layer), *parts), i)
    part = copy.copy(decoder)
    part.__dict__ = dict(vars(decoder))
    part._modules = dict(decoder._modules)
    part._modules[name] = torch.nn.ModuleList(layers[: max(kinds.values()) + 1])
    return part


def output(out: Any) -> Tensor:
    hidden = getattr(out, "last_hidden_state", None)  # a decoder may be the whole model
    return out.logits if hidden is None else hidden
