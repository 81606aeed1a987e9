"""The page of a reward model: accuracy by margin, what the truth reaches, and the pairs that it gets wrong."""

import math

import pytest
from report_kit import RESULT, affine, evaluation, points, step

from palate.report.certainty import certainty
from palate.report.charts import draw
from palate.report.reading import read_run

CURVE = [
    {"count": 20, "margin": 0.25, "predicted": 0.562, "accuracy": 0.55, "low": 0.342, "high": 0.742},
    {"count": 20, "margin": 1.5, "predicted": 0.818, "accuracy": 0.75, "low": 0.531, "high": 0.888},
]
KNOWN = {"accuracy": 0.8125, "lost": 0.021, "lost_low": 0.012, "lost_high": 0.033, "loss": 0.4321, "excess": 0.0123}
SURE = {"eval/calibration": CURVE, "eval/calibration_slope": 0.87, "eval/calibration_error": 0.034}
SURE |= {f"eval/truth/{name}": value for name, value in KNOWN.items()}
BY = [{"count": 40, "said": 2.0, "accuracy": 0.7, "low": 0.546, "high": 0.819}]
PAIR = {"prompt": "How was it?", "chosen": "fine & good", "rejected": "<b>bad</b>", "rewards": [-0.25, 1.75]}


def lines(**changes):
    early = {
        "eval/calibration": [CURVE[0] | {"accuracy": 0.11}],
        "eval/truth/loss": 0.4321,
        "eval/truth/accuracy": 0.8125,
    }
    return [evaluation(0, **early), step(1), step(2), evaluation(2, **SURE | changes)]


def test_the_curve_is_that_of_the_last_evaluation(folder):
    found = certainty(read_run(folder(verb="reward", lines=lines())))
    (chart,) = found.charts
    said, measured = (line for line in points(draw(chart)) if line[0][0] != line[-1][0])  # but for the intervals
    assert len(measured) == 2 and len(said) == 61
    affine([1 / (1 + math.exp(-1.5 * n / 60)) for n in (0, 30, 60)], [said[n][1] for n in (0, 30, 60)])
    assert said[-1][0] == pytest.approx(measured[-1][0], abs=1e-3)  # one scale
    top, bottom = said[-1][1], said[0][1]
    slope = (top - bottom) / (1 / (1 + math.exp(-1.5)) - 0.5)
    assert measured[0][1] - bottom == pytest.approx(slope * 0.05, abs=1e-3)
    assert chart.curves[1].band == [(0.25, 0.342, 0.742), (1.5, 0.531, 0.888)]


def test_the_page_says_it_in_words_and_numbers(folder, report):
    page = report(folder(verb="reward", lines=lines(**{"eval/by_margin": BY}), result=RESULT | {"examples": [PAIR]}))
    for said in (
        "Calibration slope 0.87",
        "Said and found accuracy are 3.4 points apart",
        "orders 81.2% of such pairs rightly, at a loss of 0.4321 nats",
        "loses 2.1 [1.2, 3.3] points to it and 0.0123 nats",
        "0.25 20 56.2% 55.0% [34.2%, 74.2%]",
        "How was it?",
        "fine & good",
        "<b>bad</b>",  # as text
        "score \u22120.25",
        "score 1.75",
    ):
        assert said in page.text, said
    assert {"Accuracy by margin", "Accuracy by the data's margin", "Loss", "Accuracy", "Rewards"} <= page.svgs.keys()
    assert page.html.count("the truth&#39;s own") == 2  # in the charts of loss and accuracy
    assert "Implicit rewards" not in page.text


def test_other_runs_have_no_such_section(folder, report):
    page = report(folder())
    assert "How sure it may be" not in page.text and "Where it is most wrong" not in page.text
    assert "the truth&#39;s own" not in page.html


@pytest.mark.parametrize("curve", [None, [], "no list", [None, {"margin": 1.0}], [{**CURVE[0], "accuracy": "high"}]])
def test_what_is_no_curve_is_left_out(folder, report, curve):
    rows = [evaluation(0), step(1), evaluation(1, **{"eval/calibration": curve})]
    assert "How sure it may be" not in report(folder(verb="reward", lines=rows)).text


def test_pairs_that_are_ordered_rightly_are_no_mistakes(folder, report):
    right = PAIR | {"rewards": [1.0, 0.5]}
    page = report(folder(verb="reward", lines=lines(), result=RESULT | {"examples": [right]}))
    assert "How sure it may be" in page.text and "Where it is most wrong" not in page.text
