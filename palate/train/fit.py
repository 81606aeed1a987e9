"""fit(): the loop with a run folder around it: log, evaluate, save, stop cleanly, go on exactly where it stopped."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from palate.data.stream import StepBatch
from palate.distributed import Ranks
from palate.errors import AwaitsVotes, Interrupted
from palate.run import Run
from palate.train import checkpoint
from palate.train.loop import TrainState, steps
from palate.train.objectives import Objective, Outcome

Evaluate = Callable[[], dict[str, Any]]


def fit(
    state: TrainState,
    batches: Iterable[StepBatch],
    objective: Objective,
    run: Run,
    *,
    ranks: Ranks | None = None,
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    meta: dict[str, Any] | None = None,
    better: str | None = None,
    inspect: Callable[[int, list[Outcome]], None] | None = None,
    stop: int | None = None,
    every: int = 1,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains to the end of `batches`, or to the first signal: then saves and raises Interrupted.

    stop: a step after which it saves and returns, also where it is not the last; nothing, where that step is behind.
    every: steps that belong together, as those on one rollout: after multiples of it alone is anything evaluated, saved
    or stopped.

    Every step is logged; evaluations and checkpoints follow it in this order, also after the last step, so that a run
    resumed from a checkpoint has every line it should have and none twice.
    meta: what the checkpoints belong to. show: called with every logged line.
    better: the evaluation's key whose best checkpoint is kept beside the last `keep`; higher is better, or lower where
    the key follows a "-", as in "-eval/loss".
    """
    ranks = ranks or Ranks.single()
    last = state.total_steps
    if stop is not None and stop <= state.step:
        return
    with _signals() as asked:
        batches = _saved_while_waiting(batches, lambda: ranks.once(partial(_save, state, run, keep, meta)), state)
        for step in steps(state, batches, objective, ranks, inspect=inspect):
            ranks.once(partial(_log, run, step.as_dict(), show))
            if step.number % every:
                continue
            final, improved = step.number == last, False
            if evaluate is not None and (final or (eval_every and step.number % eval_every == 0)):
                found = evaluate()
                ranks.once(partial(_log, run, {"step": step.number} | found, show))
                improved = better is not None and _improves(found.get(better.lstrip("-")), state.best, better)
                if improved:
                    state.best = {"step": step.number, "value": found[better.lstrip("-")]}
            if final or asked or improved or step.number == stop or (save_every and step.number % save_every == 0):
                ranks.once(partial(_save, state, run, keep, meta))
            if asked and not final:
                raise Interrupted(
                    f"stopped by {asked[0]} after step {step.number}, which is saved",
                    next=f"palate {run.verb} -c {run.path / 'config.yaml'} --resume --out {run.path}",
                )
            if step.number == stop:
                return


def _saved_while_waiting(batches: Iterable[StepBatch], save: Callable[[], None], state: TrainState) -> Iterator:
    """The batches; where the next one waits for people, the steps until then are saved."""
    try:
        yield from batches
    except AwaitsVotes:
        if state.step:
            save()
        raise


def _improves(value: float | None, best: dict[str, Any] | None, better: str) -> bool:
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value < best["value"] if better.startswith("-") else value > best["value"])


def _log(run: Run, line: dict[str, Any], show) -> None:
    run.log(line | {"time": time.time()})
    if show is not None:
        show(line)


def _save(state: TrainState, run: Run, keep: int, meta: dict[str, Any] | None) -> None:
    run.sync()  # the lines that the checkpoint counts on come to the disk before it
    checkpoint.save(state, run.checkpoints, keep=keep, meta=meta)


@contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that holds the name of the first SIGINT or SIGTERM; the second one acts at once."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number, frame):
        asked.append(signal.Signals(number).name)
        for kind, handler in before.items():
            signal.signal(kind, handler)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, note)
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
