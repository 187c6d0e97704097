"""Solutions scored line by line, from JSON to JSON, so that a run can be cut off and go on."""

import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from . import PRM, Scores

REDUCED = [field.name for field in fields(Scores) if field.name not in ("margins", "probs")]
# How a file of scores begins: with the settings that it was made with, in its first record.
BEGIN = '{"settings": {"kvtools": '


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
        done: the checksums of lines that `sink` has already, see `opened`; they are skipped.
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


def text_lines(source: Iterable[bytes | str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1 on."""
    for number, line in enumerate(source, 1):
        if isinstance(line, bytes):
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not UTF-8") from error
        if line.strip():
            yield number, line.strip()


@contextmanager
def opened(path: Path, settings: dict[str, Any]) -> Iterator[tuple[IO[str], list[str]]]:
    """A file to append scores to, and the checksums of lines that it has; nobody else may have it
    open like this. A last record that was cut off is removed. Devices and pipes are written to.

    Args:
        settings: what the file must have been made with; begins with "kvtools", the version.

    Raises:
        ValueError: the file is something else, or was made with other settings; nothing in it was
            changed.
        BlockingIOError: another process writes to it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("w", encoding="utf-8") as file:
            yield file, []
        return
    import fcntl  # not on Windows, where nothing else here needs it either

    fresh = not path.exists()
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as raw:
        try:
            fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BlockingIOError(f"{path}: another process writes to it") from error
        try:
            done, whole = written(path, raw.read(), settings)
            raw.truncate(whole)
            raw.seek(whole)
            with open(raw.fileno(), "w", encoding="utf-8", closefd=False) as file:
                yield file, done
        finally:
            if fresh and not os.fstat(raw.fileno()).st_size:
                path.unlink(missing_ok=True)


def check(path: Path, settings: dict[str, Any]) -> None:
    """Raise what `opened` would, without opening: before a model is loaded."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.exists() and stat.S_ISREG(path.stat().st_mode):
        written(path, path.read_bytes(), settings)


def written(path: Path, text: bytes, settings: dict[str, Any]) -> tuple[list[str], int]:
    """The checksums of the records in a file of scores, and the bytes that they take."""
    alien = ValueError(f"{path} holds something else than scores: name a new output")
    if not text:
        return [], 0
    whole = text[: text.rfind(b"\n") + 1]
    if not text.startswith(BEGIN.encode()):
        raise alien
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        done = [str(record["input"]) for record in records]
        old = records[0]["settings"] if records else settings
        names = {*old, *settings}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise alien from error
    # What follows the last line's end must be what a record of ours begins with.
    begins = (
        [b'{"id": ', b'{"input": '] if records else [json.dumps({"settings": old})[:-1].encode()]
    )
    rest = text[len(whole) :]
    if not any(rest.startswith(x) or x.startswith(rest) for x in begins):
        raise alien
    other = sorted(x for x in names if old.get(x) != settings.get(x))
    if other:
        said = ", ".join(f"{x}={old.get(x)!r}, not {settings.get(x)!r}" for x in other)
        raise ValueError(f"{path} was made with {said}: name a new output")
    return done, len(whole)


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


def checksum(line: str) -> str:
    return f"{zlib.crc32(line.encode()):08x}"


def finite(x: float) -> float | None:
    """JSON knows neither infinities nor what is no number."""
    return x if abs(x) < float("inf") else None
