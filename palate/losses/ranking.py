"""Losses of ranked lists: (L, K) in, best first, (L,) out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.losses.pairwise import POSITIVE, check_columns, constant
from palate.losses.registry import ranked_loss


@dataclass(frozen=True)
class RankedLogps:
    """What a ranked loss may read of L lists of K completions, best first; every column has shape (L, K).

    total: log-probs under the policy, summed over completion tokens, nats. reference: the same under the reference;
    gradients never enter it. length: completion tokens.
    """

    total: Tensor
    reference: Tensor | None = None
    length: Tensor | None = None

    def __post_init__(self):
        check_columns(self, self.total.shape, dim=2)

    @property
    def log_ratio(self) -> Tensor:
        """Log-prob of each completion, policy minus reference: (L, K), nats."""
        return self.total - constant(self, "reference", self.total.dtype)


@ranked_loss("plackett_luce", reference=True, paper="arXiv:2305.18290, eq. 20", ranges={"beta": POSITIVE})
def plackett_luce(logps: RankedLogps, *, beta: float = 0.1) -> Tensor:
    """Plackett-Luce loss of each list: shape (L,), nats. Minus the log-probability of the order; for K = 2 it is DPO.

    beta: pull towards the reference, > 0. At the start it is log K!.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 20.
    """
    reward = beta * logps.log_ratio
    rivals = torch.ones_like(reward[0].expand(reward.shape[1], -1), dtype=torch.bool).triu()  # place k and those after
    field = torch.where(rivals, reward[:, None, :], -torch.inf).logsumexp(dim=2)
    return (field - reward).sum(dim=1)
