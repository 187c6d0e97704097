"""Figures that the project set itself, as the benchmarks report them."""

from rich.console import Console

WORDS = {True: "ok", False: "MISSED", None: "-"}


class Targets(list):
    """A dict for each: name, value, target, and whether it is met."""

    def add(self, name: str, value: float | None, target: float, least: bool = False) -> None:
        """`value` should be at most `target`, or at least; None if it was not measured."""
        ok = None if value is None else bool(value >= target if least else value <= target)
        self.append({"name": name, "value": value, "target": target, "ok": ok})

    def show(self, console: Console) -> None:
        for found in self:
            value = "no figure" if found["value"] is None else f"{found['value']:.5g}"
            console.print(
                f"{WORDS[found['ok']]:6} {found['name']}: {value} (target {found['target']:.5g})",
                highlight=False,
                soft_wrap=True,
            )
