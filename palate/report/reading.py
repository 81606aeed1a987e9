"""A run folder read once: checked values that the page is made of. Nothing outside the folder is looked at."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from palate.errors import CheckpointError, NotThereError
from palate.files import machine_errors, read_json
from palate.run import flat_keys, read_lines, status_of

_RESTORE = "put a copy of the file back, or move it out of the folder"
_MOST_CONFIG = 1 << 18  # characters of config.yaml
_DEEPEST_CONFIG = 32

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """What the page reads of one file; further keys are no concern of it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Message(_Part):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | list[Message]


class Retention(_Part):
    """`flags`: what the run broke, in sentences; the numbers behind them are the further keys."""

    model_config = ConfigDict(extra="allow")

    flags: list[str] = []


class Misjudged(_Part):
    """A held-out pair that a reward model ordered wrongly or barely rightly. rewards: of chosen and rejected."""

    prompt: str
    chosen: str
    rejected: str
    rewards: Annotated[list[float], Field(min_length=2, max_length=2)]

    @property
    def wrong(self) -> bool:
        """Whether the rejected completion has the larger reward."""
        return self.rewards[0] < self.rewards[1]


class Result(_Part):
    """What a run ended with. peak_bytes: of memory, where somebody measured it. examples: of a reward model."""

    steps: Count | None = None
    better: bool | None = None
    retention: Retention | None = None
    reference_scored: Count | None = None
    reference_reused: Count | None = None
    peak_bytes: Count | None = None
    examples: list[Misjudged] = []


class Plan(_Part):
    """What was foreseen: steps, seconds (as the third step took), stream tokens, bytes of memory at the peak."""

    steps: Count | None = None
    seconds: float | None = None
    tokens: Count | None = None
    peak_bytes: Count | None = None


class Parent(_Part):
    """A model that the run began from, and the fingerprint of its weights."""

    model: str | None = None
    identity: str | None = None


class Record(_Part):
    """run.json."""

    id: str
    verb: str
    argv: list[str] = []
    seed: int | None = None
    parents: list[Parent] = []
    hardware: str | None = None
    versions: dict[str, str | None] = {}
    times: dict[str, str] = {}
    resumed: list[str] = []
    start: dict[str, str | None] = {}
    plan: Plan = Plan()
    verdict: str | None = None
    health: list[str] | None = None
    error: str | None = None
    result: Result | None = None


class Source(_Part):
    """A data file as it was when it was read."""

    path: str
    role: str | None = None
    rows: int | None = None
    slice: str | None = None
    sha256: str | None = None


class Finding(_Part):
    """One finding of `palate doctor`."""

    check: str
    severity: str
    count: Count = 0
    what: str = ""
    fix: str = ""


class Doctor(_Part):
    """What `palate doctor` said of the data."""

    findings: list[Finding] = []


class Data(_Part):
    """data.json."""

    sources: list[Source] = []
    counts: dict[str, int] = {}
    notes: list[str] = []
    rejected: list[str] = []
    train: Count | None = None
    held: Count | None = None
    seed: int | None = None
    doctor: Doctor | None = None


class Scores(_Part):
    """What is known of a sample. reward, reward_before: of runs that follow one, of what is new and what was before."""

    tokens: Count | None = None
    reward: float | None = None
    reward_before: float | None = None


class Sample(_Part):
    """A row of samples.jsonl; `after` is null in those of step 0."""

    step: Count
    prompt: Prompt
    before: str | None = None
    after: str | None = None
    scores: Scores = Scores()


class Change(_Part):
    """A mean before training and after it."""

    before: float | None = None
    after: float | None = None


class Example(_Part):
    """One prompt of a comparison, completed before and after; scores by the judge, larger is better."""

    prompt: Prompt
    before: str
    after: str
    score_before: float | None = None
    score_after: float | None = None


class Comparison(_Part):
    """comparison.json: `a`, the model after training, against `b`, the one before; of `a`, ties counted half."""

    a: str
    b: str
    judge: str
    n: Count
    wins: Count
    losses: Count
    ties: Count
    win_rate: Share | None = None
    low: Share | None = None
    high: Share | None = None
    verdict: Literal["better", "worse", "not shown to be different"]
    kl: float | None = None
    length: Change | None = None
    reward: Change | None = None
    examples: list[Example] = []


Line = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """One run folder. steps: lines of metrics.jsonl with a loss; evals: those with `eval/...` keys; both in file order.

    status: as `palate.run.status_of` has it. config: config.yaml, inner keys dotted.
    """

    path: Path
    status: str
    record: Record
    config: dict[str, Any]
    data: Data
    steps: tuple[Line, ...]
    evals: tuple[Line, ...]
    samples: tuple[Sample, ...]
    comparison: Comparison | None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def imitates(self) -> bool:
        """Whether it learned from demonstrations alone, so that nothing was rejected."""
        return self.record.verb in ("sft", "pretrain")

    @property
    def sides(self) -> tuple[str, str]:
        """What the two kinds of completions are called where the run's data came from."""
        return ("wanted", "unwanted") if self.record.verb == "kto" else ("chosen", "rejected")

    @cached_property
    def before(self) -> dict[str, float]:
        """The first evaluation of every `eval/...` key, where it is a finite number; empty without any."""
        return _numbers({key: line[key] for line in reversed(self.evals) for key in line})

    @cached_property
    def after(self) -> dict[str, float]:
        """The last evaluation of every `eval/...` key after a step, where it is a finite number; empty without any."""
        return _numbers({key: line[key] for line in self.evals if line["step"] for key in line})

    @cached_property
    def seconds(self) -> float | None:
        """Spent in optimizer steps; None where none was logged."""
        found = series(self.steps, "seconds")
        return sum(value for _, value in found) if found else None

    @property
    def planned(self) -> int | None:
        """The steps that it was to take, where that is known."""
        given = self.config.get("steps")
        return self.record.plan.steps or (given if isinstance(given, int) and given > 0 else None)

    @cached_property
    def last_step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((line["step"] for line in (*self.steps, *self.evals)), default=0)


def read_run(path: Path) -> Reading:
    """The run in the folder `path`.

    Raises NotThereError (E101) where no run is; CheckpointError (E501) naming file and field where one is damaged.
    """
    if not (path / "run.json").exists():
        raise NotThereError("there is no run here", where=str(path), code="E101", next="palate runs list names them")
    with _readable(path / "run.json"):
        record, status = _checked(Record, path / "run.json", read_json(path / "run.json")), status_of(path)
    with _readable(path / "config.yaml"):
        config = _config(path / "config.yaml")
    steps, evals = _metrics(path / "metrics.jsonl")
    return Reading(
        path=path,
        status=status,
        record=record,
        config=config,
        data=_optional(Data, path / "data.json") or Data(),
        steps=steps,
        evals=evals,
        samples=tuple(
            _checked(Sample, f"{path / 'samples.jsonl'}:{number}", row)
            for number, row in enumerate(_lines(path / "samples.jsonl"), 1)
        ),
        comparison=_optional(Comparison, path / "comparison.json")
        or _optional(Comparison, path / "compare" / "comparison.json"),
    )


def series(lines: Sequence[Line], key: str) -> list[tuple[int, float]]:
    """(step, value) of every line that holds a finite number under `key`."""
    return [(line["step"], value) for line in lines if (value := finite(line.get(key))) is not None]


def finite(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    if type(value) is float:  # as nearly all are, of very many
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _numbers(line: Line) -> dict[str, float]:
    return {key: value for key in line if (value := finite(line[key])) is not None}


def _metrics(path: Path) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    steps, evals = [], []
    for number, line in enumerate(_lines(path), 1):
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            raise _damaged(f"{path}:{number}", '"step" is no count')
        (evals if any(key.startswith("eval/") for key in line) else steps).append(line)
    return tuple(steps), tuple(evals)


def _lines(path: Path) -> list[Line]:
    with _readable(path):
        return read_lines(path)


def _optional(kind, path: Path):
    """The checked content of a file; None where there is none."""
    if not path.exists():
        return None
    with _readable(path):
        return _checked(kind, path, read_json(path))


def _checked(kind, where, content):
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:80]
        at = f'"{field}": ' if field else ""
        raise _damaged(str(where), f"{at}{first['msg'][0].lower()}{first['msg'][1:]}") from None


def _config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        text = path.read_bytes().decode("utf-8", "surrogatepass")
        content = yaml.safe_load(text) if _plain_yaml(text) else None
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise _damaged(str(path), "is no config: no plain keys with values")
    return {str(key): value for key, value in flat_keys(content).items()}


def _plain_yaml(text: str) -> bool:
    """Whether the text has nothing that a config never has: aliases, which can multiply, great depth, great length."""
    import yaml

    depth = 0
    for event in yaml.parse(text[:_MOST_CONFIG]):  # stopped early: PyYAML slows down with depth
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_CONFIG or isinstance(event, yaml.AliasEvent):
            return False
    return len(text) <= _MOST_CONFIG


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within, what is no file or is nested beyond reading is a CheckpointError; what may not be read MachineError."""
    try:
        with machine_errors(path, "read"):
            if path.is_dir():
                raise _damaged(str(path), "is a folder, no file")
            yield
    except RecursionError:
        raise _damaged(str(path), "is nested too deeply") from None


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(what, where=where, code="E501", next=_RESTORE)
