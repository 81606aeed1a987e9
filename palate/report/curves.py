"""Which curves stand on the page: of one run in training and held out, of several runs over each other."""

from collections.abc import Sequence

from palate.report.charts import MOST_POINTS, Chart, Curve
from palate.report.reading import Line, Reading, finite, series

ACCURACY = "rewards/accuracies"


def progress_charts(run: Reading) -> list[Chart]:
    """Loss, margin, accuracy, and KL where the run measured it."""
    good, bad = run.sides
    charts = [
        Chart("loss", "Loss", f"loss, {_unit(run)}", _curves(run, "loss") + _truth(run, "loss")),
        Chart("margin", "Margin", f"{good} minus {bad} reward", _curves(run, "rewards/margins"), level=0),
        Chart(
            "accuracy",
            "Accuracy",
            "share ordered rightly",
            _accuracy(run) + _truth(run, "accuracy"),
            share=True,
            level=0.5,
        ),
    ]
    if any(value for _, value in series(run.steps, "kl")):
        charts.append(Chart("kl", "KL, as the loss estimates it", "nats a completion", _curves(run, "kl")))
    if run.imitates:
        charts.append(Chart("logps", "Log-probs", "nats a completion", _curves(run, "logps/chosen")))
    return [chart for chart in charts if chart.curves]


def likelihood_charts(run: Reading) -> list[Chart]:
    """Rewards and log-probs of the chosen and of the rejected completions; none where nothing was rejected."""
    if run.imitates:
        return []
    charts = [
        Chart(
            "rewards",
            "Rewards" if run.record.verb == "reward" else "Implicit rewards",
            "reward",
            _sides(run, "rewards"),
            level=0,
        ),
        Chart("logps", "Log-probs", "nats a completion", _sides(run, "logps")),
    ]
    return [chart for chart in charts if chart.curves]


def retention_charts(run: Reading) -> list[Chart]:
    """How likely the demonstrations stayed, where that was measured more than at the ends."""
    points = series(run.evals, "eval/retain/loss")
    curve = Curve("demonstrations", points, "s1", dots=True)
    return [Chart("retain", "Demonstrations", "loss, nats a token", (curve,))] if len(points) > 2 else []


def overlaid_charts(runs: Sequence[Reading], names: Sequence[str]) -> list[Chart]:
    """The held-out curves of several runs over each other, in training where a run held nothing out."""
    units = {_unit(run) for run in runs}
    kinds = (
        ("loss", "Loss", f"loss, {units.pop()}" if len(units) == 1 else "loss, each in its unit", None),
        ("rewards/margins", "Margin", "chosen minus rejected reward", 0),
        (ACCURACY, "Accuracy", "share ordered rightly", 0.5),
        ("reward", "Reward", "mean score of a completion", None),
        ("logps/chosen", "Log-probs of chosen completions", "nats a completion", None),
        ("logps/rejected", "Log-probs of rejected completions", "nats a completion", None),
    )
    charts = []
    for key, title, y, level in kinds:
        curves = [
            Curve(name, points, f"s{number % 6 + 1}", dots=True, dashed=number >= 6)
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
            if (points := _own_points(run, key))
        ]
        if curves:
            name = key.replace("/", "-")
            charts.append(Chart(name, title, y, tuple(curves), share=key == ACCURACY, level=level))
    return charts


def thinned(chart: Chart) -> str:
    """What a reader should know of a chart whose points are means; empty for others."""
    most = max(len(curve.points) for curve in chart.curves)
    return f"Each point in training is a mean of about {most / MOST_POINTS:,.0f} steps." if most > MOST_POINTS else ""


def _unit(run: Reading) -> str:
    return "nats a token" if run.imitates else "mean of the rows"


def _own_points(run: Reading, key: str):
    evals, steps = (run.evals, run.steps) if key != ACCURACY else (_decided(run.evals), _decided(run.steps))
    return series(evals, f"eval/{key}") or series(steps, key)


def _curves(run: Reading, key: str, ink: str = "s1", word: str = "") -> tuple[Curve, ...]:
    held = series(run.evals, f"eval/{key}")
    both = (
        Curve(f"{word} in training".strip(), series(run.steps, key), ink, quiet=bool(held)),
        Curve(f"{word} held out".strip(), held, ink, dots=True),
    )
    return tuple(curve for curve in both if curve.points)


def _sides(run: Reading, kind: str) -> tuple[Curve, ...]:
    good, bad = run.sides
    return _curves(run, f"{kind}/chosen", "s1", good) + _curves(run, f"{kind}/rejected", "s2", bad)


def _accuracy(run: Reading) -> tuple[Curve, ...]:
    steps, evals = _decided(run.steps), _decided(run.evals)
    held = series(evals, f"eval/{ACCURACY}")
    lows, highs = (dict(series(evals, f"eval/{ACCURACY}_{end}")) for end in ("low", "high"))
    band = [(step, lows[step], highs[step]) for step, _ in held if step in lows and step in highs]
    word = "held out, 95 % interval" if band else "held out"
    both = (
        Curve("in training", series(steps, ACCURACY), "s1", quiet=bool(held)),
        Curve(word, held, "s1", dots=True, band=band),
    )
    return tuple(curve for curve in both if curve.points)


def _truth(run: Reading, key: str) -> tuple[Curve, ...]:
    """What the true reward itself reaches on the held-out pairs, where it is known."""
    points = series(run.evals, f"eval/truth/{key}")
    return (Curve("the truth's own", [points[0], points[-1]], "s3", dashed=True),) if len(points) > 1 else ()


def _decided(lines: Sequence[Line]) -> list[Line]:
    """Lines with at most half ties: where all tie, as at the start, a share of right ones says nothing."""
    return [line for line in lines if (finite(line.get("rewards/ties", line.get("eval/rewards/ties"))) or 0) <= 0.5]
