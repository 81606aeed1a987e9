"""The points of a frontier to what a person sees: hulls, the table, the plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from palate.recipes.verbs import aligned

Method = Literal["dpo", "ppo", "ppo_true", "rloo", "best_of_n", "unlikelihood", "preferred_ft", "sft"]
METHODS: tuple[Method, ...] = get_args(Method)
# colours that the colour-blind tell apart: Okabe and Ito 2008
_INKS = ("#0072b2", "#d55e00", "#e69f00", "#cc79a7", "#009e73", "#a6a6a6", "#56b4e9", "#000000")
INKS = dict(zip(METHODS, _INKS, strict=True))
MARKS = dict(zip(METHODS, "os^vDXP*", strict=True))
Exact = Mapping[int, Sequence[tuple[float, float]]]  # the curve of each seed


def hulls_of(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """method -> seed -> the hull of its points, the reference among them: every method may stay where it begins."""
    from palate.evaluation.frontier import upper_hull

    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for method in METHODS:
        for seed in dict.fromkeys(p["seed"] for p in points if p["method"] == method):
            mine = [p for p in points if p["seed"] == seed and p["method"] in (method, "sft")]
            found.setdefault(method, {})[seed] = upper_hull([(p["kl"], p["reward"]) for p in mine])
    return found


def standings(points: Sequence[Mapping[str, Any]], at: Sequence[float], exact: Exact) -> list[dict[str, Any]]:
    """A row a method, the exact frontier's first: what its hull reaches at these KLs and what its runs took.

    reward: at each KL mean, lowest and highest of the seeds. hull: the same of the hull's mean up to the largest KL.
    seconds, samples: of a run to its last point, mean over runs.
    """
    from palate.evaluation.frontier import mean_reward, reward_at

    rows = []
    lines = {"exact": dict(exact)} if exact else {}
    for method, by_seed in (lines | hulls_of(points)).items():
        last = {(p["setting"], p["seed"]): p for p in points if p["method"] == method}.values()
        rows.append(
            {
                "method": method,
                "seeds": len(by_seed),
                "runs": len(last),
                "reward": {f"{kl:g}": _spread([reward_at(hull, kl) for hull in by_seed.values()]) for kl in at},
                "hull": _spread([mean_reward(hull, max(at)) for hull in by_seed.values()]),
                "seconds": _mean([p["seconds"] for p in last]),
                "samples": _mean([p["samples"] for p in last]),
            }
        )
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the screen: a line a method."""

    def spread(found: Mapping[str, float]) -> str:
        return f"{found['mean']:.3f}" + ("" if several == 1 else f" [{found['low']:.3f}, {found['high']:.3f}]")

    several = max((row["seeds"] for row in rows), default=1)
    kls = list(rows[0]["reward"]) if rows else []
    head = ["", *(f"KL {kl}" for kl in kls), "hull", "runs", "seconds", "samples"]
    lines = [head]
    for row in rows:
        spent = ["" if row[name] is None else f"{row[name]:,.0f}" for name in ("seconds", "samples")]
        runs = str(row["runs"]) if row["runs"] else ""
        lines.append([row["method"], *(spread(row["reward"][kl]) for kl in kls), spread(row["hull"]), runs, *spent])
    return aligned(lines, right=range(1, len(head)))


def draw(path: Path, points: Sequence[Mapping[str, Any]], exact: Exact, reach: float) -> None:
    """Reward against KL: every point, each method's hull in the mean of the seeds, the exact curve; always one SVG.

    reach: the largest KL of the table; the plot goes a quarter beyond, and says how many points lie further.
    """
    import io
    import logging

    import numpy as np

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written is no news
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from palate.evaluation.frontier import reward_at
    from palate.files import write_bytes
    from palate.report.frontier import NAMES

    right = 1.25 * reach
    shown = [point for point in points if point["kl"] <= right]
    grid = np.linspace(0, right, 200)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        lines = ({"exact": dict(exact)} if exact else {}) | hulls_of(points)
        keys = []
        for method, by_seed in lines.items():
            mine = [point for point in shown if point["method"] == method]
            ink, style = INKS.get(method, "#000000"), {"exact": "--", "sft": ""}.get(method, "-")
            mark = {"color": ink, "marker": MARKS[method] if mine else "", "markeredgewidth": 0}
            mark["markersize"] = 8 if method == "sft" else 4.2
            if style:
                # a hull is drawn as far as its own points go
                ends = max(min(right, hull[-1][0]) for hull in by_seed.values())
                there = grid[grid <= ends]
                means = [np.mean([reward_at(hull, kl) for hull in by_seed.values()]) for kl in there]
                axes.plot(there, means, style, color=ink, linewidth=1.4)
            if mine:
                places = [[point[name] for point in mine] for name in ("kl", "reward")]
                axes.plot(*places, **mark, alpha=0.75, linestyle="", zorder=3)
            keys.append(Line2D([], [], **mark, linestyle=style, linewidth=1.4, label=NAMES[method]))
        beyond = len(points) - len(shown)
        note = f" ({beyond} of {len(points)} points lie further right)" if beyond else ""
        axes.set_xlim(-0.02 * right, right)
        heights = [p["reward"] for p in shown] + [r for curve in exact.values() for kl, r in curve if kl <= right]
        low, high = np.quantile(heights, 0.02), max(heights)
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axes.set_xlabel(f"KL from the reference, nats a completion{note}")
        axes.set_ylabel("reward")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_bytes(path, buffer.getvalue())
