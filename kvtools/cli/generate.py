"""The command `kvtools generate`."""

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from kvtools import models

from .options import (
    Usage,
    add_cache,
    add_model,
    add_prompt,
    cache_of,
    count,
    encode,
    fits,
    flag,
    load,
    number,
    read_prompt,
    seed,
    warn_length,
)
from .output import FIGURES, figures, progress

HELP = "continue a prompt n times"
EXAMPLE = 'kvtools generate smollm2 --prompt "Name a prime." --chat -n 4 --bits 4 --compare'


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_prompt(command.add_mutually_exclusive_group(required=True))
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument("-n", type=count, default=1, help="continuations (default 1)")
    command.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="default 128"
    )
    command.add_argument("--compare", action="store_true", help="run plain generate beside it")
    command.add_argument("--json", action="store_true", help="print the result as JSON")

    sampling = command.add_argument_group("sampling (default: what the model asks for)")
    sampling.add_argument(
        "--temperature", type=number(float, 0, 1e6), metavar="T", help="0 is greedy"
    )
    sampling.add_argument(
        "--top-k", type=number(int, 0, 2**31 - 1), metavar="K", help="of the K likeliest"
    )
    sampling.add_argument(
        "--top-p", type=number(float, 0, 1), metavar="P", help="of the likeliest that hold P"
    )
    sampling.add_argument(
        "--min-p",
        type=number(float, 0, 1),
        metavar="P",
        help="of those with P times the likeliest's",
    )
    sampling.add_argument("--seed", type=seed, default=0, help="default 0")
    sampling.add_argument("--greedy", action="store_true", help="as does temperature 0")

    add_cache(command)


def run(args: argparse.Namespace) -> None:
    # All that can be wrong without a model comes before loading one.
    text = read_prompt(args)
    config, given = cache_of(args)
    options = sampling_options(args)
    model, tokenizer = load(args)
    fits(config, given, model, args.n)
    inputs = encode(tokenizer, text, args.chat).to(model.device)
    warn_length(model, inputs["input_ids"].shape[1])

    rows = {}
    with progress() as bar:
        for name in ("kvtools", "plain") if args.compare else ("kvtools",):
            task = bar.add_task(name, total=args.max_new_tokens)
            torch.manual_seed(args.seed)
            new, rows[name] = models.measure(
                model,
                inputs,
                config if name == "kvtools" else None,
                lambda task=task: bar.advance(task),
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
            rows[name]["texts"] = tokenizer.batch_decode(new, skip_special_tokens=True)
    result = {
        "model": args.model,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": args.seed,
        "config": given,
        "prompt_tokens": inputs["input_ids"].shape[1],
        **rows["kvtools"],
    }
    if args.compare:
        result["plain"] = rows["plain"]
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for i, text in enumerate(rows["kvtools"]["texts"]):
        print(f"--- {i + 1}\n{text.strip()}")
    table = Table(*FIGURES)
    for name, row in rows.items():
        table.add_row(name, *figures(row))
    Console().print(table)


def sampling_options(args: argparse.Namespace) -> dict:
    options = {"max_new_tokens": args.max_new_tokens, "num_return_sequences": args.n}
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.greedy or args.temperature == 0:
        greedy = "--greedy" if args.greedy else "--temperature 0"
        if args.n > 1:
            raise Usage(f"-n {args.n} with {greedy} gives the same continuation {args.n} times")
        others = [flag(name) for name in given if name != "temperature" or args.greedy]
        if others:
            raise Usage(f"{greedy} with {' and '.join(others)}: give one of them")
        return options | {"do_sample": False}
    return options | {"do_sample": True} | given
