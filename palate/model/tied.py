"""A matrix that is embedding and head at once: one gradient, which the head's backward begins and the embedding's ends.

Autograd by itself fills a second matrix of the vocabulary's size with zeros, writes some hundred rows of it, and adds
the whole to the first. CPU only: on CUDA rows would be added in no fixed order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

_HERE: ContextVar[bool] = ContextVar("here", default=True)


@contextmanager
def tied(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block the embedding leaves its edge in the yielded list; nothing, where no plain matrix is tied.

    The edge stands for the whole matrix, (V, H) without numbers. The head takes it beside its weight, gives it the
    gradient of both, and the embedding's backward adds its own rows to that.
    """
    rows, edges = _tied_rows(model), []
    if rows is None:
        yield edges
        return

    def forward(input: Tensor) -> Tensor:  # as the module's own parameter is called
        found, edge = _Rows.apply(input, rows.weight, rows.padding_idx)
        edges[:] = [edge]
        return found

    rows.forward = forward
    try:
        yield edges
    finally:
        del rows.forward


@contextmanager
def untied() -> Iterator[None]:
    """Inside the block no model is tied: what is rehearsed for machines that are elsewhere may run on CUDA there."""
    token = _HERE.set(False)
    try:
        yield
    finally:
        _HERE.reset(token)


def is_matrix(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is a module of just this class, with its class's forward and a weight that is whole, in one place."""
    own = type(module) is kind and "forward" not in module.__dict__
    return own and type(module.weight) in (nn.Parameter, FakeTensor)  # a rehearsal goes the same way


def _tied_rows(model: nn.Module) -> nn.Embedding | None:
    """The embedding whose plain matrix the head is, where it learns, and on the CPU."""
    head = model.get_output_embeddings()
    try:
        rows = model.get_input_embeddings()
    except NotImplementedError:
        return None
    if not (is_matrix(rows, nn.Embedding) and is_matrix(head, nn.Linear) and rows.weight is head.weight):
        return None
    plain = rows.max_norm is None and not rows.scale_grad_by_freq and not rows.sparse
    here = rows.weight.device.type == "cpu" and _HERE.get()
    return rows if plain and here and rows.weight.requires_grad else None


class _Rows(torch.autograd.Function):
    """weight[ids], and the edge."""

    @staticmethod
    def forward(ctx, ids, weight, padding):
        ctx.save_for_backward(ids)
        ctx.padding, ctx.shape = padding, weight.shape
        ctx.set_materialize_grads(False)
        return embedding(ids, weight), weight.new_zeros(()).expand(weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, total):
        if gradient is None:
            return None, total, None
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0)
        total = gradient.new_zeros(ctx.shape) if total is None else total  # the head alone had it: it is written over
        return None, total.index_add_(0, ids.flatten(), gradient.flatten(0, -2)), None
