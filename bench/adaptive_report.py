"""What `bench.adaptive` says of its cells: pairs at equal tokens, intervals, table, targets."""

from collections.abc import Sequence

import numpy as np

from bench.search import WIDTH
from bench.targets import Targets
from kvtools import search
from kvtools.quality import interval

SCORERS = ("exact", "trained")
SEARCHES = ("beam", "dvts")
HEADS = ("", "right", "rival", "rival right", "difference, 95 %", "tokens", "rival tokens")


def ones(right: str) -> np.ndarray:
    return np.array([x == "1" for x in right], float)


def taken(samples: dict, how: str, n: int) -> np.ndarray:
    """Whether best-of-N of the first n samples of each problem is right; or their majority."""
    found = []
    for i, right in enumerate(samples["right"]):
        answers = np.array(samples["answers"][i][:n])
        named = np.flatnonzero(answers >= 0)
        rows = named if len(named) else np.arange(n)
        scores = np.array(samples["exact" if "exact" in how else "trained"][i][:n])
        if how == "majority" and len(named):
            counts = np.bincount(answers[named])
            # Of equals that which is there first, as `choose` has it.
            first = max(dict.fromkeys(answers[named].tolist()), key=counts.__getitem__)
            rows = np.flatnonzero(answers == first)
        found.append(right[rows[np.argmax(scores[rows])]] == "1")
    return np.array(found, float)


def at_tokens(samples: dict, how: str, tokens: float) -> np.ndarray:
    """Chance of each problem to be right by N samples of so many tokens on average: a mixture of
    the two N around it."""
    cost = np.array(samples["tokens"]).cumsum(1).mean(0)
    if tokens <= cost[0]:
        return taken(samples, how, 1)
    n = int(np.searchsorted(cost, tokens))
    if n >= len(cost):
        return taken(samples, how, len(cost))
    share = (tokens - cost[n - 1]) / (cost[n] - cost[n - 1])
    return (1 - share) * taken(samples, how, n) + share * taken(samples, how, n + 1)


def abstained(samples: dict, n: int) -> dict[str, float]:
    """Right of all, right of those answered, what the one is more than the other, with a 95 %
    interval, and the share answered. Half of the problems are to be answered: the threshold comes
    from the other half, and the other way round."""
    sure = np.array([search.confidence([None if x < 0 else x for x in answers[:n]])
                     for answers in samples["answers"]])  # fmt: skip
    right, half = taken(samples, "majority", n), np.arange(len(sure)) % 2 == 0
    answered = np.zeros(len(sure), bool)
    for here in (half, ~half):
        answered[here] = sure[here] >= search.threshold(sure[~here], coverage=0.5)

    def gain(index: np.ndarray) -> float:
        some = index[answered[index]]
        return right[some].mean() - right[index].mean() if len(some) else np.nan

    every = np.arange(len(sure))
    drawn = np.random.default_rng(0).integers(len(sure), size=(2000, len(sure)))
    low, high = np.nanquantile([gain(index) for index in drawn], (0.025, 0.975))
    return {
        "right": right.mean(), "answered": right.mean() + gain(every), "difference": gain(every),
        "low": low, "high": high, "share": answered.mean(),
    }  # fmt: skip


def paired(differences: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of their mean; not narrower where wins and losses change places."""
    (low, high), (other_high, other_low) = interval(differences), interval(-differences)
    return min(low, -other_low), max(high, -other_high)


def rows(cells: dict[str, dict]) -> list[dict]:
    """Each strategy beside a rival at equal tokens; of stopping, beside the same samples whole."""
    samples, found = cells["samples"], []
    cost = np.array(samples["tokens"]).cumsum(1).mean(0)

    def add(name: str, cell: dict, rival: str, right: np.ndarray, tokens: float) -> None:
        own = ones(cell["right"])
        low, high = paired(own - right)
        found.append({
            "name": name, "right": own.mean(), "rival": rival, "rival_right": right.mean(),
            "difference": (own - right).mean(), "low": low, "high": high,
            "tokens": cell["tokens"], "rival_tokens": tokens,
        })  # fmt: skip

    for scorer in SCORERS:
        for rival in SEARCHES:
            cell, other = cells[f"allocate as {rival}, {scorer}"], cells[f"{rival}, {scorer}"]
            name = f"allocate as {rival}, {scorer}"
            add(name, cell, rival, ones(other["right"]), other["tokens"])
            independent = at_tokens(samples, f"max, {scorer}", cell["tokens"])
            add(name, cell, "best of N", independent, min(cell["tokens"], cost[-1]))
        cell = cells[f"deepen, {scorer}"]
        independent = at_tokens(samples, f"max, {scorer}", cell["tokens"])
        add(f"deepen, {scorer}", cell, "best of N", independent, min(cell["tokens"], cost[-1]))
    for title, cell in cells.items():
        if title.startswith("stop, "):
            whole = taken(samples, cell["how"], WIDTH)
            add(title.replace(", ", ": ", 1), cell, "all samples", whole, cost[WIDTH - 1])
    return found


def difference(row: dict) -> str:
    return f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


def table(cells: dict[str, dict]) -> list[Sequence[str]]:
    found: list[Sequence[str]] = [HEADS]
    for task, measured in cells.items():
        for row in rows(measured):
            found.append([
                f"{task}: {row['name']}", f"{row['right']:.2f}", row["rival"],
                f"{row['rival_right']:.2f}",
                difference(row), f"{row['tokens']:.0f}", f"{row['rival_tokens']:.0f}",
            ])  # fmt: skip
        half = abstained(measured["samples"], WIDTH)
        found.append([
            f"{task}: majority, {half['share']:.2f} answered", f"{half['answered']:.2f}",
            "all answered", f"{half['right']:.2f}", difference(half), "", "",
        ])  # fmt: skip
    return found


def targets(cells: dict[str, dict]) -> Targets:
    """What the strategies are for: not to be worse at equal tokens, and to save tokens."""
    found = Targets()
    for task, measured in cells.items():
        for row in rows(measured):
            name = f"{task}: {row['name']}"
            if row["name"].startswith("stop"):
                saved = 1 - row["tokens"] / row["rival_tokens"]
                found.add(f"{name}: tokens saved", saved, 0.3, least=True)
                found.add(f"{name}: right answers lost", 0.0 - row["difference"], 0.0)
            else:
                what = f"{name}: right more than {row['rival']}"
                found.add(what, row["difference"], 0.0, least=True)
                gap = row["tokens"] / row["rival_tokens"] - 1
                found.add(f"{name}: tokens over {row['rival']}'s", gap, 0.05)
        half = abstained(measured["samples"], WIDTH)
        name = f"{task}: right more where half is answered"
        found.add(name, half["difference"], 0.0, least=True)
        found.add(f"{task}: share answered is off by", abs(half["share"] - 0.5), 0.1)
    return found


def caption(found: dict[str, dict], where: dict, drew: Sequence[str]) -> str:
    counts = ", ".join(
        f"{task}: {len(cells['samples']['right'])} problems, tables and rules fitted on "
        f"{cells['table, exact']['problems']} others" for task, cells in found.items()
    )  # fmt: skip
    return (
        f"{counts}. Differences are paired by problem. Best of N at as many tokens is a mixture of "
        "two N. Thresholds of abstention come from the other half of the problems. "
        f"{where['device']}, torch {where['torch']}, transformers {where['transformers']}; drawn "
        f"at commit {', '.join(drew)}, played back at {where['commit']}."
    )
