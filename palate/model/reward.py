"""A reward model's folder to a model that gives a text one number: `AutoModelForSequenceClassification`, one label."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from palate.errors import ModelError, NotThereError
from palate.model.checks import check_folder, read_object
from palate.model.load import LoadedModel, _device, _How, _refusing, _tokenizer, quiet

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
