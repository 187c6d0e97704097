"""Draws the figures of the README from committed results only: python -m bench.plots."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

from kvtools.quality import interval  # noqa: E402

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


# Rows of the figure of quality: a model, and its tasks for divergence and for right answers.
MODELS = (
    ("SmolLM2-135M", "text", "needle 2000"),
    ("Gemma 3 270M", "Gemma text", "Gemma needle 2000"),
    ("byte-level model", "recall", "recall"),
    ("byte-level model", "worked sums", "worked sums"),
)
FORMATS = [f"{bits}-bit" for bits in (8, 6, 4, 3, 2)]
PRESETS = ("lossless", "balanced", "max")
POLICIES = dict(zip(("scissorhands", "h2o", "snapkv", "tova", "streaming", "lru", "random"),
                    "oPd^vsX", strict=True))  # fmt: skip
RIVALS = ("kivi4", "kivi4-g64", "kivi2", "rtn4", "quanto4", "hqq4", "fp8-tensor")


def draw_quality(result: dict, path: Path) -> None:
    """Bits held against divergence and against right answers, a row per model."""
    cells = result["cells"]
    models = [(name, *tasks) for name, *tasks in MODELS if cells.keys() >= {*tasks}]
    figure, axes = plt.subplots(
        len(models), 2, figsize=(9, 2.5 * len(models)), squeeze=False, layout="constrained"
    )
    handles = {}
    for (left, right), (name, divergence, answers) in zip(axes, models, strict=True):
        scatter(left, cells[divergence], "kl")
        scatter(right, cells[answers], "top1" if answers == "recall" else "right")
        left.set(yscale="log", ylabel="KL from 16 bits, nats", ymargin=0.1)
        right.set(ylim=(-0.05, 1.15), ylabel="right answers")
        for axis, task in ((left, divergence), (right, answers)):
            axis.set_title(f"{name}: {task.removeprefix('Gemma ')}", fontsize="medium")
            axis.set(xscale="log", xlim=(0.25, 24), xticks=(ticks := (0.5, 1, 2, 4, 8, 16)))
            axis.set_xticklabels(map(str, ticks))
            axis.minorticks_off()
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in axes[-1]:
        axis.set_xlabel("bits held per element")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    save(figure, path)


def scatter(axis: plt.Axes, rows: dict[str, dict], metric: str) -> None:
    """Each cache of a task; formats and shares of tokens kept are lines."""

    def points(names: Sequence[str]) -> list[tuple[float, float]]:
        return [(rows[name]["bits"], rows[name][metric]) for name in names if name in rows]

    shares = [name for name in rows if name.startswith("scissorhands ")]
    for names, label, style in (
        (FORMATS, "8, 6, 4, 3, 2 bits", "o-C0"),
        (shares, "4 bits, fewer tokens", "o--C0"),
        (PRESETS, "preset", "*C3"),
        (RIVALS, "other caches", "xk"),
    ):
        if chosen := points(names):
            axis.plot(*zip(*chosen, strict=True), style, ms=4, lw=1, label=label)
    for name, marker in POLICIES.items():
        if chosen := points([name]):
            axis.plot(*zip(*chosen, strict=True), marker, color="C2", mfc="none", ms=5, label=name)
    for names, (offset, align) in ((RIVALS, ((4, 3), "left")), (PRESETS, ((-4, -7), "right"))):
        for name in names:
            for point in points([name]):
                axis.annotate(name, point, offset, textcoords="offset points", ha=align, fontsize=7)


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
        axis.set(xscale="log", yscale="log", xlabel="rollouts", xticks=[int(n) for n in cells],
                 yticks=(20, 50, 100, 200, 400))  # fmt: skip
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
        axis.set_title(f"prompt of {int(length):,} tokens", fontsize="medium")
    axes[0].set_ylabel("decoding, tokens/s")
    axes[-1].legend(fontsize=7)
    save(figure, path)


def draw_search(result: dict, path: Path) -> None:
    """Right answers against tokens: a row per task, a panel per scorer."""
    scorers = {"exact": "exact check", "trained": "trained scorer", "chance": "chance"}
    lines = {"max": ("best of N", "C0-"), "weighted": ("weighted vote", "C0--")}
    marks = {"beam": "^", "DVTS": "s", "particles": "D"}
    cells = result["cells"]
    figure, axes = plt.subplots(
        len(cells), 3, figsize=(9, 2.7 * len(cells)), sharex="row", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (task, measured) in zip(axes, cells.items(), strict=True):
        samples, greedy = measured["samples"], measured["greedy"]
        for axis, (scorer, title) in zip(row, scorers.items(), strict=True):
            shares = {name: [x.count("1") / len(x) for x in right]
                      for name, right in samples["right"].items()}  # fmt: skip
            for how, (label, style) in lines.items():
                axis.plot(samples["tokens"], shares[f"{how}, {scorer}"], style, lw=1, label=label)
            axis.plot(samples["tokens"], shares["majority, chance"], "0.5", lw=1, label="majority")
            right = greedy["right"].count("1") / len(greedy["right"])
            axis.plot(greedy["tokens"], right, "k*", label="greedy")
            for i, (name, mark) in enumerate(marks.items(), 1):
                found = [x for key, x in measured.items() if key.startswith(f"{name}, {scorer}, ")]
                points = [(x["tokens"], *bar(x["right"]["max"])) for x in found]
                tokens, right, low, high = zip(*points, strict=True)
                axis.errorbar(tokens, right, (low, high), fmt=f"C{i}{mark}", ms=4, lw=1, label=name)
            axis.set(xscale="log", ylim=(-0.02, 1.02))
            ticks = [x for x in (25, 50, 100, 200, 400, 800) if x < 2 * samples["tokens"][-1]]
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
            axis.set_title(f"{task}: {title}", fontsize="medium")
        row[0].set_ylabel("right answers")
    for axis in axes[-1]:
        axis.set_xlabel("tokens generated per problem")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7,
                  fontsize=8)  # fmt: skip
    save(figure, path)


def bar(right: str) -> tuple[float, float, float]:
    """A share, and how far its 95 % interval reaches down and up."""
    share = right.count("1") / len(right)
    low, high = interval([int(x) for x in right])
    return share, max(0.0, share - low), max(0.0, high - share)


if __name__ == "__main__":
    for draw, results, name in (
        (draw_demo, "demo-cpu.json", "demo.svg"),
        (draw_quality, "quality-cpu.json", "quality.svg"),
        (draw_cpu, "cpu.json", "cpu.svg"),
        (draw_search, "search-cpu.json", "search.svg"),
    ):
        path = ROOT / "bench/results" / results
        if path.exists():
            draw(json.loads(path.read_text()), ROOT / "docs" / name)
        else:
            print(f"{name} is left as it is: there is no {path.relative_to(ROOT)}")
