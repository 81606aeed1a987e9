"""A matrix that is embedding and head at once: one gradient, which the head's backward begins and the embedding's ends.

Autograd by itself fills a second matrix of the vocabulary's size with zeros, writes some hundred rows of it, and adds
the whole to the first. CPU only: on CUDA rows would be added in no fixed order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding


@dataclass
class Tie:
    """Between the two ends of one forward.

    edge: a number of the embedding's output that the head takes too, so that its backward comes first, and is followed
    by the embedding's. gradient: (V, H) what the head's backward leaves.
    """

    edge: Tensor | None = None
    gradient: Tensor | None = None


@contextmanager
def tied(model: nn.Module) -> Iterator[Tie | None]:
    """Inside the block the embedding's backward goes on with what the head's left; None where they share no matrix."""
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not _is_one(rows, head):
        yield None
        return
    tie = Tie()

    def forward(ids: Tensor) -> Tensor:
        found, tie.edge = _Rows.apply(ids, rows.weight, tie, rows.padding_idx)
        return found

    rows.forward = forward
    try:
        yield tie
    finally:
        del rows.forward


def is_matrix(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is a module of just this class, with its class's forward and a plain weight."""
    return type(module) is kind and "forward" not in module.__dict__ and type(module.weight) is nn.Parameter


def _is_one(rows: nn.Module, head: nn.Module) -> bool:
    if not (is_matrix(rows, nn.Embedding) and is_matrix(head, nn.Linear) and rows.weight is head.weight):
        return False
    plain = rows.max_norm is None and not rows.scale_grad_by_freq and not rows.sparse
    return plain and rows.weight.requires_grad and rows.weight.device.type == "cpu"


class _Rows(torch.autograd.Function):
    """weight[ids], and the tie's edge."""

    @staticmethod
    def forward(ctx, ids, weight, tie, padding):
        ctx.save_for_backward(ids)
        ctx.tie, ctx.padding, ctx.shape = tie, padding, weight.shape
        return embedding(ids, weight), weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        (ids,) = ctx.saved_tensors
        total, ctx.tie.gradient = ctx.tie.gradient, None  # none where the head took no part
        total = gradient.new_zeros(ctx.shape) if total is None else total
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0)
        return None, total.index_add_(0, ids.flatten(), gradient.flatten(0, -2)), None, None
