"""What bench.gpu found: the project's own targets, and all rows for people to read.

python -m bench.gpu_report ARCHIVE keeps what came back from a device in bench/results, failures
included, and writes the table of docs/kernels.md, its status and README's from it.
"""

import argparse
import json
import math
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gpu_checks import ROOT
from bench.gpu_parts import PARTS
from bench.targets import WORDS, Targets
from kvtools.cli import demo


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


def read(archive: Path) -> dict[str, dict]:
    """Results by part, of an archive of bench.gpu."""
    with tarfile.open(archive) as tar:
        members = {x.name: x for x in tar if x.name.removesuffix(".json") in PARTS}
        return {
            name.removesuffix(".json"): json.load(tar.extractfile(x)) for name, x in members.items()
        }


def keep(new: dict[str, dict], folder: Path) -> Path:
    """Add results to those of their device in `folder`: cells of the same commit are joined, parts
    of another replaced."""
    device = next(iter(new.values()))["device"]
    path = folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    for part, result in new.items():
        old = parts.get(part, {})
        if old.get("commit") == result["commit"]:
            result["cells"] = old["cells"] | result["cells"]
            result["targets"] = targets(part, result["cells"])
        parts[part] = result
    ordered = {part: parts[part] for part in PARTS if part in parts}
    path.write_text(json.dumps({"device": device, "parts": ordered}, indent=1) + "\n")
    return path


HEADS = ("", "kvtools ms", "of the floor", "packed ms", "fastest other", "ms")
TIMED = ("attention", "sampling", "quant", "evict", "scoring", "end_to_end")


def lines(parts: dict[str, dict]) -> list[list[str]]:
    """The table: a line per cell, the faster of our implementations, what failed included."""

    def fastest(rows: dict, names: list[str]) -> tuple[str, dict]:
        timed = [(name, rows[name]) for name in names if "ms" in rows[name]]
        return min(timed, key=lambda x: x[1]["ms"], default=("", {}))

    found = []
    for part in TIMED:
        for cell, rows in parts.get(part, {}).get("cells", {}).items():
            if not all(isinstance(row, dict) for row in rows.values()) or "formats" in cell:
                continue
            groups: dict[str, list[str]] = {"16": [], "packed": [], "others": []}
            for name in rows:
                if not name.startswith("kvtools"):
                    groups["others"].append(name)
                elif name.split(",")[0] in ("kvtools", "kvtools 16-bit"):
                    groups["16"].append(name)
                elif name.split(",")[0] in ("kvtools int4", "kvtools balanced"):
                    groups["packed"].append(name)
            (_, ours), (_, packed), (other, theirs) = (fastest(rows, x) for x in groups.values())
            ms = [figure(x.get("ms")) or "-" for x in (ours, packed, theirs)]
            if not ours and any("failed" in rows[name] for name in groups["16"]):
                ms[0] = "failed"
            share = f"{ours['of_floor']:.2f}" if "of_floor" in ours else "-"
            found.append([f"{part}: {cell}", ms[0], share, ms[1], other or "-", ms[2]])
    return found


def status(result: dict) -> str:
    """The status in sentences: what ran, what failed, which targets are met."""
    parts = result["parts"]
    tests = parts.get("tests", {}).get("cells", {}).values()
    passed, failed = (sum(x.get(name, 0) for x in tests) for name in ("passed", "failures"))
    smoke = [row for cell in parts.get("smoke", {}).get("cells", {}).values()
             for row in cell.values() if "skipped" not in row]  # fmt: skip
    died = sum("failed" in row for row in smoke)
    judged = [x for part in parts.values() for x in part.get("targets", []) if x["ok"] is not None]
    missed = [f"{x['name']} ({figure(x['value'])}, wanted {figure(x['target'])})"
              for x in judged if not x["ok"]]  # fmt: skip
    said = [
        f"On {result['device']}, {len(smoke) - died} of {len(smoke)} kernels and formats ran and "
        f"gave what the reference gives, and of the tests {passed} passed and {failed} failed. "
        f"{len(judged) - len(missed)} of {len(judged)} targets are met."
    ]
    if missed:
        said.append(f"Missed: {'; '.join(missed)}.")
    unfinished = [x["failed"] for x in parts.values() if "failed" in x]
    if unfinished:
        said.append(f"Not finished: {'; '.join(unfinished)}.")
    return " ".join(said)


def write(result: dict, readme: Path, page: Path) -> None:
    """The table in `page`, and the status in both, between their markers."""
    wheres = [part["where"] for part in result["parts"].values()]
    commits = ", ".join(dict.fromkeys(str(x["commit"]) for x in wheres))
    where = wheres[-1]
    caption = (
        f"{result['device']}, torch {where['torch']}, Triton {where['triton']}, transformers "
        f"{where['transformers']}, {where['date']}, commit {commits}. Milliseconds, medians; the "
        "floor is the least time of its bytes at the rate of a copy, or of its operations at that "
        "of a matrix product; packed: int4, and balanced for whole steps."
    )
    demo.rewrite(page, "gpu", [HEADS, *lines(result["parts"])], caption)
    for path in (readme, page):
        head, tail = demo.parts(path, "gpu-status")
        path.write_text(f"{head}\n{status(result)}\n{tail}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_report", description=__doc__.split("\n\n")[1])
    parser.add_argument("archive", type=Path, help="of bench.gpu")
    parser.add_argument("--results", type=Path, metavar="DIR", default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, metavar="PATH", default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, metavar="PATH", default=ROOT / "docs" / "kernels.md")
    args = parser.parse_args(argv)
    path = keep(read(args.archive), args.results)
    write(json.loads(path.read_text()), args.readme, args.page)
    print(f"{path}, {args.readme} and {args.page} are written")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
