"""Demonstrations to a policy: next-token likelihood on the completions alone."""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from palate.recipes.plan import dry_run
from palate.recipes.rows import anything
from palate.recipes.training import Quantize, TrainingConfig, Watch, open_folder, prepare, train
from palate.recipes.verbs import fell, number, stderr


class SftConfig(TrainingConfig):
    """Options of `palate sft`."""

    turns: Annotated[
        Literal["all", "last"], Field(description="Which assistant turns of a conversation are trained")
    ] = "all"
    quantize: Quantize = None


def run(
    config: SftConfig,
    *,
    verb: str = "sft",
    argv=(),
    say=stderr,
    panel=None,
    stop: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Trains --model on the demonstrations of --data; returns the result object of --json.

    stop, watch: as for `train`.
    """
    from palate.data.sources import read_demonstrations
    from palate.train.objectives import completion_nll

    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    read = partial(
        read_demonstrations,
        columns=config.columns or None,
        format=config.format,
        bad_rows=config.bad_rows,
        turns=config.turns,
    )
    prepared = prepare(config, read, completion_nll, usable=anything, say=say)
    if config.dry_run:
        return dry_run(config, prepared, say)
    return train(
        config,
        verb,
        out,
        prepared,
        argv=argv,
        say=say,
        panel=panel,
        better="-eval/loss",
        verdict=verdict,
        stop=stop,
        watch=watch,
    )


def verdict(before: dict, after: dict) -> tuple[bool, str]:
    """Better: held-out nats per token fell."""
    if "eval/loss" not in after:
        return False, "no held-out rows, so nothing is shown"
    return fell(before, after), (
        f"held-out {number(before['eval/loss'])} to {number(after['eval/loss'])} nats a token "
        f"on {after['eval/count']:.0f} tokens"
    )
