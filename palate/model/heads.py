"""A scalar head on any decoder that transformers can put one on: one number a position, for rewards and values.

The model is transformers' own for sequence classification with one label, so that anybody can load what we train.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palate.errors import ModelError
from palate.model import Model

_PAD = "<|pad|>"


def with_scalar_head(model: Model, *, seed: int = 0) -> Model:
    """The causal model's backbone under a new head of one number, in eval mode; the weights are shared, not copied.

    The head is drawn from N(0, 1 / (width + 1)) with `seed`. Raises ModelError (E412) for a family that transformers
    has no sequence classification for.
    Source: Huang et al. 2024, arXiv:2403.17031, detail 12.
    """
    from transformers import AutoModelForSequenceClassification

    config, name = copy.deepcopy(model.config), type(model).__name__
    config.num_labels = 1
    try:
        with torch.device("meta"):  # only the frame: the backbone is there already
            made = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise _no_head(name, "transformers has no sequence classification for this family") from error
    prefix, head = made.base_model_prefix, getattr(made, "score", None)
    if not isinstance(head, nn.Linear) or type(getattr(made, prefix, None)) is not type(model.base_model):
        raise _no_head(name, f"{type(made).__name__} is built in another way")
    setattr(made, prefix, model.base_model)
    made.score = nn.Linear(head.in_features, 1, bias=head.bias is not None, device="meta").to_empty(device=model.device)
    made.score.to(model.dtype)
    made.config = model.config  # the one that its layers read
    made.config.num_labels = 1
    if model.device.type != "meta" and any(tensor.is_meta for tensor in made.state_dict(keep_vars=True).values()):
        raise _no_head(name, f"{type(made).__name__} has layers besides")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(made.score.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
        made.score.weight.copy_(drawn)
        if made.score.bias is not None:
            made.score.bias.zero_()
    return made.eval()


def _no_head(name: str, why: str) -> ModelError:
    return ModelError(f"{name} takes no reward head: {why}", code="E412", next="take a model such as Llama or Qwen")


def scalar_head(model: Model) -> nn.Module | None:
    """The module that gives one number a position (below an adapter's wrapping too); None where the model has none."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bare.score if type(bare).__name__.endswith("ForSequenceClassification") and hasattr(bare, "score") else None


def backbone(model: Model) -> nn.Module:
    """The decoder below the head, with its adapters if there are any."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def head_weights(model: Model) -> list[nn.Parameter]:
    """Weight and, where there is one, bias of the scalar head: of an adapted model those that are trained."""
    head = scalar_head(model)
    assert head is not None
    saved = getattr(head, "modules_to_save", None)
    return list((head if saved is None else saved["default"]).parameters())


@torch.no_grad()
def scale_head(model: Model, gain: float) -> None:
    """Multiplies what the head says by `gain`."""
    for weight in head_weights(model):
        weight.mul_(gain)


@contextmanager
def scaled_head(model: Model, gain: float) -> Iterator[None]:
    """Within, the head says `gain` times what it says; afterwards it is as it was, to the bit."""
    before: list[Tensor] = [weight.detach().clone() for weight in head_weights(model)]
    try:
        scale_head(model, gain)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(head_weights(model), before, strict=True):
                weight.copy_(old)


def set_pad(model: Model, tokenizer, ends: Collection[int]) -> None:
    """Gives model and tokenizer a pad token that ends no completion: transformers reads a row before its pads.

    The tokenizer's own where that will do, else its BOS, else a new one (with a new row of the embedding if need be).
    ends: the tokens that end a completion.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    found = (id for id in (tokenizer.pad_token_id, tokenizer.bos_token_id) if id is not None)
    pad = next((id for id in found if id not in ends and id < rows), None)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": _PAD})
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
