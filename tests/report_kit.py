"""What tests of the report share: lines of a run's files, and the page read back as text and elements."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

CONFIG = {"model": "models/start", "data": "pairs.jsonl", "lr": 1e-4, "steps": 4, "seed": 0, "train": {"keep": 2}}
DATA = {
    "sources": [{"path": "pairs.jsonl", "sha256": "ab" * 32, "rows": 60, "role": "train"}],
    "counts": {"rows": 60, "refused": 2, "prompts cut": 0},
    "notes": ["columns prompt, chosen, rejected: pairs"],
    "seed": 0,
    "train": 57,
    "held": 3,
    "rejected": ["pairs.jsonl:7: no completion", "pairs.jsonl:9: no prompt"],
}
RESULT = {
    "steps": 4,
    "better": True,
    "verdict": "better: on 40 held-out pairs the chosen completion wins 80.0% [65.2%, 89.5%]",
    "reference_scored": 120,
    "reference_reused": 6,
}


def step(number: int, **changes) -> dict:
    """A line of a training step."""
    line = {"step": number, "loss": 0.7 / number, "learning_rate": 1e-4, "tokens": 512, "seconds": 0.5}
    line |= {"rewards/chosen": 0.11 * number, "rewards/rejected": -0.2 * number, "rewards/margins": 0.31 * number}
    line |= {"rewards/accuracies": 0.5 + number / 10, "rewards/ties": 0.0}
    line |= {"logps/chosen": -40.0 - number, "logps/rejected": -41.0 - 3 * number}
    return line | changes


def evaluation(number: int, **changes) -> dict:
    """A line of a held-out evaluation; at step 0 all pairs tie."""
    share = 0.0 if number == 0 else 0.6 + number / 20
    line = {"step": number, "eval/loss": 0.693 - number / 10, "eval/rewards/accuracies": share, "eval/count": 40}
    line |= {"eval/rewards/accuracies_low": max(0.0, share - 0.15), "eval/rewards/accuracies_high": share + 0.1}
    line |= {"eval/rewards/ties": float(number == 0), "eval/rewards/margins": 0.4 * number}
    line |= {"eval/rewards/chosen": -0.25 * number, "eval/rewards/rejected": -0.65 * number}
    line |= {"eval/logps/chosen": -40.0 - 2.5 * number, "eval/logps/rejected": -41.0 - 6.5 * number}
    return line | {"eval/displaced": 0.625 * bool(number)} | changes


def sample(number: int, prompt: str, before: str, after: str | None, tokens: int = 8) -> dict:
    return {"step": number, "prompt": prompt, "before": before, "after": after, "scores": {"tokens": tokens}}


def comparison(count: int = 9, **changes) -> dict:
    """A comparison whose example n scored n/10 before; after it, one in three fell by 0.15, the others rose by 0.05."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"prompt {n}"}],
            "before": f"before {n}",
            "after": f"after {n}",
            "score_before": n / 10,
            "score_after": n / 10 + (0.05 if n % 3 else -0.15),
        }
        for n in range(count)
    ]
    facts = {"a": "after", "b": "before", "judge": "rule", "n": count, "wins": 6, "losses": 3, "ties": 0}
    facts |= {"win_rate": 0.667, "low": 0.354, "high": 0.879, "verdict": "not shown to be different", "kl": 1.234}
    facts |= {"length": {"before": 21.25, "after": 24.5}, "reward": {"before": 0.4, "after": 0.3833}}
    return facts | {"examples": rows} | changes


LINES = [evaluation(0), step(1), step(2), evaluation(2), step(3), step(4), evaluation(4)]
SAMPLES = [
    sample(0, "How are you?", "bad", None, 6),
    sample(0, "And now?", "worse", None, 10),
    sample(4, "How are you?", "bad", "very well", 7),
    sample(4, "And now?", "worse", "still well", 12),
]


class Page(HTMLParser):
    """A page as elements (tag, attributes) and as text, spaces made single. `svgs`: the drawings' sources."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements, self.parts, self._skip = [], [], False
        self.feed(self.html)
        self.text = " ".join("".join(self.parts).split())
        self.svgs = {s.split('aria-label="')[1].split(":")[0]: s for s in self.html.split("<svg")[1:]}
        self.svgs = {name: "<svg" + s.split("</svg>")[0] for name, s in self.svgs.items()}

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._skip = self._skip or tag == "style"

    def handle_endtag(self, tag):
        self._skip = self._skip and tag != "style"
        if tag in ("p", "div", "td", "th", "dt", "dd", "h1", "h2", "h3", "li", "text", "title", "span", "pre"):
            self.parts.append(" ")

    def handle_data(self, data):
        if not self._skip:
            self.parts.append(data)


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The drawn lines, as lists of points, but for the axes' own."""
    drawn = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none;[^"]* stroke: var\(--s\d\)', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in drawn]


def affine(values, places):
    """Asserts that places are a line through values."""
    (v0, p0), (v1, p1) = (values[0], places[0]), (values[-1], places[-1])
    for value, place in zip(values, places, strict=True):
        assert place == pytest.approx(p0 + (value - v0) * (p1 - p0) / (v1 - v0), abs=1e-3)
