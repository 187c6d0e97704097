"""The command `kvtools score`."""

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import kvtools
from kvtools import models, records

from .options import Usage, add_cache, add_model, cache_of, count, fits, load, place, text
from .output import progress

HELP = "score the steps of solutions with a process reward model"
EXAMPLE = "kvtools score path/to/prm solutions.jsonl --output scores.jsonl"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "input", help='JSON lines with "question" and "solutions", lists of steps; - for stdin'
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="append here, and go on after what it has; it must be of the same model and settings",
    )
    command.add_argument("--family", default="auto", metavar="NAME", help="default: told by itself")
    command.add_argument(
        "--separator",
        type=text,
        metavar="TEXT",
        help="behind every step, where the family leaves it open",
    )
    command.add_argument("--reference", metavar="NAME", help="model that an implicit PRM began as")
    command.add_argument(
        "--reference-quirks", action="store_true", help="score as published readers do"
    )
    command.add_argument("--batch", type=count, default=16, help="solutions at a time (default 16)")
    add_cache(command)


def run(args: argparse.Namespace) -> None:
    models.need("transformers", "pip install 'kvtools[hf]'")
    from kvtools import prm
    from kvtools.prm import checkpoint, lines

    config, given = cache_of(args)
    family: Any = args.family
    if family not in ("auto", *prm.FAMILIES):
        raise Usage(f"--family {family}: expected {', '.join(prm.FAMILIES)} or auto")
    if args.separator is not None:
        family = prm.FAMILIES.get(family)
        if not hasattr(family, "separator"):
            raise Usage("--separator is for --family trl, prm800k and pure")
        family = functools.partial(family, separator=args.separator)
    if args.input != "-" and not Path(args.input).is_file():
        raise Usage(f"input {args.input}: no such file; name a file of JSON lines")
    settings = {
        "kvtools": kvtools.__version__, "model": place(args.model), "dtype": args.dtype,
        "family": args.family, "separator": args.separator,
        "reference": args.reference and place(args.reference),
        "reference_quirks": args.reference_quirks, "cache": given,
    }  # fmt: skip
    output = None if str(args.output) in ("None", "-", "/dev/stdout") else args.output
    if output:
        try:
            records.check(output, settings)
        except (ValueError, OSError) as error:
            raise Usage(f"--output {error}") from error
    model, tokenizer = load(args, read=checkpoint.read)
    fits(config, given, model, args.batch)
    reference = load(args, args.reference, read=checkpoint.read)[0] if args.reference else None
    scorer = prm.load(
        model, tokenizer, family, reference=reference, reference_quirks=args.reference_quirks
    )
    with contextlib.ExitStack() as stack:
        source: Any = getattr(sys.stdin, "buffer", sys.stdin)
        if args.input != "-":
            source = stack.enter_context(open(args.input, "rb"))
        sink, done = sys.stdout, []
        if output:
            sink, held = stack.enter_context(records.opened(output, settings))
            done = [record["input"] for record in held]
        bar = stack.enter_context(progress())
        line = bar.add_task("solutions", total=None)
        try:
            lines.score_lines(
                scorer, source, sink, settings=settings, done=done, config=config,
                batch=args.batch, progress=lambda n: bar.advance(line, n),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"input {args.input}: {error}") from error
