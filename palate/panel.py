"""What a person sees while a run trains: a live panel on a terminal, one plain line a step elsewhere, on stderr."""

import contextlib
import math
import os
import sys
import time
from collections import deque
from typing import Any, TextIO

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = (("loss", "loss"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"), ("reward", "reward"))
_HELD = (
    ("eval/loss", "loss"),
    ("eval/rewards/margins", "margin"),
    ("eval/rewards/accuracies", "accuracy"),
    ("eval/reward", "reward"),
    ("eval/kl", "KL"),
)
_HEALTH = (  # of a policy-gradient step
    ("reward/total", "less KL"),
    ("kl", "KL"),
    ("policy/clipped", "clipped"),
    ("value/explained", "explained"),
    ("ended", "ended"),
)
_KEPT = 4096  # points kept of each sparkline; a longer run keeps every second, fourth, ... step


def make_panel(total_steps: int, stream: TextIO | None = None):
    """A context manager whose value is called with each line of metrics: `with make_panel(180) as show: show(line)`.

    total_steps: optimizer steps of the whole run, > 0 where known. A line needs `step`; of the others it shows what is
    there: `loss`, `rewards/margins`, `rewards/accuracies`, `reward` with the health of a policy gradient,
    `tokens_per_second`, and `eval/...`.
    """
    stream = stream or sys.stderr
    terminal = hasattr(stream, "isatty") and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "")
    return LivePanel(total_steps, stream) if terminal else PlainLines(total_steps, stream)


def sparkline(values, width: int) -> str:
    """At most `width` bars from the lowest to the highest of the values, each the mean of its share of them."""
    values = [v for v in values if math.isfinite(v)]
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    if high == low:
        return _BARS[3] * count
    return "".join(_BARS[min(7, int((v - low) / (high - low) * 8))] for v in means)


class Progress:
    """Counts steps and seconds; shared by both views."""

    def __init__(self, total_steps: int, stream: TextIO, clock=time.monotonic):
        self.total, self.stream, self.clock = int(total_steps or 0), stream, clock
        self.step, self.taken, self.stride = 0, 0, 1
        self.times: deque[tuple[int, float]] = deque(maxlen=20)
        self.line: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.history: dict[str, list[float]] = {key: [] for key, _ in _SHOWN}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def __call__(self, line: dict[str, Any]) -> None:
        self.update(line)

    def update(self, line: dict[str, Any]) -> None:
        """Takes one line of metrics, a step's or an evaluation's, and shows it."""
        self.take(line)
        self.show(line)

    def take(self, line: dict[str, Any]) -> None:
        self.step = max(self.step, int(line.get("step", self.step)))
        if any(key.startswith("eval/") for key in line):
            self.evaluation = {k: v for k, v in line.items() if k.startswith("eval/")}
        if "loss" not in line:
            return
        self.line = line
        self.times.append((self.step, self.clock()))
        if self.taken % self.stride == 0:
            for key, values in self.history.items():
                if isinstance(line.get(key), int | float):
                    values.append(float(line[key]))
        self.taken += 1
        if self.taken >= _KEPT * self.stride:  # thinner from here on, and evenly so
            self.stride *= 2
            for values in self.history.values():
                del values[1::2]

    def show(self, line: dict[str, Any]) -> None:
        raise NotImplementedError

    def eta(self) -> float | None:
        """Seconds that the remaining steps take at the pace of the last twenty; None before two are known."""
        if len(self.times) < 2 or not self.total:
            return None
        (first, began), (last, ended) = self.times[0], self.times[-1]
        return max(0, self.total - last) * (ended - began) / max(1, last - first)

    def headline(self) -> list[str]:
        parts = [f"step {self.step}/{self.total}" if self.total else f"step {self.step}"]
        eta = self.eta()
        if eta is not None:
            parts.append(f"ETA {clock_text(eta)}")
        speed = self.line.get("tokens_per_second")
        if isinstance(speed, int | float):
            parts.append(f"{speed:,.0f} tok/s")
        return parts


class PlainLines(Progress):
    """One line of text for every line of metrics, without control characters."""

    def show(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            parts = self.headline()
            parts += [f"{name} {number(key, line[key])}" for key, name in _SHOWN if key in line]
            parts += health(line)
        else:
            parts = [f"step {self.step}"]
        if any(key.startswith("eval/") for key in line):
            parts.append(held_out(line))
        with contextlib.suppress(BrokenPipeError, ValueError):  # nobody reads any more; the files have it all
            print("  ".join(parts), file=self.stream, flush=True)


class LivePanel(Progress):
    """A few lines redrawn in place by rich; the last state stays on the screen."""

    def __enter__(self):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=self.stream, highlight=False)
        # said text goes above the panel; stdout is a result and stays as it is
        self.live = Live(console=self.console, refresh_per_second=4, redirect_stdout=False, transient=False)
        self.live.__enter__()
        return self

    def __exit__(self, *exc):
        self.live.update(self.render(), refresh=True)
        self.live.__exit__(*exc)

    def show(self, line: dict[str, Any]) -> None:
        self.live.update(self.render())

    def render(self):
        from rich.text import Text

        width = max(20, self.console.width)
        plain = not (self.console.encoding or "utf-8").lower().startswith("utf")
        share = min(1.0, self.step / self.total) if self.total else 0.0
        head = "  ".join(([f"{share:4.0%}"] if self.total else []) + self.headline())
        room = min(30, width - len(head) - 2)
        text = Text(no_wrap=True, overflow="crop")
        if room >= 8:
            full = int(share * room)
            done, rest = ("#", "-") if plain else ("━", "─")
            text.append(done * full, style="green").append(rest * (room - full), style="dim").append("  ")
        text.append(head)
        for key, name in _SHOWN:
            values = self.history[key]
            if not values:
                continue
            row = f"\n{name:<9}{number(key, values[0])} → {number(key, self.line.get(key, values[-1]))}"
            row = row.replace("→", "->") if plain else row
            text.append(row)
            if not plain:
                text.append("  " + sparkline(values, min(40, width - len(row) - 2)), style="cyan")
        if words := health(self.line):
            text.append("\n" + "  ".join(words)[:width])
        if self.evaluation:
            text.append("\n" + held_out(self.evaluation)[:width])
        return text


def held_out(line: dict[str, Any]) -> str:
    """The few numbers of an evaluation that fit a line, the accuracy with its interval; the files have all."""
    parts = []
    for key, name in _HELD:
        if key in line:
            parts.append(f"{name} {number(key, line[key])}")
            low, high = line.get(key + "_low"), line.get(key + "_high")
            if low is not None and high is not None:
                parts[-1] += f" [{number(key, low)}, {number(key, high)}]"
    return "held out: " + "  ".join(parts)


def health(line: dict[str, Any]) -> list[str]:
    """How a policy-gradient step goes, in a few numbers; none of other steps."""
    return [f"{name} {number(key, line[key])}" for key, name in _HEALTH if key in line and "policy/clipped" in line]


def number(key: str, value: Any) -> str:
    """A metric as a few characters: shares in percent, others with four digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return f"{value:.0%}" if key.endswith(("accuracies", "clipped", "ended")) else f"{value:.4g}"


def clock_text(seconds: float) -> str:
    """Seconds as 0:21, 12:05 or 3:04:05."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
