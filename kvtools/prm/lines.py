"""Solutions scored line by line, from JSON to JSON, so that a run can be cut off and go on."""

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import IO, Any

from ..records import checksum, finite, text_lines
from . import PRM, Scores

REDUCED = [field.name for field in fields(Scores) if field.name not in ("margins", "probs")]


def score_lines(
    prm: PRM,
    source: Iterable[bytes | str],
    sink: IO[str],
    *,
    settings: dict[str, Any] | None = None,
    done: list[str] | None = None,
    progress: Callable[[int], Any] = lambda solutions: None,
    **options: Any,
) -> None:
    """Score questions with their solutions, one per line.

    Args:
        prm: scores.
        source: JSON lines with "question" and "solutions": a list of steps each, or a text, which
            is split at blank lines. An "id" is handed through. Bytes are UTF-8.
        sink: gets a JSON line for each, at once: "id", "input" (a checksum of the line), "margins"
            and "probs" of each solution's steps, and each reduction of `Scores` by name. What is no
            number is null.
        settings: what all was made with; goes into the first record, as "settings".
        done: the checksums of lines that `sink` has already; they are skipped.
        progress: called with the number of solutions, after each batch and for lines skipped.
        options: further arguments of `PRM.score`.

    Raises:
        ValueError: a line is not as it should be, or not the one that was scored before; names the
            line of `source`, blank ones counted.
    """
    done = done or []
    i = 0
    for number, line in text_lines(source):
        record, mark = parse(line, number), checksum(line)
        i += 1
        if i <= len(done):
            if done[i - 1] != mark:
                raise ValueError(f"line {number} is not the one that was scored: name a new output")
            progress(len(record["solutions"]))
            continue
        try:
            scores = prm.score(
                record["question"], record["solutions"], progress=progress, **options
            )
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        found: dict[str, Any] = {"settings": settings} if settings and i == 1 else {}
        found |= {"id": record["id"]} if "id" in record else {}
        found |= {"input": mark}
        for name in ("margins", "probs"):
            found[name] = [[finite(x) for x in row.tolist()] for row in getattr(scores, name)]
        for name in REDUCED:
            found[name] = [finite(x) for x in getattr(scores, name).tolist()]
        sink.write(json.dumps(found, allow_nan=False) + "\n")
        sink.flush()
    if i < len(done):
        raise ValueError(f"the output has {len(done)} records, the input {i}: name a new output")


def parse(line: str, number: int) -> dict[str, Any]:
    """A line's question and solutions, texts split into steps."""
    try:
        record = json.loads(line)
        question, solutions = record["question"], record["solutions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'line {number} is no JSON with "question" and "solutions"') from error
    except RecursionError as error:
        raise ValueError(f"line {number} is nested too deeply") from error
    if not isinstance(solutions, list):
        raise ValueError(f'line {number}: "solutions" must be a list, of lists of steps or texts')
    solutions = [x.split("\n\n") if isinstance(x, str) else x for x in solutions]
    steps = [step for x in solutions for step in (x if isinstance(x, list) else [None])]
    if not all(isinstance(x, str) for x in [question, *steps]):
        raise ValueError(f"line {number}: a solution must be a list of steps, or a text")
    return record | {"solutions": solutions}
