"""runs: what the run folders below one root hold; reads their files only."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import NotThereError, RefusedError, UsageError


class RunsConfig(BaseModel):
    """Options of `palate runs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Annotated[Literal["list", "show", "diff"], Field(description="list, show or diff")] = "list"
    run: Annotated[str | None, Field(description="A run: its folder, or its name below --root")] = None
    other: Annotated[str | None, Field(description="The run to compare it with")] = None
    root: Annotated[str, Field(description="Folder of the runs")] = "runs"


def run(config: RunsConfig, *, verb: str = "runs", say=print, panel=None, argv=()) -> dict[str, Any]:
    """The runs as dicts for --json and lines for the screen. Raises NotThereError where a run is not."""
    if config.action == "list":
        root = Path(config.root)
        found = [facts(folder) for folder in sorted(root.iterdir()) if _is_run(folder)] if root.is_dir() else []
        lines = [f"{f['name']:<24} {f['verb']:<8} {f['status']:<12} {_last(f)}" for f in found]
        return {"runs": found, "summary": lines or [f"no runs below {root}"]}
    if config.run is None or (config.action == "diff" and config.other is None):
        need = "RUN" if config.action == "show" else "A B"
        raise UsageError(f"runs {config.action} needs {need}", next=f"write palate runs {config.action} {need}")
    first = facts(_folder(config, config.run))
    if config.action == "show":
        lines = [f"{key:<12} {json.dumps(value, ensure_ascii=False)}" for key, value in first.items()]
        return {"run": first, "summary": lines}
    second = facts(_folder(config, config.other))
    one, two = _flat(first), _flat(second)
    changed = {key: [one.get(key), two.get(key)] for key in {**one, **two} if one.get(key) != two.get(key)}
    lines = [f"{key:<32} {a!s:<24} {b!s}" for key, (a, b) in changed.items()]
    return {"diff": changed, "summary": lines or ["no difference"]}


def facts(folder: Path) -> dict[str, Any]:
    """What a run folder says about itself: name, verb, status, times, verdict, config, the last logged step."""
    about = _read_json(folder / "run.json")
    return {
        "name": folder.name,
        "verb": about.get("verb", "?"),
        "status": about.get("status", "?"),
        **{key: about[key] for key in ("seed", "times", "verdict", "versions") if key in about},
        "config": _config(folder / "config.yaml"),
        "last": _last_step(folder / "metrics.jsonl"),
    }


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _folder(config: RunsConfig, name: str) -> Path:
    for folder in (Path(name), Path(config.root) / name):
        if _is_run(folder):
            return folder
    there = sorted(p.name for p in Path(config.root).iterdir() if _is_run(p)) if Path(config.root).is_dir() else []
    hint = f"use one of {', '.join(there[:10])}" if there else "check the name, or give --root"
    raise NotThereError("no such run", where=name, code="E101", next=hint)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise RefusedError(
            "cannot be read as JSON", where=str(path), code="E501", next="check the run folder"
        ) from None
    return found if isinstance(found, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _last_step(path: Path) -> dict[str, Any]:
    """The last whole line of the metrics that is a step; a line cut by a kill is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return {}


def _last(found: dict[str, Any]) -> str:
    last = found["last"]
    return f"step {last.get('step', '?')}  loss {last['loss']:.4g}" if last else "no steps"


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
