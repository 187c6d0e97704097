"""What bench.cpu says of its cells: the targets, the table of docs/cpu.md and its caption."""

from functools import partial

from bench.bench_end_to_end import CONFIGS, OURS
from bench.targets import Targets


def targets(cells: dict[str, dict]) -> Targets:
    """The figures the project set itself."""
    found = Targets()
    add = partial(found.add, least=True)
    balanced = "kvtools balanced"
    for dtype, times, overall in (("float32", 5, 8), ("bfloat16", 15, 12)):
        if "attention" in cells:
            rows = cells["attention"]["shared"][dtype]
            add(f"attention over SDPA, {dtype}", rows["sdpa"]["ratio"], times)
            add(f"attention's share of the floor, {dtype}", rows["cpu"]["of_floor"], 0.6)
            rows = cells["attention"]["alone"][dtype]
            fastest = min(rows["sdpa"]["ratio"], rows["sdpa gqa"]["ratio"])
            add(f"nothing shared, over the faster SDPA, {dtype}", fastest, 1)
        if "generate" in cells:
            rows = cells["generate"][dtype]
            plain = rows["plain"]
            ratio = rows[OURS]["tokens_per_s"] / plain["tokens_per_s"]
            add(f"tokens/s over generate's, {dtype}", ratio, overall)
            ratio = rows[balanced]["tokens_per_s"] / rows[OURS]["tokens_per_s"]
            add(f"balanced over 16-bit, {dtype}", ratio, 1)
            for name in (OURS, balanced):
                ratio = rows[name]["memory"] / plain["memory"]
                found.add(f"KV of {name} over generate's, {dtype}", ratio, 0.1)
        if "step" in cells:
            rows = cells["step"][dtype]
            found.add(f"step over forward, {dtype}", rows["step"]["ratio"], 1.25)
            found.add(f"host over forward, {dtype}", rows["host"], 0.05)
        if "own" in cells:
            ratio = 1 / cells["own"][dtype][balanced]["ratio"]
            add(f"balanced over 16-bit, 4,096 tokens a row, {dtype}", ratio, 1.25)
    if "attention" in cells:
        ratio = 1 / cells["attention"]["long"]["bfloat16"]["cpu int4"]["ratio"]
        add("4-bit KV over 16-bit, 4,096 tokens", ratio, 2)
    if "sample" in cells:
        ratio = cells["sample"]["top_k,top_p"]["transformers"]["ratio"]
        add("sample over transformers'", ratio, 10)
    if "sweep" in cells:
        for length, row in cells["sweep"]["one row"].items():
            add(f"one row over generate, prompt of {length}", row["ratio"], 1)
    return found


def table(cells: dict[str, dict]) -> list[list[str]]:
    """The rows of the table; the heads first."""
    lines = [["", "kvtools", "rival", "", "ratio", "of the floor"]]

    def add(name: str, ours: dict, rival: str, row: dict) -> None:
        lines.append([
            name, f"{ours['ms']:.2f} ms", f"{row['ms']:.2f} ms", rival, f"{row['ratio']:.1f}",
            f"{ours['of_floor']:.2f}",
        ])  # fmt: skip

    for name, title in (("shared", "attention, 32 rows sharing 2,048 tokens"),
                        ("alone", "attention, 32 rows of 512, nothing shared")):  # fmt: skip
        for dtype, rows in cells["attention"][name].items():
            for rival in ("sdpa", "sdpa gqa", "sdpa prefix + merge"):
                if name == "shared" or rival != "sdpa prefix + merge":
                    add(f"{title}, {dtype}", rows["cpu"], rival, rows[rival])
    rows = cells["attention"]["long"]["bfloat16"]
    ratio = {**rows["cpu"], "ratio": 1 / rows["cpu int4"]["ratio"]}
    add("attention, 4-bit, 32 rows of 4,096", rows["cpu int4"], "16-bit", ratio)
    for name, rows in cells["sample"].items():
        add(f"sample, {name}", rows["cpu"], "transformers", rows["transformers"])
    for dtype in ("float32", "bfloat16"):
        rows = cells["generate"][dtype]
        plain = rows["plain"]
        for name in CONFIGS:
            rate = rows[name]["tokens_per_s"]
            lines.append([
                f"generate, {name.removeprefix('kvtools ')}, {dtype}", f"{rate:.0f} tokens/s",
                f"{plain['tokens_per_s']:.0f} tokens/s", "generate",
                f"{rate / plain['tokens_per_s']:.1f}", "",
            ])  # fmt: skip
        rows = cells["step"][dtype]
        lines.append([
            f"decode step, {dtype}", f"{rows['step']['ms']:.1f} ms",
            f"{rows['forward']['ms']:.1f} ms", "forward, no context",
            f"{1 / rows['step']['ratio']:.2f}", "",
        ])  # fmt: skip
        if "own" in cells:
            rows = cells["own"][dtype]
            ours, rival = (rows[x] for x in ("kvtools balanced", OURS))
            lines.append([
                f"decode, balanced, 4,096 tokens a row, {dtype}",
                f"{ours['tokens_per_s']:.0f} tokens/s", f"{rival['tokens_per_s']:.0f} tokens/s",
                "16-bit", f"{1 / ours['ratio']:.1f}", "",
            ])  # fmt: skip
    few = cells["generate"]["few"]
    ours = few[OURS]["tokens_per_s"]
    for name in ("quanto int4", "hqq int4", "generate_batch"):
        rate = few[name].get("tokens_per_s")
        lines.append([
            f"generate, {few[OURS]['rows']} x {few[OURS]['new']} tokens", f"{ours:.1f} tokens/s",
            "does not run" if rate is None else f"{rate:.1f} tokens/s", name,
            "" if rate is None else f"{ours / rate:.1f}", "",
        ])  # fmt: skip
    return lines


def caption(result: dict) -> str:
    where, best = result["where"], result["cells"]["floor"]
    dirty = ", with uncommitted changes" if where["dirty"] else ""
    return (
        "Ratio: the rival's time over ours. Attention is one layer's decode step (9 query and 3 KV "
        "heads of 64); the floor is the larger of its least bytes at the rate of a copy "
        f"({best['copy GB/s']:.1f} GB/s read and written) and its operations at that of a float32 "
        f"matrix product ({best['float32 GFLOP/s']:.0f} GFLOP/s; one in bfloat16 does "
        f"{best['bfloat16 GFLOP/s']:.0f}, which is why a share can exceed 1). "
        "sample: 64 x 151,936 logits. "
        "generate: SmolLM2-135M-Instruct, 32 rollouts of 128 tokens, prompt of 1,024, prefill "
        "included, plain generate run once. "
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {where['commit']}{dirty}."
    )
