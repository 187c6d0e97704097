"""The command `kvtools`: what can run here, generation, search, scores of steps, caches, the demo.

An error is one line on standard error; --debug shows the traceback. The exit code is 2 where the
command line is wrong (an option, its value, what a file that it names holds), so that nothing has
run yet, and 1 where something failed later.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
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
from kvtools.config import BITS, PRESETS
from kvtools.policy import POLICIES

FIGURES = ("", "prefill s", "tokens/s", "KV MiB")


class Usage(ValueError):
    """The command line is wrong."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has seen enough; Python must not flush to it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"kvtools: {message(error)}", file=sys.stderr)
        return 2 if isinstance(error, Usage) else 1
    return 0


def message(error: Exception) -> str:
    """One line; what a field of CacheConfig is blamed for is put down to its option."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        said = f"{type(error).__name__}: {said}; --debug shows where"
    names = "|".join(field.name for field in dataclasses.fields(kvtools.CacheConfig))
    return re.sub(rf"^({names})(?==| has )", lambda x: flag(x[1]), said)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    root = Parser(
        prog="kvtools", description="N continuations of one prompt for little more than one."
    )
    root.add_argument("--version", action="version", version=f"kvtools {kvtools.__version__}")
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
    demo.add_argument("--device", type=device, default=default_device(), help=DEVICE)
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
    sampling.add_argument("--temperature", type=number(float, 0, 1e6), metavar="T")
    sampling.add_argument("--top-k", type=number(int, 0, 2**31 - 1), metavar="K")
    sampling.add_argument("--top-p", type=number(float, 0, 1), metavar="P")
    sampling.add_argument("--min-p", type=number(float, 0, 1), metavar="P")
    sampling.add_argument("--seed", type=seed, default=0, help="default 0")
    sampling.add_argument("--greedy", action="store_true", help="as does temperature 0")

    add_cache(command)


def add_quality(command: argparse.ArgumentParser) -> None:
    add_model(command)
    prompt = command.add_mutually_exclusive_group()
    add_prompt(prompt)
    command.add_argument("--probe", action="store_true", help="measure on the given prompt alone")
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


def add_score(command: argparse.ArgumentParser) -> None:
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
    group.add_argument("--prompt", metavar="TEXT")
    group.add_argument("--prompt-file", type=Path, metavar="PATH")
    group.add_argument("stdin", nargs="?", choices=["-"], help="read the prompt from stdin")


def add_cache(command: argparse.ArgumentParser) -> None:
    # Read off CacheConfig, so that the two cannot drift apart.
    cache = command.add_argument_group("cache (the fields of kvtools.CacheConfig)")
    for field in dataclasses.fields(kvtools.CacheConfig):
        cache.add_argument(
            flag(field.name),
            dest=f"cache_{field.name}",
            type=CACHE[field.name],
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"default {field.default}",
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
    fits(config, given, model, args.n)
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
    try:
        return models.load(name or args.model, args.dtype, args.device, **how)
    except FileNotFoundError as error:
        raise Usage(str(error)) from error


def run_score(args: argparse.Namespace) -> None:
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
            lines.check(output, settings)
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
            sink, done = stack.enter_context(lines.opened(output, settings))
        bar = stack.enter_context(progress())
        line = bar.add_task("solutions", total=None)
        try:
            lines.score_lines(
                scorer, source, sink, settings=settings, done=done, config=config,
                batch=args.batch, progress=lambda n: bar.advance(line, n),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"input {args.input}: {error}") from error


def place(name: str) -> str:
    """The name of a model, or where its folder is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def run_quality(args: argparse.Namespace) -> None:
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


def encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise Usage("this model has no chat template; leave out --chat")
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
