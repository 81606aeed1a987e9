"""A run's numbers to a tracker besides: tensorboard, trackio, wandb or mlflow, through accelerate's adapters.

The files of the run folder are written whatever the tracker does. Nothing is started unless --track names it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from palate.errors import UsageError
from palate.run import Run, flat_keys

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
PROJECT = "palate"  # under which a tracker that has projects shows the run by its folder's name


def check_tracker(name: Tracker | None) -> None:
    """Nothing, where the tracker can be started; UsageError (E319) where a package is missing."""
    missing = [package for package in ("accelerate", name) if package and find_spec(package) is None]
    if name and missing:
        what = f"needs {' and '.join(missing)}, which cannot be imported here"
        raise UsageError(what, where="track", code="E319", next=f"pip install {' '.join(missing)}")


@contextmanager
def tracking(name: Tracker | None, run: Run, config: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[None]:
    """Every line that the run logs inside goes to the tracker too, its finite numbers by step.

    A tracker that fails is named once and left; the run goes on. It begins with the first line, so that of several
    processes only the one that logs has it.
    """
    if name is None:
        yield
        return
    tracker, broken = None, False

    def tell(line: Mapping[str, Any]) -> None:
        nonlocal tracker, broken
        if broken:
            return
        try:
            if tracker is None:
                tracker = _started(name, run, config)
            tracker.log(numbers(line), step=line.get("step"))
        except Exception as error:
            broken = True
            say(f"track: {name} failed and is left: {error}; the numbers stand in {run.path / 'metrics.jsonl'}")

    run.listener = tell
    try:
        yield
    finally:
        run.listener = None
        if tracker is not None and not broken:
            try:
                tracker.finish()
            except Exception as error:
                say(f"track: {name} did not finish: {error}")


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line a tracker can draw."""
    kept = {key: value for key, value in line.items() if key not in ("step", "time") and not isinstance(value, bool)}
    return {key: value for key, value in kept.items() if isinstance(value, int | float) and math.isfinite(value)}


def _started(name: Tracker, run: Run, config: Mapping[str, Any]):
    from accelerate import tracking as adapters

    title = run.path.name or run.id
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: adapters.TensorBoardTracker("tensorboard", run.path),
        "trackio": lambda: adapters.TrackioTracker(PROJECT, name=title),
        "wandb": lambda: adapters.WandBTracker(PROJECT, name=title, id=run.id, resume="allow"),
        "mlflow": lambda: adapters.MLflowTracker(PROJECT, run_name=title),
    }
    tracker = makers[name]()
    tracker.start()
    plain = {
        key: value for key, value in flat_keys(dict(config)).items() if isinstance(value, bool | int | float | str)
    }
    tracker.store_init_configuration(plain)
    return tracker
