"""The drawings: every point where its value says, axes named, nothing of matplotlib's own taste left."""

import re
from itertools import pairwise

import pytest
from report_kit import affine, points

from palate.report.charts import MOST_POINTS, Chart, Curve, draw, thin


def test_points_stand_where_their_values_say():
    values = [(1, 0.7), (2, 0.31), (5, 0.55), (9, -0.2)]
    (line,) = points(draw(Chart("loss", "Loss", "nats", (Curve("held out", values, "s1", dots=True),))))
    affine([x for x, _ in values], [x for x, _ in line])
    affine([y for _, y in values], [y for _, y in line])
    assert line[0][1] < line[-1][1]  # up is more: SVG counts downwards


def test_two_curves_share_one_scale():
    low, high = [(1, 0.0), (2, 1.0)], [(1, 3.0), (2, 4.0)]
    one, two = points(draw(Chart("r", "R", "reward", (Curve("a", low, "s1"), Curve("b", high, "s2")))))
    affine([0.0, 1.0, 3.0, 4.0], [one[0][1], one[1][1], two[0][1], two[1][1]])


def test_axes_are_named_and_text_is_text():
    svg = draw(Chart("loss", "Loss", "nats a token", (Curve("in training", [(1, 1.0), (2, 0.5)], "s1"),)))
    said = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert "step" in said and "nats a token" in said
    assert 'aria-label="Loss: nats a token by step"' in svg
    assert "font-family" not in svg and "font:" not in svg
    shares = draw(Chart("acc", "A", "share", (Curve("x", [(0, 0.5), (1, 1.0)], "s1"),), share=True, level=0.5))
    assert "100%" in re.findall(r"<text[^>]*>([^<]+)</text>", shares)


def test_steps_are_counted_in_whole_numbers_also_where_there_is_one():
    svg = draw(Chart("kl", "KL", "nats", (Curve("held out", [(1, 0.12)], "s1", dots=True),), x="round"))
    ticks = re.findall(
        r"<text[^>]*>([^<]+)</text>", svg[svg.index("matplotlib.axis_1") : svg.index("matplotlib.axis_2")]
    )
    assert ticks == ["1", "round"]


def test_colours_are_the_pages():
    svg = draw(Chart("c", "C", "y", (Curve("a", [(1, 1.0)], "s1", band=[(1, 0.5, 1.5)]), Curve("b", [(1, 2.0)], "s2"))))
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert {"var(--s1)", "var(--s2)", "var(--soft)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", svg))


def test_the_same_chart_gives_the_same_bytes_and_no_prolog():
    chart = Chart("c", "C", "y", (Curve("a", [(1, 1.0), (2, 2.0)], "s1"),))
    assert draw(chart) == draw(chart)
    assert draw(chart).startswith("<svg viewBox=")
    for word in ("<?xml", "DOCTYPE", "metadata", "xmlns", "http"):
        assert word not in draw(chart)


def test_shares_go_from_0_to_100_or_as_far_as_the_curves():
    curve = Curve("held out", [(1, 0.61), (2, 0.64)], "s1")
    said = [
        re.findall(r"<text[^>]*>(\d+)%</text>", draw(Chart("a", "A", "share", (curve,), share=True, whole=whole)))
        for whole in (True, False)
    ]
    assert said[0] == ["0", "20", "40", "60", "80", "100"]
    near = [int(text) for text in said[1]]
    assert near[-1] - near[0] >= 6 and 50 <= near[0] < 61 and 64 < near[-1] <= 75
    assert len({b - a for a, b in pairwise(near)}) == 1  # no label is rounded to another


@pytest.mark.parametrize(
    "values", [[(0, 1e-12), (1, 2e-12)], [(1, 2.5e7), (2, 2.4e7)], [(3, 0.0)], [(1, -5.0), (9, -5.0)]]
)
def test_any_scale_can_be_drawn(values):
    svg = draw(Chart("c", "C", "y", (Curve("a", values, "s1"),)))
    assert "nan" not in svg


def test_thinning_keeps_the_mean_and_the_order():
    values = [(n, float(n * n % 97)) for n in range(1, 10_001)]
    few = thin(values)
    assert len(few) == MOST_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(sum(y for _, y in values) / len(values))
    assert few[0] == (13.0, sum(y for _, y in values[:25]) / 25)
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert thin(values[:MOST_POINTS]) == values[:MOST_POINTS]
