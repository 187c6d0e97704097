"""The command `kvtools search`."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import kvtools
from kvtools.records import text_lines

from .options import (
    MOST,
    Usage,
    add_cache,
    add_model,
    add_prompt,
    cache_of,
    choice,
    count,
    encode,
    fits,
    load,
    number,
    read_prompt,
    seed,
    text,
    warn_length,
)
from .output import progress

HELP = "search step by step"
EXAMPLE = (
    'kvtools search smollm2 --prompt "What is 12 * 12 + 5?" --chat --strategy beam -n 8 '
    "--max-new-tokens 128"
)


def numbers_of(given: str) -> list[int]:
    """An argparse type: ascending numbers from 1 on, between commas."""
    try:
        found = [int(x) for x in given.split(",")]
    except ValueError:
        found = []
    if not found or found[0] < 1 or found != sorted({*found}):
        raise argparse.ArgumentTypeError(f"{given!r} is not like 1,2,4: ascending, from 1 on")
    return found


# As `kvtools.search` has them, which needs transformers: a test compares.
REDUCE = ("last", "min", "max", "mean", "sum", "prod", "gmean", "sum_logit", "softmin")
TEMPERATURES = (1e-6, 1e6)
STRATEGIES = ("best_of_n", "beam", "dvts", "rebase", "particle_filter", "particle_gibbs", "prune",
              "allocate", "deepen", "revise")  # fmt: skip
# What some strategies take, and the flags of it; which do is asked of the library.
OPTIONS = {
    "--beam": ("beam", count, "beam, dvts: continuations of each row that is kept (default 4)"),
    "--lookahead": (
        "lookahead",
        number(int, 0, MOST),
        "beam, dvts: greedy steps ahead that a row is judged with (default 0)",
    ),
    "--reduce": (
        "reduce",
        choice(*REDUCE),
        "beam, dvts, rebase, prune, allocate, deepen, revise: a row's score from its steps' by "
        f"{', '.join(REDUCE)} (default last)",
    ),
    "--resampling": (
        "resampling",
        choice("multinomial", "systematic"),
        "particle_filter, particle_gibbs: multinomial (default) or systematic",
    ),
    "--weight-temperature": (
        "temperature",
        number(float, *TEMPERATURES),
        "rebase, particle_filter, particle_gibbs: what scores are divided by (default 0.2 for "
        "rebase, else 1)",
    ),
    "--ess": (
        "ess",
        number(float, 0, 1),
        "particle_filter, particle_gibbs: resample only where the effective sample size is under "
        "this share of n (default: after every step)",
    ),
    "--iterations": ("iterations", count, "particle_gibbs: particle filters in turn (default 4)"),
    "--least": (
        "least",
        number(float, 0, 1),
        "prune: rows that the policy thinks right with less than this are dropped (default 0.5)",
    ),
    "--tokens": (
        "budget",
        number(float, 1, 1e12),
        "allocate: tokens per question on average, probes included; needed",
    ),
    "--table": ("table", Path, "allocate: a file of Table.save (default: independent samples)"),
    "--probes": ("probes", count, "allocate: samples of each question at first (default 4)"),
    "--difficulty": (
        "difficulty",
        choice("score", "votes"),
        "allocate: by the probes' mean score (default score) or the vote of their answers: votes",
    ),
    "--trigger": (
        "trigger",
        str,
        "deepen: what a row is told once it went back; Wait, that may be wrong. Again: (default)",
    ),
    "--depths": (
        "depths",
        numbers_of,
        "deepen: steps to go back, one after the other (default 1, 2, 4; as 1,2,4)",
    ),
    "--enough": (
        "enough",
        number(float, 0, 1),
        "deepen, revise: rows that score at least this are left alone (default 1)",
    ),
    "--critique": ("critique", str, "revise: what the policy is told after a draft"),
    "--revision": ("revision", str, "revise: what it is told after its critique"),
    "--rounds": ("rounds", count, "revise: revisions of each row (default 1)"),
    "--critique-tokens": (
        "critique_tokens",
        count,
        "revise: most tokens of a critique (default 128)",
    ),
}
# Rules of `kvtools.search.Stopping`, for best_of_n.
STOPPING = {
    "--stop-margin": (
        "margin", number(float, -1e6, 1e6),
        "a row stops where the trend of its log-odds is under this",
    ),
    "--stop-longer": (
        "longer", number(float, 0, 1e6), "a row stops at so many times the length of finished ones",
    ),
    "--stop-enough": ("enough", count, "a question stops with so many finished rows verified"),
    "--stop-verified": (
        "verified", number(float, 0, 1), "score of a verified row, for --stop-enough (default 0.9)",
    ),
    "--stop-sure": (
        "sure", number(float, 0, 1),
        "with --stop-votes: a question stops also where its first answer leads so probably",
    ),
    "--wave": ("wave", count, "rows of a question that grow at a time (default all)"),
}  # fmt: skip


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    source = command.add_mutually_exclusive_group(required=True)
    add_prompt(source)
    source.add_argument(
        "--questions",
        type=Path,
        metavar="PATH",
        help='JSON lines, each with "question" and, if known, "answer", a number',
    )
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument("--strategy", default="beam", choices=STRATEGIES, help="default beam")
    command.add_argument(
        "-n", "--n", type=count, help="rows per question (default 16); allocate: see --probes"
    )
    command.add_argument(
        "--scorer",
        type=scorer,
        default="arithmetic",
        metavar="X",
        help="arithmetic, which checks sums (default), or the folder or hub name of a PRM",
    )
    command.add_argument(
        "--pick",
        default="max",
        choices=("max", "weighted", "majority"),
        help="the best candidate (default), or a vote weighted by scores, or a plain one; --reduce "
        "says what a candidate's score is",
    )
    command.add_argument("--batch", type=count, default=8, help="questions at a time (default 8)")
    command.add_argument("--seed", type=seed, default=0, help="default 0")
    command.add_argument("--json", action="store_true", help="print candidates and trace as JSON")

    command.add_argument(
        "--plot", type=picture, metavar="PATH",
        help="draw the steps as a tree coloured by score: .svg, .png or .pdf; needs matplotlib",
    )  # fmt: skip

    steps = command.add_argument_group("steps")
    steps.add_argument(
        "--delimiter",
        type=text,
        action="append",
        metavar="X",
        help="ends a step; repeatable (default \\n\\n)",
    )
    steps.add_argument(
        "--done", type=text, metavar="X", help="a solution that holds it is complete"
    )
    steps.add_argument("--step-tokens", type=count, default=256, metavar="N", help="default 256")
    steps.add_argument(
        "--max-new-tokens", type=count, default=1024, metavar="N", help="default 1024"
    )
    steps.add_argument("--depth", type=count, default=40, help="selections (default 40)")
    steps.add_argument("--temperature", type=number(float, 0, 1e6), default=0.8, help="default 0.8")
    steps.add_argument(
        "--top-p", type=number(float, 0, 1), default=1.0, metavar="P", help="default 1"
    )

    some = command.add_argument_group("options of some strategies")
    for flag, (name, kind, meaning) in OPTIONS.items():
        some.add_argument(
            flag, dest=f"rule_{name}", type=kind, default=argparse.SUPPRESS, metavar="X",
            help=meaning,
        )  # fmt: skip
    early = command.add_argument_group("best_of_n: when to stop early")
    for flag, (name, kind, meaning) in STOPPING.items():
        early.add_argument(
            flag, dest=f"stop_{name}", type=kind, default=argparse.SUPPRESS, metavar="X",
            help=meaning,
        )  # fmt: skip
    early.add_argument(
        "--stop-votes", action="store_true", help="a question stops when its vote is settled"
    )
    add_cache(command)


def run(args: argparse.Namespace) -> None:
    # All that can be wrong without a model comes before loading one.
    questions, answers = read_questions(args)
    config, given = cache_of(args)
    strategy, options = strategy_of(args)
    scorer = scorer_of(args, answers)
    said = {name[5:]: x if isinstance(x, (int, float, list)) else str(x)
            for name, x in vars(args).items() if name.startswith(("rule_", "stop_"))}  # fmt: skip
    model, tokenizer = load(args)
    fits(config, given, model, widest(args, options) * min(args.batch, len(questions)))
    rollouts = kvtools.Rollouts(model, config, temperature=args.temperature, top_p=args.top_p)

    def prompt(text: str) -> list[int]:
        return encode(tokenizer, text, args.chat)["input_ids"][0].tolist()

    warn_length(model, max(len(prompt(x)) for x in questions))
    steps = kvtools.search.Steps(
        tokenizer,
        [x.replace(r"\n", "\n") for x in args.delimiter or [r"\n\n"]],
        args.step_tokens,
        args.max_new_tokens,
        args.depth,
        done=lambda text: bool(args.done) and args.done in text,
        prompt=prompt,
    )
    found: list[dict] = []
    results = []
    costs: Counter[str] = Counter()
    with progress() as bar:
        line = bar.add_task(args.strategy, total=len(questions))
        for start in range(0, len(questions), args.batch):
            some = questions[start : start + args.batch]
            if "budget" in options:
                options["budget"] = args.rule_budget * len(some)
            result = strategy(rollouts, some, scorer, steps, seed=args.seed, **options)
            found += rows_of(result, args.pick, options.get("reduce", "last"))
            results.append(result)
            costs.update(generated=result.generated, encoded=result.encoded)
            if "stop" in options:
                costs.update(saved=round(result.saved))
            costs.update({f"{part}_s": round(x, 4) for part, x in result.seconds.items()})
            bar.advance(line, len(some))
    show(args, found, costs, {"options": said, "config": given})
    if args.plot is not None:  # last: what was found is told by then
        kvtools.search.draw(joined(results), args.plot)


def show(args: argparse.Namespace, found: list[dict], costs: Counter[str], how: dict) -> None:
    if args.json:
        header = {"model": args.model, "strategy": args.strategy, "n": args.n, "seed": args.seed}
        print(json.dumps(header | how | {"questions": found} | costs, indent=2))
        return
    for row in found:
        print(f"--- {row['question']}\n{(row['best'] or '').strip()}")
    table = Table("candidates", *costs)
    total = sum(len(row["candidates"]) for row in found)
    table.add_row(str(total), *(f"{x:.2f}" if name.endswith("_s") else str(x)
                                for name, x in costs.items()))  # fmt: skip
    Console().print(table)


def read_questions(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Questions, and the answers that are known."""
    if args.questions is None:
        return [read_prompt(args)], {}
    place = f"--questions {args.questions}"
    if not args.questions.is_file():
        raise Usage(f"{place}: no such file; name a JSONL file")
    questions, answers = [], {}
    try:
        with args.questions.open("rb") as file:
            for number, line in text_lines(file):
                question, answer = question_of(line, number)
                if answer is not None and answers.setdefault(question, answer) != answer:
                    raise ValueError(f"line {number}: another answer to a question above")
                questions.append(question)
    except (ValueError, OSError) as error:
        raise Usage(f"{place}: {error}") from error
    if not questions:
        raise Usage(f"{place}: it holds no question")
    return questions, answers


def question_of(line: str, number: int) -> tuple[str, Any]:
    """A line's question, and its answer or None."""
    form = f'line {number} is not {{"question": "...", "answer": 1}}'
    try:
        found = json.loads(line)
        question, answer = found["question"], found.get("answer")
    except RecursionError as error:
        raise ValueError(f"line {number} is nested too deeply") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(form) from error
    if not isinstance(question, str) or isinstance(answer, bool):
        raise ValueError(form)
    if isinstance(answer, str):
        answer = kvtools.search.sums.value(answer)
        if answer is None:
            raise ValueError(f"line {number}: the answer {found['answer']!r} is no number")
    elif answer is not None and not (isinstance(answer, (int, float)) and math.isfinite(answer)):
        raise ValueError(form)
    return question, answer


def strategy_of(args: argparse.Namespace) -> tuple[Any, dict]:
    """The strategy, and the options of it that were given."""
    strategy = getattr(kvtools.search, args.strategy)
    known = inspect.signature(strategy).parameters
    given = {name[5:]: value for name, value in vars(args).items() if name.startswith("rule_")}
    for flag, (name, *_) in OPTIONS.items():
        if name in given and name not in known:
            raise Usage(f"{flag} is not an option of --strategy {args.strategy}")
    if args.strategy == "allocate":
        if "budget" not in given:
            raise Usage("--strategy allocate needs --tokens: how many per question")
        if "table" in given:
            given["table"] = table_of(given["table"])
        given["answer"] = kvtools.search.final_number
    if "n" in known:
        args.n = given["n"] = args.n or 16
    elif args.n is not None:
        raise Usage(f"-n is not an option of --strategy {args.strategy}: --probes and --table are")
    rules = {name[5:]: x for name, x in vars(args).items() if name.startswith("stop_")}
    if rules.pop("votes"):
        rules["answer"] = kvtools.search.final_number
    if rules and "stop" not in known:
        flag = next(iter(rules))
        flag = {"answer": "--stop-votes", "wave": "--wave"}.get(flag, f"--stop-{flag}")
        raise Usage(f"{flag} is not an option of --strategy {args.strategy}")
    if "verified" in rules and "enough" not in rules:
        raise Usage("--stop-verified needs --stop-enough: how many verified rows end a question")
    if "sure" in rules and "answer" not in rules:
        raise Usage("--stop-sure needs --stop-votes: it is about votes")
    if rules:
        given["stop"] = kvtools.search.Stopping(**rules)
    if "beam" in known:
        beam = given.get("beam", known["beam"].default)
        if args.n % beam:
            raise Usage(f"-n {args.n} is not a multiple of --beam {beam}")
    if args.strategy == "particle_gibbs" and args.n < 2 and given.get("iterations") != 1:
        raise Usage(f"-n {args.n}: particle_gibbs needs two rows or more")
    rows, flag = (args.n, "-n") if "n" in known else (given.get("probes", 4), "--probes")
    if args.temperature == 0 and rows > 1:
        raise Usage(f"--temperature 0 makes all {rows} rows of {flag} equal")
    return strategy, given


def table_of(path: Path) -> Any:
    if not path.is_file():
        raise Usage(f"--table {path}: no such file; name one that Table.save wrote")
    try:
        table = kvtools.search.Table.load(path)
    except ValueError as error:
        raise Usage(f"--table {error}") from error
    for i, entry in enumerate(table.entries):
        known = ["none", *(x for x in STRATEGIES if x != "allocate")]
        if entry.strategy not in known:
            raise Usage(
                f"--table {path}: entries[{i}] has a strategy {entry.strategy!r}, which is none of "
                f"{', '.join(known)}"
            )
        n = entry.options.get("n", 1)
        if not kvtools.config.is_int(n) or n < 1:
            raise Usage(f"--table {path}: entries[{i}].options has n={n!r}, no number of rows")
    return table


def widest(args: argparse.Namespace, options: dict) -> int:
    """Most rows of a question at a time."""
    if args.strategy == "allocate":
        probes = options.get("probes", 4)
        table = options.get("table") or kvtools.search.Table.samples(probes=probes)
        return max(probes, *(int(x.options.get("n", 16)) for x in table.entries))
    return args.n * (2 if args.strategy in ("deepen", "revise") else 1)


def picture(name: str) -> Path:
    """An argparse type: a file to draw into."""
    path = Path(name)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"{name!r}: end its name in .svg, .png or .pdf")
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r}: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is needed: pip install matplotlib")
    return path


def joined(results: list) -> Any:
    """The results of batches as one, for the picture."""
    first = 0
    total = dataclasses.replace(results[0], questions=[], candidates=[], trace=[], stopped=[])
    for result in results:
        total.questions += result.questions
        total.candidates += result.candidates
        total.stopped += result.stopped
        total.trace += [dataclasses.replace(e, question=e.question + first) for e in result.trace]
        first += len(result.questions)
    return total


def scorer(name: str) -> str:
    """An argparse type: arithmetic, a folder, or a name on the hub."""
    if name == "arithmetic" or Path(name).is_dir():
        return name
    near = difflib.get_close_matches(name.lower(), ["arithmetic"], cutoff=0.6)
    if near:
        raise argparse.ArgumentTypeError(f"{name!r} is no folder; did you mean arithmetic?")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise argparse.ArgumentTypeError(
            f"{name!r} is neither arithmetic, nor a folder, nor a name on the hub as owner/model"
        )
    return name


def scorer_of(args: argparse.Namespace, answers: dict[str, Any]) -> Any:
    if args.scorer == "arithmetic":
        return kvtools.search.arithmetic(answers)
    from kvtools import prm
    from kvtools.prm import checkpoint

    try:
        model, tokenizer = load(args, args.scorer, read=checkpoint.read)
        return prm.load(model, tokenizer)
    except (ValueError, OSError) as error:
        raise type(error)(f"--scorer {args.scorer}: {error}") from error


def rows_of(result: Any, pick: str, reduce: str) -> list[dict]:
    best = result.best(pick, answer=kvtools.search.final_number, reduce=reduce)
    return [
        {
            "question": question,
            "best": None if best[i] is None else best[i].text,
            "candidates": [
                {"text": c.text, "scores": c.scores, "finished": c.finished}
                for c in result.candidates[i]
            ],
            "trace": [dataclasses.asdict(e) for e in result.trace if e.question == i],
        }
        for i, question in enumerate(result.questions)
    ]
