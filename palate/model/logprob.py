"""Log-probs of given tokens behind the model's own LM head, on scored rows alone, without the full logits.

The head module is called on chunks of rows, inside the model's own forward: a wrapped head (LoRA, sharded, biased) goes
through the same door as a bare one. Backward computes each chunk's logits again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LOGITS_PER_CHUNK = 2**25  # vocabulary times rows: 128 MiB in float32
ROWS = 16  # the head runs on multiples of this: matrix kernels treat left-over rows apart, and round them apart


def logit_transform(config) -> Callable[[Tensor], Tensor] | None:
    """What the model does to its head's output before it is a logit (soft cap, scale), from its config; None: nothing.

    The probe compares with the model's own logits, so a family that does anything else is found out.
    """
    cap = getattr(config, "final_logit_softcapping", None)
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
    original = head.forward
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    size = max(1, LOGITS_PER_CHUNK // model.config.get_text_config(decoder=True).vocab_size // ROWS) * ROWS
    count = len(targets)
    predictors, targets = (nn.functional.pad(x, (0, -count % ROWS)) for x in (predictors, targets))
    found: list[Tensor] = []

    def forward(hidden: Tensor, *args, **kwargs) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predictors)
        if hidden_rows is not None:
            hidden_rows.append(rows)
        found.append(_TargetLogps.apply(rows, targets, original, transform, size, *parameters)[:count])
        return hidden[..., :1]

    head.forward = forward
    try:
        yield found
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


class _TargetLogps(torch.autograd.Function):
    """log softmax(head(rows))[targets], (N,), float32 at least; keeps one number a row besides its inputs."""

    @staticmethod
    def forward(ctx, rows, targets, head, transform, size, *parameters):
        device = rows.device.type
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.head, ctx.transform, ctx.size, ctx.device = head, transform, size, device
        logps, norms = [], []
        for part, wanted in zip(rows.split(size), targets.split(size), strict=True):
            logits = head(part)
            logits = _wide(logits if transform is None else transform(logits))
            norms.append(logits.logsumexp(-1))
            logps.append(logits.gather(-1, wanted[:, None])[:, 0] - norms[-1])
        ctx.save_for_backward(rows, targets, torch.cat(norms), *parameters)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient):
        rows, targets, norms, *parameters = ctx.saved_tensors
        row_gradients, sums = [], [None] * len(parameters)
        pieces = (x.split(ctx.size) for x in (rows, targets, norms, gradient))
        with torch.enable_grad(), torch.autocast(ctx.device, ctx.autocast[1], enabled=ctx.autocast[0]):
            for part, wanted, norm, weight in zip(*pieces, strict=True):
                part = part.detach().requires_grad_()
                raw = ctx.head(part)
                logits = raw if ctx.transform is None else ctx.transform(raw)
                with torch.no_grad():
                    # d logp_t / d logits = onehot_t - softmax, written over logits that nothing else needs
                    slope = _wide(logits.detach() if ctx.transform is None else logits.detach().clone())
                    weight = weight[:, None].to(slope.dtype)
                    slope.sub_(norm[:, None]).exp_().mul_(-weight).scatter_add_(-1, wanted[:, None], weight)
                first, *rest = torch.autograd.grad(
                    logits, [part, *parameters], slope.to(logits.dtype), allow_unused=True
                )
                row_gradients.append(first)
                sums = [_added(old, new) for old, new in zip(sums, rest, strict=True)]
        return torch.cat(row_gradients), None, None, None, None, *sums


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
