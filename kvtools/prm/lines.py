"""Solutions scored line by line, from JSON to JSON, so that a run can be cut off and go on."""

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from . import PRM, Scores

REDUCED = [field.name for field in fields(Scores) if field.name not in ("margins", "probs")]


def score_lines(
    prm: PRM,
    source: Iterable[str],
    sink: IO[str],
    *,
    done: list[str] | None = None,
    progress: Callable[[int], Any] = lambda solutions: None,
    **options: Any,
) -> None:
    """Score questions with their solutions, one per line.

    Args:
        prm: scores.
        source: JSON lines with "question" and "solutions": a list of steps each, or a text, which
            is split at blank lines. An "id" is handed through.
        sink: gets a JSON line for each, at once: "id", "input" (a checksum of the line), "margins"
            and "probs" of each solution's steps, and each reduction of `Scores` by name. What is no
            number is null.
        done: the checksums of lines that `sink` has already, see `written`; they are skipped.
        progress: called with the number of solutions, after each batch and for lines skipped.
        options: further arguments of `PRM.score`.

    Raises:
        ValueError: a line is not as it should be, or not the one that was scored before.
    """
    done = done or []
    lines = (line.strip() for line in source)
    for i, line in enumerate(filter(None, lines)):
        record, mark = parse(line, i + 1), checksum(line)
        if i < len(done):
            if done[i] != mark:
                raise ValueError(f"line {i + 1} is not the one that was scored: name a new output")
            progress(len(record["solutions"]))
            continue
        scores = prm.score(record["question"], record["solutions"], progress=progress, **options)
        found = {"id": record["id"]} if "id" in record else {}
        found |= {"input": mark}
        for name in ("margins", "probs"):
            found[name] = [[number(x) for x in row.tolist()] for row in getattr(scores, name)]
        for name in REDUCED:
            found[name] = [number(x) for x in getattr(scores, name).tolist()]
        sink.write(json.dumps(found, allow_nan=False) + "\n")
        sink.flush()


def written(path: Path) -> list[str]:
    """The checksums of what `path` holds; a last line that was cut off is removed."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        done = [json.loads(line)["input"] for line in whole.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds something else than scores: name a new output") from error
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


def parse(line: str, number: int) -> dict[str, Any]:
    """A line's question and solutions, texts split into steps."""
    try:
        record = json.loads(line)
        question, solutions = record["question"], record["solutions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'line {number} is no JSON with "question" and "solutions"') from error
    solutions = [x.split("\n\n") if isinstance(x, str) else x for x in solutions]
    steps = [step for x in solutions for step in (x if isinstance(x, list) else [None])]
    if not all(isinstance(x, str) for x in [question, *steps]):
        raise ValueError(f"line {number}: a solution must be a list of steps, or a text")
    return record | {"solutions": solutions}


def checksum(line: str) -> str:
    return f"{zlib.crc32(line.encode()):08x}"


def number(x: float) -> float | None:
    """JSON knows neither infinities nor what is no number."""
    return x if abs(x) < float("inf") else None
