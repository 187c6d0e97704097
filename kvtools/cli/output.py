"""What commands print: progress, and figures of a run."""

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

FIGURES = ("", "prefill s", "tokens/s", "KV MiB")


def progress() -> Progress:
    """A bar on standard error, gone when done; nothing where that is no terminal."""
    console = Console(stderr=True)
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), *times)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def figures(row: dict) -> list[str]:
    rate = row["tokens_per_s"]
    return [
        f"{row['prefill_s']:.2f}",
        "-" if rate is None else f"{rate:.1f}",
        f"{row['memory']['total'] / 2**20:.2f}",
    ]
