"""Curves as SVG, drawn by matplotlib: the same values give the same bytes, and the page's style gives the colours.

Text stays text in the page's font. Colours are stand-ins while matplotlib draws and variables of the style sheet in
the end, so that one drawing serves light, dark and paper.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 236  # points, which the page scales
MOST_POINTS = 400
_INKS = ("ink", "soft", "rule", *(f"s{n}" for n in range(1, 7)))  # variables of style.css
_STAND_IN = {name: f"#0000{number + 16:02x}" for number, name in enumerate(_INKS)}


@dataclass(frozen=True)
class Curve:
    """One line of a chart. ink: a variable of the style sheet, s1 to s6.

    quiet: drawn thin, behind the others. dots: a mark at each point. band: (step, low, high) of an interval.
    """

    label: str
    points: Points
    ink: str
    quiet: bool = False
    dots: bool = False
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A chart to draw: its axes named, its curves with at least a point among them. level: a value to mark.

    share: of shares, in percent; whole: all the way from 0 to 100, else as far as the curves go.
    """

    name: str
    title: str
    y: str
    curves: tuple[Curve, ...]
    x: str = "step"
    share: bool = False
    whole: bool = True
    level: float | None = None


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: each the mean of its neighbours in a run of equal size, where there are more."""
    if len(points) <= most:
        return list(points)
    cuts = [len(points) * i // most for i in range(most + 1)]
    return [tuple(sum(axis) / len(axis) for axis in zip(*points[a:b], strict=True)) for a, b in pairwise(cuts)]


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element."""
    import io

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written is no news
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ink, soft, rule = (_STAND_IN[name] for name in ("ink", "soft", "rule"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 11, "path.simplify": False}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        if chart.level is not None:
            axes.axhline(chart.level, color=ink, linewidth=0.8, linestyle=(0, (2, 3)))
        for curve in chart.curves:
            _add(axes, curve)
        if chart.share:
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
            if chart.whole:
                axes.set_ylim(-0.02, 1.02)
            else:
                axes.margins(y=0.15)
                low, high = axes.get_ylim()
                axes.set_ylim(min(low, high - 0.1), max(high, low + 0.1))  # ten points at least: no noise is blown up
        whole = chart.x in ("step", "round")  # of a single one, one tick: there are no steps between steps
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, min_n_ticks=1 if whole else 2, steps=[1, 2, 5, 10]))
        if not (chart.share and chart.whole):
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10] if chart.share else [1, 2, 2.5, 5, 10]))
        axes.set_xlabel(chart.x, color=soft, labelpad=5)
        axes.set_title(chart.y, color=soft, loc="left", fontsize=11, pad=8)  # read without turning one's head
        axes.grid(axis="y", color=rule, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=soft, length=0, pad=6)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(rule)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), chart)


def _add(axes, curve: Curve) -> None:
    ink, points = _STAND_IN[curve.ink], thin(curve.points)
    if curve.band:
        steps, low, high = zip(*curve.band[:: max(1, len(curve.band) // MOST_POINTS)], strict=True)
        axes.fill_between(steps, low, high, color=ink, alpha=0.16, linewidth=0)
        axes.vlines(steps, low, high, color=ink, alpha=0.6, linewidth=1)
    if not points:
        return
    steps, values = zip(*points, strict=True)
    dots = len(points) == 1 or (curve.dots and len(points) <= 60)
    axes.plot(
        steps,
        values,
        color=ink,
        linewidth=1.1 if curve.quiet else 2,
        alpha=0.55 if curve.quiet else 1,
        linestyle="--" if curve.dashed else "-",
        marker="o" if dots else None,
        markersize=4,
        zorder=2 if curve.quiet else 3,
        solid_capstyle="round",
        solid_joinstyle="round",
    )


def _inline(svg: str, chart: Chart) -> str:
    """The drawing as part of a page: no prolog, no metadata, names of its own, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{chart.name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"\s*font-family: [^;\"]*;", "", svg)
    for name, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return re.sub(r"<svg[^>]*>", _opening(chart), svg, count=1).strip()


def _opening(chart: Chart) -> str:
    label = f"{chart.title}: {chart.y} by {chart.x}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
