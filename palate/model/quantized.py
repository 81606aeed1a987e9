"""Frozen weights in 4 bits, for adapters to be trained over them: QLoRA.

Dettmers et al. 2023, arXiv:2305.14314: every linear layer but the head holds its weights as NF4, in blocks of 64 with
one scale each; a product makes them whole in its own precision, forward and backward, and keeps nothing of them.
Departs: the scales stay float32 (0.56 bytes a weight, not 0.52). The kernels are those of bitsandbytes; its own layer,
which in evaluation mode on some CPUs computes in bfloat16 and without a gradient, is not used.
"""

import logging
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from palate.errors import UsageError
from palate.model import Model

BLOCK = 64


def need_bitsandbytes() -> None:
    """Nothing, where the package is installed; else UsageError with the command that installs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it could download
    try:
        import_module("bitsandbytes")  # registers its operators
    except ImportError:
        what = "4-bit weights need the package bitsandbytes"
        raise UsageError(what, where="quantize", code="E308", next="pip install 'palate[quantize]'") from None


class Linear4bit(nn.Linear):
    """x W^T + b with a frozen W in 4 bits. weight: uint8, two weights each; absmax: float32, one a block."""

    def __init__(self, packed: Tensor, absmax: Tensor, shape: tuple[int, int], bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def of(cls, layer: nn.Linear) -> "Linear4bit":
        """The layer's weights, rounded; on the meta device their sizes alone."""
        weight = layer.weight.detach()
        shape = (layer.out_features, layer.in_features)
        if weight.device.type == "meta":
            packed = weight.new_empty((-(-weight.numel() // 2), 1), dtype=torch.uint8)
            return cls(packed, weight.new_empty(-(-weight.numel() // BLOCK), dtype=torch.float32), shape, layer.bias)
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
        return cls(packed, absmax, shape, layer.bias)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the weights that the bits stand for."""
        kernel = torch.float32 if dtype == torch.float64 else dtype
        shape = (self.out_features, self.in_features)
        made = torch.ops.bitsandbytes.dequantize_4bit(self.weight, self.absmax.float(), BLOCK, "nf4", shape, kernel)
        return made.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x.to(dtype), self)

    def plain(self) -> nn.Linear:
        """A layer with the same weights in float32, on the CPU."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight = nn.Parameter(self.whole(torch.float32).cpu())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().cpu())
        return layer


class _Product(torch.autograd.Function):
    """Keeps the layer for backward in place of its whole weights."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return linear(x, layer.whole(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.whole(gradient.dtype), None


def quantize(model: Model) -> Model:
    """`model`, whose linear layers but the head are now frozen in 4 bits."""
    need_bitsandbytes()
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            model.set_submodule(name, Linear4bit.of(layer))
    return model


def adopt(model: Model) -> Model:
    """`model`, whose 4-bit layers, as transformers reads them, are now ours; nothing is rounded again."""
    theirs = import_module("bitsandbytes.nn").Linear4bit
    for name, layer in list(model.named_modules()):
        if isinstance(layer, theirs):
            state = layer.weight.quant_state
            model.set_submodule(name, Linear4bit(layer.weight.data, state.absmax, tuple(state.shape), layer.bias))
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit"):
        model.__dict__.pop(name, None)
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether some of the model's weights are in 4 bits."""
    return any(isinstance(layer, Linear4bit) for layer in model.modules())


def restore(model: nn.Module) -> nn.Module:
    """`model` on the CPU with whole weights in float32: those that the bits stand for, not those they were made of."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            model.set_submodule(name, layer.plain())
    return model.cpu()


def count_weights(model: nn.Module) -> int:
    """Weights of the model, those in 4 bits counted one by one."""
    packed = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, Linear4bit)}
    return sum(
        packed[id(p)].out_features * packed[id(p)].in_features if id(p) in packed else p.numel()
        for p in model.parameters()
    )
