"""Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO"."""

from dataclasses import replace
from decimal import Decimal

from oracles import dpo
from oracles.numbers import Pair


def loss(pair: Pair, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """Eq. 3: (1 - e) times the loss of the label given plus e times the loss of the label flipped."""
    flipped = replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        reference_chosen=pair.reference_rejected,
        reference_rejected=pair.reference_chosen,
    )
    return (1 - label_smoothing) * dpo.loss(pair, beta) + label_smoothing * dpo.loss(flipped, beta)
