"""The name of a model's function: equal weights and an equal forward give equal fingerprints, wherever they lie.

Scores of a reference are kept under this name. An input too many costs a second scoring; one too few serves stale
numbers: so unknown config keys count, and only those that are known not to touch an evaluated forward are left out.
"""

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from palate.model import Model

_VERSION = b"palate-fingerprint-1"

# Config keys that no evaluated forward of given token ids reads. Dropout is off where scores are made.
_IRRELEVANT = re.compile(
    r"""
    _name_or_path | transformers_version | architectures | dtype | torch_dtype | use_cache | return_dict | problem_type
    | (bos | eos | pad | sep | decoder_start)_token_id
    | id2label | label2id | num_labels | finetuning_task | task_specific_params
    | output_(attentions | hidden_states | scores | logits | router_logits)
    | _?(attn | experts)_implementation(_internal)? | chunk_size_feed_forward | gradient_checkpointing
    | initializer_range
    | do_sample | num_beams | num_beam_groups | diversity_penalty | length_penalty | repetition_penalty
    | no_repeat_ngram_size | early_stopping | num_return_sequences | max_length | min_length | max_new_tokens
    | .*dropout.* | .*pdrop | .*layerdrop
    """,
    re.VERBOSE,
)


def fingerprint(model: Model) -> str:
    """64 hex digits: SHA-256 over weights, persistent buffers and the config keys that the forward may read.

    Names, dtypes, shapes and bytes all count; tied weights count under each of their names. The folder, the device,
    train or eval mode and settings of generation do not. Adapters, if there are any, count as they are.
    """
    base = _unwrapped(model)
    adapters = model.peft_config if base is not model else None
    return _digest(base, model.state_dict(keep_vars=True), adapters)


def base_fingerprint(model: Model) -> str:
    """The `fingerprint` of the model below its adapters: what it was before peft wrapped it."""
    base = _unwrapped(model)
    return _digest(base, dict(_below_adapters(base.state_dict(keep_vars=True))), None)


def _unwrapped(model: Model) -> Model:
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _below_adapters(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name as before wrapping, tensor) of all that is not an adapter's own."""
    for name, tensor in state.items():
        parts = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        yield ".".join(part for part in parts if part not in ("base_layer", "original_module")), tensor


def _digest(model: Model, state: dict[str, Tensor], adapters: dict | None) -> str:
    whole = hashlib.sha256(_VERSION)
    facts = {"class": type(model).__name__, "code": _foreign_code(model), "config": _plain(model.config.to_dict())}
    if adapters:
        facts["adapters"] = {name: _plain(config.to_dict()) for name, config in adapters.items()}
        for config in facts["adapters"].values():
            config.pop("base_model_name_or_path", None)
    whole.update(json.dumps(facts, sort_keys=True, default=str).encode())
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    distinct = {_identity(tensor): tensor for tensor in tensors.values()}
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing leaves the interpreter lock
        digests = dict(zip(distinct, pool.map(_bytes_digest, distinct.values()), strict=True))
    for name in sorted(tensors):
        tensor = tensors[name]
        line = f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digests[_identity(tensor)]}"
        whole.update(line.encode())
    return whole.hexdigest()


def _identity(tensor: Tensor) -> tuple:
    return (tensor.data_ptr() if tensor.numel() else 0, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _bytes_digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1)
    digest = hashlib.sha256()
    for piece in flat.split(1 << 24):  # bounds what is copied from a device at once
        digest.update(piece.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value):
    """`value` as plain JSON values, without the keys that a forward does not read, at any depth."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not _IRRELEVANT.fullmatch(str(key))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _foreign_code(model: Model) -> str | None:
    """SHA-256 of the source that defines the model where it is not transformers' own: such code can change alone."""
    module = type(model).__module__
    if module.split(".")[0] == "transformers" or module not in sys.modules:
        return None
    try:
        return hashlib.sha256(inspect.getsource(sys.modules[module]).encode()).hexdigest()
    except (OSError, TypeError):
        return module
