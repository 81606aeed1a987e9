"""How the cells of a sweep stand: their ranking, sweep.json, the table on the screen, the plot."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.recipes.verbs import aligned, number

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
    """Best first: by the metric, then the margin, then the loss, then the grid's order.

    Accuracies on a few hundred pairs are coarse, and early in a run they are as high at tiny rates as at good ones. So
    cells within one standard error of the highest count as tied, and the held-out loss, which sees how far a cell has
    come, puts them in order; not where the cells have different losses.
    Source: the one-standard-error rule, Breiman, Friedman, Olshen and Stone 1984, section 3.4.3.
    """

    def value(cell: Cell, name: str) -> float:
        found = cell.line.get(name)
        if found is None or not math.isfinite(found):
            return math.inf
        return found if name in LOWER else -found

    def by(*names: str):
        return lambda cell: [value(cell, name) for name in names]

    found = sorted(cells, key=by(key, "eval/rewards/margins", "eval/loss"))
    best = found[0].line.get(key) if found else None
    varied = any(path == "loss" or path.startswith("loss_options.") for path in (found[0].options if found else ()))
    if not key.endswith("accuracies") or best is None or varied:
        return found
    error = math.sqrt(best * (1 - best) / found[0].line["eval/count"])
    tied = [cell for cell in found if value(cell, key) <= error - best]
    return sorted(tied, key=by("eval/loss")) + found[len(tied) :]


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
    return aligned(rows, right=range(2, 6))


# colours that the colour-blind tell apart: Okabe and Ito 2008; the cells beyond them are grey
_INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(path: Path, cells: list[Cell], key: str) -> None:
    """The held-out number of every cell against its steps, best first in the legend; an SVG of always the same bytes.

    Step 0 is left out: there policy and reference agree, so that every pair is a tie.
    """
    import io
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written is no news
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from palate.files import write_bytes

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for place, cell in enumerate(in_order(cells, key)):
            points = [(step, value) for step, value in cell.curve if step and value is not None]
            if not points:
                continue
            ink = _INKS[place] if place < len(_INKS) else "#a6a6a6"
            thick, label = 2.2 if place == 0 else 1.1, cell.name if place < 20 else None
            axes.plot(*zip(*points, strict=True), color=ink, linewidth=thick, zorder=len(cells) - place, marker="o",
                      markersize=3, label=label)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(f"held-out {key.removeprefix('eval/')}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if key.endswith("accuracies"):
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_bytes(path, buffer.getvalue())
