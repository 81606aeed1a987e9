"""Trackers: what they are told is what metrics.jsonl holds, and none of them can end a run."""

import json
import math

import pytest

from palate.errors import UsageError
from palate.run import Run
from palate.track import check_tracker, numbers, tracking

LINE = {"step": 2, "loss": 0.5, "rewards/margins": 1, "time": 9.0, "eval/lost": None, "eval/nan": math.nan, "on": True}


def test_a_tracker_is_told_finite_numbers():
    assert numbers(LINE) == {"loss": 0.5, "rewards/margins": 1}


def test_a_missing_package_is_named_before_anything_begins(monkeypatch):
    check_tracker(None)
    monkeypatch.setattr("palate.track.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"track: needs accelerate and wandb.*E319.*pip install accelerate wandb"):
        check_tracker("wandb")


def logged(folder, lines, name="tensorboard"):
    """What was said, and what metrics.jsonl holds, of a run that logs these lines under a tracker."""
    said = []
    with (
        Run.create(folder, verb="dpo", config={"lr": 0.1, "train": {"keep": 2}}) as run,
        tracking(name, run, {"lr": 0.1, "train": {"keep": 2}, "none": None}, said.append),
    ):
        if folder.name == "broken":
            (folder / "tensorboard").write_text("a file where a folder should be")
        for line in lines:
            run.log(line)
    return said, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_is_told_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [{"step": n, "loss": 1 / (n + 1), "rewards/margins": n / 2} for n in range(4)]
    said, held = logged(tmp_path / "run", [*lines, LINE])
    assert (said, len(held)) == ([], 5)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "rewards/margins"}
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"])) for line in [*lines, LINE]]
    assert any("lr" in path.read_text() for path in (tmp_path / "run" / "tensorboard").glob("*/hparams.yml"))


def test_a_tracker_that_fails_is_named_once_and_left(tmp_path):
    pytest.importorskip("tensorboard")
    lines = [{"step": n, "loss": 1.0} for n in range(3)]
    said, held = logged(tmp_path / "broken", lines)
    assert held == lines
    assert len(said) == 1 and "tensorboard failed and is left" in said[0] and "metrics.jsonl" in said[0]


def test_without_a_name_there_is_no_tracker(tmp_path):
    said, held = logged(tmp_path / "run", [{"step": 0}], name=None)
    assert (said, held, (tmp_path / "run" / "tensorboard").exists()) == ([], [{"step": 0}], False)
