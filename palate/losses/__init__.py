"""Pure, unreduced losses of log-probs and rewards, and the table that names them. They know no model and no batch."""

from dataclasses import replace

from torch import Tensor

from palate.losses.demonstration import DemonstrationLogps, completion_nll
from palate.losses.feedback import FeedbackLogps, kto
from palate.losses.pairwise import (
    PairLogps,
    cpo,
    dpo,
    dpo_nll,
    dpop,
    hinge,
    ipo,
    ln_dpo,
    orpo,
    r_dpo,
    robust_dpo,
    simpo,
    unlikelihood,
)
from palate.losses.ranking import RankedLogps, plackett_luce
from palate.losses.registry import (
    LOSSES,
    LossInfo,
    check_options,
    demonstration_loss,
    feedback_loss,
    info,
    is_normalised,
    pairwise_loss,
    ranked_loss,
    reward_loss,
    reward_scale,
)
from palate.losses.reward import PairRewards, bradley_terry


def start_values(name: str, logps, **options) -> Tensor:
    """The loss each row would have if the policy were the reference: shape (P,), (L,) or (B,).

    Where `info(name).at_start` gives a number, these rows equal it; where it gives none, because the value depends on
    lengths, labels or ranks, these still are the closed form. ValueError for a loss without reference.
    """
    if not info(name).reference:
        raise ValueError(f'loss "{name}" has no reference, so it has no value at the start')
    if isinstance(logps, PairLogps):
        logps = replace(logps, chosen=_at(logps.reference_chosen), rejected=_at(logps.reference_rejected))
    elif isinstance(logps, RankedLogps):
        logps = replace(logps, total=_at(logps.reference))
    else:
        logps = replace(logps, completion=_at(logps.reference), mismatched=_at(logps.reference_mismatched))
    return LOSSES[name](logps, **options)


def _at(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError("a value at the start needs the reference log-probs")
    return reference.detach()


__all__ = [
    "LOSSES",
    "DemonstrationLogps",
    "FeedbackLogps",
    "LossInfo",
    "PairLogps",
    "PairRewards",
    "RankedLogps",
    "bradley_terry",
    "check_options",
    "completion_nll",
    "cpo",
    "demonstration_loss",
    "dpo",
    "dpo_nll",
    "dpop",
    "feedback_loss",
    "hinge",
    "info",
    "ipo",
    "is_normalised",
    "kto",
    "ln_dpo",
    "orpo",
    "pairwise_loss",
    "plackett_luce",
    "r_dpo",
    "ranked_loss",
    "reward_loss",
    "reward_scale",
    "robust_dpo",
    "simpo",
    "start_values",
    "unlikelihood",
]
