"""Draws the figures of README and docs from committed results only: python -m bench.plots.

Ours is dark blue and filled, a variant of ours a lighter blue; what it is compared with is grey:
the figures can be read in greyscale, too.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

from bench.quality import NAMES, OTHERS  # noqa: E402
from kvtools.quality import interval  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OURS, VARIANT, OTHER, PICKED = "#08519c", "#4292c6", "0.6", "#fec44f"


def draw_demo(result: dict, path: Path) -> None:
    """Bars of KV held, prefill and decoding speed, a bar per row of the demo."""
    rows = result["rows"]
    panels = {
        "KV held at the end, MiB": [row["memory"]["total"] / 2**20 for row in rows.values()],
        "time to the first token, s": [row["prefill_s"] for row in rows.values()],
        "decoding, tokens/s": [row["tokens_per_s"] for row in rows.values()],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2), sharey=True, layout="constrained")
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(list(rows), values, color=[OTHER] + [OURS] * (len(rows) - 1))
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_xlabel(title)
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
# Where a label is not to the right of its point: offset in points, and which end is there.
BESIDE = {"rtn4": ((-5, -2), "right"), "kivi4-g64": ((5, -6), "left")}


def draw_quality(result: dict, path: Path) -> None:
    """Bits held against divergence and against right answers, a row per model."""
    cells = result["cells"]
    models = [(name, *tasks) for name, *tasks in MODELS if cells.keys() >= {*tasks}]
    figure, axes = plt.subplots(
        len(models), 2, figsize=(9, 2.7 * len(models)), squeeze=False, layout="constrained"
    )
    handles = {}
    for (left, right), (name, divergence, answers) in zip(axes, models, strict=True):
        scatter(left, cells[divergence], "kl")
        scatter(right, cells[answers], "top1" if answers == "recall" else "right")
        left.set(yscale="log", ylabel="KL from 16 bits, nats", ymargin=0.12)
        right.set(ylim=(-0.08, 1.2), ylabel="share of right answers")
        for axis, task, least in ((left, divergence, 0.7), (right, answers, 0.25)):
            axis.set_title(f"{name}: {task.removeprefix('Gemma ')}", fontsize="medium")
            ticks = [x for x in (0.5, 1, 2, 4, 8, 16) if x > least]
            axis.set(xscale="log", xlim=(least, 24))
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in axes[-1]:
        axis.set_xlabel("bits held per element")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def scatter(axis: plt.Axes, rows: dict[str, dict], metric: str) -> None:
    """Each cache of a task; formats and shares of tokens kept are lines."""

    def points(names: Sequence[str]) -> list[tuple[float, float]]:
        return [(rows[name]["bits"], rows[name][metric]) for name in names if name in rows]

    shares = [name for name in rows if name.startswith("scissorhands ")]
    for names, label, style in (
        (FORMATS, "ours: 8, 6, 4, 3, 2 bits", dict(fmt="o-", color=OURS)),
        (shares, "ours: 4 bits, fewer tokens", dict(fmt="o--", color=VARIANT)),
        (OTHERS, "other caches", dict(fmt="x", color="0.35")),
    ):
        if chosen := points(names):
            axis.errorbar(*zip(*chosen, strict=True), ms=4, lw=1, label=label, **style)
    for name, marker in POLICIES.items():
        if chosen := points([name]):
            style = dict(color=OURS if name == "scissorhands" else OTHER, mfc="none", ms=6, ls="")
            label = f"evicted by {name}"
            axis.plot(*zip(*chosen, strict=True), marker=marker, label=label, **style)
    if chosen := points(PRESETS):
        style = dict(marker="*", ms=9, mfc=PICKED, mec="k", mew=0.7, ls="")
        axis.plot(*zip(*chosen, strict=True), label="ours: preset", **style)
    for name in PRESETS:
        at = (0, 7), "center"
        if metric == "kl" and points([name]):  # on the side where the line of formats is not
            below = name == "balanced" and rows[name]["kl"] < rows["4-bit"]["kl"]
            at = ((-7, -2), "right") if below else ((7, -2), "left")
        label_at(axis, points([name]), name, *at)
    for name in OTHERS:
        label_at(axis, points([name]), NAMES.get(name, name), *BESIDE.get(name, ((5, -2), "left")))


def label_at(
    axis: plt.Axes, points: list, text: str, offset: tuple[float, float], align: str
) -> None:
    for point in points:
        axis.annotate(text, point, offset, textcoords="offset points", ha=align, fontsize=7)


def draw_cpu(result: dict, path: Path) -> None:
    """Decoding speed against rows: a panel per prompt, a line per contender."""
    prompts = result["cells"]["sweep"]["prompts"]
    figure, axes = plt.subplots(
        1, len(prompts), figsize=(9, 2.8), sharey=True, layout="constrained"
    )
    styles = {
        "plain": dict(color=OTHER, marker="s", ls="--"),
        "kvtools 16-bit": dict(color=OURS, marker="o"),
        "kvtools balanced": dict(color=VARIANT, marker="^", mfc="w"),
    }
    for axis, (length, cells) in zip(axes, prompts.items(), strict=True):
        for name, style in styles.items():
            points = [(int(n), rows[name]["tokens_per_s"]) for n, rows in cells.items()
                      if "tokens_per_s" in rows[name]]  # fmt: skip
            label = "plain, prefilled once" if name == "plain" else name
            axis.plot(*zip(*points, strict=True), ms=5, label=label, **style)
        axis.set(xscale="log", yscale="log", xlabel="rollouts at a time",
                 xticks=[int(n) for n in cells], yticks=(20, 50, 100, 200, 400))  # fmt: skip
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
        axis.set_title(f"prompt of {int(length):,} tokens", fontsize="medium")
    axes[0].set_ylabel("decoding speed, tokens/s")
    axes[-1].legend(fontsize=7)
    save(figure, path)


def draw_search(result: dict, path: Path) -> None:
    """Right answers against tokens: a row per task, a panel per scorer."""
    scorers = {"exact": "exact check", "trained": "trained scorer", "chance": "chance"}
    lines = {"max": ("best of N samples", "-"), "weighted": ("their weighted vote", "--")}
    marks = {
        "DVTS": dict(fmt="s", color=VARIANT, mfc="w", ms=7),
        "beam": dict(fmt="^", color=OURS, ms=6),
        "particles": dict(fmt="D", color="k", mfc=PICKED, ms=4),
    }
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
                share = shares[f"{how}, {scorer}"]
                axis.plot(samples["tokens"], share, style, color="0.35", lw=1, label=label)
            share = shares["majority, chance"]
            axis.plot(samples["tokens"], share, ":", color="0.35", lw=1.3, label="their majority")
            right = greedy["right"].count("1") / len(greedy["right"])
            axis.plot(greedy["tokens"], right, "k*", ms=8, label="greedy")
            for name, style in marks.items():
                found = [x for key, x in measured.items() if key.startswith(f"{name}, {scorer}, ")]
                points = [(x["tokens"], *bar(x["right"]["max"])) for x in found]
                tokens, right, low, high = zip(*points, strict=True)
                axis.errorbar(tokens, right, (low, high), lw=1, label=name, **style)
            axis.set(xscale="log", ylim=(-0.02, 1.02))
            ticks = [x for x in (25, 50, 100, 200, 400, 800) if x < 2 * samples["tokens"][-1]]
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
            axis.set_title(f"{task}: {title}", fontsize="medium")
        row[0].set_ylabel("share of right answers")
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
