"""Caches in files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..cache import KVCache
from ..config import CacheConfig
from ..results import replacing
from .door import Door, device_of, inner
from .parallel import own_part
from .plug import PagedCache
from .session import check_model, config_of

FORMAT = "kvtools cache 1"  # of what is in a file; another number where it means something else
# Of a model's config, what does not bear on what it says.
ASIDE = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
# What tells a model's weights apart, beside the sum of them all: first elements of each parameter.
SEEN = 64
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def save_cache(model: Any, cache: PagedCache, path: str | os.PathLike) -> None:
    """Write a cache that `generate` has returned to a file (safetensors), for `load_cache`.

    Args:
        model: that it is of, with the adapters (peft) on that it was filled with.
        cache: its rows, texts, and all that a step looks at; of its pools, the pages in use.
        path: of the file. It is written whole or not at all, over a file that is there.

    Raises:
        TypeError: it is another kind of cache.
        ValueError: it holds no rows, does not know their texts, or is of another model; or its
            policy is a function.
        OSError: the file cannot be written.
    """
    if cache is None:
        raise TypeError("cache is None: pass one that kvtools.generate returned")
    config_of(model, cache, None, ("cache", "config"))
    _refuse_parts(cache.door)
    if not cache.kv.rows:
        raise ValueError("cache holds no rows: there is nothing to save")
    said = {
        "format": FORMAT,
        "model": _model(model),
        "config": _config(cache.kv.config),
        "windows": {str(layer): x for layer, x in cache.door.windows.items()},
    }
    tensors = {f"kv.{name}": x for name, x in cache.kv.packed().items()}
    tensors["text"] = torch.tensor([x for text in cache.texts for x in text])
    tensors["lengths"] = torch.tensor(list(map(len, cache.texts)))
    tensors["prompt_lengths"] = torch.tensor(cache.prompt_lengths)
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not Path(os.path.realpath(target)).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path} is a device, a pipe or a socket: name a file")
    with replacing(target) as scratch:
        try:
            save_file(tensors, scratch, {name: json.dumps(x) for name, x in said.items()})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def load_cache(
    model: Any, path: str | os.PathLike, config: CacheConfig | None = None, *, probe: bool = True
) -> PagedCache:
    """The cache that `save_cache` wrote, on the device of the model: `generate` and `Rollouts` go
    on from it as from the one that was saved.

    Args:
        model: with the weights of the one that it was saved of, in the same dtype, and the same
            adapters (peft) on.
        path: of the file.
        config: what it must have been kept with, but for `impl`, which may be another; default
            what it was.
        probe: see `kvtools.generate`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole file of a cache, of another version, model or weights, or kept
            with another config; the message says which.
    """
    if config is not None and not isinstance(config, CacheConfig):
        raise TypeError(f"config={config!r}: expected a kvtools.CacheConfig")
    given = None if config is None else _config(config)
    door = check_model(model, probe=probe)
    _refuse_parts(door)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            words = file.metadata() or {}
            said = {name: json.loads(x) for name, x in words.items() if name != "format"}
            version = words.get("format")
            if version != json.dumps(FORMAT):
                raise _Refused(f"has the format {version}, not {json.dumps(FORMAT)}")
            _same("was saved of another model", said["model"], _model(model))
            if given is not None:
                held = said["config"] | {"impl": given["impl"]}
                _same("was kept with another config", held, given)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = CacheConfig(**said["config"]) if config is None else config
        kv = KVCache(config, door.layers, device=device_of(model))
        kv.unpack({
            name.removeprefix("kv."): x for name, x in tensors.items() if name.startswith("kv.")
        })  # fmt: skip
        cache = PagedCache(kv, door)
        texts = tensors["text"].split(tensors["lengths"].tolist())
        cache.texts = [text.tolist() for text in texts]
        cache.prompt_lengths = tensors["prompt_lengths"].tolist()
        if [len(text) - 1 for text in texts] != kv.lengths.tolist():
            raise ValueError("texts are not those of the rows")
        windows = {int(layer): int(x) for layer, x in said["windows"].items()}
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{path} is no whole file of a cache ({type(error).__name__}: {error}): save it again"
        ) from error
    door.windows = windows | door.windows
    return cache


def _refuse_parts(door: Door) -> None:
    if door.ranks is not None:
        raise ValueError(
            f"{door.kind} lies on {door.ranks.size} ranks, each of which has a cache of its own "
            "heads: save and load caches with a whole model"
        )
    if door.recurrent:
        raise ValueError(
            f"{door.kind} has recurrent layers, whose states no file holds yet: keep the cache in "
            "memory, or run the prompts again"
        )


class _Refused(ValueError):
    """A file is whole, and of something else."""


def _same(what: str, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = [x for x in {**held, **wanted} if held.get(x) != wanted.get(x)]
    if names:
        first = ", ".join(f"{x}={held.get(x)!r}, not {wanted.get(x)!r}" for x in names[:3])
        raise _Refused(f"{what}: {first}")


def _config(config: CacheConfig) -> dict[str, Any]:
    """The fields, as a file has them."""
    fields = {x.name: getattr(config, x.name) for x in dataclasses.fields(config)}
    if not isinstance(config.policy, str):
        raise ValueError(
            f"policy={config.policy!r} is a function, which no file can hold: name one"
        )
    return json.loads(json.dumps(fields))


def _model(model: Any) -> dict[str, Any]:
    """What tells a model from others."""
    core = inner(model)
    config = core.config.get_text_config(decoder=True).to_dict()
    found = hashlib.sha256()
    for name, x in _weights(core):
        x = own_part(x)  # all of it: `_refuse_parts`
        found.update(f"{name} {tuple(x.shape)}".encode())
        if x.device.type != "meta" and x.numel():
            some = x.detach()[None][(0,) * x.dim()][:SEEN].cpu().contiguous()
            found.update(some.view(torch.uint8).numpy().tobytes())
            # And all of it, where it lies: the sum of its bits, whatever the order.
            bits = x.detach().view(BITS[x.element_size()]).sum(dtype=torch.int64)
            found.update(int(bits).to_bytes(8, "little", signed=True))
    adapters = _adapters(core)
    found.update(repr(adapters).encode() if adapters else b"")
    on = sorted({name for _, scales in adapters for name in scales})
    about = {name: x for name, x in config.items() if name not in ASIDE and name[0] != "_"}
    return {
        "class": type(core).__name__,
        "vocabulary": core.get_input_embeddings().weight.shape[0],
        "dtype": str(core.dtype),
        **({"adapters": ", ".join(on) or "off"} if adapters else {}),
        **{f"config.{name}": x for name, x in json.loads(json.dumps(about, default=str)).items()},
        "weights": found.hexdigest()[:16],
    }


def _adapters(core: torch.nn.Module) -> list[tuple[str, dict[str, float | None]]]:
    """Of each layer that has adapters, as peft puts them there, those that count and how much: what
    its weights do not tell."""
    found = []
    for prefix, part in core.named_modules():
        if not hasattr(part, "active_adapters") or not hasattr(part, "disable_adapters"):
            continue
        if not isinstance(part.disable_adapters, bool):
            continue  # transformers' models have methods of these names
        scaling = getattr(part, "scaling", {})
        merged = list(getattr(part, "merged_adapters", ()))
        off = part.disable_adapters and not merged
        names = [] if off else list(dict.fromkeys([*merged, *part.active_adapters]))
        found.append((prefix, {name: scaling.get(name) for name in names}))
    return found


def _weights(core: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that a checkpoint holds, as quantised layers have them."""
    yield from core.named_parameters()
    for prefix, part in core.named_modules():
        for name, x in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}", x
