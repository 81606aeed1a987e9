"""What a model folder must be before transformers sees it: whole, of sound headers, and nothing that runs.

Only headers and names are read, by our own few lines: what they find does not depend on the library that would be
fooled.
"""

import json
import os
import re
import struct
from pathlib import Path

from palate.errors import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPE = re.compile(r"BOOL|BF16|C64|F4|(?:[UI](?:8|16|32|64)|F(?:16|32|64))|F8_E\w+|F6_E\w+")
AGAIN = "write or download the file again"
_MAX_HEADER = 100_000_000  # what the safetensors format itself allows


def check_folder(folder: str | os.PathLike, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError where a model folder is incomplete, holds only pickles, asks for code, or is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        _incomplete(folder, "config.json")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        _incomplete(folder, "tokenizer.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            check_remote_code(folder / name, read_object(folder / name), trust_remote_code)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        check_safetensors(single)
    elif index.is_file():
        _check_index(folder, index)
    else:
        refuse_weights(folder)


def _incomplete(folder: Path, missing: str):
    raise ModelError(
        f"{missing} is missing; the folder holds {_listing(folder)}",
        where=str(folder),
        code="E401",
        next="name the folder that save_pretrained wrote, with its tokenizer",
    )


def refuse_weights(folder: Path):
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        _incomplete(folder, "model.safetensors")
    raise ModelError(
        f"the weights are pickles ({', '.join(pickles[:3])}), which can run any code when they are opened",
        where=str(folder),
        code="E402",
        next='if you trust them, convert them apart: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder.name}', use_safetensors=False).save_pretrained('{folder.name}-safe')\"",
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(shown(name) for name in names[:12]) + more) or "nothing"


def check_remote_code(path: Path, content: dict, trusted: bool) -> None:
    modules = content.get("auto_map")
    if modules and not trusted:
        first = next(iter(modules.values())) if isinstance(modules, dict) else modules
        first = first[0] if isinstance(first, list) and first else first
        raise ModelError(
            f"the model asks to run its own Python, {shown(first)}",
            where=f'{path}: field "auto_map"',
            code="E403",
            next="read that code, then allow it: --trust-remote-code and --revision with the commit's 40 digits",
        )


def _check_index(folder: Path, index: Path) -> None:
    entries = read_object(index, "E405").get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError('"weight_map" is missing', where=str(index), code="E405", next="download the model again")
    inside: dict[str, set[str]] = {}
    for tensor, shard in sorted(entries.items()):
        entry = f"{index}: entry {shown(tensor)}"
        _check_name(folder, shard, entry)
        if shard not in inside:
            if not (folder / shard).is_file():
                raise ModelError(
                    f"shard {shown(shard)} is missing", where=entry, code="E405", next="download the model again"
                )
            inside[shard] = set(check_safetensors(folder / shard))
        if tensor not in inside[shard]:
            raise ModelError(
                f"shard {shown(shard)} does not hold this tensor",
                where=entry,
                code="E405",
                next="download the model again",
            )
    pattern = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
    families = {match[1] for match in map(pattern.fullmatch, inside) if match}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and match[1] in families and path.name not in inside:
            raise ModelError(
                f"shard {shown(path.name)} lies in the folder but the index does not name it",
                where=str(index),
                code="E405",
                next="download the model again",
            )


def _check_name(folder: Path, shard, entry: str) -> None:
    """A name from an index must stay in its folder (or in the blobs that a Hub cache's snapshot links to)."""
    bad = not isinstance(shard, str) or not shard or "\0" in shard or "\\" in shard or os.path.isabs(shard)
    bad = bad or re.match(r"[A-Za-z]:", shard) is not None or ".." in Path(shard).parts
    bad = bad or not shard.endswith(".safetensors")
    if not bad:
        homes = [folder.resolve()]
        if folder.resolve().parent.name == "snapshots":
            homes.append(folder.resolve().parent.parent / "blobs")
        real = (folder / shard).resolve()
        bad = not any(real.is_relative_to(home) for home in homes)
    if bad:
        raise ModelError(
            f"{shown(shard)} is no file name inside the model's folder",
            where=entry,
            code="E405",
            next="do not trust this model",
        )


def check_safetensors(path: str | os.PathLike) -> list[str]:
    """The tensor names of a safetensors file whose header is sound, without reading the tensors.

    The tensors must cover the file's data exactly, without hole or overlap, each as large as its shape and dtype say.
    Raises ModelError (E404) naming the tensor.
    """
    path = Path(path)

    def refuse(what: str, tensor: str | None = None):
        where = f"{path}: tensor {shown(tensor)}" if tensor is not None else str(path)
        raise ModelError(what, where=where, code="E404", next="download the model again")

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            refuse(f"the file has {size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", head)
        if length > _MAX_HEADER:
            refuse(f"the header claims {length} bytes, over the format's limit of {_MAX_HEADER}")
        if length > size - 8:
            refuse(f"the header claims {length} bytes, the file has {size - 8} after its first 8")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        refuse(f"the header is not JSON: {first_line(error)}")
    if not isinstance(header, dict):
        refuse("the header is no JSON object")
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not isinstance(entry.get("dtype"), str) or not _DTYPE.fullmatch(entry["dtype"]):
            refuse(f"dtype {shown(entry.get('dtype'))} is unknown", name)
        if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
            refuse(f"shape {shown(shape)} is no list of sizes", name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
            refuse(f"data_offsets {shown(offsets)} are not two numbers", name)
        begin, end = offsets
        bits = 8 if entry["dtype"] == "BOOL" else int(re.findall(r"\d+", entry["dtype"])[0])
        for side in shape:
            bits *= side
        if end - begin != (bits + 7) // 8:
            refuse(
                f"shape {shape} of {entry['dtype']} takes {(bits + 7) // 8} bytes, its place has {end - begin}", name
            )
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin < at:
            refuse(f"it overlaps another tensor at byte {begin}", name)
        if begin > at:
            refuse(f"there is a hole of {begin - at} bytes before it", name)
        at = end
    if at != size - 8 - length:
        refuse(f"the tensors take {at} bytes, the file holds {size - 8 - length}")
    return list(header)


def _unique(pairs: list[tuple]) -> dict:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        raise ValueError("a key stands twice")
    return seen


def read_object(path: Path, code: str = "E401") -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not JSON: {first_line(error)}", where=str(path), code=code, next=AGAIN) from error
    if not isinstance(content, dict):
        raise ModelError("no JSON object", where=str(path), code=code, next=AGAIN)
    return content


def shown(value) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else type(error).__name__).rstrip(". :")
