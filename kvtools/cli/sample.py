"""The command `kvtools sample`."""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvtools
from kvtools import records

from .options import (
    MOST,
    Usage,
    add_cache,
    add_model,
    cache_of,
    count,
    encode,
    fits,
    load,
    number,
    place,
    seed,
    text,
    warn_length,
)
from .output import progress
from .search import question_of

HELP = "draw any number of samples of many prompts"
EXAMPLE = (
    "kvtools sample smollm2 problems.jsonl --chat -n 256 --until-correct 1 --output samples.jsonl"
)
FORM = '{"prompt": "..."} or {"question": "...", "answer": 1}'


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "input", help='JSON lines with "prompt", or "question" and perhaps "answer"; - for stdin'
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="append here, and go on after what it has; it must be of the same model and settings",
    )
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument("-n", type=count, default=16, help="samples per prompt (default 16)")
    command.add_argument(
        "--rows", type=count, default=64, help="samples that grow at a time (default 64)"
    )
    command.add_argument(
        "--max-new-tokens", type=count, default=256, metavar="N", help="of a sample (default 256)"
    )
    command.add_argument(
        "--stop", type=text, action="append", metavar="TEXT", help="ends a sample; repeatable"
    )
    command.add_argument(
        "--until-correct",
        type=count,
        metavar="K",
        help="end a prompt's samples after K whose sums and answer are right",
    )
    command.add_argument(
        "--tokens", action="store_true", help="write token ids and their log-probabilities, too"
    )
    command.add_argument("--seed", type=seed, default=0, help="default 0")

    ends = command.add_argument_group("budget of all samples (default: none)")
    ends.add_argument("--max-tokens", type=count, metavar="N", help="stop after so many tokens")
    ends.add_argument(
        "--max-seconds", type=number(float, 0, MOST), metavar="S", help="stop after so long"
    )

    sampling = command.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=number(float, 0, 1e6), default=1.0, metavar="T", help="default 1"
    )
    for flag, kind, default, metavar, meaning in (
        ("--top-k", number(int, 0, 2**31 - 1), 0, "K", "of the K likeliest (default: of all)"),
        ("--top-p", number(float, 1e-9, 1), 1.0, "P", "of the likeliest that hold P (default 1)"),
        ("--min-p", number(float, 0, 1), 0.0, "P", "of those with P times the likeliest's"),
    ):
        sampling.add_argument(flag, type=kind, default=default, metavar=metavar, help=meaning)
    add_cache(command)


def run(args: argparse.Namespace) -> None:
    # All that can be wrong without a model comes before loading one.
    config, given = cache_of(args)
    if args.temperature == 0 and args.n > 1:
        raise Usage(f"--temperature 0 makes all {args.n} samples of -n equal")
    if args.input != "-" and not Path(args.input).is_file():
        raise Usage(f"input {args.input}: no such file; name a file of JSON lines")
    filters = {x: getattr(args, x) for x in ("temperature", "top_k", "top_p", "min_p")}
    settings = {
        "kvtools": kvtools.__version__, "model": place(args.model), "dtype": args.dtype,
        "chat": args.chat, "n": args.n, "seed": args.seed, "max_new_tokens": args.max_new_tokens,
        "stop": args.stop, "until_correct": args.until_correct, "tokens": args.tokens,
        **filters, "cache": given,
    }  # fmt: skip
    output = None if str(args.output) in ("None", "-", "/dev/stdout") else args.output
    lines = read(args)
    if output:
        try:
            there(lines, records.check(output, settings), args)
        except (ValueError, OSError) as error:
            raise Usage(f"--output {error}") from error
    correct = verdict(lines) if args.until_correct else None
    model, tokenizer = load(args)
    fits(config, given, model, min(args.rows, args.n * len(lines)))
    prompts = [encode(tokenizer, x["text"], args.chat)["input_ids"][0].tolist() for x in lines]
    warn_length(model, max(map(len, prompts)))
    rollouts = kvtools.Rollouts(model, config, seed=args.seed, **filters)
    with contextlib.ExitStack() as stack:
        sink, held = sys.stdout, []
        if output:
            sink, held = stack.enter_context(records.opened(output, settings))
        skip, right = there(lines, held, args)
        first, done = not held, Counter(prompt for prompt, _ in skip)
        del held
        bar = stack.enter_context(progress())
        line = bar.add_task("samples", total=args.n * len(lines), completed=len(skip))
        begin, drawn, cut = time.monotonic(), 0, 0
        some = rollouts.sample(
            prompts, args.n, rows=args.rows, max_new_tokens=args.max_new_tokens,
            until=ends(tokenizer, args.stop) if args.stop else None, skip=skip, tokenizer=tokenizer,
            enough=lambda x: bool(correct) and right[x.prompt] >= args.until_correct,
            max_tokens=args.max_tokens, max_seconds=args.max_seconds,
        )  # fmt: skip
        for sample in some:
            drawn += len(sample.tokens)
            rate = drawn / max(time.monotonic() - begin, 1e-9)
            bar.update(line, description=f"samples, {rate:.0f} tokens/s")
            if sample.why == "budget":  # it is drawn again when the run goes on
                cut += 1
                continue
            record = record_of(sample, lines[sample.prompt], args.tokens)
            if correct:
                record["correct"] = correct(sample)
                right[sample.prompt] += record["correct"]
            if first:
                record, first = {"settings": settings} | record, False
            sink.write(json.dumps(record, allow_nan=False) + "\n")
            sink.flush()
            done[sample.prompt] += 1
            bar.advance(line)
            if correct and right[sample.prompt] == args.until_correct:
                # Those that are dropped are done, too.
                bar.advance(line, args.n - done[sample.prompt])
        if cut:
            print(
                f"kvtools: the budget has cut off {cut} samples, which are left out: run again "
                "with a greater one to go on",
                file=sys.stderr,
            )


def read(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each line: its text, a mark, and if there are such its answer and id."""
    found = []
    with contextlib.ExitStack() as stack:
        source: Any = getattr(sys.stdin, "buffer", sys.stdin)
        try:
            if args.input != "-":
                source = stack.enter_context(open(args.input, "rb"))
            for number, line in records.text_lines(source):
                found.append(parse(line, number) | {"mark": f"{number}:{records.checksum(line)}"})
        except (ValueError, OSError) as error:
            raise Usage(f"input {args.input}: {error}") from error
    if not found:
        raise Usage(f"input {args.input}: it holds no prompt")
    return found


def parse(line: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        given = {"id": record["id"]} if "id" in record else {}
        prompt = record.get("prompt")
    except RecursionError as error:
        raise ValueError(f"line {number} is nested too deeply") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"line {number} is not {FORM}") from error
    if prompt is None:
        question, answer = question_of(line, number)
        given |= {"text": question, "answer": answer}
    elif isinstance(prompt, str):
        given |= {"text": prompt, "answer": None}
    else:
        raise ValueError(f"line {number} is not {FORM}")
    if not given["text"].strip():
        raise ValueError(f"line {number}: the prompt is empty")
    return given


def ends(tokenizer: Any, stops: list[str]) -> Callable[[list[int]], bool]:
    """Whether tokens, of which the last is new, say one of these texts."""
    most = 8 + max(len(stop.encode()) for stop in stops)  # a byte may be a token

    def until(tokens: list[int]) -> bool:
        said = tokenizer.decode(tokens[-most:])
        return any(stop in said for stop in stops)

    return until


def verdict(lines: list[dict[str, Any]]) -> Callable[[Any], bool]:
    """Whether a sample is right: its equations hold, and it ends with the answer if that is
    known."""
    search = kvtools.search
    checks = [
        search.arithmetic({} if x["answer"] is None else {x["text"]: x["answer"]}) for x in lines
    ]

    def correct(sample: Any) -> bool:
        each = lines[sample.prompt]
        said = each["answer"] is None or search.final_number(sample.text) is not None
        return said and checks[sample.prompt].check(each["text"], sample.text) is True

    return correct


def there(
    lines: list[dict[str, Any]], held: list[dict[str, Any]], args: argparse.Namespace
) -> tuple[set[tuple[int, int]], Counter[int]]:
    """Samples that need not be drawn, and how many of each prompt's are right."""
    known = {x["mark"]: i for i, x in enumerate(lines)}
    skip, right = set(), Counter()
    for record in held:
        i = known.get(record["input"])
        if i is None:
            raise ValueError(f"{args.output} is of another input: name a new output")
        skip.add((i, record.get("number")))
        right[i] += bool(record.get("correct"))
    if args.until_correct:
        enough = [i for i in right if right[i] >= args.until_correct]
        skip |= {(i, number) for i in enough for number in range(args.n)}
    return skip, right


def record_of(sample: Any, line: dict[str, Any], tokens: bool) -> dict[str, Any]:
    record = {"id": line["id"]} if "id" in line else {}
    record |= {
        "input": line["mark"], "number": sample.number, "text": sample.text, "why": sample.why,
        "length": len(sample.tokens), "logprob": records.finite(sum(sample.logprobs)),
        "seed": sample.seed,
    }  # fmt: skip
    return record | ({"tokens": sample.tokens, "logprobs": sample.logprobs} if tokens else {})
