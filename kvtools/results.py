"""Files of results: written whole or not at all, and never over something else."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def claim(
    path: Path, settings: dict[str, Any], keys: Iterable[str] = (), stale: Iterable[str] = ()
) -> dict[str, Any] | None:
    """What a file of results has, or None where there is none or nothing to look at (a pipe).

    Args:
        path: where results are to be written; its folder is made.
        settings: entries that those of the file must be equal to.
        keys: further entries that it must have.
        stale: names of settings that may differ: such results are to be replaced, so None.

    Raises:
        ValueError: the file is something else, or was made with other settings; says which.
        IsADirectoryError: it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.is_file() or not path.stat().st_size:
        return None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        alien = not old.keys() >= {*settings, *keys}
    except (ValueError, RecursionError, AttributeError):
        alien = True
    if alien:
        raise ValueError(f"{path} holds something else than such results: name a new file")
    other = {name for name in settings if old[name] != settings[name]}
    if other - {*stale}:
        said = ", ".join(differing(x, old[x], settings[x]) for x in sorted(other - {*stale}))
        raise ValueError(f"{path} was made with {said}: name a new file, or remove it")
    return None if other else old


def differing(name: str, old: Any, new: Any, most: int = 80) -> str:
    """Two values of a setting for a message; of long ones, such as a prompt, where they differ."""
    said = [repr(old), repr(new)]
    if max(map(len, said)) > most:
        start = max(len(os.path.commonprefix(said)) - most // 4, 0)
        end = start + most
        said = ["..." * (start > 0) + x[start:end] + "..." * (end < len(x)) for x in said]
    return f"{name}={said[0]}, not {said[1]}"


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one go: it is as before, or whole, whatever happens in between."""
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(content)
        return
    with replacing(path) as scratch:
        scratch.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives an empty file beside a regular one, or one to come, to be written instead: it takes its
    place, and its mode, where the block ends without an error."""
    path = Path(os.path.realpath(path))  # what a link leads to, not the link
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        scratch.open("xb").close()
        mode = (path if path.exists() else scratch).stat().st_mode & 0o777
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.chmod(mode)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
