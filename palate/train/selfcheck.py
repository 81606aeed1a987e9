"""The check at the start: where the reference is the starting policy, step 0 has a closed form.

It is cheap and sharp: most silent bugs of preference training (another template, dropout, a stale or wrong reference,
another dtype) show here, before a single weight has moved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from palate import losses
from palate.data.batch import RolloutGroup
from palate.errors import ModelError
from palate.losses import PairLogps
from palate.tally import Tally
from palate.train.objectives import Objective, Outcome

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # nats a token


@dataclass(frozen=True)
class StartReport:
    """largest: the largest |log-ratio| a token, nats. loss: of the first step. closed_form: its value at zero."""

    largest: float
    loss: float
    closed_form: float | None

    def __str__(self) -> str:
        text = f"start: loss {self.loss:.6f}"
        if self.closed_form is not None:
            text += f" (closed form {self.closed_form:.6f})"
        return f"{text}, largest log-ratio {self.largest:.1g} nats a token"


def start_report(outcomes: Sequence[Outcome], objective: Objective) -> StartReport:
    """What the first step saw before its update."""
    rows = torch.cat([outcome.row_losses for outcome in outcomes] or [torch.zeros(0)])  # a share can be empty
    starts = [outcome.start_losses for outcome in outcomes if outcome.start_losses is not None]
    ratios = [(o.log_ratio.abs() / o.length.clamp(min=1)).max() for o in outcomes if o.log_ratio is not None]
    closed = float(torch.cat(starts).mean()) if starts else None
    return StartReport(float(torch.stack(ratios).max()) if ratios else 0.0, float(rows.mean()), closed)


def check_start(outcomes: Sequence[Outcome], objective: Objective, suspects) -> StartReport:
    """The report, if the policy is where the reference is and the loss at its closed form.

    suspects: called on failure, returns which of weights, dtype, template or dropout differs.
    Raises ModelError otherwise: training on would optimise against another reference than the user named.
    """
    report = start_report(outcomes, objective)
    allowed = TOLERANCE[objective.numerics.precision if objective.numerics else "float32"]
    if not report.largest <= allowed:  # nan too
        raise ModelError(
            f"at step 0 policy and reference differ by {report.largest:.2g} nats a token (allowed: {allowed:g}), "
            f"although the reference is the start; what differs: {suspects()}",
            code="E602",
            next="run again with a fresh $PALATE_CACHE, or name the reference with --reference",
        )
    if report.closed_form is not None:
        known = objective.at_start
        if known is not None and abs(report.closed_form - known) > 1e-9:
            raise ModelError(f'loss "{objective.name}" is {report.closed_form} where its closed form is {known}')
        slack = 1e-6 + _reach(outcomes, objective)
        if not abs(report.loss - report.closed_form) <= slack:
            raise ModelError(
                f'at step 0 loss "{objective.name}" is {report.loss:.6f}, its closed form {report.closed_form:.6f} '
                f"(allowed difference {slack:.1g}); what differs: {suspects()}",
                code="E602",
                next="report this: the loss or its inputs are wrong",
            )
    return report


def check_rollout(outcomes: Sequence[Outcome], objective: Objective, *, whitened: bool = False) -> str:
    """What the first minibatch of the first rollout saw, in one line, if it is what it must be before any update.

    The ratio is 1, so nothing is clipped and the update has moved nothing yet; the policy is the reference, so the KL
    is 0. whitened: whether the minibatch holds advantages of mean 0, which make a policy loss of 0.
    Raises ModelError (E602).
    """
    allowed = TOLERANCE[objective.numerics.precision if objective.numerics else "float32"]
    metrics: dict[str, Tally] = {}
    for outcome in outcomes:
        for name, tally in outcome.metrics.items():
            metrics[name] = metrics.get(name, Tally()) + tally
    largest = max(float(outcome.log_ratio.abs().max()) for outcome in outcomes if outcome.log_ratio is not None)
    kl = metrics["kl"].mean / max(metrics["length"].mean, 1.0)
    found = [
        ("the log-probs of what was sampled differ from those of the update", largest, "nats a token"),
        ("policy and reference differ, although the policy has not moved", abs(kl), "nats a token"),
        ("tokens are clipped before any update", metrics["policy/clipped"].mean, "of them"),
    ]
    loss = metrics["policy/loss"].mean
    if whitened:
        found.append(("the policy loss is off its closed form, 0,", abs(loss), ""))
    for what, value, unit in found:
        if not value <= allowed:  # nan too
            raise ModelError(
                f"at the first update {what} by {value:.2g} {unit} (allowed: {allowed:g})".replace("  ", " "),
                code="E602",
                next="look for dropout, another dtype or a temperature that is not everywhere the same",
            )
    return f"start: ratio 1 within {largest:.1g}, KL {abs(kl):.1g} nats a token, policy loss {loss:.1g}"


def check_sampling(policy, groups: Sequence[RolloutGroup], temperature: float, *, most: int = 64) -> str:
    """Whether samples of the policy follow its law, in one line, if they do.

    A token's rank is the probability of all likelier tokens and half that of its own (and of its equals): under the law
    that it was drawn from 1/2 on average, with a variance of 1/12 at most. Another temperature, top-k, top-p or a
    suppressed end token move the mean; 6 standard errors are allowed. The law comes from one stock forward a
    completion, which shares nothing with generation or with the streams of training.
    most: completions that are looked at. Raises ModelError (E602).
    """
    ranks = []
    texts = [(group.prompt, ids) for group in groups for ids in group.completions]
    with torch.no_grad():
        for prompt, ids in texts[:most]:
            row = torch.tensor([[*prompt.tolist(), *ids.tolist()]], device=policy.device)
            logits = policy(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
            law = (logits.double() / temperature).softmax(-1)
            own = law.gather(1, row[0, len(prompt) :, None])
            ranks.append(((law > own).double() * law).sum(1) + ((law == own).double() * law).sum(1) / 2)
    ranks = torch.cat(ranks)
    mean, allowed = float(ranks.mean()), 6 / math.sqrt(12 * len(ranks))
    if not abs(mean - 0.5) <= allowed:  # nan too
        raise ModelError(
            f"the samples do not follow the policy: their tokens rank at {mean:.3f} on average, where the law that is "
            f"trained would give 0.5 (allowed: {allowed:.3f} on either side of it, on {len(ranks)} tokens)",
            code="E602",
            next="look for another temperature, top-k, top-p, a least length or suppressed tokens in sampling",
        )
    return f"start: samples follow the policy, mean rank {mean:.3f} of {len(ranks)} tokens (0.5 +- {allowed:.3f})"


def _reach(outcomes: Sequence[Outcome], objective: Objective) -> float:
    """How far the log-ratios that were seen can move the loss from its closed form: the most at their corners."""
    farthest = max((float(o.log_ratio.abs().max()) for o in outcomes if o.log_ratio is not None), default=0.0)
    if farthest == 0.0 or losses.info(objective.name).kind != "pairwise":
        return 4 * farthest
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    corners = [
        PairLogps(zero + better * farthest, zero + worse * farthest, zero, zero, one, one)
        for better, worse in product((-1, 1), repeat=2)
    ]
    rest = losses.LOSSES[objective.name](PairLogps(zero, zero, zero, zero, one, one), **objective.options)
    moved = [losses.LOSSES[objective.name](corner, **objective.options) - rest for corner in corners]
    return max(abs(float(difference)) for difference in moved)
