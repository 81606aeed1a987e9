"""Log-probs of given tokens behind the model's own LM head, on scored rows alone, without the full logits.

The head module is called on chunks of rows, inside the model's own forward: a wrapped head (LoRA, sharded, biased) goes
through the same door as a bare one. Where the head is frozen, forward turns a chunk's logits into what backward needs
of them, a gradient a row, and the head runs once. Where it learns, backward begins with the last chunk, whose logits
were kept for it, and computes the others again: one chunk is there at the end of forward and at the start of backward
in any case, so what is kept raises no peak, and where one chunk is all the head runs once there too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from palate.model.softmax import row_logps, row_slopes
from palate.model.tied import is_matrix, tied

LOGITS_PER_CHUNK = 2**25  # vocabulary times rows: 128 MiB in float32
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
ROWS = 16  # the head runs on multiples of this: matrix kernels treat left-over rows apart, and round them apart


def logit_transform(config) -> Callable[[Tensor], Tensor] | None:
    """What the model does to its head's output before it is a logit (soft cap, scale), from its config; None: nothing.

    The probe compares with the model's own logits, so a family that does anything else is found out.
    """
    caps = (getattr(config, name, None) for name in _CAPS)
    cap = next((cap for cap in caps if cap is not None), None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap is None and scale is None and divisor is None:
        return None

    def transform(logits: Tensor) -> Tensor:
        logits = logits if scale is None else logits * scale
        logits = logits if divisor is None else logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


@contextmanager
def scored_rows(
    model: nn.Module,
    predictors: Tensor,
    targets: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    hidden_rows: list[Tensor] | None = None,
) -> Iterator[list[Tensor]]:
    """Inside the block the model's forward fills the yielded list with the (N,) log-probs of `targets`.

    predictors: (N,) rows of the flattened (batch, length) hidden states. The head's output becomes one unused column.
    hidden_rows: gets these rows as well, filled up to a multiple of `ROWS`, for a second head on the same forward.
    """
    head = model.get_output_embeddings()
    own = head.__dict__.get("forward")
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    size = max(1, LOGITS_PER_CHUNK // model.config.get_text_config(decoder=True).vocab_size // ROWS) * ROWS
    count = len(targets)
    predictors, targets = (nn.functional.pad(x, (0, -count % ROWS)) for x in (predictors, targets))
    found: list[Tensor] = []
    with tied(model) as edges:
        bare = transform is None and is_matrix(head, nn.Linear) and head.bias is None
        how = _How(head.forward, transform, size, bare)

        def forward(hidden: Tensor, *args, **kwargs) -> Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predictors)
            if hidden_rows is not None:
                hidden_rows.append(rows)
            keep = torch.is_grad_enabled() and (rows.requires_grad or bool(parameters))
            edge = edges.pop() if edges else None
            found.append(_TargetLogps.apply(rows, targets, how, keep, edge, *parameters)[:count])
            return hidden[..., :1]

        head.forward = forward
        try:
            yield found
        finally:
            if own is None:
                del head.forward
            else:
                head.forward = own


@dataclass(frozen=True)
class _How:
    """What stays the same over a forward and its backward.

    size: rows of a chunk. bare: whether logits are a product with one matrix, whose gradient then grows in place.
    """

    head: Callable[[Tensor], Tensor]
    transform: Callable[[Tensor], Tensor] | None
    size: int
    bare: bool

    def logits(self, rows: Tensor) -> Tensor:
        """(N, V) of the rows."""
        raw = self.head(rows)
        return raw if self.transform is None else self.transform(raw)


class _TargetLogps(torch.autograd.Function):
    """log softmax(head(rows))[targets], (N,), float32 at least.

    keep: whether backward may come. It finds one number a row and the last chunk's logits, or of a frozen head
    d log-prob / d row. edge: of a tied embedding; it gets the gradient of the first parameter, the matrix.
    """

    @staticmethod
    def forward(ctx, rows, targets, how, keep, edge, *parameters):
        device = rows.device.type
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.how, ctx.device, ctx.tied = how, device, ctx.needs_input_grad[4]
        ctx.sizes = [len(rows) % how.size] * (len(rows) % how.size > 0) + [how.size] * (len(rows) // how.size)
        ctx.kept, ctx.frozen = None, keep and not parameters
        logps, norms, gradients = [], [], []
        pieces = zip(rows.split(ctx.sizes), targets.split(ctx.sizes), strict=True)
        for number, (part, wanted) in enumerate(pieces, start=1):
            last = number == len(ctx.sizes)  # which is full
            if ctx.frozen or (keep and last):
                leaf, logits = _logits(ctx, part)
            else:
                logits = how.logits(part)
            found, norm = row_logps(logits, wanted)
            logps.append(found)
            norms.append(norm)
            if ctx.frozen:
                slope = row_slopes(logits, norm, wanted, torch.ones_like(norm), spare=how.transform is None)
                gradients += torch.autograd.grad(logits, leaf, slope)
                del slope
            elif keep and last:
                ctx.kept = leaf, logits
            del logits  # before the next chunk's are made
        ctx.save_for_backward(*(gradients if ctx.frozen else (rows, targets, torch.cat(norms), *parameters)))
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if ctx.frozen:
            found = torch.cat(ctx.saved_tensors)
            return (found * gradient[:, None]).to(found.dtype), None, None, None, None
        rows, targets, norms, *parameters = ctx.saved_tensors
        row_gradients, sums = [], [None] * len(parameters)
        kept, ctx.kept = ctx.kept, None  # a second backward finds nothing kept
        pieces = [x.split(ctx.sizes) for x in (rows, targets, norms, gradient)]
        for part, wanted, norm, weight in reversed(list(zip(*pieces, strict=True))):
            leaf, logits = _logits(ctx, part) if kept is None else kept
            kept = None
            slope = row_slopes(logits, norm, wanted, weight, spare=ctx.how.transform is None)
            if ctx.how.bare and row_gradients and not ctx.autocast[0]:
                sums[0].addmm_(slope.T, part)  # no second matrix of its size, only to be added
                row_gradients.append(slope @ parameters[0])
            else:
                first, *rest = torch.autograd.grad(logits, [leaf, *parameters], slope, allow_unused=True)
                sums = [_added(old, new) for old, new in zip(sums, rest, strict=True)]
                row_gradients.append(first)
            del logits, slope
        edge = None
        if ctx.tied:
            edge, sums[0] = sums[0], None
        return torch.cat(row_gradients[::-1]), None, None, None, edge, *sums


def _logits(ctx, part: Tensor) -> tuple[Tensor, Tensor]:
    """(part, its logits) as leaf and root of a graph of their own."""
    # no cache: a weight cast where gradients are off would cut this graph off from the weight
    autocast = torch.autocast(ctx.device, ctx.autocast[1], enabled=ctx.autocast[0], cache_enabled=False)
    with torch.enable_grad(), autocast:
        part = part.detach().requires_grad_()
        return part, ctx.how.logits(part)


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)
