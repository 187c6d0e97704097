"""Draws the figures of the README from committed results only: python -m bench.plots."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

ROOT = Path(__file__).resolve().parent.parent


def draw_demo(result: dict, path: Path) -> None:
    """Bars of KV held, prefill and decoding speed, a bar per row of the demo."""
    rows = result["rows"]
    panels = {
        "KV held, MiB": [row["memory"]["total"] / 2**20 for row in rows.values()],
        "prefill, s": [row["prefill_s"] for row in rows.values()],
        "decoding, tokens/s": [row["tokens_per_s"] for row in rows.values()],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2), sharey=True, layout="constrained")
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(list(rows), values, color=["0.7"] + ["C0"] * (len(rows) - 1))
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(title)
        axis.set_xlim(0, max(values) * 1.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{result['n']} rollouts of {result['new_tokens']} tokens, prompt of "
        f"{result['prompt_tokens']}: {result['model']}, {result['dtype']}, {result['device']}",
        fontsize="medium",
    )
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    # Without a date and with fixed ids, the same results give the same file.
    with plt.rc_context({"svg.hashsalt": "kvtools", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_quality(result: dict, path: Path) -> None:
    """Bits against divergence, and compression against right answers."""
    cells = result["cells"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ours = [f"{bits}-bit" for bits in (8, 6, 4, 3, 2)]
    for names, color in (
        ([*ours, "lossless", "balanced"], "C0"),
        (("kivi4", "kivi4-g64", "kivi2", "rtn4", "quanto4", "hqq4", "fp8-tensor"), "0.5"),
    ):
        rows = {name: cells["text"][name] for name in names if name in cells["text"]}
        if color == "C0":
            line = [rows[name] for name in ours]
            left.plot([x["bits"] for x in line], [x["kl"] for x in line], color=color, lw=1)
        for name, row in rows.items():
            left.plot(row["bits"], row["kl"], "o", color=color, ms=4)
            left.annotate(
                name, (row["bits"], row["kl"]), (4, 4), textcoords="offset points", fontsize=7,
                color=color,
            )  # fmt: skip
    left.set(yscale="log", xlabel="bits per element held", ylabel="KL from the 16-bit cache, nats")
    left.set_title("text", fontsize="medium")
    needle = cells["needle 2000"]
    kept = sorted((row["ratio"], row["right"]) for name, row in needle.items()
                  if name.startswith("scissorhands") or name in ("max", "balanced"))  # fmt: skip
    right.plot(*zip(*kept, strict=True), "o-", color="C0", ms=4, label="scissorhands")
    for i, name in enumerate(("h2o", "snapkv", "tova", "streaming", "lru", "random")):
        row = needle[name]
        right.plot(row["ratio"], row["right"], "<>^vsD"[i], color="0.5", ms=5, label=name)
    right.set(xlabel="16-bit bytes over bytes held", ylabel="right", ylim=(-0.05, 1.05))
    right.set_title("needle in 2,000 tokens, 4 bits, question visible", fontsize="medium")
    right.legend(fontsize=7)
    save(figure, path)


def draw_cpu(result: dict, path: Path) -> None:
    """Decoding speed against rows: a panel per prompt, a line per contender."""
    prompts = result["cells"]["sweep"]["prompts"]
    figure, axes = plt.subplots(
        1, len(prompts), figsize=(9, 2.8), sharey=True, layout="constrained"
    )
    styles = {"plain": ("0.5", "s"), "kvtools 16-bit": ("C0", "o"), "kvtools balanced": ("C1", "^")}
    for axis, (length, cells) in zip(axes, prompts.items(), strict=True):
        for name, (color, marker) in styles.items():
            points = [(int(n), rows[name]["tokens_per_s"]) for n, rows in cells.items()
                      if "tokens_per_s" in rows[name]]  # fmt: skip
            label = "plain, prefilled once" if name == "plain" else name
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, ms=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="rollouts", xticks=[int(n) for n in cells])
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
        axis.set_title(f"prompt of {int(length):,} tokens", fontsize="medium")
    axes[0].set_ylabel("decoding, tokens/s")
    axes[-1].legend(fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    for draw, results, name in (
        (draw_demo, "demo-cpu.json", "demo.svg"),
        (draw_quality, "quality-cpu.json", "quality.svg"),
        (draw_cpu, "cpu.json", "cpu.svg"),
    ):
        path = ROOT / "bench/results" / results
        if path.exists():
            draw(json.loads(path.read_text()), ROOT / "docs" / name)
        else:
            print(f"{name} is left as it is: there is no {path.relative_to(ROOT)}")
