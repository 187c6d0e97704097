"""What commands have in common: options with their types, and what is made of them."""

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

import kvtools.ops
from kvtools import models
from kvtools.config import BITS, PRESETS
from kvtools.policy import POLICIES


class Usage(ValueError):
    """The command line is wrong."""


def message(error: Exception) -> str:
    """One line; arguments, such as the fields of CacheConfig, are named as the options are."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        said = f"{type(error).__name__}: {said}; --debug shows where"
    names = "|".join(field.name for field in dataclasses.fields(kvtools.CacheConfig))
    said = re.sub(rf"^({names})(?==| has )", lambda x: flag(x[1]), said)
    return re.sub(r"\b(family|reference)=(?=[ ,])", lambda x: flag(x[1]), said)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="folder or hub name, or smollm2 for the packaged model")
    command.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        metavar="X",
        help=f"{', '.join(DTYPES)}; default: that of the checkpoint",
    )
    command.add_argument("--device", type=device, default=default_device(), help=DEVICE)


def add_prompt(group: Any) -> None:
    group.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    group.add_argument("--prompt-file", type=Path, metavar="PATH", help="a text file in UTF-8")
    group.add_argument(
        "stdin", nargs="?", choices=["-"], metavar="-", help="read the prompt from stdin"
    )


def add_cache(command: argparse.ArgumentParser) -> None:
    # Read off CacheConfig, so that the two cannot drift apart.
    cache = command.add_argument_group("cache (the fields of kvtools.CacheConfig)")
    for field in dataclasses.fields(kvtools.CacheConfig):
        default = "" if field.default is None else f" (default {field.default})"
        cache.add_argument(
            flag(field.name),
            dest=f"cache_{field.name}",
            type=CACHE[field.name],
            default=argparse.SUPPRESS,
            metavar="X",
            help=MEANING[field.name] + default,
        )
    cache.add_argument("--preset", choices=list(PRESETS), help="where the options start from")


def cache_of(args: argparse.Namespace) -> tuple[kvtools.CacheConfig, dict]:
    """The cache that was asked for, and the options that were given."""
    given = {name[6:]: value for name, value in vars(args).items() if name.startswith("cache_")}
    try:
        if args.preset is None:
            return kvtools.CacheConfig(**given), given
        config = kvtools.CacheConfig.preset(args.preset, **given)
    except ValueError as error:
        raise Usage(message(error)) from error
    return config, {"preset": args.preset} | given


def load(args: argparse.Namespace, name: str | None = None, **how: Any) -> tuple[Any, Any]:
    try:
        return models.load(name or args.model, args.dtype, args.device, **how)
    except FileNotFoundError as error:
        raise Usage(str(error)) from error


def place(name: str) -> str:
    """The name of a model, or where its folder is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def fits(config: kvtools.CacheConfig, given: dict, model: Any, rows: int) -> None:
    """Refuse options whose least memory, a page for each row, is more than there is."""
    from kvtools.quality import elements

    free = available(model.device)
    for name in ("page_size", "sinks"):
        need = rows * getattr(config, name) * elements(model) * model.dtype.itemsize
        if name in given and free is not None and need > free:
            raise Usage(
                f"{flag(name)} {given[name]}: so many tokens in each of {rows} rows take "
                f"{need / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"
            )


def available(device: torch.device) -> int | None:
    """Bytes of memory that can still be had there; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def read_prompt(args: argparse.Namespace) -> str:
    source = f"--prompt-file {args.prompt_file}" if args.prompt_file else "standard input"
    if args.prompt_file and not args.prompt_file.is_file():
        raise Usage(f"{source}: no such file; name a text file")
    try:
        if args.prompt_file:
            text = args.prompt_file.read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if args.stdin else args.prompt
    except UnicodeDecodeError as error:
        raise Usage(f"{source} is not UTF-8") from error
    except OSError as error:
        raise Usage(f"{source}: {error.strerror}") from error
    if not text.strip():
        raise Usage("the prompt is empty; give some text")
    return text


def encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise Usage("this model has no chat template; leave out --chat")
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def warn_length(model: Any, tokens: int) -> None:
    """Say so before the wait, if a prompt has more tokens than the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        print(
            f"kvtools: the prompt has {tokens} tokens, but the model was made for {limit}: what it "
            "says may be nonsense",
            file=sys.stderr,
        )


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def number(
    kind: type, least: float, most: float, besides: dict[str, Any] | None = None
) -> Callable[[str], Any]:
    """An argparse type: a number of that kind from `least` to `most`, or one of other words."""

    def convert(text: str) -> Any:
        if text in (besides or {}):
            return besides[text]
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:
                return value
        what = "an integer" if kind is int else "a number"
        words = "".join(f", or {word}" for word in besides or {})
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least} to {most}{words}")

    return convert


def choice(*values: Any) -> Callable[[str], Any]:
    """An argparse type: one of these, None written as none."""
    words = {"none" if x is None else str(x): x for x in values}

    def convert(text: str) -> Any:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return words[text]

    return convert


def text(given: str) -> str:
    """An argparse type: a text that is not empty."""
    if not given:
        raise argparse.ArgumentTypeError("it is empty; give some text")
    return given


def device(name: str) -> str:
    """An argparse type: a device that is here."""
    try:
        models.check_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def presets(names: str) -> list[str]:
    """An argparse type: names of presets."""
    found = [name for name in names.split(",") if name]
    for name in found or [names]:
        if name not in PRESETS:
            raise argparse.ArgumentTypeError(
                f"preset {name!r} does not exist; expected {', '.join(PRESETS)}"
            )
    return found


def share(text: str) -> int | float | None:
    """An argparse type: a number of tokens, or a fraction of them."""
    if "." in text or "e-" in text:
        return number(float, 0, 1)(text)
    return number(int, 1, MOST, {"none": None})(text)


def factors(text: str) -> str | list[float]:
    """An argparse type: uniform, later, or a factor for each layer."""
    if text in ("uniform", "later"):
        return text
    return [number(float, 1e-3, 1e3, {})(part) for part in text.split(",")]


MOST = 2**24  # of anything that is counted
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICE = "cpu, cuda or cuda:1; default: cuda, else cpu"
count = number(int, 1, MOST)
seed = number(int, 0, 2**63 - 1)
CACHE: dict[str, Callable[[str], Any]] = {
    "bits": choice(*BITS),
    "k_bits": choice(*BITS, None),
    "v_bits": choice(*BITS, None),
    "prompt_budget": share,
    "budget": number(int, 1, MOST, {"none": None}),
    "policy": choice(*POLICIES),
    "window": count,
    "recent": count,
    "recent_bits": choice(16, 8, "fp8", None),
    "sinks": number(int, 0, 2**16),
    "drop": number(int, 1, MOST, {"none": None}),
    "group": choice("all", "mean"),
    "layer_budget": factors,
    "page_size": number(int, 1, 2**16),
    "impl": choice(*get_args(kvtools.ops.Impl)),
}
MEANING = {  # in a line; CacheConfig's docstring has it in full
    "bits": f"{', '.join(map(str, BITS))}, for keys and values; 16 is the model's own dtype",
    "k_bits": "for keys, in place of --bits",
    "v_bits": "for values, in place of --bits",
    "prompt_budget": "tokens of a prompt that are kept: 200, or a share as 0.5, or none for all",
    "budget": "tokens that a row may own beyond its prompt, or none for no limit",
    "policy": f"who is evicted: {', '.join(POLICIES)}",
    "window": "steps, and last tokens of a prompt, by whose attention policies judge",
    "recent": "newest tokens of a row, which are never evicted",
    "recent_bits": "16, 8, fp8 or none: hold recent tokens in these too, where they are finer",
    "sinks": "first tokens of a prompt, neither evicted nor quantised",
    "drop": "tokens evicted at a time, by default an eighth of --budget",
    "group": "mean or all: what query heads of a KV head must agree on for scissorhands",
    "layer_budget": "uniform, later, or a factor of the budgets for each layer, as 0.5,1.5",
    "page_size": "tokens in a page of the store",
    "impl": f"who computes: {', '.join(get_args(kvtools.ops.Impl))}",
}
