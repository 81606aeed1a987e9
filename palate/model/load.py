"""A name becomes a model and its tokenizer; a trained model becomes a folder that `from_pretrained` reads.

Whoever hands us a folder is not trusted: names, headers and sizes are looked at before transformers sees any of it,
pickles are never opened, and a local path never touches the network.
"""

import copy
import hashlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from palate import builtin
from palate.errors import MachineError, ModelError, NotThereError, PalateError, UsageError
from palate.files import machine_errors, new_folder, verify_folder
from palate.model import Model
from palate.model.adapters import is_adapted, merged_copy
from palate.model.checks import (
    TOKENIZER_FILES,
    check_folder,
    check_remote_code,
    check_safetensors,
    first_line,
    read_object,
    refuse_weights,
)
from palate.model.fingerprint import base_fingerprint, fingerprint
from palate.model.quantized import adopt, is_quantized, need_bitsandbytes
from palate.model.quantized import quantize as quantized
from palate.model.sizes import SIZES
from palate.model.tokenizer import check_same_tokenizer as check_same_tokenizer
from palate.model.tokenizer import same_tokenizer as same_tokenizer
from palate.model.tokenizer import tokenizer_difference as tokenizer_difference
from palate.model.tokenizer import train_tokenizer as train_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_HUB_FILES = [f"*{end}" for end in (".safetensors", ".safetensors.index.json", ".model", ".tiktoken")]
_HUB_FILES += ["config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"]
_HUB_FILES += ["tokenizer*", "vocab*", "merges.txt", "tekken.json", "chat_template*", "adapter_config.json"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode, its tokenizer, and where they came from.

    tokenizer: None only for `new:` without a tokenizer beside the config; see `with_tokenizer`.
    path: the folder or file that was read; None for weights that were drawn here.
    notes: what a user should hear, one line each.
    """

    model: Model
    tokenizer: Any
    name: str
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that name the weights below any adapter, as they are when first asked for."""
        return base_fingerprint(self.model)


def load(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    seed: int = 0,
    quantize: str | None = None,
) -> LoadedModel:
    """The causal language model that `name` stands for, in eval mode, and its tokenizer.

    name: a folder, a run folder (its `model/`), a LoRA adapter's folder (merged into its base), a GGUF file,
        `new:CONFIG.json` or `new:5m` (random weights drawn from `seed`), `builtin:tiny`, `builtin:base`, or a Hub id.
    dtype: "float32", "bfloat16", "float16" or "float64": what the weights are held in.
    device: "cpu", "cuda", "mps" or "auto", which takes what is there.
    trust_remote_code: run Python that comes with the model; needs `revision`, the 40-digit commit that was read.
    quantize: "4bit" holds the linear layers but the head frozen in 4 bits (`palate.model.quantized`); a folder is
        rounded weight by weight as it is read, anything else once it is there.

    Raises NotThereError, UsageError, MachineError and ModelError: E401 files missing, E402 pickles, E403 remote code,
    E404 damaged weights, E405 shard index, E406 not finite, E407 vocabulary, E409 adapter of another base, E411 not
    causal.
    """
    text, dtype, device = os.fspath(name), _dtype(dtype), _device(device)
    if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UsageError(
            "trust_remote_code runs Python that comes with the model, so it needs the commit that you read",
            where=f"model {text!r}",
            code="E308",
            next="give the full 40-digit revision as well",
        )
    how = _How(dtype, device, trust_remote_code, revision, seed, quantize is not None)
    if not how.quantize:
        return _load(text, how)
    need_bitsandbytes()
    loaded = _load(text, how)
    if not is_quantized(loaded.model):
        quantized(loaded.model)
    return loaded


def _load(text: str, how: "_How") -> LoadedModel:
    if text.startswith(builtin.PREFIX):
        return _named(_from_folder(text, builtin.model_folder(text), how), text)
    if text.startswith("new:"):
        return _new(text, how)
    path = Path(text).expanduser()
    if path.is_dir():
        return _named(_from_folder(text, path, how))
    if path.is_file():
        return _named(_from_gguf(text, path, how))
    if path.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.fullmatch(text) or text.endswith(".gguf"):
        raise NotThereError(f"there is no model at {text!r}", code="E401", next=_NAMES)
    return _named(_from_folder(text, _snapshot(text, how), how), text)


def outline(
    name: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantize: str | None = None,
) -> LoadedModel:
    """`load` without weights: config and tokenizer are read, and the model's parameters stand on the meta device.

    For plans, where a model may be larger than the machine. name: as for `load`, but no adapter and no GGUF file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    text = os.fspath(name)
    how = _How(torch.float32, torch.device("meta"), trust_remote_code, revision, 0)
    tokenizer, folder = None, None
    if text.startswith("new:"):
        content, path = _new_config(text, how)
        if path.parent.is_dir() and any((path.parent / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = _tokenizer(path.parent, how)
    else:
        path = Path(text).expanduser()
        if text.startswith(builtin.PREFIX):
            folder = builtin.model_folder(text)
        elif path.exists() or path.is_absolute() or not _HUB_ID.fullmatch(text):
            folder = next((one for one in (path, path / "model") if (one / "config.json").is_file()), None)
        else:
            folder = _snapshot(text, how, weights=False)
        if folder is None:
            raise NotThereError(f"there is no config at {text!r}", code="E401", next="name a folder, new:CONFIG.json")
        path = folder / "config.json"
        content = read_object(path)
        check_remote_code(path, content, how.trust_remote_code)
        tokenizer = _tokenizer(folder, how)
    with _refusing(str(path), "E401"), quiet(), torch.device("meta"):
        if folder is None:
            config = AutoConfig.for_model(**content)
        else:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=how.trust_remote_code, revision=how.revision
            )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=how.trust_remote_code)
    if quantize is not None:
        quantized(model)
    return LoadedModel(model.eval(), tokenizer, text, folder)


_SIZES = ", ".join(f"new:{size}" for size in SIZES)
_NAMES = "name a model folder, a run folder, a GGUF file, new:CONFIG.json or a Hub id such as owner/name"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")


@dataclass(frozen=True)
class _How:
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool
    revision: str | None
    seed: int
    quantize: bool = False


def save(
    model: Model,
    tokenizer,
    folder: str | os.PathLike,
    *,
    card: str | None = None,
    adapter: str | os.PathLike | None = None,
    verify: bool = True,
) -> Path:
    """The folder, which now holds what `from_pretrained` reads: safetensors, config, tokenizer, template, card.

    A model with an adapter is written merged, and the adapter alone into `adapter` (default: beside `folder`); weights
    in 4 bits are written whole, in float32, as they were trained over, which is not what they were rounded from.
    The weights keep the dtype they have; tied weights are written once. The folder appears whole or not at all. Before
    that it is loaded again: its weights and its logits on a probe must be the same bits (with an adapter, the logits
    the same up to the rounding of the merge); otherwise ModelError, and nothing is there. A folder that already holds
    just this stays; another one is not written over (UsageError E313).

    card: the text of README.md; without it a short one is written.
    """
    folder = Path(folder)
    if is_adapted(model):
        plain = merged_copy(model)
        _save_adapter(model, Path(adapter) if adapter is not None else folder.with_name("adapter"))
    else:
        plain = model
    content = {"content": _content(plain, tokenizer, card)}
    if _is_there(folder, content):
        return folder
    with new_folder(folder, content) as tmp:
        with _writing(folder), quiet(), _savable(plain):
            plain.save_pretrained(tmp, max_shard_size="5GB")
            if tokenizer is not None:
                tokenizer.save_pretrained(tmp)
        _scrub_config(tmp / "config.json")
        (tmp / "README.md").write_text(card if card is not None else _CARD, encoding="utf-8")
        if verify:
            _verify(model, plain, tmp)
    return folder


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [palate]
---
A causal language model trained with palate. Load it with `AutoModelForCausalLM.from_pretrained`.
"""

_ADAPTER_CARD = """---
library_name: peft
pipeline_tag: text-generation
tags: [lora, palate]
---
A LoRA adapter trained with palate; adapter_config.json names its base, palate.json the base's weights.
"""


def with_tokenizer(loaded: LoadedModel, texts: Iterable[str]) -> LoadedModel:
    """`loaded` with a tokenizer trained on `texts` for the model's vocabulary, where it came without one."""
    if loaded.tokenizer is not None:
        return loaded
    try:
        tokenizer = train_tokenizer(texts, loaded.model.get_input_embeddings().weight.shape[0])
    except ModelError as error:
        error.where = loaded.name
        raise
    _adopt_ids(loaded.model, tokenizer)
    note = f"a tokenizer of {len(tokenizer)} tokens was trained on the data"
    return replace(loaded, tokenizer=tokenizer, notes=(*loaded.notes, note))


def context(model: Model) -> int | None:
    """How many tokens the model takes at once; None where its config names no bound (no learnt or scaled positions)."""
    config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers, peft and the Hub client without bars, logs and warnings; errors still come as exceptions."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _named(loaded: LoadedModel, name: str | None = None) -> LoadedModel:
    """What an adapter trained on this model will name as its base: a Hub id, or a path that holds in any folder."""
    name = name or str(Path(loaded.path or loaded.name).resolve())
    loaded.model.name_or_path = loaded.model.config._name_or_path = name
    return loaded


# --- the kinds of names ----------------------------------------------------------------------------------------------


def _from_folder(text: str, folder: Path, how: _How) -> LoadedModel:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return _from_adapter(text, folder, how)
        if (folder / "model" / "config.json").is_file():
            return replace(_from_folder(text, folder / "model", how), name=text)
        if (folder / "run.json").is_file():
            raise ModelError(
                "this run holds no model yet", where=str(folder), code="E401", next="finish it with --resume"
            )
    check_folder(folder, trust_remote_code=how.trust_remote_code)
    tokenizer = _tokenizer(folder, how)
    model = _pretrained(folder, how)
    return _checked(LoadedModel(model, tokenizer, text, folder), how)


def _from_gguf(text: str, path: Path, how: _How) -> LoadedModel:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError("this file is no GGUF model", where=str(path), code="E404", next=_NAMES)
    try:
        import gguf  # noqa: F401  (transformers looks for it)
    except ImportError:
        raise UsageError("reading GGUF needs the package gguf", next="pip install 'palate[gguf]'") from None
    with redirect_stderr(io.StringIO()):  # its bar listens to nobody
        tokenizer = _tokenizer(path.parent, how, gguf_file=path.name)
        model = _pretrained(path.parent, how, gguf_file=path.name)
    # The weights were dequantized while reading; what remembers the packing would only forbid saving them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    return _checked(LoadedModel(model, tokenizer, text, path), how)


def _from_adapter(text: str, folder: Path, how: _How) -> LoadedModel:
    """The base with the adapter merged in: what then trains or refers is the sum, never the bare base by mistake."""
    config = read_object(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):
        kind = config.get("peft_type")
        what = f"the adapter is of kind {kind!r}; palate reads LoRA"
        raise ModelError(what, where=str(folder), code="E409", next="merge it with peft, and name the merged model")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        refuse_weights(folder)
    check_safetensors(weights)
    base_name = config.get("base_model_name_or_path")
    if not base_name:
        raise ModelError("the adapter names no base model", where=str(folder), code="E409", next="merge it by hand")
    beside = folder / base_name
    base = load(
        beside if not os.path.isabs(base_name) and beside.is_dir() else base_name,
        dtype=how.dtype,
        device=how.device,
        trust_remote_code=how.trust_remote_code,
        revision=how.revision,
    )
    where = f"adapter {folder}, base {base_name}"
    right = "load it on the base it was trained on"
    facts = read_object(folder / _ADAPTER_FACTS) if (folder / _ADAPTER_FACTS).is_file() else {}
    if facts.get("base_dtype") == _dtype_name(base.model) and facts.get("base_fingerprint") != base.fingerprint:
        raise ModelError(
            "the base's weights are not those the adapter was trained on", where=where, code="E409", next=right
        )
    from peft import PeftModel

    try:
        with quiet():
            adapted = PeftModel.from_pretrained(base.model, folder, use_safetensors=True, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the adapter does not fit its base: {first_line(error)}", where=where, code="E409", next=right
        ) from error
    held = {name.replace(".default", "") for name, _ in adapted.named_parameters()}
    for tensor in check_safetensors(weights):
        if tensor not in held and "lora_embedding" not in tensor:
            raise ModelError(f"the base has no place for {tensor!r}", where=where, code="E409", next=right)
    tokenizer = _tokenizer(folder, how) if (folder / "tokenizer.json").is_file() else base.tokenizer
    model = adapted.merge_and_unload().eval().requires_grad_(True)
    return _checked(LoadedModel(model, tokenizer, text, folder, base.notes), how)


def _new_config(text: str, how: _How) -> tuple[dict[str, Any], Path]:
    """What `new:CONFIG.json` or `new:5m` says, and the file's path (for a size, one that is not there)."""
    named = text.removeprefix("new:")
    path = Path(named).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if named in SIZES:
        content, path = SIZES[named], Path(text)
    elif path.is_file():
        content = read_object(path)
    else:
        what = f"there is no config at {str(path)!r}"
        raise NotThereError(what, where=text, code="E401", next=f"name a model's config.json, or {_SIZES}")
    check_remote_code(path, content, how.trust_remote_code)
    if not content.get("model_type"):
        raise ModelError('"model_type" is missing', where=str(path), code="E401", next='for example "llama"')
    return content, path


def _new(text: str, how: _How) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    content, path = _new_config(text, how)
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(how.seed)
        with _refusing(str(path), "E401"), quiet():
            config = AutoConfig.for_model(**content)
            # Drawn in float32 first: a bfloat16 model is then the rounding of the float32 one.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        torch.default_generator.set_state(state)
    _cast(model, how.dtype)
    model = model.to(how.device)
    tokenizer = None
    if path.is_file() and any((path.parent / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = _tokenizer(path.parent, how)
    return _checked(LoadedModel(model, tokenizer, text, None), how)


def _snapshot(hub_id: str, how: _How, weights: bool = True) -> Path:
    """The local folder of a Hub model: only files that we read are fetched, so a pickle never arrives."""
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if how.trust_remote_code else _HUB_FILES
    patterns = [one for one in patterns if weights or ".safetensors" not in one]
    try:
        with quiet():
            return Path(
                snapshot_download(
                    hub_id, revision=how.revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
                )
            )
    except Exception as error:
        raise NotThereError(
            f"{hub_id!r} is no folder here, and as a Hub id it could not be fetched: {first_line(error)}",
            code="E401",
            next="check the spelling, the network and your Hub login, or name a local folder",
        ) from error


# --- what transformers is asked --------------------------------------------------------------------------------------


def _pretrained(folder: Path, how: _How, **extra) -> Model:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    streamed = how.quantize and not extra  # each weight is rounded as it is read
    if streamed:
        fourbit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
        extra = {"quantization_config": fourbit, "device_map": {"": str(how.device)}}
    with _refusing(str(folder), "E404"), quiet():
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=how.dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=how.trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    # transformers would fill these with random numbers and go on.
    for what, names in (("is missing", told["missing_keys"]), ("has another shape", told["mismatched_keys"])):
        if names:
            first = min(str(name[0] if isinstance(name, tuple) else name) for name in names)
            raise ModelError(
                f"weight {first!r} {what} ({len(names)} in all)",
                where=str(folder),
                code="E404",
                next="download the model again, or check that config.json belongs to it",
            )
    return adopt(model) if streamed else model.to(how.device)


def _tokenizer(folder: Path, how: _How, **extra):
    from transformers import AutoTokenizer

    with _refusing(str(folder), "E401", "the tokenizer cannot be read"), quiet():
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=how.trust_remote_code, **extra
        )


def _checked(loaded: LoadedModel, how: _How) -> LoadedModel:
    """The loaded model in eval mode, once its weights are finite and its embedding has a row for every token."""
    where = str(loaded.path or loaded.name)
    loaded.model.eval()
    for name, tensor in loaded.model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            count = int((~torch.isfinite(tensor.detach())).sum())
            raise ModelError(
                f"weight {name!r} holds {count} values that are not finite (NaN or infinite)",
                where=where,
                code="E406",
                next="take another checkpoint",
            )
    _check_causal(loaded.model, where)
    if loaded.tokenizer is None:
        return loaded
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    beyond = {token: id for token, id in loaded.tokenizer.get_vocab().items() if id >= rows}
    if not beyond:
        return loaded
    unused = beyond.keys() - _used_tokens(loaded.tokenizer)
    if len(unused) < len(beyond):
        token, id = max(beyond.items(), key=lambda item: item[1])
        raise ModelError(
            f"the tokenizer knows {id + 1} tokens (the last is {token!r}), the model's embedding has {rows} rows",
            where=where,
            code="E407",
            next="use the tokenizer that belongs to these weights, or resize the embedding and save the model first",
        )
    note = f"control tokens without a row in the embedding, never written by us: {', '.join(sorted(unused)[:5])}"
    return replace(loaded, notes=(*loaded.notes, note))


@torch.no_grad()
def _check_causal(model: Model, where: str) -> None:
    """A later token must not move an earlier prediction: encoders such as BERT load as well, and look ahead."""
    rows = model.get_input_embeddings().weight.shape[0]
    length = min(6, context(model) or 6)
    ids = (torch.arange(length, device=model.device) * 7919 + 3) % rows
    other = ids.clone()
    other[-1] = (ids[-1] + 1) % rows
    with _refusing(where, "E411", "the model takes no plain text"):
        one, two = (model(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in (ids, other))
    # Equal shapes give equal bits on most kernels; the slack is for those that do not promise it.
    slack = 100 * torch.finfo(model.dtype).eps * float(one.abs().max())
    if not torch.allclose(one, two, rtol=0, atol=slack):
        raise ModelError(
            "the model looks ahead: a later token changes earlier predictions",
            where=where,
            code="E411",
            next="take a causal language model (a decoder)",
        )


def _used_tokens(tokenizer) -> set[str]:
    """Tokens that text or a template may ask for: all but control tokens without a part to play (Gemma 3 has one)."""
    added = tokenizer.added_tokens_decoder.values()
    templates = str(tokenizer.chat_template or "")
    roles = {getattr(tokenizer, f"{role}_token", None) for role in ("bos", "eos", "pad", "unk")}
    idle = {str(token) for token in added if token.special and str(token) not in roles and str(token) not in templates}
    return set(tokenizer.get_vocab()) - idle


def _cast(model: Model, dtype: torch.dtype) -> None:
    """Casts the weights as from_pretrained would: `model.to(dtype)` would round the rotary frequencies as well."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and name not in module._non_persistent_buffers_set:
                tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _adopt_ids(model: Model, tokenizer) -> None:
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = None  # left padding is masked; nothing is written into a row of its own


# --- saving ----------------------------------------------------------------------------------------------------------

_ADAPTER_FACTS = "palate.json"
_REPORT = "look at the disk; where it is sound, report this"


@contextmanager
def _savable(model: Model) -> Iterator[None]:
    """Within, what transformers writes of the model is valid; afterwards the model is as it was."""
    before = model.config, getattr(model, "generation_config", None)
    model.config = copy.deepcopy(model.config)
    if before[1] is not None:
        model.generation_config = _valid(before[1])
    try:
        yield
    finally:
        model.config = before[0]
        if before[1] is not None:
            model.generation_config = before[1]


def _valid(config):
    """A generation config that transformers agrees to write: many published ones set a temperature but no sampling."""
    config = copy.deepcopy(config)
    for change in ({}, {"do_sample": True}):
        for key, value in change.items():
            setattr(config, key, value)
        try:
            config.validate(strict=True)
            return config
        except ValueError:
            continue
    return type(config)(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _scrub_config(path: Path) -> None:
    """Leaves out which attention this process used: no property of the model, and ours is known to nobody else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if "attn_implementation" not in key}
    if kept != content:
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _content(model: Model, tokenizer, card: str | None) -> str:
    """SHA-256 of all that a saved folder depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [fingerprint(model), backend.to_str() if backend is not None else str(tokenizer), card]
    parts.append(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _is_there(folder: Path, content: dict[str, str]) -> bool:
    """Whether `folder` already is what would be written: a run killed between two saves goes on behind the first."""
    return folder.is_dir() and (folder / "manifest.json").is_file() and verify_folder(folder).items() >= content.items()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk is said as one, whichever library met it."""
    with machine_errors(folder):
        try:
            yield
        except SafetensorError as error:
            raise MachineError(f"cannot be written: {first_line(error)}", where=str(folder), code="E505") from error


def _save_adapter(model: Model, folder: Path, card: str | None = None, facts: dict[str, Any] | None = None) -> None:
    """card: README.md. facts: palate.json; the base's weights unless given."""
    content = {"content": _content(model, None, None if facts is None else json.dumps(facts))}
    if _is_there(folder, content):
        return
    with new_folder(folder, content) as tmp, _writing(folder), quiet():
        model.save_pretrained(tmp, save_embedding_layers=False)
        (tmp / "README.md").write_text(card or _ADAPTER_CARD, encoding="utf-8")
        facts = facts or {"base_fingerprint": base_fingerprint(model), "base_dtype": _dtype_name(model)}
        (tmp / _ADAPTER_FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _verify(model: Model, plain: Model, folder: Path) -> None:
    """Loads `folder` again and compares it with what was to be saved."""
    from transformers import AutoModelForCausalLM

    expected = _probe(plain)
    if not bool(torch.isfinite(expected).all()):
        what = "the model's logits are no longer finite, so it is not saved"
        raise ModelError(what, where=str(folder), code="E406", next="train with a lower --lr")
    with _refusing(str(folder), "E404", "the saved model cannot be read back"), quiet():
        again = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=plain.dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=plain.config._attn_implementation,
        ).to(plain.device)
    again.eval()
    ours, theirs = plain.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not _same_bits(ours[name], theirs[name]):
            raise ModelError(
                f"weight {name!r} does not read back as it was saved", where=str(folder), code="E404", next=_REPORT
            )
    if fingerprint(again) != fingerprint(plain):
        raise ModelError("the config does not read back as it was saved", where=str(folder), code="E404", next=_REPORT)
    got = _probe(again)
    if not torch.equal(expected, got):
        raise ModelError(
            "the saved model gives other logits",
            where=str(folder),
            code="E404",
            next="see what was changed besides the weights: .to(dtype), for one, rounds rotary frequencies",
        )
    if plain is not model and plain.dtype in (torch.float32, torch.float64):
        gap = float((_probe(model).to(got.device) - got).abs().max())
        if gap > 1e-3 * max(1.0, float(got.abs().max())):
            raise ModelError(
                f"merging the adapter moved a logit by {gap:.2g}", where=str(folder), code="E404", next=_REPORT
            )


@torch.no_grad()
def _probe(model: Model) -> torch.Tensor:
    """Logits of one short row in eval mode, float32."""
    rows = model.get_input_embeddings().weight.shape[0]
    length = min(12, context(model) or 12)
    ids = (torch.arange(length, device=model.device) * 7919 + 3) % rows
    was = model.training
    model.eval()
    try:
        return model(input_ids=ids[None], use_cache=False).logits.float()
    finally:
        model.train(was)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.detach(), b.detach())


# --- small things ----------------------------------------------------------------------------------------------------


def _dtype(value: str | torch.dtype) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    if value not in DTYPES:
        raise UsageError(f"there is no precision {value!r}", next=f"choose one of {', '.join(DTYPES)}")
    return DTYPES[value]


def _device(value: str | torch.device) -> torch.device:
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    found = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device is None or device.type not in found:
        what = f"there is no device {value!r}"
        raise UsageError(what, where="device", code="E303", next="choose auto, cpu, cuda or mps")
    if not found[device.type]():
        what = f"this machine has no {device.type} device"
        raise MachineError(what, where="device", code="E318", next="use --device cpu")
    return device


def _dtype_name(model: Model) -> str:
    if is_quantized(model):
        return "nf4"
    return str(next(iter(model.parameters())).dtype).removeprefix("torch.")


@contextmanager
def _refusing(where: str, code: str, what: str = "the model cannot be read") -> Iterator[None]:
    """Whatever a strange folder makes transformers raise becomes one clear line."""
    try:
        yield
    except PalateError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineError("memory ran out while loading the model", where=where) from error
    except Exception as error:
        hint = "check that all of its files belong together, or download it again"
        raise ModelError(f"{what}: {first_line(error)}", where=where, code=code, next=hint) from error
