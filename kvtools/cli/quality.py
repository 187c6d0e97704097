"""The command `kvtools quality`."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import kvtools
from kvtools.config import PRESETS

from .options import (
    Usage,
    add_cache,
    add_model,
    add_prompt,
    cache_of,
    count,
    encode,
    fits,
    load,
    place,
    presets,
    read_prompt,
    warn_length,
)
from .output import progress

HELP = "what compressed caches change in what a model says"
EXAMPLE = "kvtools quality path/to/model --probe --prompt-file notes.txt"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    prompt = command.add_mutually_exclusive_group()
    add_prompt(prompt)
    command.add_argument(
        "--probe",
        action="store_true",
        help="measure on the given prompt alone, of 128 tokens or more",
    )
    command.add_argument(
        "--presets", type=presets, default=list(PRESETS), metavar="A,B", help="default: all of them"
    )
    command.add_argument("--count", type=count, default=8, help="items per task (default 8)")
    command.add_argument(
        "--length", type=count, default=1000, help="tokens of a prompt (default 1000)"
    )
    command.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="write results here, and go on after what it has; it must be of the same settings",
    )
    add_cache(command)


def run(args: argparse.Namespace) -> None:
    given_prompt = args.prompt or args.prompt_file or args.stdin
    if args.probe and not given_prompt:
        raise Usage("--probe measures on a prompt: give --prompt, --prompt-file or -")
    text = read_prompt(args) if given_prompt else None
    from kvtools import quality

    config, given = cache_of(args)
    contenders = [quality.Ours(name, kvtools.CacheConfig.preset(name)) for name in args.presets]
    if given:
        contenders.append(quality.Ours(" ".join(f"{k}={v}" for k, v in given.items()), config))
    header = {
        "kvtools": kvtools.__version__,
        "model": place(args.model),
        "dtype": args.dtype,
        "items": repr((args.count, args.length, text)),
    }
    try:
        journal = quality.Journal(args.json, header)
    except (ValueError, OSError) as error:
        raise Usage(f"--json {error}") from error
    model, tokenizer = load(args)
    fits(config, given, model, 8)
    if text is not None:
        ids = encode(tokenizer, text, chat=False)["input_ids"][0].tolist()
        warn_length(model, len(ids))
        todo = {"your prompt": quality.probe_items(ids)}
    if not args.probe:
        try:
            todo = tasks_of(tokenizer, args.length, args.count) | (todo if text is not None else {})
        except ValueError as error:
            raise Usage(f"--length {args.length}: {error}") from error
    with progress() as bar:
        for task, items in todo.items():
            steps = -(-len(items) // 8) * (len(contenders) + 1)
            line = bar.add_task(task, total=steps)
            journal.run(
                model, task, items, contenders, progress=lambda line=line: bar.advance(line)
            )
    table = Table("task", "cache", "bits", "16-bit over it", "KL, nats", "top-1", "right", "")
    for task in todo:
        for name, row in journal.cells[task].items():
            if name in ("exact", *(x.name for x in contenders)):
                right = "-" if task in ("text", "your prompt") else f"{row['right']:.2f}"
                table.add_row(
                    task, name, f"{row['bits']:.2f}", f"{row['ratio']:.1f}", f"{row['kl']:.5f}",
                    f"{row['top1']:.3f}", right, quality.verdict(row["kl"]),
                )  # fmt: skip
    Console().print(table)


def tasks_of(tokenizer: Any, length: int, count: int) -> dict[str, list]:
    """What `quality` measures, by name."""
    from kvtools import tasks

    texts = tasks.texts("held")
    topic = texts["types"]
    return {
        "text": tasks.text_items(tokenizer, texts, prompt=length, length=128)[:count],
        "needle": tasks.needle_items(tokenizer, topic, length, count, 0),
        "needle, asked later": tasks.needle_items(tokenizer, topic, length, count, 0, seen=False),
        "turns": tasks.turns_items(tokenizer, topic, count, 0),
    }
