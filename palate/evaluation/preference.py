"""Held-out loss, margins and accuracy, with the interval of the accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from palate.data.batch import stream_length
from palate.data.stream import pack
from palate.data.tokens import TokenGroup
from palate.distributed import Ranks
from palate.evaluation.statistics import design_effect, wilson
from palate.layout import MICRO_BATCH_TOKENS
from palate.tally import Tally, means

SHARES = ("rewards/accuracies", "logps/accuracies")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    objective: Callable,
    *,
    tokens: int = MICRO_BATCH_TOKENS,
    seen: Callable[[Any], None] | None = None,
) -> dict[str, float]:
    """`eval/...` numbers of the model on `groups`, as the objective counts them; shares come with `_low` and `_high`.

    objective: as in `train.objectives`; its metrics are summed over micro-batches and divided once.
    Intervals are Wilson's of the effective number of pairs: those of one prompt are no independent cases.
    seen: called with the outcome of every micro-batch.
    """
    loss, metrics = Tally(), {}
    hits: dict[str, list[float]] = {name: [] for name in SHARES}
    owners: list[int] = []
    prompts = {group.prompt.tobytes(): number for number, group in enumerate(groups)}
    asked = [replace(group, source=prompts[group.prompt.tobytes()]) for group in groups]  # known again in the outcome
    micro = [objective.collate([asked[i] for i in part]) for part in pack([stream_length(g) for g in groups], tokens)]
    micro = [batch.to(model.device) for batch in micro]
    context = objective.prepare(model, micro, Ranks.single())
    for batch in micro:
        outcome = objective(model, batch, context)
        if seen is not None:
            seen(outcome)
        for name, found in outcome.hits.items():
            hits[name] += found.double().tolist()
        owners += outcome.sources if outcome.hits else ()
        loss = loss + Tally(float(outcome.loss.total), outcome.loss.count)
        for name, tally in outcome.metrics.items():
            metrics[name] = metrics.get(name, Tally()) + Tally(float(tally.total), tally.count)
    numbers: dict[str, Any] = {"eval/loss": loss.mean} | {f"eval/{name}": mean for name, mean in means(metrics).items()}
    for name in SHARES:
        if name in metrics:
            effect = design_effect(hits[name], owners) if hits[name] else 1.0
            share = wilson(metrics[name].total / effect, metrics[name].count / effect)
            numbers |= {f"eval/{name}_low": share.low, f"eval/{name}_high": share.high}
    return numbers | {"eval/count": loss.count}
