"""The panel: a terminal gets a picture, everything else plain lines; no width or stream breaks it."""

import io

import pytest

from palate.panel import LivePanel, PlainLines, clock_text, make_panel, sparkline


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def lines(count=5):
    for step in range(1, count + 1):
        yield {
            "step": step,
            "loss": 0.7 - 0.1 * step,
            "rewards/margins": 0.1 * step,
            "rewards/accuracies": 0.5 + 0.1 * step,
            "tokens_per_second": 9400.3,
        }
    yield {"step": count, "eval/loss": 0.5, "eval/rewards/accuracies": 0.8, "eval/rewards/accuracies_low": 0.7,
           "eval/rewards/accuracies_high": 0.9}  # fmt: skip


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "30")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def show(stream, total=10):
    with make_panel(total, stream) as panel:
        for line in lines():
            panel(line)
    return stream.getvalue()


def test_a_pipe_gets_plain_lines():
    text = show(io.StringIO())
    assert "\x1b" not in text
    assert "\r" not in text
    found = text.splitlines()
    assert len(found) == 6
    assert found[0] == "step 1/10  9,400 tok/s  loss 0.6  margin 0.1  accuracy 60%"
    assert found[1].startswith("step 2/10  ETA ")
    assert found[-1] == "step 5  held out: loss 0.5  accuracy 80% [70%, 90%]"


def test_a_terminal_gets_a_picture():
    text = show(Terminal())
    for part in ("step 5/10", "50%", "9,400 tok/s", "0.6 → 0.2", "60% → 100%", "█", "held out: loss 0.5"):
        assert part in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_dumb_terminal_is_a_pipe(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in show(Terminal())


def test_no_color_means_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in show(Terminal())
    assert "\x1b[32m" not in show(Terminal())


@pytest.mark.parametrize("columns", ["1", "20", "37", "300"])
def test_any_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert "step 5" in show(Terminal()) or columns == "1"


def test_a_terminal_without_unicode():
    stream = Terminal()
    stream.encoding = "ascii"
    assert show(stream).isascii()


def test_a_reader_who_left_stops_nothing():
    stream = io.StringIO()
    with make_panel(10, stream) as panel:
        stream.close()
        for line in lines():
            panel(line)


def test_odd_lines_are_shown_all_the_same():
    for stream in (Terminal(), io.StringIO()):
        with make_panel(0, stream) as panel:
            panel({"step": 1, "loss": float("nan"), "tokens_per_second": None})
            panel({"step": 2, "loss": float("inf"), "rewards/margins": 1e300})
            panel({"loss": 1})
            panel({})
        assert "step 2" in stream.getvalue()


def test_eta_counts_from_where_the_run_resumed():
    now = [0.0]
    panel = PlainLines(100, io.StringIO(), clock=lambda: now[0])
    assert panel.eta() is None
    for step in range(51, 61):
        panel.take({"step": step, "loss": 1.0})
        now[0] += 2.0
    assert panel.eta() == pytest.approx(80.0)


def test_a_long_run_keeps_a_bounded_history():
    panel = LivePanel(100_000, io.StringIO())
    for step in range(20_000):
        panel.take({"step": step, "loss": step / 20_000})
    assert len(panel.history["loss"]) <= 4096
    assert panel.history["loss"][-1] > 0.99
    assert sparkline(panel.history["loss"], 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [([], 5, ""), ([1.0], 5, "▄"), ([1, 1], 5, "▄▄"), ([0, 1], 5, "▁█"), ([0, 0, 1, 1], 2, "▁█"), ([1], 0, "")],
)
def test_sparkline(values, width, bars):
    assert sparkline(values, width) == bars


def test_clock():
    assert [clock_text(s) for s in (0, 21.4, 725, 11045)] == ["0:00", "0:21", "12:05", "3:04:05"]


def test_the_health_of_a_policy_gradient(monkeypatch):
    line = {"step": 3, "loss": 0.1, "reward": 1.25, "reward/total": 1.2, "kl": 0.5, "kl_coef": 0.1}
    line |= {"policy/clipped": 0.125, "value/explained": 0.31, "ended": 1.0}
    for stream in (io.StringIO(), Terminal()):
        with make_panel(10, stream) as panel:
            panel(line)
        assert "less KL 1.2  KL 0.5  clipped 12%  explained 0.31  ended 100%" in stream.getvalue()
    stream = io.StringIO()
    with make_panel(10, stream) as panel:
        panel({"step": 1, "loss": 0.5, "kl": 0.2})  # of KTO
    assert "KL" not in stream.getvalue()
