"""A micro-batch on tensors without storage: the bytes that a step will take, before it takes them.

The forward and backward of training are run as they are, on fake tensors that have shapes and no numbers: every storage
that comes to life and dies is counted, so the peak needs neither the memory nor the time of the real thing, and a model
of any size can be asked (`palate.model.load.outline`). What no count of tensors sees: scratch memory inside kernels and
an allocator's waste.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from palate.data.batch import TokenBatch, collate
from palate.data.tokens import TokenGroup
from palate.errors import ModelError
from palate.model.attention import forget_masks
from palate.model.heads import scalar_head
from palate.model.quantized import count_weights, is_quantized
from palate.model.tied import untied
from palate.scoring import Numerics, scalars, sequence_logps, support, token_logps


@dataclass(frozen=True)
class Needs:
    """Bytes that training takes, by part, on one process.

    weights; gradients; optimizer: its states. activations: what forward keeps for backward, each storage once, the last
    chunk of logits among them unless the head is frozen. casts: how much lower the peak would be without whole weights
    in the precision of the matmuls, as where layers are gathered one by one. working: what comes on top of activations
    where the step stands highest: more logits, gradients on their way. saving: what writing the model takes on top of
    weights and optimizer.
    flops: of the matmuls and attention of the micro-batch, forward and backward.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    casts: int
    working: int
    saving: int
    flops: int

    @property
    def step(self) -> int:
        """Peak of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    @property
    def peak(self) -> int:
        """Peak of a run: in a step, or when the model is saved."""
        return max(self.step, self.weights + self.optimizer + self.saving)


def rehearse(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    numerics: Numerics = Numerics(),
    *,
    states: int = 2,
    several: bool = True,
) -> Needs:
    """The bytes of a step whose largest micro-batch holds `groups`; nothing is computed, no weight is touched.

    states: numbers that the optimizer keeps a weight (AdamW 2). several: the step has more micro-batches than this, so
    that gradients are there already while its activations are. Raises ModelError where the model's forward looks at
    numbers, which a tensor without storage has not.
    """
    weights = sum(size_of(tensor) for tensor in _held(model).values())
    gradients = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    adapted = hasattr(model, "disable_adapter")
    watch = _watched(model, collate(groups), numerics, several)
    return Needs(
        weights=weights,
        gradients=gradients if several else 0,
        optimizer=states * gradients,
        activations=watch.kept,
        casts=watch.peak - watch.peak_uncast,
        working=watch.peak - watch.kept,
        # a copy of what is saved is loaded again to be compared; an adapter is merged into a copy before
        saving=_saving(model, weights) * (2 if adapted else 1),
        flops=watch.flops,
    )


def _saving(model: nn.Module, weights: int) -> int:
    """Bytes of what is written; weights in 4 bits are made whole on the CPU, where a GPU's memory has none of it."""
    if not is_quantized(model):
        return weights
    return 4 * count_weights(model) if model.device.type == "cpu" else 0


def _watched(model: nn.Module, batch: TokenBatch, numerics: Numerics, several: bool) -> "_Watch":
    """What was counted over one micro-batch, above weights and gradients."""
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    support(model)  # its probe wants numbers
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            watch = _Watch()

            def fake(tensor: Tensor) -> Tensor:
                made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                watch.see(made, before=True)
                return made.requires_grad_(tensor.requires_grad)

            held = {f"model.{name}": fake(tensor) for name, tensor in _held(model).items()}
            for weight in held.values():
                if several and weight.requires_grad:
                    weight.grad = fake(weight.detach())
            tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
            tensors = {name: fake(value) for name, value in tensors.items() if isinstance(value, Tensor)}
            forget_masks()
            with watch, untied() if model.device.type == "meta" else nullcontext():
                torch.func.functional_call(_Pass(model, numerics, watch), held, (replace(batch, **tensors),))
            return watch
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"{type(model).__name__} cannot be rehearsed: {first}"
        raise ModelError(what, code="E407", next="plan with the weights there, in one process") from error
    finally:
        forget_masks()  # those made inside have no numbers


class _Pass(nn.Module):
    """Forward and backward of everything the model says of a batch, in one call: backward runs parts of it again."""

    def __init__(self, model: nn.Module, numerics: Numerics, watch: "_Watch"):
        super().__init__()
        self.model, self.numerics, self.watch = model, numerics, watch

    def forward(self, batch: TokenBatch) -> None:
        if scalar_head(self.model) is not None:
            total = scalars(self.model, batch, numerics=self.numerics).sum()
        else:
            total = sequence_logps(token_logps(self.model, batch, numerics=self.numerics), batch).total.sum()
        self.watch.kept = self.watch.live
        total.backward()


class _Watch(TorchDispatchMode):
    """live: bytes of the storages made inside that are still there; peak: the most at any time; flops so far.

    kept: live at the end of forward. cast: of live, weights in another precision; peak_uncast: the most without them.
    """

    def __init__(self):
        super().__init__()
        self.live = self.cast = self.peak = self.peak_uncast = self.kept = self.flops = 0
        self._known: dict[int, bool] = {}  # storage -> whether it was there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        weight = (
            func is torch.ops.aten._to_copy.default and args[0].dim() == 2 and self._known.get(_key(args[0]), False)
        )
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, cast=weight)
        return out

    def see(self, tensor: Tensor, *, before: bool = False, cast: bool = False) -> None:
        """Counts the tensor's storage from now to its end, once; not at all, if it was there before."""
        key, size = _key(tensor), 0 if before else tensor.untyped_storage().nbytes()
        if key in self._known:
            return
        self._known[key] = before
        self.live += size
        self.cast += size * cast
        self.peak = max(self.peak, self.live)
        self.peak_uncast = max(self.peak_uncast, self.live - self.cast)
        finalize(tensor.untyped_storage(), self._gone, key, size, cast)

    def _gone(self, key: int, size: int, cast: bool) -> None:
        self._known.pop(key, None)
        self.live -= size
        self.cast -= size * cast


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _held(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def size_of(tensor: Tensor) -> int:
    """Bytes of the tensor's numbers."""
    return tensor.numel() * tensor.element_size()
