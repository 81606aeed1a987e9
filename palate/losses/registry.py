"""One table of losses: what each is called, needs and takes. Losses are pure functions of log-probs, never reduced."""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

AtStart = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class LossInfo:
    """The facts of one registered loss.

    kind: "pairwise" (PairLogps), "ranked" (RankedLogps), "feedback" (FeedbackLogps), "reward" (PairRewards) or
        "demonstration".
    reference: whether it reads reference log-probs.
    normalised: whether, at its default options, it compares means per token rather than sums (see `is_normalised`).
    at_start: from options to its value where policy equals reference, or to None where that depends on the rows;
        itself None where the loss has no reference or no such value.
    options: each option with its default. ranges: the numeric ones' intervals, such as "[0, 0.5)".
    """

    name: str
    kind: str
    reference: bool
    normalised: bool
    at_start: AtStart | None
    options: dict[str, Any]
    ranges: dict[str, str]
    paper: str
    equation: str


LOSSES: dict[str, Callable[..., Tensor]] = {}
_INFO: dict[str, LossInfo] = {}


def _register(kind: str, name: str, reference: bool, paper: str, normalised: bool, at_start, ranges):
    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in LOSSES:
            raise ValueError(f'two losses are called "{name}"')
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = {p.name: p.default for p in parameters}
        number = {key for key, default in options.items() if not isinstance(default, bool)}
        if set(ranges or {}) != number:
            raise ValueError(
                f'loss "{name}" must declare a range for each number it takes: {", ".join(sorted(number))}'
            )
        source, _, equation = paper.partition(", ")
        _INFO[name] = LossInfo(
            name, kind, reference, normalised, at_start, options, dict(ranges or {}), source, equation
        )

        @functools.wraps(function)
        def checked(logps, **given):
            return function(logps, **check_options(name, given))

        LOSSES[name] = checked
        return checked

    return decorate


def pairwise_loss(name, *, reference: bool, paper: str, normalised: bool = False, at_start=None, ranges=None):
    """Decorator that enters a function of PairLogps, returning (P,), into LOSSES under `name`.

    Its keyword-only arguments become its options; `ranges` gives each numeric one's interval. `paper` is the
    source and, after a comma, the equation. Options are checked at every call, so a direct call is as safe as a config.
    """
    return _register("pairwise", name, reference, paper, normalised, at_start, ranges)


def ranked_loss(name, *, reference: bool, paper: str, normalised: bool = False, at_start=None, ranges=None):
    """Decorator that enters a function of RankedLogps, returning (L,), into LOSSES; as `pairwise_loss`."""
    return _register("ranked", name, reference, paper, normalised, at_start, ranges)


def feedback_loss(name, *, reference: bool, paper: str, normalised: bool = False, at_start=None, ranges=None):
    """Decorator that enters a function of FeedbackLogps, returning (B,), into LOSSES; as `pairwise_loss`."""
    return _register("feedback", name, reference, paper, normalised, at_start, ranges)


def demonstration_loss(name, *, reference: bool, paper: str, normalised: bool = False, at_start=None, ranges=None):
    """Decorator that enters a function of DemonstrationLogps, returning (S,), into LOSSES; as `pairwise_loss`."""
    return _register("demonstration", name, reference, paper, normalised, at_start, ranges)


def reward_loss(name, *, paper: str, ranges=None):
    """Decorator that enters a function of PairRewards, returning (P,), into LOSSES; as `pairwise_loss`."""
    return _register("reward", name, False, paper, False, None, ranges)


def info(name: str) -> LossInfo:
    """The facts of the loss called `name`; ValueError naming the registered ones where there is none."""
    if name not in _INFO:
        raise ValueError(f'there is no loss "{name}". There are: {", ".join(sorted(_INFO))}')
    return _INFO[name]


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the loss, the given ones over its defaults; numbers as float, switches as bool.

    Raises ValueError for an option it has not (naming those it takes), a value of the wrong type, or one out of range.
    """
    facts = info(name)
    for key in options:
        if key not in facts.options:
            takes = f"It takes: {', '.join(facts.options)}" if facts.options else "It takes none"
            raise ValueError(f'loss "{name}" has no option "{key}". {takes}')
    full = {}
    for key, default in facts.options.items():
        value = options.get(key, default)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f'loss "{name}", option "{key}" is true or false, not {value!r}')
            full[key] = value
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f'loss "{name}", option "{key}" is a number in {facts.ranges[key]}, not {value!r}')
        if not _within(float(value), facts.ranges[key]):
            raise ValueError(f'loss "{name}", option "{key}" must lie in {facts.ranges[key]}, not at {value!r}')
        full[key] = float(value)
    return full


def reward_scale(name: str, options: Mapping[str, Any] | None = None) -> float:
    """The factor from log-ratio to implicit reward: beta where the loss has one, else 1."""
    return check_options(name, options or {}).get("beta", 1.0)


def is_normalised(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether the loss compares means per token rather than sums, under these options (for ipo: `average`)."""
    return check_options(name, options or {}).get("average", info(name).normalised)


def _within(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # not a number is neither, and every interval leaves infinity out
