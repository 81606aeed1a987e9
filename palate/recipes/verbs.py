"""What every verb shares: how it speaks, which models and files it takes, how it names what it refuses."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import ModelError, UsageError

Say = Callable[[str], None]


class _ModelConfig(BaseModel):
    """The option that names one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[
        str, Field(description="Hub id, folder, run folder, GGUF file, builtin:tiny, builtin:base, or new:CONFIG.json")
    ]


class ReadConfig(BaseModel):
    """Options of every verb that runs models over a data file: which file, how it and they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[
        str, Field(description="JSONL, JSON, CSV or Parquet file, slice of one as FILE[:500], builtin:NAME, or Hub id")
    ]
    columns: Annotated[dict[str, str], Field(description="Column names, as chosen=good,rejected=bad")] = {}
    format: Annotated[str | None, Field(description="jsonl, json, csv, parquet, text: where the name is silent")] = None
    bad_rows: Annotated[
        Literal["stop", "skip"], Field(description="stop: name them and write nothing; skip: keep them aside")
    ] = "stop"
    chat_template: Annotated[str | None, Field(description="Jinja file to use instead of the model's template")] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, mps")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="Run Python code that the model brings")] = False
    revision: Annotated[str | None, Field(description="Commit of a Hub model; 40 hex digits with remote code")] = None


class InputConfig(ReadConfig, _ModelConfig):
    """Options of every verb that runs one model over a data file."""


def stderr(text: str) -> None:
    """Messages go to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def every_tenth(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`tell(done, todo)` at most ten times, and at the end."""
    told = [0]

    def maybe(done: int, todo: int) -> None:
        if done == todo or done * 10 // todo > told[0]:
            told[0] = done * 10 // todo
            tell(done, todo)

    return maybe


def number(value: float | None, spec: str = ".4f") -> str:
    """The number as a person reads it; files hold null for what was not finite or not there."""
    return "n/a" if value is None else format(value, spec)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of texts as lines with columns of one width; the columns of these numbers stand on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


def fell(before: dict, after: dict) -> bool:
    """Whether held-out loss fell."""
    first, last = before.get("eval/loss"), after.get("eval/loss")
    return first is not None and last is not None and last < first


def check_model_options(config, *names: str | None) -> None:
    """Nothing, where --revision and --trust-remote-code fit the models of these names; else UsageError."""
    if config.trust_remote_code:
        if not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
            what = "runs Python that comes with the model, so it needs the commit that you read"
            raise UsageError(what, where="trust_remote_code", code="E308", next="give --revision with its 40 digits")
        return

    def here(name: str) -> bool:  # an adapter here may have its base on the Hub
        path = Path(name).expanduser()
        return name.startswith(("new:", "builtin:")) or (path.exists() and not (path / "adapter_config.json").is_file())

    if config.revision is not None and all(here(name) for name in names if name is not None):
        raise UsageError("has no effect on local models", where="revision", code="E316", next="drop it")


def check_new_file(out: str) -> None:
    """Nothing, where a file may be made at --out; else UsageError or MachineError."""
    from palate.files import check_new

    if Path(out).exists():
        raise UsageError(f"{out} exists already", code="E313", next="name another --out")
    check_new(out)


def write_lines(out: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes --out of score and generate, and the folder above it."""
    from palate.files import make_folder, write_json_lines

    make_folder(Path(out).parent)
    write_json_lines(Path(out), rows)


def with_own_tokenizer(loaded):
    """The same model. Raises ModelError where it came without a tokenizer."""
    if loaded.tokenizer is None:
        raise ModelError(
            "has no tokenizer beside it", where=loaded.name, code="E401", next="train it first, or add one"
        )
    return loaded


def max_length(config, model) -> int:
    """--max-length, by default min(1024, context). Raises UsageError beyond the model's context."""
    from palate.model.load import context

    bound = context(model)
    if config.max_length is not None and bound is not None and config.max_length > bound:
        raise UsageError(
            f"--max-length {config.max_length} is beyond the model's context of {bound} tokens",
            code="E308",
            next=f"use at most {bound}",
        )
    return config.max_length or min(1024, bound or 1024)


def resolve_precision(config, device: str) -> str:
    """--precision; auto is bfloat16 on GPUs and float32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device == "cuda" else "float32"
