"""Rows, objectives and tiny models that the tests of training share."""

from dataclasses import replace

import numpy as np
import torch
from models import build, lifted, random_group

from palate import losses
from palate.data.records import Source
from palate.data.stream import stream
from palate.reference import annotate
from palate.train.objectives import objective

NAMES = sorted(name for name in losses.LOSSES if losses.info(name).kind != "reward")  # of log-probs


def rows_for(name: str, count: int = 7, seed: int = 0, longest: int = 9):
    """Groups that the loss can be trained on, of uneven lengths, their sources "rows.jsonl:1" and so on."""
    generator = np.random.default_rng(seed)
    draw = lambda: int(generator.integers(1, longest))  # noqa: E731
    kind, groups = losses.info(name).kind, []
    for number in range(count):
        if kind == "demonstration":
            group = random_group(generator, draw(), draw())
        elif kind == "ranked":
            k = 2 + number % 3
            places = [int(i) for i in generator.permutation(k)]
            wins = tuple((places[a], places[b]) for a in range(k) for b in range(a + 1, k))
            group = random_group(generator, draw(), *(draw() for _ in range(k)), preferences=wins)
        else:
            label = {"label": number % 3 == 0, "preferences": ()} if kind == "feedback" else {}
            group = random_group(generator, draw(), draw(), draw(), **label)
        groups.append(replace(group, source=Source("rows.jsonl", number + 1)))
    return groups


def ready(name: str, groups, reference):
    """The groups with reference scores where the loss reads them."""
    return annotate(groups, reference) if losses.info(name).reference else groups


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole_batch(name, model, groups, tokens=10**6, numerics=None, **options):
    """(loss, gradients, metrics) of one step over all groups, cut into micro-batches of `tokens`."""
    from palate.distributed import Ranks
    from palate.tally import Tally

    made = objective(name, numerics, **options)
    (step,) = stream(groups, made.collate, batch=len(groups), tokens=tokens)
    model.zero_grad()
    context = made.prepare(model, step.micro, Ranks.single())
    total, metrics = 0.0, {}
    for part in step:
        outcome = made(model, part, context)
        (outcome.loss.total / step.units).backward()
        total += float(outcome.loss.total.detach()) / step.units
        for key, tally in outcome.metrics.items():
            metrics[key] = metrics.get(key, Tally()) + tally
    return total, gradients(model), {key: tally.mean for key, tally in metrics.items()}


def pair_of_models(seed=0, name="llama", dtype=torch.float64):
    """(policy, reference): two random models, near each other, so that log-ratios are small and not zero."""
    policy, reference = build(name, seed, dtype), build(name, seed, dtype)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(99)
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return policy, reference


__all__ = ["NAMES", "gradients", "lifted", "pair_of_models", "ready", "rows_for", "whole_batch"]
