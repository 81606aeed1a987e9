"""Losses of demonstrations: (S,) in, (S,) out."""

from dataclasses import dataclass

from torch import Tensor

from palate.losses.pairwise import check_columns
from palate.losses.registry import demonstration_loss


@dataclass(frozen=True)
class DemonstrationLogps:
    """What a demonstration loss may read of S sequences; both columns have shape (S,).

    total: log-probs under the policy, summed over completion tokens, nats. length: completion tokens.
    """

    total: Tensor
    length: Tensor | None = None

    def __post_init__(self):
        check_columns(self, self.total.shape, dim=1)


@demonstration_loss("completion_nll", reference=False, paper="Fisher 1922, maximum likelihood")
def completion_nll(logps: DemonstrationLogps) -> Tensor:
    """Negative log-likelihood of each completion: shape (S,), nats, summed over its tokens.

    Not divided by length: over a step the sum is divided by the count of its tokens, which makes the mean per token.
    Source: maximum likelihood; no equation of its own.
    """
    return -logps.total
