"""Low-rank adapters through peft. Switched off, an adapter leaves the model it was put on: the reference, for free.

Hu et al. 2021, arXiv:2106.09685: W x + (alpha / rank) B A x, where only A and B are trained and B starts at zero.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from palate.errors import ModelError, UsageError
from palate.model import Model
from palate.model.heads import scalar_head
from palate.model.quantized import is_quantized, restore


def add_lora(
    model: Model,
    rank: int,
    alpha: float | None = None,
    *,
    seed: int = 0,
    targets: str | list[str] = "all-linear",
) -> Model:
    """`model` wrapped by peft, all of it frozen but new adapters; its outputs are the same until they are trained.

    A scalar head is trained too, whole, in a copy.

    rank: columns of A, >= 1. alpha: the update is scaled by alpha / rank; 2 * rank unless given.
    seed: of A; the global random state is not touched. targets: names of layers, or all linear ones but the head.
    """
    from peft import LoraConfig, get_peft_model

    if is_adapted(model):
        raise ModelError("the model already has an adapter", next="merge it first (palate.model.adapters.merged_copy)")
    if rank < 1:
        raise UsageError(f"a LoRA rank is at least 1, not {rank}")
    if alpha is not None and not alpha > 0:
        raise UsageError(f"lora_alpha is above 0, not {alpha}")
    scale: Any = 2 * rank if alpha is None else alpha  # peft says int and takes fractions
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM" if scalar_head(model) is None else "SEQ_CLS",
    )
    training = model.training
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)  # peft draws A on the CPU, then moves it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft mends fan_in_fan_out for GPT-2 by itself, and says so
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"no adapter fits this model: {error}", next="train all weights, or name the targets"
        ) from error
    finally:
        torch.default_generator.set_state(state)
    # peft keeps a set, whose order in the saved file would change from process to process.
    chosen: Any = adapted.peft_config["default"]
    chosen.target_modules = sorted(chosen.target_modules)
    return adapted.train(training)


def is_adapted(model: Model) -> bool:
    """Whether peft wraps the model."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


@contextmanager
def reference_mode(model: Model) -> Iterator[Model]:
    """Within, `model` is what it was before its adapter; afterwards it is as before, gradients' flags included.

    Only an adapted model has a reference inside; ValueError for others: the policy would be its own reference.
    """
    if not is_adapted(model):
        raise ValueError("the model has no adapter to switch off: load its reference as a model of its own")
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield model
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def merged_copy(model: Model) -> Model:
    """A plain transformers model in eval mode with the adapter added to its weights; `model` itself stays as it is.

    Weights in 4 bits are made whole for it, on the CPU.
    """
    if not is_adapted(model):
        raise ValueError("the model has no adapter to merge")
    plain = copy.deepcopy(model)
    if is_quantized(plain):
        restore(plain)
    plain = plain.merge_and_unload(safe_merge=True)
    plain.__dict__.pop("peft_config", None)
    return plain.requires_grad_(True).eval()
