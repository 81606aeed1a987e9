"""How the cells of a sweep stand: their ranking, sweep.json, the table on the screen, the plot."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.recipes.verbs import number

HIGHER = ("eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/accuracies", "eval/logps/chosen")
LOWER = ("eval/loss", "eval/displaced", "eval/kl", "eval/retain/loss")


@dataclass
class Cell:
    """One point of the grid and what became of it. rungs: steps at which it is compared; the last is its end."""

    name: str
    options: dict[str, Any]
    config: Any
    rungs: list[int] = field(default_factory=list)
    steps: int = 0
    state: str = "waiting"  # then stopped (at a rung), done or failed
    curve: list[tuple[int, float | None]] = field(default_factory=list)
    line: dict[str, Any] = field(default_factory=dict)  # its last evaluation
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failure(self) -> str:
        """Why it failed, in short."""
        return "failed: " + str(self.facts.get("error")).partition(";")[0][:100]

    def row(self, key: str) -> dict[str, Any]:
        """Its entry of sweep.json."""
        line = {} if self.state == "failed" else self.line
        return {
            "name": self.name,
            "options": self.options,
            "steps": self.steps,
            "metric": line.get(key),
            "low": line.get(f"{key}_low"),
            "high": line.get(f"{key}_high"),
            "margin": line.get("eval/rewards/margins"),
            "loss": line.get("eval/loss"),
            "seconds": round(self.seconds, 3),
            "path": f"cells/{self.name}",
            "state": self.state,
            "curve": [list(point) for point in self.curve],
            **self.facts,
        }


def ranking(cells: Iterable[Cell], key: str) -> list[Cell]:
    """Best first: by the metric, then the margin, then the loss, then the grid's order."""

    def value(cell: Cell, name: str) -> float:
        found = cell.line.get(name)
        if found is None or not math.isfinite(found):
            return math.inf
        return found if name in LOWER else -found

    return sorted(cells, key=lambda cell: [value(cell, name) for name in (key, "eval/rewards/margins", "eval/loss")])


def in_order(cells: list[Cell], key: str) -> list[Cell]:
    """Rows of the table: those that came farthest first, best first among them, failed ones last."""
    states = {"done": 0, "failed": 2}
    return sorted(ranking(cells, key), key=lambda cell: (states.get(cell.state, 1), -cell.steps))


def as_text(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share in percent with its interval, another number with four places."""
    if value is not None and low is not None and high is not None:
        return f"{value:.1%} [{low:.1%}, {high:.1%}]"
    return number(value)


def table_lines(cells: list[Cell], key: str, best: Cell) -> list[str]:
    """The table of the screen: one line a cell, the best one marked."""
    head = ["", "cell", "steps", key.removeprefix("eval/"), "loss", "seconds", ""]
    rows = [head]
    for cell in cells:
        row = cell.row(key)
        measured = as_text(row["metric"], row["low"], row["high"])
        state = {"done": "", "failed": cell.failure}.get(cell.state, cell.state)
        mark, seconds = "*" if cell is best else "", f"{cell.seconds:.0f}"
        rows.append([mark, cell.name, str(cell.steps), measured, number(row["loss"]), seconds, state])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    sides = [str.ljust, str.ljust, *[str.rjust] * 4, str.ljust]
    return ["  ".join(side(text, width) for side, text, width in zip(sides, row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip


def draw(path: Path, cells: list[Cell], key: str, best: Cell) -> None:
    """The held-out metric of every cell against its steps, as an SVG of always the same bytes."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from palate.files import write_bytes

    with matplotlib.rc_context({"svg.hashsalt": "palate", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for cell in cells:
            points = [(step, value) for step, value in cell.curve if value is not None]
            if not points:
                continue
            style = {"best": ("#0b6e99", 2.2, 3), "done": ("#c2703d", 1.4, 2)}
            colour, width, order = style.get("best" if cell is best else cell.state, ("#9a9a9a", 0.9, 1))
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=width, zorder=order, marker="o", markersize=2.5)
            if cell.state == "done":
                axes.annotate(cell.name, points[-1], xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8,
                              color=colour)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(f"held-out {key.removeprefix('eval/')}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_bytes(path, buffer.getvalue())
