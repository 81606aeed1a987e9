"""Losses of a reward model: (P,) in, (P,) out. Rewards, not log-probs: a scalar head's numbers of two completions."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from palate.losses.pairwise import NOT_NEGATIVE, check_columns, constant
from palate.losses.registry import reward_loss


@dataclass(frozen=True)
class PairRewards:
    """What a reward loss may read of P pairs; every column has shape (P,).

    chosen, rejected: rewards. margin: how much better the chosen one was said to be, in the data's own unit.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None = None

    def __post_init__(self):
        check_columns(self, self.chosen.shape, dim=1)


@reward_loss("bradley_terry", paper="Bradley and Terry 1952", ranges={"margin": NOT_NEGATIVE, "centring": NOT_NEGATIVE})
def bradley_terry(rewards: PairRewards, *, margin: float = 0.0, centring: float = 0.0) -> Tensor:
    """Bradley-Terry loss of each pair: shape (P,), nats. Logistic in the difference of the two rewards.

    margin: factor on the pair's own margin, which the difference must exceed; 0 leaves margins unread.
    centring: weight of (chosen + rejected)^2, which holds rewards near zero: pairs alone leave their level open.
    Source: Bradley and Terry 1952, Biometrika 39, p. 324; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2;
        centring: Eisenstein et al. 2023, arXiv:2312.09244, section 2.
    """
    difference = rewards.chosen - rewards.rejected
    if margin:
        difference = difference - margin * constant(rewards, "margin", difference.dtype)
    values = -logsigmoid(difference)
    return values + centring * (rewards.chosen + rewards.rejected) ** 2 if centring else values
