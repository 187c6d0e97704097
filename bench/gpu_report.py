"""What bench.gpu found: the project's own targets, and all rows for people to read."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gpu_parts import PARTS
from bench.targets import WORDS, Targets


def targets(part: str, cells: dict[str, dict]) -> Targets:
    """The figures the project set itself; None where there is no figure."""
    found = Targets()

    def ratio(cell: str, *rivals: str) -> float | None:
        """Of the fastest of the rivals whose names begin so."""
        return min((row["ratio"] for name, row in cells[cell].items()
                    if name.startswith(rivals) and "ratio" in row), default=None)  # fmt: skip

    for cell in cells:
        heads, _, shape = cell.partition(" ")
        if part == "tests":
            found.add(f"tests, {cell}: failures", cells[cell].get("failures"), 0)
        elif part in ("smoke", "sanitizers"):
            failed = [row for row in cells[cell].values() if "failed" in row]
            found.add(f"{part}, {cell}: failures", len(failed), 0)
        elif part == "attention" and "+" not in shape:
            found.add(f"{cell}, nothing shared: over FlashInfer and FA3",
                      ratio(cell, "flashinfer", "fa3"), 1 / 1.1, least=True)  # fmt: skip
            if "kvtools int4" in cells[cell]:  # long rows
                share = cells[cell]["kvtools"].get("of_floor")
                found.add(f"{cell}: share of the copy rate", share, 0.75, least=True)
                quarter = ratio(cell, "kvtools int4")
                quarter = quarter and 1 / quarter
                found.add(f"{cell}: int4 over 16 bits", quarter, 2.5, least=True)
        elif part == "attention" and shape == "64 x 8192 + 256":
            found.add(f"{cell}: over SDPA", ratio(cell, "sdpa"), 8, least=True)
            found.add(f"{cell}: over FlashInfer", ratio(cell, "flashinfer"), 1, least=True)
        elif part == "sampling" and cell == "b=64,v=151936 top_k,top_p":
            over = ratio(cell, "transformers")
            found.add(f"{cell}: over transformers", over, 20, least=True)
        elif part == "scoring" and cell.startswith("step_scores"):
            for rival in ("full_logits", "gather_matmul"):
                found.add(f"{cell}: over {rival}", ratio(cell, rival), 1, least=True)
    return found


def report(folder: Path, console: Console) -> None:
    """Write all rows of all parts to report.md, and print targets and ratios."""
    results = {}
    for part in PARTS:
        path = folder / f"{part}.json"
        results[part] = json.loads(path.read_text()) if path.exists() else {}
    where = next((x["where"] for x in results.values() if "where" in x), {})
    lines = ["# kvtools on a GPU", "", ", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += ["| target | value | wanted | |", "| --- | ---: | ---: | --- |"]
    for result in results.values():
        lines += [
            f"| {x['name']} | {figure(x['value'])} | {figure(x['target'])} | {WORDS[x['ok']]} |"
            for x in result.get("targets", [])
        ]
    for part, result in results.items():
        lines += ["", f"## {part}", "", result.get("failed", "" if result else "not run")]
        for cell, rows in result.get("cells", {}).items():
            lines += ["", f"**{cell}**", "", *table(rows)]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    for part, result in results.items():
        for cell, rows in result.get("cells", {}).items():
            console.print(f"{part} / {cell}: {brief(rows)}", highlight=False, soft_wrap=True)
    for part, result in results.items():
        if "failed" in result or not result:
            console.print(f"{part}: {result.get('failed', 'not run')}", highlight=False)
        found = Targets()
        found.extend(result.get("targets", []))
        found.show(console)


COLUMNS = ("ms", "p20", "p80", "event ms", "graph ms", "ratio", "bytes", "GB/s", "TFLOP/s",
           "of_floor", "peak MiB")  # fmt: skip


def table(rows: dict) -> list[str]:
    if not all(isinstance(row, dict) for row in rows.values()):
        return [f"{name}: {figure(x)}  " for name, x in rows.items()]
    lines = [f"| | {' | '.join(COLUMNS)} | |", "| --- |" + " ---: |" * len(COLUMNS) + " --- |"]
    for name, row in rows.items():
        words = "; ".join(f"{k}: {x}" for k, x in row.items() if isinstance(x, str))
        figures = " | ".join(figure(row.get(x)) for x in COLUMNS)
        lines.append(f"| {name} | {figures} | {words.replace('|', '/')} |")
    return lines


def brief(rows: dict) -> str:
    """Our time and share of the floor, then others' times as multiples of ours (ms, where we have
    none); - for those without."""
    words = []
    for name, row in rows.items():
        if not isinstance(row, dict):
            words.append(f"{name} {figure(row)}")
        elif not words and "ms" in row:
            words.append(f"{row['ms']:.4g} ms, {row.get('of_floor', math.nan):.2f} of the floor")
        else:
            unit = "ratio" if "ratio" in row else "ms"
            words.append(f"{name} {row[unit]:.3g}" if unit in row else f"{name} -")
    return ", ".join(words)


def figure(x: Any) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)
