"""The run folder: what training writes and reports read, owned by one process, resumable at any moment."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from . import files
from .errors import CheckpointError, Interrupted, PalateError, UsageError
from .files import Lock

_LOCK = ".lock"
# What a round of samples leaves in its folder before the run that trains on it begins there.
_PREPARED = frozenset(("written", "asked.json", "asked.jsonl", "samples", "judged", "checked", "pairs.jsonl",
                       "held.jsonl", "pairs.json", "before", "config.yaml"))  # fmt: skip
# Options that say how a run is started or shown, not what it computes.
_PASSING = frozenset({"resume", "dry_run", "json", "out", "require_better"})


class Run:
    """A run folder that this process writes; made by `create`, closed by `with`.

    Leaving the `with` block records how it went: done, interrupted (a signal, Ctrl-C) or failed.
    """

    def __init__(self, path: Path, lock: Lock, record: dict[str, Any]):
        self.path, self.record, self._lock = path, record, lock
        self.listener: Callable[[Mapping[str, Any]], None] | None = None  # is told each line that is logged

    @classmethod
    def create(
        cls,
        out: str | os.PathLike,
        *,
        verb: str,
        config: Mapping[str, Any],
        argv: Sequence[str] = (),
        resume: bool = False,
        may_change: Iterable[str] = (),
        parents: Sequence[Any] = (),
        hardware: str | None = None,
    ) -> "Run":
        """A new run in `out`, or with `resume` the one that is there; where it is finished, nothing in it is touched.

        config: resolved, of plain values. may_change: its keys (dotted for inner ones) that may differ on resume.
        Raises UsageError (E313) where `out` is not empty and not resumed, or no run; CheckpointError (E502) naming each
        difference in verb or config; MachineError (E503) where another process owns it, (E314) where nobody may write.
        """
        path = Path(out)
        check_out(path, resume=resume)
        files.make_folder(path)
        lock = Lock(path / _LOCK)
        try:
            return cls._begin(path, lock, verb, config, argv, resume, may_change, parents, hardware)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def _begin(cls, path, lock, verb, config, argv, resume, may_change, parents, hardware) -> "Run":
        there = _content(path)  # again: another process may have begun between the first look and the lock
        if there and not resume:
            raise UsageError("is not empty", where=str(path), code="E313", next="take a new --out, or add --resume")
        config = _plain(config)
        if "run.json" in there:
            record = _read_record(path)
            _refuse_other(path, record, verb, config, may_change)
            run = cls(path, lock, record)
            if not run.finished:
                run.status("running", resumed=[*record.get("resumed", []), _now()])
            return run
        files.write_bytes(path / "config.yaml", _yaml(config))
        record = {
            "id": uuid.uuid4().hex,
            "status": "running",
            "verb": verb,
            "argv": scrub(list(argv)),
            "seed": config.get("seed"),
            "parents": list(parents),
            "hardware": hardware or machine(),
            "versions": _versions(),
            "times": {"started": _now()},
        }
        run = cls(path, lock, record)
        run._write()
        return run

    @property
    def id(self) -> str:
        """32 hex digits, new for every run."""
        return self.record["id"]

    @property
    def verb(self) -> str:
        """The verb that made it."""
        return self.record["verb"]

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.record.get("status") == "done"

    @property
    def result(self) -> dict[str, Any]:
        """What it ended with; empty before that."""
        return dict(self.record.get("result") or {})

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def reference_path(self) -> Path:
        """The reference column that this run uses, pinned."""
        return self.path / "reference.safetensors"

    def status(self, status: str, **facts: Any) -> None:
        """Replaces run.json: `status` is running, done, interrupted or failed; facts are further keys of it."""
        self.record |= {"status": status} | facts
        times = {key: value for key, value in self.record.get("times", {}).items() if key != "ended"}
        self.record["times"] = times | ({} if status == "running" else {"ended": _now()})
        self._write()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Ends the run as done, with its result; a "verdict" in it also stands on top of run.json."""
        self.sync()
        self.status("done", verdict=result.get("verdict"), result=dict(result))

    def write_data(self, facts: Mapping[str, Any]) -> None:
        """Replaces data.json: sources with SHA-256, counts, dropped rows by reason, split seed."""
        files.write_json(self.path / "data.json", facts)

    def write_rejects(self, rows: Iterable[str]) -> None:
        """Replaces rejects.jsonl by refused rows, byte for byte as they stood; why they were is in data.json."""
        lines = [row.encode("utf-8", "surrogateescape") + b"\n" for row in rows]
        files.write_bytes(self.path / "rejects.jsonl", b"".join(lines))

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; what is not finite becomes null."""
        files.append_json(self.path / "metrics.jsonl", line)
        if self.listener is not None:
            self.listener(line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last one that was cut off."""
        return read_lines(self.path / "metrics.jsonl")

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to samples.jsonl, each once: a resumed run brings its last ones again."""
        path = self.path / "samples.jsonl"
        there = set(_whole_lines(path)[0])
        for row in rows:
            if files.json_line(row) not in there:
                files.append_json(path, row)

    def rewind(self, step: int) -> None:
        """Takes metrics and samples back to where they stood after `step`, byte for byte; 0 empties them.

        Raises CheckpointError (E501) where a line before the end cannot be read.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if not path.exists():
                continue
            lines, cut = _whole_lines(path)
            kept = [line for line, row in zip(lines, _parsed(path, lines), strict=True) if 0 < step >= _step(row)]
            if cut or len(kept) < len(lines):
                files.write_bytes(path, b"".join(kept))

    def sync(self) -> None:
        """Brings the logs to the disk, as a checkpoint that counts on them needs it."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            files.sync_file(self.path / name)

    def forget(self, name: str) -> None:
        """Removes a work folder of this run, if it is there."""
        with files.machine_errors(self.path / name, "removed"):
            files.remove_tree(self.path / files.safe_name(name))

    def close(self) -> None:
        """Frees the folder for other processes."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        try:
            if not self.finished:
                if error is None:
                    if self.record.get("status") == "running":  # else it was left to another process
                        self.finish({})
                else:
                    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                    # The disk may be what failed: then the first error is the one to hear of.
                    with contextlib.suppress(PalateError, OSError):
                        self.status("interrupted" if stopped else "failed", error=scrub(str(error))[:2000])
        finally:
            self.close()

    def _write(self) -> None:
        files.write_json(self.path / "run.json", self.record)


def next_folder(root: str | os.PathLike, verb: str) -> Path:
    """The next free ROOT/VERB-N, N from 1, beyond all that are there. Not made here."""
    root = Path(root)
    pattern = re.compile(re.escape(verb) + r"-([0-9]+)")
    try:
        names = os.listdir(root)
    except OSError:
        names = []
    numbers = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return root / f"{verb}-{max(numbers, default=0) + 1}"


def status_of(path: str | os.PathLike) -> str:
    """running, done, interrupted or failed; "interrupted" also where the process that said "running" is gone."""
    status = str(_read_record(Path(path)).get("status"))
    return "interrupted" if status == "running" and not Lock.held(Path(path) / _LOCK) else status


def from_builtin(name: str) -> bool:
    """Whether the model is one of ours, or a run whose first parents lead to one."""
    for _ in range(100):  # a chain that bites its own tail ends here
        if name.startswith("builtin:"):
            return True
        path = Path(name).expanduser()
        record = next((folder / "run.json" for folder in (path, path.parent) if (folder / "run.json").is_file()), None)
        parents = files.read_json(record).get("parents") if record else None
        if not parents:
            return False
        name = str(parents[0].get("model"))
    return False


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a run wrote; none where there is no file. A last line without end is left out.

    Raises CheckpointError (E501) naming a line that is no JSON object.
    """
    path = Path(path)
    return _parsed(path, _whole_lines(path)[0])


_SECRET_FLAG = re.compile(r"(?i)(^|[-_.])(token|secret|passw(or)?d|api[-_]?key|access[-_]?key|credentials?)$")
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[a-z]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


def scrub(value: Any) -> Any:
    """`value` with "***" for secrets: known token shapes, passwords in URLs, values of --token and the like."""
    if isinstance(value, str):
        return _SECRET.sub("***", value)
    if isinstance(value, Mapping):
        return {
            key: "***" if isinstance(item, str) and item and _SECRET_FLAG.search(str(key)) else scrub(item)
            for key, item in value.items()
        }
    if not isinstance(value, list | tuple):
        return value
    cleaned, hide = [], False
    for item in value:
        name, equals, _ = item.partition("=") if isinstance(item, str) else ("", "", "")
        flag = isinstance(item, str) and bool(name.startswith("-") and _SECRET_FLAG.search(name))
        cleaned.append("***" if hide and not flag else f"{name}=***" if flag and equals else scrub(item))
        hide = flag and not equals
    return cleaned


def _content(path: Path) -> set[str]:
    """What lies in a folder, but for the lock and what a writer that was killed left."""
    with files.machine_errors(path, "read"):
        try:
            names = set(os.listdir(path))
        except FileNotFoundError:
            return set()
    return {name for name in names if name != _LOCK and not (name.startswith(".") and name.endswith(".tmp"))}


def check_out(path: Path, *, resume: bool = False) -> None:
    """Nothing, where a run may begin in `path`, or with `resume` go on; the errors are those of `Run.create`."""
    if path.exists() and not path.is_dir():
        raise UsageError("is not a folder", where=str(path), code="E313", next="take a new --out")
    files.check_new(path)
    there = _content(path)
    if there and not resume:
        raise UsageError("is not empty", where=str(path), code="E313", next="take a new --out, or add --resume")
    if there and "run.json" not in there and not there <= _PREPARED:
        raise UsageError("holds no run to resume", where=str(path), code="E313", next="take a new --out")


def _read_record(path: Path) -> dict[str, Any]:
    record = files.read_json(path / "run.json")
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or not isinstance(record.get("verb"), str):
        raise CheckpointError(
            "is no record of a run", where=str(path / "run.json"), code="E501", next="take a new --out"
        )
    return record


def _refuse_other(path: Path, record: Mapping, verb: str, config: Mapping, may_change: Iterable[str]) -> None:
    import yaml

    file = path / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError("cannot be read", where=str(file), code="E501", next="take a new --out") from error
    old, new = flat_keys({"verb": record["verb"], "config": before or {}}), flat_keys({"verb": verb, "config": config})
    allowed = {f"config.{key}" for key in (*may_change, *_PASSING)}
    differing = [
        f"{key.removeprefix('config.')} was {_show(old, key)}, now {_show(new, key)}"
        for key in old | new
        if old.get(key, _ABSENT) != new.get(key, _ABSENT) and not any(f"{key}.".startswith(f"{a}.") for a in allowed)
    ]
    if differing:
        raise CheckpointError(
            f"belongs to another run: {'; '.join(differing)}",
            where=str(path),
            code="E502",
            next=f"resume with {file}, or take a new --out",
        )


_ABSENT = object()


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"


def flat_keys(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The table with inner keys dotted: {"train": {"keep": 2}} as {"train.keep": 2}."""
    flat = {}
    for key, value in table.items():
        flat |= (
            flat_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        )
    return flat


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it reads back from its own YAML, secrets starred."""
    import yaml

    return yaml.safe_load(yaml.safe_dump(scrub(_yamlable(config)), sort_keys=False, allow_unicode=True))


def _yamlable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _yamlable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yamlable(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _yaml(config: Mapping[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _whole_lines(path: Path) -> tuple[list[bytes], bytes]:
    """The lines of a file that have their end, and what stands after the last of them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], b""
    *lines, rest = data.split(b"\n")
    return [line + b"\n" for line in lines], rest


def _parsed(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # deep nesting
            row = None
        if not isinstance(row, dict):
            raise CheckpointError(
                "is not a JSON object",
                where=f"{path}:{number}",
                code="E501",
                next="remove the line, or take a new --out",
            )
        rows.append(row)
    return rows


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("palate", "torch", "transformers", "peft", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def machine() -> str:
    """The machine in a few words; torch is asked only where it is loaded already."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = torch.get_num_threads() if torch is not None else 0
    threads = f", {count} thread{'s' * (count > 1)}" if count else ""
    return f"CPU {platform.machine()}, {os.cpu_count()} cores{threads}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
