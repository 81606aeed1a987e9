"""A sweep.json to its page: which cell is best, every cell's number, and how they came to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.files import read_json
from palate.report import words
from palate.report.charts import Chart, Curve

FILE = "sweep.json"
DRAWN = 6  # cells, the best ones; more cannot be told apart


@dataclass(frozen=True)
class Row:
    """A cell as the table shows it; page: its own report, beside this one."""

    name: str
    page: str
    best: bool
    texts: list[str]


def is_sweep(path: Path) -> bool:
    """Whether a folder holds a sweep rather than a run."""
    return (path / FILE).is_file()


def sweep(path: Path) -> dict[str, Any]:
    """All that sweep.html shows, in its order: cells that came farthest first, the best of them first."""
    record = read_json(path / FILE)
    cells = sorted(record["cells"], key=lambda cell: _order(cell, record))
    best = next((cell for cell in cells if cell["name"] == record["best"]), None)
    return {
        "title": path.name,
        "source": f"{path / FILE}",
        "verb": record["verb"],
        "metric": _metric(record),
        "best": best,
        "measured": _measured(best) if best else "",
        "options": [f"--{key.replace('_', '-')} {value}" for key, value in best["options"].items()] if best else [],
        "count": len(cells),
        "halved": not record["full"],
        "rungs": record["rungs"],
        "share": record["compute_share"],
        "rows": [_row(path, cell, cell is best) for cell in cells],
        "charts": _charts(cells, record),
    }


def _metric(record: dict[str, Any]) -> str:
    """What the cells were ranked by, as a reader calls it."""
    name = record["metric"].removeprefix("eval/")
    return {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}.get(name, name)


def _order(cell: dict[str, Any], record: dict[str, Any]) -> tuple:
    value = cell["metric"]
    worth = float("inf") if value is None else value if record["lower_is_better"] else -value
    return cell["name"] != record["best"], cell["state"] == "failed", -cell["steps"], worth


def _measured(cell: dict[str, Any]) -> str:
    if cell["metric"] is None:
        return "n/a"
    if cell["low"] is None:
        return words.number(cell["metric"])
    return f"{words.percent(cell['metric'])} {words.interval(cell['low'], cell['high'])}"


def _row(path: Path, cell: dict[str, Any], best: bool) -> Row:
    page = f"{cell['path']}/report.html"
    texts = [f"{cell['steps']:,}", _measured(cell), words.number(cell["margin"], ".3f"), words.number(cell["loss"])]
    texts += [words.duration(cell["seconds"]), {"done": ""}.get(cell["state"], cell["state"])]
    return Row(cell["name"], page if (path / page).is_file() else "", best, texts)


def _charts(cells: list[dict[str, Any]], record: dict[str, Any]) -> list[Chart]:
    """The held-out number of the first cells against their steps; at step 0 policy and reference agree."""
    curves = []
    for cell in cells:
        points = [(step, value) for step, value in cell["curve"] if step and value is not None]
        if points and len(curves) < DRAWN:
            curves.append(Curve(cell["name"], points, f"s{len(curves) + 1}", dots=True))
    share = record["metric"].endswith("accuracies")
    return [Chart("cells", "Held out", _metric(record), tuple(curves), share=share, whole=False)] if curves else []
