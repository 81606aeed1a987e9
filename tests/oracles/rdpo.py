"""Chowdhury, Kini and Natarajan 2024, "Provably robust DPO", arXiv:2403.00409."""

from dataclasses import replace
from decimal import Decimal

from oracles import dpo
from oracles.numbers import Pair


def loss(pair: Pair, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """((1 - e) L(w, l) - e L(l, w)) / (1 - 2e)."""
    flipped = replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        reference_chosen=pair.reference_rejected,
        reference_rejected=pair.reference_chosen,
    )
    given, other = dpo.loss(pair, beta), dpo.loss(flipped, beta)
    return ((1 - label_smoothing) * given - label_smoothing * other) / (1 - 2 * label_smoothing)
