"""Runs that lie in a folder: list them, show one, say how two differ."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import CheckpointError, NotThereError, UsageError
from palate.recipes.verbs import stderr


class RunsConfig(BaseModel):
    """Options of `palate runs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Annotated[Literal["list", "show", "diff"], Field(description="list, show RUN or diff RUN OTHER")] = "list"
    run: Annotated[str | None, Field(description="A run folder; for list the folder that holds runs")] = None
    other: Annotated[str | None, Field(description="The run to compare with")] = None


def run(config: RunsConfig, *, verb: str = "runs", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """What was asked for, as an object and as lines."""
    from palate.run import flat_keys

    if config.action == "list":
        found = [summary(path.parent) for path in sorted(Path(config.run or "runs").glob("*/run.json"))]
        lines = [
            f"{row['run']:24} {row['status']:12} {row['verb']:8} step {row['step']:<6} {row['verdict']}"
            for row in found
        ]
        return {"runs": found, "summary": lines or [f"no runs in {config.run or 'runs'}"]}
    if config.run is None or (config.action == "diff" and config.other is None):
        needs = "a run folder" if config.action == "show" else "two run folders"
        raise UsageError(f"palate runs {config.action} needs {needs}", code="E300", next="palate runs list names them")
    first = _read(config.run)
    if config.action == "show":
        row = summary(Path(config.run))
        lines = [f"{key:10} {value}" for key, value in row.items()]
        lines += [f"{key:28} {value}" for key, value in sorted(flat_keys(first["config"]).items())]
        return {"run": row, "config": first["config"], "summary": lines}
    one, two = flat_keys(first["config"]), flat_keys(_read(config.other)["config"])
    differing = {key: [one.get(key), two.get(key)] for key in sorted({*one, *two}) if one.get(key) != two.get(key)}
    lines = [f"{key:28} {a!s:24} {b}" for key, (a, b) in differing.items()]
    ends = [summary(Path(name)) for name in (config.run, config.other)]
    lines += [f"{key:28} {ends[0][key]!s:24} {ends[1][key]}" for key in ("status", "step", "verdict")]
    return {"differences": differing, "runs": ends, "summary": lines}


def summary(path: Path) -> dict[str, Any]:
    """Status, verb, last step and verdict of a run folder."""
    from palate.run import read_lines, status_of

    record = _read(str(path))["record"]
    steps = [line["step"] for line in read_lines(path / "metrics.jsonl")]
    return {
        "run": str(path),
        "status": status_of(path),
        "verb": record.get("verb"),
        "step": max(steps, default=0),
        "verdict": str(record.get("verdict") or ""),
    }


def _read(name: str) -> dict[str, Any]:
    import yaml

    from palate.files import read_json

    path = Path(name)
    if not (path / "run.json").exists():
        raise NotThereError("there is no run here", where=name, code="E101", next="palate runs list names them")
    record, file, config = read_json(path / "run.json"), path / "config.yaml", {}
    if file.exists():
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError):
            config = None
    for part, content in (("run.json", record), ("config.yaml", config)):
        if not isinstance(content, dict):
            what = "cannot be read: no keys with values"
            raise CheckpointError(what, where=str(path / part), code="E501", next="put a copy of the file back")
    return {"record": record, "config": config}
