"""Less memory for more time: a layer's activations are dropped in forward and made again in backward."""

from contextlib import nullcontext

from torch.utils.checkpoint import checkpoint

from palate.errors import UsageError
from palate.layout import Layout
from palate.model import Model
from palate.model.attention import current_layout, shared_attention


class _Recomputed:
    """A layer's forward under `checkpoint`. An object rather than a closure, so that a copied model runs its own."""

    def __init__(self, layer, model: Model):
        self.forward, self.model = layer.forward, model

    def __call__(self, *args, **kwargs):
        layout = current_layout()
        return checkpoint(self._run, layout, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _run(self, layout: Layout | None, *args, **kwargs):
        # in backward the stream's attention is no longer switched on
        with nullcontext() if layout is None or layout is current_layout() else shared_attention(self.model, layout):
            return self.forward(*args, **kwargs)


def enable_recompute(model: Model) -> None:
    """Makes the model recompute its layers in backward, in evaluation mode too; no number changes. Once is enough.

    transformers' own switch works in training mode alone, where dropout is on. Raises UsageError where the model's
    layers are not marked as ones that can be run again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            "the model has no layers that can be recomputed", code="E316", next="leave --train.checkpointing out"
        )
    for layer in layers:
        if not isinstance(layer.__dict__.get("forward"), _Recomputed):
            layer.forward = _Recomputed(layer, model)
