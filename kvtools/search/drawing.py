"""A search as a picture: its steps as a tree, coloured by score."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..results import write
from .result import Candidate, Result

FORMATS = (".svg", ".png", ".pdf")
MARKS = {"went on": "o", "finished": "s", "left out": "X"}


@dataclass
class Node:
    """A step of some rows.

    Attributes:
        parent: number of the node before it; -1 for the question itself.
        depth: how many there are before it.
        value: its score, or what its row was judged by.
        fate: "went on", "finished" or "left out".
    """

    parent: int
    depth: int
    value: float
    fate: str = "went on"


def tree(result: Result, question: int) -> list[Node]:
    """The nodes of a question, parents first.

    Where rows were selected, a node is a row at a selection, and forks are those of the trace. Of
    independent rows, a node is a step, and rows share those that they begin with alike.

    Raises:
        IndexError: there is no such question.
    """
    if not 0 <= question < len(result.questions):
        raise IndexError(f"question={question}: there are {len(result.questions)}")
    events = [e for e in result.trace if e.question == question]
    if any(e.kept for e in events):
        return _selections(events)
    nodes: list[Node] = []
    known: dict[tuple[str, ...], int] = {}
    stopped = result.stopped[question] if result.stopped else []
    for c in (*result.candidates[question], *stopped):
        _chain(nodes, known, c)
    return nodes


def _chain(nodes: list[Node], known: dict[tuple[str, ...], int], c: Candidate) -> None:
    parent = -1
    for i, score in enumerate(c.scores):
        key = tuple(c.steps[: i + 1])
        if key not in known:
            known[key] = len(nodes)
            nodes.append(Node(parent, i, score))
        parent = known[key]
    if parent >= 0:
        nodes[parent].fate = "finished" if c.finished else "left out"


def _selections(events: Sequence) -> list[Node]:
    nodes: list[Node] = []
    above: list[int] = []  # nodes that the rows of the next event come from
    run = None
    for event in events:
        if event.run != run or len(above) != len(event.values):
            above, run = [-1] * len(event.values), event.run
        first = len(nodes)
        for i, value in enumerate(event.values):
            parent = above[i]
            node = Node(parent, nodes[parent].depth + 1 if parent >= 0 else 0, value)
            if i in event.finished:
                node.fate = "finished"
            elif i not in event.kept:
                node.fate = "left out"
            nodes.append(node)
        above = [first + i for i in event.kept]
    return nodes


def heights(nodes: Sequence[Node]) -> list[float]:
    """Where each node is drawn: ends one below the other, all others between theirs."""
    below: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        if node.parent >= 0:
            below[node.parent].append(i)
    place, ends = [0.0] * len(nodes), 0
    # Depth first, without recursion: a node is visited again once those below it are placed.
    waiting = [(i, False) for i, node in reversed([*enumerate(nodes)]) if node.parent < 0]
    while waiting:
        i, placed = waiting.pop()
        if placed:
            place[i] = sum(place[x] for x in below[i]) / len(below[i])
        elif below[i]:
            waiting.append((i, True))
            waiting += [(x, False) for x in reversed(below[i])]
        else:
            place[i], ends = float(ends), ends + 1
    return place


def draw(result: Result, path: str | Path) -> None:
    """Draw the tree of each question into a file; needs matplotlib.

    Args:
        path: its ending says the format: .svg, .png or .pdf. The file is written whole or not at
            all, over one that is there.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no question, or the ending is another.
    """
    kind = Path(path).suffix
    if kind not in FORMATS:
        raise ValueError(f"path={str(path)!r}: end its name in {', '.join(FORMATS)}")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not result.questions:
        raise ValueError("result has no question: there is nothing to draw")
    trees = [tree(result, i) for i in range(len(result.questions))]
    places = [heights(nodes) for nodes in trees]
    tall = [1 + 0.16 * max(place, default=0) for place in places]
    figure = Figure(figsize=(9, 0.6 + sum(tall)), layout="constrained")
    axes = figure.subplots(
        len(trees), 1, squeeze=False, gridspec_kw={"height_ratios": tall}
    )[:, 0]  # fmt: skip
    for axis, question, nodes, place in zip(axes, result.questions, trees, places, strict=True):
        for node, y in zip(nodes, place, strict=True):
            if node.parent >= 0:
                before = nodes[node.parent]
                axis.plot([before.depth, node.depth], [place[node.parent], y], color="0.8",
                          linewidth=0.8, zorder=1)  # fmt: skip
        values = [node.value for node in nodes if node.value == node.value]  # but for NaN
        low, high = min(values, default=0.0), max(values, default=1.0)
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        for fate, mark in MARKS.items():
            some = [i for i, node in enumerate(nodes) if node.fate == fate]
            if some:
                dots = axis.scatter(
                    [nodes[i].depth for i in some], [place[i] for i in some], marker=mark, s=26,
                    c=[nodes[i].value for i in some], vmin=low, vmax=high, cmap="viridis",
                    label=fate, zorder=2, plotnonfinite=True,
                )  # fmt: skip
        if nodes:
            figure.colorbar(dots, ax=axis, label="score")
        # A title is text: dollar signs would make formulas of it.
        axis.set_title(question.strip()[-80:].replace("$", r"\$"), fontsize="small", loc="left")
        axis.set_yticks([])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.invert_yaxis()
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("steps or selections")
    marks = [
        Line2D([], [], color="0.4", marker=mark, linestyle="", label=fate)
        for fate, mark in MARKS.items()
    ]
    figure.legend(handles=marks, fontsize="small", loc="outside upper right", ncols=len(marks))
    # Without a date and with fixed ids, the same result gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "kvtools"}):
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        image = io.BytesIO()
        figure.savefig(image, format=kind[1:], metadata=dates.get(kind))
    write(Path(path), image.getvalue())
