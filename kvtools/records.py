"""Records appended to a file of JSON lines, so that a run can be cut off and go on."""

import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# How such a file begins: with the settings that it was made with, in its first record.
BEGIN = '{"settings": {"kvtools": '


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
def opened(path: Path, settings: dict[str, Any]) -> Iterator[tuple[IO[str], list[dict[str, Any]]]]:
    """A file to append records to, and those that it has; nobody else may have it open like this.

    The first record begins with "settings", the others with "input", or "id" and that. A last
    record that was cut off is removed. Devices and pipes are written to.

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


def check(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The records that `opened` would find, or what it would raise, before a model is loaded."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.exists() and stat.S_ISREG(path.stat().st_mode):
        return written(path, path.read_bytes(), settings)[0]
    return []


def written(path: Path, text: bytes, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The records in a file, and the bytes that they take."""
    alien = ValueError(f"{path} holds something else than such results: name a new output")
    if not text:
        return [], 0
    whole = text[: text.rfind(b"\n") + 1]
    if not text.startswith(BEGIN.encode()):
        raise alien
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        if not all(isinstance(record["input"], str) for record in records):
            raise alien
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
    return records, len(whole)


def checksum(line: str) -> str:
    return f"{zlib.crc32(line.encode()):08x}"


def finite(x: float) -> float | None:
    """JSON knows neither infinities nor what is no number."""
    return x if abs(x) < float("inf") else None
