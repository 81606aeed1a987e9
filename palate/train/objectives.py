"""Objectives: (model, batch) -> a loss with its count, and the numbers people watch; a loss bound to a forward pass.

A loss is summed here and divided by the whole step's units in the loop, so the cut into micro-batches and ranks moves
no number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from palate import losses
from palate.data.batch import (
    FeedbackBatch,
    PairBatch,
    RankedBatch,
    RewardBatch,
    RolloutBatch,
    TokenBatch,
    collate_feedback,
    collate_pairs,
    collate_rankings,
    collate_rewards,
    collate_rollouts,
)
from palate.data.batch import collate as collate_tokens
from palate.distributed import Ranks
from palate.losses import FeedbackLogps, PairLogps, PairRewards, RankedLogps, policy
from palate.scoring import Numerics, SequenceLogps, logps, logps_and_values, reward_bias, scalars
from palate.tally import Tally


@dataclass(frozen=True)
class Outcome:
    """What one micro-batch gave.

    loss: total (scalar, differentiable) over `count` units. metrics: detached tallies by their public names.
    row_losses: per unit, for naming rows; nan where a log-prob is not finite, whatever the loss makes of it.
    log_ratio: (S,) policy minus reference of every completion, nats, for the check at the start, and length: (S,) their
    scored tokens. start_losses: per unit, the loss if the policy were the reference, where there is one.
    margins: (P,) of pairs of rewards, in the order of the batch. hits: of shares, by their metric's name, whether each
    pair counts: (P,) bool, in the order of `sources`.
    origins: where each completion was read. units: (U,) the completion that each of `row_losses` stands for; None where
    that is their order.
    """

    loss: Tally
    metrics: dict[str, Tally]
    row_losses: Tensor
    log_ratio: Tensor | None = None
    length: Tensor | None = None
    start_losses: Tensor | None = None
    margins: Tensor | None = None
    hits: dict[str, Tensor] = field(default_factory=dict)
    origins: tuple[Any, ...] = ()
    units: Tensor | None = None

    @property
    def sources(self) -> tuple[Any, ...]:
        """Where each of `row_losses` was read. Waits for the device, so a step asks only to name bad rows."""
        return self.origins if self.units is None else tuple(self.origins[i] for i in self.units.tolist())


class Objective(Protocol):
    """What the loop calls. `prepare` sees the whole step first; its result is handed to every micro-batch."""

    name: str
    collate: Callable[[Sequence[Any]], Any]
    reference: bool

    def prepare(self, model: nn.Module, micro: Sequence[Any], ranks: Ranks) -> Any: ...

    def __call__(self, model: nn.Module, batch: Any, context: Any = None) -> Outcome: ...


@dataclass(frozen=True)
class _Loss:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    numerics: Numerics | None = None

    def score(self, model: nn.Module, batch: TokenBatch) -> SequenceLogps:
        """Log-probs under this objective's numerics; where none are given, those that a reference pass takes too."""
        return logps(model, batch, numerics=self.numerics or Numerics.of(model))

    @property
    def reference(self) -> bool:
        """Whether the loss reads a reference column."""
        return losses.info(self.name).reference

    @property
    def at_start(self) -> float | None:
        """The loss where policy equals reference, in closed form; None where it has none."""
        closed = losses.info(self.name).at_start
        return None if closed is None else closed(self.options)

    def prepare(self, model, micro, ranks):
        """Nothing: this loss needs no view of the whole step."""
        return None

    def _reference(self, batch) -> Tensor | None:
        if self.reference and batch.reference is None:
            raise ValueError(f'loss "{self.name}" needs reference log-probs: pass the groups through annotate() first')
        return batch.reference if self.reference else None

    def _start(self, columns) -> Tensor | None:
        return losses.start_values(self.name, columns, **self.options).detach() if self.reference else None

    def _rewards(self, total: Tensor, reference: Tensor | None, length: Tensor) -> Tensor:
        """Implicit rewards: beta times the log-ratio (without reference the log-prob), per token where the loss is."""
        values = total if reference is None else total - reference
        if losses.is_normalised(self.name, self.options):
            values = values / length
        return losses.reward_scale(self.name, self.options) * values


@dataclass(frozen=True)
class Pairwise(_Loss):
    """The DPO family on pairs."""

    collate = staticmethod(collate_pairs)

    def __call__(self, model, batch: PairBatch, context=None) -> Outcome:
        """Summed loss over the batch's pairs, and rewards, margins, accuracies, log-probs."""
        scored = self.score(model, batch.batch)
        reference = self._reference(batch)
        better, worse = batch.chosen, batch.rejected
        columns = PairLogps(
            chosen=scored.total[better],
            rejected=scored.total[worse],
            reference_chosen=None if reference is None else reference[better],
            reference_rejected=None if reference is None else reference[worse],
            chosen_length=scored.length[better],
            rejected_length=scored.length[worse],
        )
        values = losses.LOSSES[self.name](columns, **self.options)
        total = scored.total.detach()
        ratio = total if reference is None else total - reference
        metrics, hits = pair_metrics(total, scored.length, better, worse, reference, self._rewards)
        return Outcome(
            loss=Tally(values.sum(), batch.units),
            metrics=metrics,
            hits=hits,
            row_losses=_marked(values, ratio[better], ratio[worse]),
            log_ratio=None if reference is None else ratio,
            length=scored.length,
            start_losses=self._start(columns),
            origins=batch.batch.sources,
            units=better,
        )


@dataclass(frozen=True)
class Ranked(_Loss):
    """Plackett-Luce on ranked lists."""

    collate = staticmethod(collate_rankings)

    def __call__(self, model, batch: RankedBatch, context=None) -> Outcome:
        """Summed loss over lists; rewards and accuracy of the best against the worst of each list."""
        scored = self.score(model, batch.batch)
        reference = self._reference(batch)
        columns = [
            RankedLogps(scored.total[order], None if reference is None else reference[order], scored.length[order])
            for order in batch.orders
        ]
        values = torch.cat([losses.LOSSES[self.name](lists, **self.options) for lists in columns])
        best, worst = (torch.cat([order[:, end] for order in batch.orders]) for end in (0, -1))
        total = scored.total.detach()
        ratio = total if reference is None else total - reference
        metrics, hits = pair_metrics(total, scored.length, best, worst, reference, self._rewards)
        return Outcome(
            loss=Tally(values.sum(), batch.units),
            metrics=metrics,
            hits=hits,
            row_losses=_marked(values, torch.cat([ratio[order].sum(1) for order in batch.orders])),
            log_ratio=None if reference is None else ratio,
            length=scored.length,
            start_losses=torch.cat([self._start(lists) for lists in columns]) if self.reference else None,
            origins=batch.batch.sources,
            units=best,
        )


@dataclass(frozen=True)
class SingleFeedback(_Loss):
    """The KTO family on single judgements. The reference point is estimated over the whole step and all ranks."""

    collate = staticmethod(collate_feedback)

    def prepare(self, model, micro: Sequence[FeedbackBatch], ranks: Ranks) -> tuple[Tensor, Tensor]:
        """(policy, reference) log-probs of every mismatched completion of the step, without gradient: (M,) each."""
        with torch.no_grad():
            policy = [self.score(model, batch.mismatched).total for batch in micro]
        columns = [batch.reference_mismatched for batch in micro]
        if any(column is None for column in columns):
            raise ValueError(f'loss "{self.name}" needs reference log-probs: pass the groups through annotate() first')
        empty = torch.zeros(0, dtype=torch.float64)
        share = (torch.cat(policy), torch.cat(columns)) if micro else (empty, empty)
        if ranks.data_size > 1:  # what crosses processes goes through the CPU
            shares = ranks.gather(tuple(part.cpu() for part in share))
            share = tuple(torch.cat(part) for part in zip(*shares, strict=True))
        mismatched, reference = share
        finite = torch.isfinite(mismatched - reference).all()
        return torch.where(finite, mismatched, torch.nan), reference  # a clamp or sigmoid must not hide it

    def __call__(self, model, batch: FeedbackBatch, context=None) -> Outcome:
        """Summed loss over judgements; rewards of the wanted and of the unwanted completions."""
        mismatched, reference_mismatched = self.prepare(model, [batch], Ranks()) if context is None else context
        scored = self.score(model, batch.batch)
        reference, device = self._reference(batch), scored.total.device
        columns = FeedbackLogps(
            completion=scored.total,
            reference=reference,
            label=batch.label,
            length=scored.length,
            mismatched=mismatched.to(device),
            reference_mismatched=reference_mismatched.to(device),
        )
        values = losses.LOSSES[self.name](columns, **self.options)
        total = scored.total.detach()
        ratio = total if reference is None else total - reference
        rewards = self._rewards(total, reference, scored.length)
        kl, wanted, unwanted = columns.baseline.detach(), batch.wanted, batch.unwanted
        metrics = {
            "rewards/chosen": _tally(rewards[wanted]),
            "rewards/rejected": _tally(rewards[unwanted]),
            "rewards/accuracies": _tally((ratio > kl) == batch.label),  # on its side of the reference point
            "logps/chosen": _tally(total[wanted]),
            "logps/rejected": _tally(total[unwanted]),
            "length/chosen": _tally(scored.length[wanted]),
            "length/rejected": _tally(scored.length[unwanted]),
            "displaced": _tally(ratio[wanted] < 0),
            "kl": Tally(kl, 1),
        }
        return Outcome(
            loss=Tally(values.sum(), batch.units),
            metrics=metrics,
            row_losses=_marked(values, ratio),
            log_ratio=None if reference is None else ratio,
            length=scored.length,
            start_losses=self._start(columns),
            origins=batch.batch.sources,
        )


@dataclass(frozen=True)
class Imitation(_Loss):
    """Supervised fine-tuning: negative log-likelihood, a mean over the scored tokens of the whole step."""

    collate = staticmethod(collate_tokens)

    def __call__(self, model, batch: TokenBatch, context=None) -> Outcome:
        """Summed negative log-likelihood over completion tokens."""
        scored = self.score(model, batch)
        values = losses.LOSSES[self.name](losses.DemonstrationLogps(scored.total, scored.length), **self.options)
        detached = values.detach()
        return Outcome(
            loss=Tally(values.sum(), batch.units),
            metrics={"logps/chosen": _tally(scored.total.detach()), "length/chosen": _tally(scored.length)},
            row_losses=detached,
            origins=batch.sources,
        )


@dataclass(frozen=True)
class Rewards(_Loss):
    """A reward model on pairs: the mean over the pairs of a prompt, then over prompts.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1: all pairs of one prompt are one element of the batch.
    """

    collate = staticmethod(collate_rewards)

    def __call__(self, model, batch: RewardBatch, context=None) -> Outcome:
        """Summed loss over the batch's prompts; rewards, margins, accuracies over its pairs."""
        numerics = self.numerics or Numerics.of(model)
        rewards = scalars(model, batch.batch, numerics=numerics) + reward_bias(model)
        better, worse = rewards[batch.chosen], rewards[batch.rejected]
        values = losses.LOSSES[self.name](PairRewards(better, worse, batch.margin), **self.options)
        chosen, rejected = better.detach(), worse.detach()
        margin = chosen - rejected
        return Outcome(
            loss=Tally((values * batch.weight).sum(), batch.units),
            metrics={
                "rewards/chosen": _tally(chosen),
                "rewards/rejected": _tally(rejected),
                "rewards/margins": _tally(margin),
                "rewards/accuracies": _tally(margin > 0),
                "rewards/ties": _tally(margin == 0),
                "length/chosen": _tally(batch.length[batch.chosen]),
                "length/rejected": _tally(batch.length[batch.rejected]),
            },
            row_losses=_marked(values, chosen, rejected),
            margins=margin,
            hits={"rewards/accuracies": margin > 0},
            origins=batch.batch.sources,
            units=batch.chosen,
        )


@dataclass(frozen=True)
class ClippedPolicy:
    """PPO on own samples: clipped policy loss, and with a critic the clipped value loss; a mean over their tokens.

    options: clip (of the ratio), value_clip, value_weight. critic: as for `scoring.logps_and_values`.
    Departs: values are compared in standard deviations of the rollout's scores, so that clip and weight mean the same
    for rewards of any scale; those of published runs had a deviation of 1.
    """

    options: dict[str, float]
    numerics: Numerics | None = None
    critic: nn.Module | None = None
    name: str = "ppo"
    reference: bool = False

    collate = staticmethod(collate_rollouts)

    def prepare(self, model, micro, ranks):
        """Nothing: all that the whole rollout is needed for was done when it was collected."""
        return None

    def __call__(self, model, batch: RolloutBatch, context=None) -> Outcome:
        """Summed loss over the batch's tokens; what is watched of the update, and of the samples it is made on."""
        clip = self.options["clip"]
        logps, values = logps_and_values(model, self.critic, batch.batch, numerics=self.numerics or Numerics.of(model))
        policy_losses = policy.clipped_policy_loss(logps, batch.old_logps, batch.advantages, clip=clip)
        change = (logps - batch.old_logps).detach()
        each = policy_losses
        metrics = {
            "policy/loss": _tally(policy_losses.detach()),
            "policy/ratio": _tally(change.exp()),
            "policy/approx_kl": _tally(policy.k2(change)),
            "policy/clipped": _tally((change.exp() - 1).abs() > clip),
            "reward": _tally(batch.scores),
            "reward/total": _tally(batch.scores - batch.coefficient * batch.kl),
            "kl": _tally(batch.kl),
            "kl_coef": _tally(batch.coefficient),
            "ended": _tally(batch.finished),
            "length": _tally(batch.batch.length),
            "entropy": _tally(-batch.old_logps),
        }
        if values is not None:
            scale = batch.spread[batch.batch.sequence]
            value_losses = policy.clipped_value_loss(
                values / scale, batch.values / scale, batch.returns / scale, clip=self.options["value_clip"]
            )
            metrics |= {"value/loss": _tally(value_losses.detach()), "value/explained": _tally(batch.explained)}
            each = each + self.options["value_weight"] * value_losses
        return Outcome(
            loss=Tally(each.sum(), batch.units),
            metrics=metrics,
            row_losses=_marked(each, logps.detach()),
            log_ratio=change,
            length=torch.ones_like(change),
            origins=batch.batch.sources,
            units=batch.batch.sequence,
        )


def ppo(
    numerics: "Numerics | None" = None,
    critic: nn.Module | None = None,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.1,
) -> ClippedPolicy:
    """The objective of PPO: `ppo(clip=0.2)`; the samples it is called on are those of `sampling.rollout`."""
    return ClippedPolicy({"clip": clip, "value_clip": value_clip, "value_weight": value_weight}, numerics, critic)


def objective(
    name: str, numerics: "Numerics | None" = None, **options
) -> Pairwise | Ranked | SingleFeedback | Imitation | Rewards:
    """The objective of a registered loss. Raises ValueError for an unknown loss or option, naming what there is."""
    kinds = {
        "pairwise": Pairwise,
        "ranked": Ranked,
        "feedback": SingleFeedback,
        "demonstration": Imitation,
        "reward": Rewards,
    }
    options = losses.check_options(name, options)
    return kinds[losses.info(name).kind](name, options, numerics)


def pairwise(name: str = "dpo", numerics: "Numerics | None" = None, **options) -> Pairwise:
    """An objective of the DPO family: `pairwise("dpo", beta=0.1)`."""
    return objective(name, numerics, **options)


def feedback(name: str = "kto", numerics: "Numerics | None" = None, **options) -> SingleFeedback:
    """An objective on single feedback: `feedback("kto", beta=0.1)`."""
    return objective(name, numerics, **options)


def ranked(name: str = "plackett_luce", numerics: "Numerics | None" = None, **options) -> Ranked:
    """An objective on ranked lists."""
    return objective(name, numerics, **options)


def reward(name: str = "bradley_terry", numerics: "Numerics | None" = None, **options) -> Rewards:
    """The objective of a reward model: `reward("bradley_terry", centring=0.01)`."""
    return objective(name, numerics, **options)


def completion_nll(numerics: "Numerics | None" = None) -> Imitation:
    """Supervised fine-tuning on completion tokens."""
    return objective("completion_nll", numerics)


def pair_metrics(total, length, better, worse, reference, rewards) -> tuple[dict[str, Tally], dict[str, Tensor]]:
    """(tallies, hits of shares) of a batch of pairs under their public names; a tie in margin is not accurate, and has
    its own share.

    total, length, reference: (S,). better, worse: (P,) indices. rewards: (total, reference, length) -> (S,).
    """
    values = rewards(total, reference, length)
    margin = values[better] - values[worse]
    hits = {"rewards/accuracies": margin > 0, "logps/accuracies": total[better] > total[worse]}
    metrics = {
        "rewards/chosen": _tally(values[better]),
        "rewards/rejected": _tally(values[worse]),
        "rewards/margins": _tally(margin),
        "rewards/ties": _tally(margin == 0),
        "logps/chosen": _tally(total[better]),
        "logps/rejected": _tally(total[worse]),
        "length/chosen": _tally(length[better]),
        "length/rejected": _tally(length[worse]),
    }
    if reference is not None:
        metrics["displaced"] = _tally(total[better] < reference[better])
    return metrics | {name: _tally(found) for name, found in hits.items()}, hits


def _marked(values: Tensor, *ratios: Tensor) -> Tensor:
    """The losses, nan where one of their ratios is not finite: a sigmoid makes a plain 0 or 1 of an infinite one."""
    finite = torch.stack([torch.isfinite(ratio) for ratio in ratios]).all(0)
    return torch.where(finite, values.detach(), torch.nan)


def _tally(values: Tensor) -> Tally:
    return Tally(values.sum().double(), values.numel())
