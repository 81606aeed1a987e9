"""A folder to a model that gives a text one number, and back: `AutoModelForSequenceClassification`, one label."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from palate.errors import ModelError, NotThereError
from palate.files import new_folder
from palate.model import Model
from palate.model.adapters import is_adapted, merged_copy
from palate.model.checks import check_folder, read_object
from palate.model.heads import scaled_head
from palate.model.load import (
    _REPORT,
    LoadedModel,
    _content,
    _device,
    _How,
    _is_there,
    _probe,
    _refusing,
    _same_bits,
    _savable,
    _save_adapter,
    _scrub_config,
    _tokenizer,
    _writing,
    quiet,
)

_NEXT = "name a folder that save_pretrained wrote of a model for sequence classification with num_labels=1"


def load_reward(name: str | os.PathLike, *, device: str | torch.device = "cpu") -> LoadedModel:
    """The reward model in a folder (or a run folder's `model/`), float32 and in eval mode, and its tokenizer.

    Its folder is looked at as `model.load.load` does: safetensors alone, headers sound, no code, weights finite.
    Raises NotThereError, MachineError and ModelError: E401 to E406 as there, E412 where it is no reward model.
    """
    from transformers import AutoModelForSequenceClassification

    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise NotThereError(f"there is no reward model at {os.fspath(name)!r}", code="E401", next=_NEXT)
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    where = str(folder)
    check_folder(folder)
    _check_kind(read_object(folder / "config.json"), where)
    how = _How(torch.float32, _device(device), False, None, 0)
    tokenizer = _tokenizer(folder, how)
    with _refusing(where, "E404"), quiet():
        model, told = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=how.dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    for what, names in (("is missing", told["missing_keys"]), ("has another shape", told["mismatched_keys"])):
        if names:
            first = min(str(name[0] if isinstance(name, tuple) else name) for name in names)
            raise ModelError(f"weight {first!r} {what} ({len(names)} in all)", where=where, code="E404", next=_NEXT)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            what = f"weight {name!r} holds values that are not finite"
            raise ModelError(what, where=where, code="E406", next="take another checkpoint")
    return LoadedModel(model.to(how.device).eval(), tokenizer, os.fspath(name), folder)


def _check_kind(config: dict[str, Any], where: str) -> None:
    made_for = config.get("architectures") or []
    if made_for and not any("SequenceClassification" in str(kind) for kind in made_for):
        raise ModelError(f"{made_for[0]} is no reward model", where=where, code="E412", next=_NEXT)
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        what = f"the model has {labels} labels, a reward model has one"
        raise ModelError(what, where=where, code="E412", next=_NEXT)
    bias = config.get("reward_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        what = f"reward_bias is {bias!r}, no finite number"
        raise ModelError(what, where=f"{where}/config.json", code="E412", next="mend or remove it")


def save_reward(
    model: Model, tokenizer, folder: str | os.PathLike, *, gain: float = 1.0, bias: float = 0.0, card: str | None = None
) -> Path:
    """The folder, from which `load_reward` reads a reward of `gain` times what the head says, plus `bias`.

    gain is folded into the head, bias is `reward_bias` in the config, and `reward_scale`, 1 / gain, turns a difference
    of these rewards into the log-odds that were trained. An adapter is merged in, and stands alone in `adapter` beside
    the folder, the head with it, bias and scale in its palate.json. The folder appears whole or not at
    all, once it reads back to the same bits; one that already holds just this stays. `model` is left as it was.
    Raises as `palate.model.load.save`.
    """
    folder, plain = Path(folder), model
    if is_adapted(model):
        plain, facts = merged_copy(model), {"reward_bias": bias, "reward_scale": 1 / gain}
        with scaled_head(model, gain):
            _save_adapter(model, folder.with_name("adapter"), _ADAPTER_CARD, facts)
    with scaled_head(plain, gain), _savable(plain):
        plain.config.reward_bias, plain.config.reward_scale = bias, 1 / gain
        content = {"content": _content(plain, tokenizer, card)}
        if _is_there(folder, content):
            return folder
        with new_folder(folder, content) as tmp:
            with _writing(folder), quiet():
                plain.save_pretrained(tmp, max_shard_size="5GB")
                tokenizer.save_pretrained(tmp)
            _scrub_config(tmp / "config.json")
            (tmp / "README.md").write_text(card if card is not None else _CARD, encoding="utf-8")
            _check_saved(plain, tmp)
    return folder


_CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, palate]
---
A reward model trained with palate: one number a text, read at its last token, the end token included. Load it with
`AutoModelForSequenceClassification.from_pretrained`, and add `reward_bias` of its config to the one logit. Samples of
the model that it was trained from have mean 0 and deviation 1. The difference of two rewards times `reward_scale` is
the log-odds that the first is preferred.
"""

_ADAPTER_CARD = """---
library_name: peft
pipeline_tag: text-classification
tags: [lora, reward-model, palate]
---
A LoRA adapter and head of a reward model trained with palate, for `AutoModelForSequenceClassification` with one label
on the base that adapter_config.json names. Add `reward_bias` of palate.json to the one logit.
"""


def _check_saved(plain: Model, folder: Path) -> None:
    """Loads `folder` again; its weights and its number for a probe must be the same bits."""
    again = load_reward(folder, device=plain.device).model
    ours, theirs = plain.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not _same_bits(ours[name], theirs[name]):
            what = f"weight {name!r} does not read back as it was saved"
            raise ModelError(what, where=str(folder), code="E404", next=_REPORT)
    if not torch.equal(_probe(plain), _probe(again)):
        raise ModelError("the saved model gives other rewards", where=str(folder), code="E404", next=_REPORT)


@torch.no_grad()
def rewards(model, rows: list[list[int]], *, tokens: int = 8192) -> list[float]:
    """The reward of each row of token ids, `reward_bias` of the config added; float, one a row.

    tokens: most places of one forward. Rows of one length go together: nothing is padded, so a reward does not depend
    on what a model takes for padding.
    """
    found = [0.0] * len(rows)
    bias = float(getattr(model.config, "reward_bias", 0.0))
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    for length, places in sorted(by_length.items()):
        one_by_one = model.config.get_text_config().pad_token_id is None  # transformers refuses batches then
        step = 1 if one_by_one else max(1, tokens // length)
        for start in range(0, len(places), step):
            part = places[start : start + step]
            ids = torch.tensor([rows[place] for place in part], device=model.device)
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].double()
            for place, value in zip(part, out.tolist(), strict=True):
                found[place] = value + bias
    return found
