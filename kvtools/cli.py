"""The command `kvtools`: what can run here, generation, search, scores of steps, caches, the demo.

What the user can put right is one line on standard error and exit code 2; --debug shows the
traceback.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

import kvtools.ops
from kvtools import models
from kvtools.config import PRESETS

FIGURES = ("", "prefill s", "tokens/s", "KV MiB")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"kvtools: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    root = Parser(
        prog="kvtools", description="N continuations of one prompt for little more than one."
    )
    commands = root.add_subparsers(required=True, metavar="command")

    env = commands.add_parser("env", parents=[common], help="what is installed, what can run")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=run_env)

    generate = commands.add_parser("generate", parents=[common], help="continue a prompt n times")
    add_generate(generate)
    generate.set_defaults(run=run_generate)

    from kvtools import search_command

    search = commands.add_parser("search", parents=[common], help="search step by step")
    search_command.add(search)
    search.set_defaults(run=search_command.run)

    quality = commands.add_parser(
        "quality", parents=[common], help="what compressed caches change in what a model says"
    )
    add_quality(quality)
    quality.set_defaults(run=run_quality)

    score = commands.add_parser(
        "score", parents=[common], help="score the steps of solutions with a process reward model"
    )
    add_score(score)
    score.set_defaults(run=run_score)

    demo = commands.add_parser("demo", parents=[common], help="16 rollouts of a real model")
    demo.add_argument("-n", type=count, default=16, help="continuations (default 16)")
    demo.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="default 64")
    demo.add_argument("--device", default=default_device(), help="default: cuda, else cpu")
    demo.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    demo.add_argument("--readme", type=Path, metavar="PATH", help="rewrite the table in this file")
    demo.set_defaults(run=run_demo)
    return root


def add_generate(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_prompt(command.add_mutually_exclusive_group(required=True))
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument("-n", type=count, default=1, help="continuations (default 1)")
    command.add_argument("--max-new-tokens", type=count, default=128, metavar="N")
    command.add_argument("--compare", action="store_true", help="run plain generate beside it")
    command.add_argument("--json", action="store_true", help="print the result as JSON")

    sampling = command.add_argument_group("sampling (default: what the model asks for)")
    sampling.add_argument("--temperature", type=number(float, 0), metavar="T")
    sampling.add_argument("--top-k", type=number(int, 0), metavar="K")
    sampling.add_argument("--top-p", type=number(float, 0, 1), metavar="P")
    sampling.add_argument("--min-p", type=number(float, 0, 1), metavar="P")
    sampling.add_argument("--seed", type=int, default=0, help="default 0")
    sampling.add_argument("--greedy", action="store_true", help="as does temperature 0")

    add_cache(command)


def add_quality(command: argparse.ArgumentParser) -> None:
    add_model(command)
    prompt = command.add_mutually_exclusive_group()
    add_prompt(prompt)
    command.add_argument("--probe", action="store_true", help="measure on the given prompt alone")
    command.add_argument(
        "--presets", default=",".join(PRESETS), metavar="A,B", help="default: all of them"
    )
    command.add_argument("--count", type=count, default=8, help="items per task (default 8)")
    command.add_argument(
        "--length", type=count, default=1000, help="tokens of a prompt (default 1000)"
    )
    command.add_argument(
        "--json", type=Path, metavar="PATH", help="write results here; what it has is kept"
    )
    add_cache(command)


def add_score(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "input", help='JSON lines with "question" and "solutions", lists of steps; - for stdin'
    )
    command.add_argument(
        "--output", type=Path, metavar="PATH", help="append here, and go on after what it has"
    )
    command.add_argument("--family", default="auto", metavar="NAME", help="default: told by itself")
    command.add_argument(
        "--separator", metavar="TEXT", help="behind every step, where the family leaves it open"
    )
    command.add_argument("--reference", metavar="NAME", help="model that an implicit PRM began as")
    command.add_argument(
        "--reference-quirks", action="store_true", help="score as published readers do"
    )
    command.add_argument("--batch", type=count, default=16, help="solutions at a time (default 16)")
    add_cache(command)


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="folder or hub name, or smollm2 for the packaged model")
    command.add_argument("--dtype", default="auto", help="default: that of the checkpoint")
    command.add_argument("--device", default=default_device(), help="default: cuda, else cpu")


def add_prompt(group: Any) -> None:
    group.add_argument("--prompt", metavar="TEXT")
    group.add_argument("--prompt-file", type=Path, metavar="PATH")
    group.add_argument("stdin", nargs="?", choices=["-"], help="read the prompt from stdin")


def add_cache(command: argparse.ArgumentParser) -> None:
    # Read off CacheConfig, so that the two cannot drift apart.
    cache = command.add_argument_group("cache (the fields of kvtools.CacheConfig)")
    for field in dataclasses.fields(kvtools.CacheConfig):
        cache.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"cache_{field.name}",
            type=literal,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"default {field.default}",
        )
    cache.add_argument("--preset", choices=list(PRESETS), help="where the options start from")


def cache_of(args: argparse.Namespace) -> tuple[kvtools.CacheConfig, dict]:
    """The cache that was asked for, and the options that were given."""
    given = {name[6:]: value for name, value in vars(args).items() if name.startswith("cache_")}
    if args.preset is None:
        return kvtools.CacheConfig(**given), given
    return kvtools.CacheConfig.preset(args.preset, **given), {"preset": args.preset} | given


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of that kind from `least` to `most`."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:
                return value
        bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, {bounds}")

    return convert


count = number(int, 1)


def literal(text: str) -> Any:
    """A number where it reads as one, a list where it has commas, else the word itself."""
    if "," in text:
        return [literal(part) for part in text.split(",")]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text == "none" else text


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_env(args: argparse.Namespace) -> None:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, version in found["versions"].items():
        facts.add_row(name, version or "not installed")
    facts.add_row("compiled part", found["compiled"])
    facts.add_row("CUDA", ", ".join(found["cuda"]) or "no device")
    console.print(facts)
    table = Table("operation", *next(iter(found["ops"].values())))
    for name, impls in found["ops"].items():
        table.add_row(name, *(reason or "yes" for reason in impls.values()))
    console.print(table)


def environment() -> dict:
    """What is installed and, per operation and implementation, why it cannot run here (or None)."""
    versions = {"python": platform.python_version()}
    for package in ("kvtools", "torch", "triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["kvtools"] = versions["kvtools"] or getattr(kvtools, "__version__", "source tree")
    versions["torch"] = torch.__version__  # knows its build (+cpu, +cu130)
    try:
        importlib.import_module("kvtools._host")
        compiled = "built"
    except ImportError as error:
        compiled = f"not built ({error}); pip install . without KVTOOLS_EXT=0 builds it"
    impls = [impl for impl in get_args(kvtools.ops.Impl) if impl != "auto"]
    ops = {
        name: {impl: obstacle(op, impl) for impl in impls} for name, op in kvtools.ops.OPS.items()
    }
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"versions": versions, "compiled": compiled, "cuda": cuda, "ops": ops}


def obstacle(op: Any, impl: str) -> str | None:
    """Why `impl` of `op` cannot run here, or None."""
    if impl == "triton" and not kvtools.ops.TRITON:
        return "pip install triton"
    if impl == "cpu" and not kvtools.ops.COMPILED:
        return "not built"
    if impl == "cuda" and op.name in kvtools.ops.IN_CUDA and not kvtools.ops.CUDA:
        return "built without CUDA"
    if impl not in op.impls:
        return "not written"
    if impl in ("triton", "cuda") and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def run_generate(args: argparse.Namespace) -> None:
    # All that can be wrong without a model comes before loading one.
    text = read_prompt(args)
    config, given = cache_of(args)
    options = sampling_options(args)
    model, tokenizer = load(args)
    inputs = encode(tokenizer, text, args.chat).to(model.device)

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


def load(args: argparse.Namespace, name: str | None = None, **how: Any) -> tuple[Any, Any]:
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f"--dtype {args.dtype}: not a torch dtype; try float32 or bfloat16")
    return models.load(name or args.model, args.dtype, args.device, **how)


def run_score(args: argparse.Namespace) -> None:
    models.need("transformers", "pip install 'kvtools[hf]'")
    from kvtools import prm
    from kvtools.prm import checkpoint, lines

    config, _ = cache_of(args)
    family: Any = args.family
    if family not in ("auto", *prm.FAMILIES):
        raise ValueError(f"--family {family}: expected {', '.join(prm.FAMILIES)} or auto")
    if args.separator is not None:
        family = prm.FAMILIES.get(family)
        if not hasattr(family, "separator"):
            raise ValueError("--separator is for --family trl, prm800k and pure")
        family = functools.partial(family, separator=args.separator)
    if args.input != "-" and not Path(args.input).is_file():
        raise FileNotFoundError(f"input {args.input}: no such file; name a file of JSON lines")
    done = lines.written(args.output) if args.output else []
    model, tokenizer = load(args, read=checkpoint.read)
    reference = load(args, args.reference, read=checkpoint.read)[0] if args.reference else None
    scorer = prm.load(
        model, tokenizer, family, reference=reference, reference_quirks=args.reference_quirks
    )
    with contextlib.ExitStack() as stack:
        source, sink = sys.stdin, sys.stdout
        if args.input != "-":
            source = stack.enter_context(open(args.input, encoding="utf-8"))
        if args.output:
            sink = stack.enter_context(args.output.open("a", encoding="utf-8"))
        bar = stack.enter_context(progress())
        line = bar.add_task("solutions", total=None)
        lines.score_lines(
            scorer, source, sink, done=done, config=config, batch=args.batch,
            progress=lambda n: bar.advance(line, n),
        )  # fmt: skip


def run_quality(args: argparse.Namespace) -> None:
    given_prompt = args.prompt or args.prompt_file or args.stdin
    if args.probe and not given_prompt:
        raise ValueError("--probe measures on a prompt: give --prompt, --prompt-file or -")
    text = read_prompt(args) if given_prompt else None
    from kvtools import quality, tasks

    config, given = cache_of(args)
    names = [name for name in args.presets.split(",") if name]
    contenders = [quality.Ours(name, kvtools.CacheConfig.preset(name)) for name in names]
    if given:
        contenders.append(quality.Ours(" ".join(f"{k}={v}" for k, v in given.items()), config))
    model, tokenizer = load(args)
    if text is not None:
        ids = encode(tokenizer, text, chat=False)["input_ids"][0].tolist()
        todo = {"your prompt": quality.probe_items(ids)}
    if not args.probe:
        texts = tasks.texts("held")
        window = dict(prompt=args.length, length=128)
        todo = {
            "text": tasks.text_items(tokenizer, texts, **window)[: args.count],
            "needle": tasks.needle_items(tokenizer, texts["types"], args.length, args.count, 0),
            "needle, asked later": tasks.needle_items(
                tokenizer, texts["types"], args.length, args.count, 0, seen=False
            ),
            "turns": tasks.turns_items(tokenizer, texts["types"], args.count, 0),
        } | (todo if text is not None else {})
    header = {
        "kvtools": kvtools.__version__,
        "model": args.model,
        "dtype": str(model.dtype),
        "items": repr((args.count, args.length, text)),
    }
    journal = quality.Journal(args.json, header)
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


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file:
        if not args.prompt_file.is_file():
            raise FileNotFoundError(
                f"--prompt-file {args.prompt_file}: no such file; name a text file"
            )
        text = args.prompt_file.read_text(encoding="utf-8")
    else:
        text = sys.stdin.read() if args.stdin else args.prompt
    if not text.strip():
        raise ValueError("the prompt is empty; give some text")
    return text


def sampling_options(args: argparse.Namespace) -> dict:
    options = {"max_new_tokens": args.max_new_tokens, "num_return_sequences": args.n}
    if args.greedy or args.temperature == 0:
        # transformers refuses several greedy continuations; sampling from the best one is the same.
        return options | ({"do_sample": True, "top_k": 1} if args.n > 1 else {"do_sample": False})
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return options | {"do_sample": True} | given


def encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template; leave out --chat")
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def progress() -> Progress:
    """A bar on standard error, gone when done; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def figures(row: dict) -> list[str]:
    rate = row["tokens_per_s"]
    return [
        f"{row['prefill_s']:.2f}",
        "-" if rate is None else f"{rate:.1f}",
        f"{row['memory']['total'] / 2**20:.2f}",
    ]


def run_demo(args: argparse.Namespace) -> None:
    from kvtools import demo

    demo.run(args.n, args.max_new_tokens, args.device, args.json, args.readme)


if __name__ == "__main__":
    sys.exit(main())
