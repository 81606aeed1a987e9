"""Records to TokenGroups: a prompt once, its completions after it, and which of their tokens are scored."""

from dataclasses import dataclass

import numpy as np

from .records import Source


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """One prompt and the K completions that branch off it (pair 2, demonstration 1, ranking and samples K).

    prompt: (P,) int32 token ids as generation sees them, BOS included.
    completions: K arrays (C_k,) int32, the end token included unless the completion was cut.
    spans: per completion the half-open ranges of its tokens that are scored; elsewhere the policy did not write.
    preferences: (better, worse) indices into `completions`; a pair has ((0, 1),).
    label: of single feedback; its completions are then (own, mismatched).
    cut: per completion, whether truncation took its end; prompt_cut: tokens taken from the prompt's start.
    reference: per completion the summed log-prob under the reference, nats, float64, once annotated.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    preferences: tuple[tuple[int, int], ...] = ()
    label: bool | None = None
    cut: tuple[bool, ...] = ()
    prompt_cut: int = 0
    source: Source | None = None
    reference: tuple[float, ...] | None = None
