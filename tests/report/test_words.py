"""Numbers as they are written on the page."""

import pytest

from palate.report import words
from palate.report.words import cut, duration, interval, number, percent, plural, size, verdict_parts


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "n/a"),
        (0.0, "0.0000"),
        (0.69314718, "0.6931"),
        (-2.5, "−2.5000"),
        (12345.6, "12,346"),
        (7.5e-5, "7.500e−05"),
        (25000000.0, "2.500e+07"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, "n/a"),
        (-1, "n/a"),
        (0.42, "0.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (90, "1 min 30 s"),
        (3725, "1 h 02 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_shares_sizes_and_counts():
    assert (percent(0.71), percent(None), interval(0.656, 0.759)) == ("71.0%", "n/a", "[65.6%, 75.9%]")
    assert interval(None, 0.5) == ""
    assert (size(512 * 2**20), size(3 * 2**30), size(None)) == ("512 MB", "3.0 GB", "n/a")
    assert (plural(1, "step"), plural(1200, "step")) == ("1 step", "1,200 steps")


def test_long_text_is_cut_and_counted():
    assert cut("a" * 100, 50) == ("a" * 50, 50)
    assert cut("a" * 60, 50) == ("a" * 60, 0)  # a few more are shown rather than counted


@pytest.mark.parametrize(
    "sentence, parts",
    [
        ("better: by far", ("better", "by far")),
        ("verdict: worse: by far", ("worse", "by far")),
        ("not shown to be better: n", ("not shown to be better", "n")),
        ("held-out loss 1: 2", (None, "held-out loss 1: 2")),
    ],
)
def test_verdict_parts(sentence, parts):
    assert verdict_parts(sentence) == parts


def test_losses_that_are_advised_exist():
    import inspect
    import re

    from palate.losses import LOSSES

    advised = re.findall(r"--loss (\w+) or (\w+)", inspect.getsource(words))
    assert advised and {name for pair in advised for name in pair} <= set(LOSSES)
