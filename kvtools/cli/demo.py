"""The command `kvtools demo`: rollouts of SmolLM2-135M-Instruct on a page of Python's
documentation, four ways."""

import argparse
import json
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table

from kvtools import models, results

from .env import environment
from .options import DEVICE, Usage, count, default_device, encode
from .options import device as device_type
from .output import figures, progress

HELP = "16 rollouts of a real model, four ways"
EXAMPLE = "kvtools demo -n 8 --max-new-tokens 32"

QUESTION = (
    "Explain in your own words what garbage collection is, and why programs should close files."
)
SEED = 1  # whose samples are worth reading
COLUMNS = ("", "prefill s", "tokens/s", "KV MiB", "ratio", "ratio to 16 bit")


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument("-n", type=count, default=16, help="continuations (default 16)")
    command.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="default 64")
    command.add_argument("--device", type=device_type, default=default_device(), help=DEVICE)
    command.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    command.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite the table in this file"
    )


def configs() -> dict:
    """The rows of the table: a name, and the cache (None is plain `generate`)."""
    from kvtools import CacheConfig

    return {
        "plain generate": None,
        "kvtools, 16-bit": CacheConfig(),
        **{f"kvtools, {name}": CacheConfig.preset(name) for name in ("balanced", "max")},
    }


def run(args: argparse.Namespace) -> None:
    """Run all rows, print them, and write what was asked for."""
    n, new_tokens, device = args.n, args.max_new_tokens, args.device
    json_path, readme = args.json, args.readme
    console = Console()
    settings = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "n": n,
                "new_tokens": new_tokens, "device": place(device)}  # fmt: skip
    if json_path:
        try:
            results.claim(json_path, settings, ["rows"])
        except (ValueError, OSError) as error:
            raise Usage(f"--json {error}") from error
    if readme:
        try:
            parts(readme, "demo")
        except (ValueError, OSError) as error:
            raise Usage(f"--readme {error}") from error
    model, tokenizer = models.load("smollm2", torch.float32, device)
    inputs = encode(tokenizer, f"{topics['objects']}\nQuestion: {QUESTION}", chat=True)
    inputs = inputs.to(model.device)
    length = inputs["input_ids"].shape[1]
    console.print(
        f"SmolLM2-135M-Instruct, float32, {place(device)}: {n} rollouts of up to {new_tokens} "
        f"tokens after a prompt of {length}.\n[bold]{QUESTION}[/bold]"
    )
    with torch.no_grad():
        model(inputs["input_ids"][:, :16])  # the first pass is slow, whoever makes it
    rows = {}
    for name, config in configs().items():
        console.rule(name)
        with progress() as bar:
            task = bar.add_task(name, total=new_tokens)
            torch.manual_seed(SEED)
            new, rows[name] = models.measure(
                model,
                inputs,
                config,
                lambda bar=bar, task=task: bar.advance(task),
                do_sample=True,
                temperature=0.7,
                top_p=0.95,
                top_k=0,
                max_new_tokens=new_tokens,
                num_return_sequences=n,
                pad_token_id=tokenizer.pad_token_id,
            )
        seconds, rate, held = figures(rows[name])
        console.print(f"prefill {seconds} s, then {rate} tokens/s; holds {held} MiB of KV")
        for text in tokenizer.batch_decode(new[:3], skip_special_tokens=True):
            console.print("• " + " ".join(text.split())[:200], markup=False, highlight=False)
    result = {
        **settings,
        "prompt_tokens": length,
        **where(device),
        **commit(),
        "rows": rows,
    }
    table = Table(*COLUMNS)
    for cells in lines(result):
        table.add_row(*cells)
    console.print(table)
    console.print(caption(result), highlight=False)
    console.print(f"[bold]{gain(rows)}[/bold]", highlight=False)
    if json_path:
        results.write(json_path, json.dumps(result, indent=2) + "\n")
    if readme:
        rewrite(readme, "demo", [COLUMNS, *lines(result)], caption(result))


def lines(result: dict) -> list[list[str]]:
    """The cells of the table."""
    plain = result["rows"]["plain generate"]["memory"]["total"]
    out = []
    for name, row in result["rows"].items():
        ratio = plain / row["memory"]["total"]
        # Plain generate held 4 bytes per element here; compression is quoted against 2.
        out.append([name, *figures(row), f"{ratio:.1f}", f"{ratio / 2:.1f}"])
    return out


def gain(rows: dict) -> str:
    """What the balanced cache gained over plain generate, in a sentence."""
    plain, ours = rows["plain generate"], rows["kvtools, balanced"]
    said = [
        f"held {plain['memory']['total'] / ours['memory']['total']:.0f} times less",
        f"prefilled {plain['prefill_s'] / ours['prefill_s']:.1f} times as fast",
    ]
    if plain["tokens_per_s"] and ours["tokens_per_s"]:
        said.append(f"decoded {ours['tokens_per_s'] / plain['tokens_per_s']:.1f} times as fast")
    return f"Beside plain generate, balanced {', '.join(said[:-1])} and {said[-1]}."


def caption(result: dict) -> str:
    dirty = ", with uncommitted changes" if result["dirty"] else ""
    return (
        f"{result['n']} rollouts of {result['new_tokens']} tokens, prompt of "
        f"{result['prompt_tokens']}, {result['dtype']}, {result['device']}, "
        f"{result['threads']} threads, torch {result['torch']}, "
        f"transformers {result['transformers']}, commit {result['commit']}{dirty}. "
        "KV MiB is what the tensors of the cache hold; ratio: plain generate's over it, as it ran "
        "in float32, and counted at 2 bytes per element."
    )


def rewrite(readme: Path, name: str, rows: Sequence[Sequence[str]], caption: str) -> None:
    """Put a table, its first row the heads, between the markers `name` of `readme`."""
    head, tail = parts(readme, name)
    ruled = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
    results.write(readme, f"{head}\n{table}\n\n{caption}\n{tail}")


def parts(readme: Path, name: str) -> tuple[str, str]:
    """What a file has up to the first marker `name`, and from the second on."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = readme.read_text(encoding="utf-8")
    head, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{readme} has no {begin} ... {end} to put the table in")
    return head + begin, end + rest.partition(end)[2]


def where(device: str) -> dict:
    """What ran, apart from our own sources, and when."""
    return {
        "device": place(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": environment()["versions"]["transformers"],
        "date": date.today().isoformat(),
    }


def place(device: str) -> str:
    """A name of the device for people."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else device


def commit() -> dict:
    """Which sources ran; None outside of git."""

    def git(*command: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }
