"""Losses of single completions marked good or bad: (B,) in, (B,) out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.losses.pairwise import NOT_NEGATIVE, POSITIVE, check_columns, constant
from palate.losses.registry import feedback_loss


@dataclass(frozen=True)
class FeedbackLogps:
    """What a feedback loss may read of B marked completions; all but the last two columns have shape (B,).

    completion, reference: log-probs under policy and reference, summed over completion tokens, nats.
    label: bool, True where the completion is wanted. length: completion tokens.
    mismatched, reference_mismatched: (M,) log-probs of completions under prompts they do not belong to. They estimate
    one number for the whole optimizer batch, so pass the same M of them with each micro-batch, from all ranks.
    Gradients enter `completion` alone.
    """

    completion: Tensor
    reference: Tensor | None = None
    label: Tensor | None = None
    length: Tensor | None = None
    mismatched: Tensor | None = None
    reference_mismatched: Tensor | None = None

    def __post_init__(self):
        own = ("mismatched", "reference_mismatched")
        check_columns(self, self.completion.shape, dim=1, skip=own)
        if self.label is not None and self.label.dtype != torch.bool:
            raise ValueError(f"FeedbackLogps.label is bool, not {self.label.dtype}")
        shapes = [tuple(column.shape) for column in (getattr(self, name) for name in own) if column is not None]
        if any(len(shape) != 1 or 0 in shape for shape in shapes) or len(set(shapes)) > 1:
            raise ValueError(f"mismatched and reference_mismatched share one shape (M,), M >= 1, not {shapes}")

    @property
    def log_ratio(self) -> Tensor:
        """Log-prob of each completion, policy minus reference: (B,), nats."""
        return self.completion - constant(self, "reference", self.completion.dtype)

    @property
    def baseline(self) -> Tensor:
        """z0, the estimate of KL(policy || reference) from mismatched completions, at least 0: scalar, nats."""
        dtype = self.completion.dtype
        ratios = constant(self, "mismatched", dtype) - constant(self, "reference_mismatched", dtype)
        return ratios.mean().clamp(min=0)


def _at_start(options) -> float | None:
    good, bad = options["desirable_weight"], options["undesirable_weight"]
    return good / 2 if good == bad else None


@feedback_loss(
    "kto",
    reference=True,
    paper="arXiv:2402.01306, eq. 7",
    at_start=_at_start,
    ranges={"beta": POSITIVE, "desirable_weight": NOT_NEGATIVE, "undesirable_weight": NOT_NEGATIVE},
)
def kto(
    logps: FeedbackLogps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """KTO loss of each completion: shape (B,), between 0 and its weight. Rewards are judged against z0.

    beta: pull towards the reference, > 0. desirable_weight, undesirable_weight: >= 0; the paper keeps the ratio of
        weight times count, wanted to unwanted, in [1, 1.5].
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7.
    Departs: z0 is over the whole optimizer batch, there over a micro-batch; it carries no gradient, as there.
    """
    if logps.label is None:
        raise ValueError("this loss needs label, which FeedbackLogps was built without")
    gain = beta * (logps.log_ratio - logps.baseline)
    # 1 - sigma(v) written as sigma(-v): exact where sigma(v) rounds to 1
    return torch.where(logps.label, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
