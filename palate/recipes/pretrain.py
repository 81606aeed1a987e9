"""Running text to a policy: next-token training, from nothing or onward.

A document is a row, packed beside others that it does not see; a longer one than --max-length is cut into consecutive
pieces, so that every token is trained.
"""

import math
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from palate.recipes.plan import auto_rate, dry_run
from palate.recipes.rows import anything
from palate.recipes.training import Ending, TrainConfig, TrainingConfig, open_folder, prepare, train
from palate.recipes.verbs import fell, number, stderr


class PretrainSteps(TrainConfig):
    """How the steps are taken: other defaults than for a model that knows its language."""

    tokens: Annotated[int, Field(gt=0, description="Stream tokens per micro-batch: bounds memory, moves no number")] = (
        4096
    )
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Field(description="After warm-up: constant, or falling to zero just after the last step"),
    ] = "cosine"
    weight_decay: Annotated[
        float, Field(ge=0, lt=1, description="Weight decay: decoupled in adamw, added to the gradient in rmsprop")
    ] = 0.1
    clip_norm: Annotated[
        float, Field(gt=0, description="Gradient norm above which gradients are scaled down; inf for never")
    ] = 1.0


class PretrainConfig(TrainingConfig):
    """Options of `palate pretrain`."""

    data: Annotated[
        str,
        Field(description="Rows with a column text, or a .txt file with blank lines between documents; or FILE[:500]"),
    ]
    model: Annotated[
        str,
        Field(
            description="new:1m, new:5m, new:20m or new:CONFIG.json (with a tokenizer beside it, or one is learnt from "
            "the data); or a model to go on from"
        ),
    ] = "new:1m"
    eval: Annotated[str, Field(description="Held-out data; auto: 5 % of the documents, at most 300; none")] = "auto"
    batch: Annotated[int, Field(gt=0, description="Documents, or pieces of them, per optimizer step")] = 32
    max_length: Annotated[
        int | None, Field(gt=1, description="Tokens of a piece; default: min(1024, the model's context)")
    ] = None
    lr: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, lt=math.inf)],
        Field(description="Peak learning rate; auto: by model size, larger for a new model"),
    ] = "auto"
    train: PretrainSteps = PretrainSteps()


def run(
    config: PretrainConfig, *, verb: str = "pretrain", argv=(), say=stderr, panel=None, stop: int | None = None
) -> dict[str, Any]:
    """Trains --model on the text of --data; returns the result object of --json. stop: as for `train`."""
    from palate.data.sources import read_texts
    from palate.data.tokens import tokenize_text
    from palate.train.objectives import completion_nll

    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    read = partial(read_texts, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    prepared = prepare(
        config,
        read,
        completion_nll,
        usable=anything,
        say=say,
        pieces=tokenize_text,
        rate_of=rate,
    )
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
        ending=Ending(evaluate=evaluate),
    )


def rate(config: PretrainConfig, parameters: int) -> tuple[float, str]:
    """The learning rate and the reason for it; a new model takes larger steps than one that knows its language."""
    if config.lr != "auto" or not config.model.startswith("new:"):
        return auto_rate(config, parameters)
    bounds = ((10e6, 2e-3, "new, under 10 M parameters"), (100e6, 1e-3, "new, under 100 M"), (math.inf, 3e-4, "new"))
    return next((rate, reason) for limit, rate, reason in bounds if parameters < limit)


def evaluate(model, held, objective, *, tokens: int) -> dict[str, float]:
    """Held-out nats a token, and their exp."""
    from palate.evaluation import preference

    found = preference.evaluate(model, held, objective, tokens=tokens)
    return found | {"eval/perplexity": math.exp(min(found["eval/loss"], 700.0))}


def verdict(before: dict, after: dict) -> tuple[bool, str]:
    """Better: held-out nats per token fell."""
    if "eval/loss" not in after:
        return False, "no held-out documents, so nothing is shown"
    return fell(before, after), (
        f"held-out {number(before['eval/loss'])} to {number(after['eval/loss'])} nats a token "
        f"(perplexity {number(before['eval/perplexity'], '.4g')} to {number(after['eval/perplexity'], '.4g')}) "
        f"on {after['eval/count']:.0f} tokens"
    )
