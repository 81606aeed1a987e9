"""What the page shows of a reward model: how often it is right where it is how sure, the truth, where it is wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palate.report import words
from palate.report.charts import Chart, Curve
from palate.report.reading import Reading, finite

_DRAWN = 60  # points of the curve of what a margin says


@dataclass(frozen=True)
class Part:
    """Held-out pairs of about one margin: its mean, and how often the model is right. predicted: by Bradley-Terry."""

    margin: float
    accuracy: float
    low: float
    high: float
    count: int
    predicted: float | None = None


@dataclass(frozen=True)
class Certainty:
    """said: in plain words. charts: accuracy by its own margin and by that of the data. parts: the first as a table."""

    said: list[str]
    charts: list[Chart]
    parts: list[Part]


def certainty(run: Reading) -> Certainty | None:
    """Of the last evaluation that looked; None of runs that train no reward model."""
    own, given = (_parts(run, *keys) for keys in (("calibration", "margin"), ("by_margin", "said")))
    if not own:
        return None
    charts = [_chart("calibration", "Accuracy by margin", "margin of the pair, nats of log-odds", own, _predicted(own))]
    if given:
        charts.append(_chart("by-margin", "Accuracy by the data's margin", "margin that the data give", given))
    return Certainty(_said(run), charts, own)


def _parts(run: Reading, key: str, place: str) -> list[Part]:
    """The parts under `eval/KEY` of the last line that has some; what is not whole is left out."""
    found: Any = next((line[f"eval/{key}"] for line in reversed(run.evals) if line.get(f"eval/{key}")), [])
    parts = []
    for row in found if isinstance(found, list) else []:
        values = [finite(row.get(name)) if isinstance(row, dict) else None for name in (place, *_NEEDED)]
        if None not in values:
            margin, accuracy, low, high, count = values
            parts.append(Part(margin, accuracy, low, high, int(count), finite(row.get("predicted"))))
    return parts


_NEEDED = ("accuracy", "low", "high", "count")


def _chart(name: str, title: str, x: str, parts: Sequence[Part], *others: Curve) -> Chart:
    band = [(part.margin, part.low, part.high) for part in parts]
    points = [(part.margin, part.accuracy) for part in parts]
    found = Curve("found, 95 % interval", points, "s1", dots=True, band=band)
    return Chart(name, title, "share ordered rightly", (*others, found), x=x, share=True, level=0.5)


def _predicted(parts: Sequence[Part]) -> Curve:
    """The accuracy that a margin says by Bradley and Terry, from zero to the largest."""
    most = max(part.margin for part in parts)
    margins = [most * n / _DRAWN for n in range(_DRAWN + 1)]
    return Curve("said: \u03c3(margin)", [(m, 1 / (1 + math.exp(-m))) for m in margins], "s2", dashed=True)


def _said(run: Reading) -> list[str]:
    after, said = {**run.before, **run.after}, []
    slope, error = after.get("eval/calibration_slope"), after.get("eval/calibration_error")
    if slope is not None:
        said.append(
            f"Calibration slope {words.number(slope, '.2f')}: the factor on all margins at which they fit the held-out "
            "labels best. At 1 the model is as sure as it may be, below 1 it is too sure."
        )
    if error is not None:
        said.append(f"Said and found accuracy are {100 * error:.1f} points apart in the mean.")
    best, floor = after.get("eval/truth/accuracy"), after.get("eval/truth/loss")
    lost, excess = after.get("eval/truth/lost"), after.get("eval/truth/excess")
    if None not in (best, floor, lost, excess):
        ends = [after.get(f"eval/truth/lost_{end}") for end in ("low", "high")]
        spread = "" if None in ends else f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
        said.append(
            f"The true reward itself orders {words.percent(best)} of such pairs rightly, at a loss of "
            f"{words.number(floor)} nats: in the mean no model does better. This one loses {100 * lost:.1f}{spread} "
            f"points to it and {words.number(excess)} nats."
        )
    return said
