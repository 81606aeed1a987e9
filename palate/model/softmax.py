"""The two passes over logits that log-probs need: what is kept of each row, and the gradient written over it.

Plain torch, or on CUDA one Triton kernel each: logits are read once, in their own dtype, without a float32 copy.
"""

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

ROWS = 8  # summed at once: they stay in the cache from the largest number to the sum


def row_logps(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob of each row's target, log-sum-exp of each row): (R,) each, float32 at least; no gradient."""
    if kernels := kernels_for(logits):
        return kernels.row_logps(logits.detach().contiguous(), targets)
    wide = _wide(logits.detach())
    spare, norms = torch.empty_like(wide[:ROWS]), []  # not a fresh copy for every few rows, as logsumexp takes
    for rows in wide.split(ROWS):
        most = rows.amax(-1, keepdim=True)
        total = torch.sub(rows, most, out=spare[: len(rows)]).exp_().sum(-1)
        norms.append(total.log_().add_(most[:, 0]))
    norms = torch.cat(norms)
    return wide.gather(-1, targets[:, None])[:, 0] - norms, norms


def row_slopes(logits: Tensor, norms: Tensor, targets: Tensor, weights: Tensor, *, spare: bool) -> Tensor:
    """weight * d log-prob / d logits = weight * (onehot - softmax), (R, V) in the logits' dtype.

    spare: the logits are needed no more and may be written over.
    """
    own = logits.detach() if spare else logits.detach().clone()
    if own.is_contiguous() and (kernels := kernels_for(own)):
        return kernels.row_slopes(own, norms, targets, weights)
    slopes = _wide(own)
    weights = weights[:, None].to(slopes.dtype)
    slopes.sub_(norms[:, None]).exp_().mul_(-weights).scatter_add_(-1, targets[:, None], weights)
    return slopes.to(logits.dtype)


def kernels_for(logits: Tensor) -> ModuleType | None:
    """The Triton kernels where they run and are right (CUDA, not float64), or nothing."""
    return _kernels() if logits.is_cuda and logits.dtype != torch.float64 else None


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from palate.model import softmax_triton
    except ImportError:
        return None
    return softmax_triton


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
