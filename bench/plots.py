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
    path.parent.mkdir(exist_ok=True)
    # Without a date and with fixed ids, the same results give the same file.
    with plt.rc_context({"svg.hashsalt": "kvtools", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw_demo(
        json.loads((ROOT / "bench/results/demo-cpu.json").read_text()), ROOT / "docs/demo.svg"
    )
