"""Figures that the project set itself, as the benchmarks report them."""

from rich.console import Console


class Targets(list):
    """A dict for each: name, value, target, and whether it is met."""

    def add(self, name: str, value: float, target: float, least: bool = False) -> None:
        """`value` should be at most `target`, or at least."""
        ok = bool(value >= target if least else value <= target)
        self.append({"name": name, "value": value, "target": target, "ok": ok})

    def show(self, console: Console) -> None:
        for found in self:
            console.print(
                ("ok    " if found["ok"] else "MISSED")
                + f" {found['name']}: {found['value']:.5g} (target {found['target']:.5g})",
                highlight=False,
            )
