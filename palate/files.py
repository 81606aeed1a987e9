"""The one writer of files: whole or not at all, checked by SHA-256, owned by one process.

A file is written beside its place, synced and renamed over it; a folder is filled under a hidden name, listed in
`manifest.json`, renamed to its place and read back. Every call to the operating system goes through `operations`, so
that a test can make any one of them fail.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from palate.errors import CheckpointError, MachineError, NotThereError, UsageError

try:
    import fcntl
except ImportError:  # Windows has no lockf; there a run folder is not guarded
    fcntl = None

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 24
_RESTORE = "put a copy of the file back, or take another folder"


class Operations:
    """What palate asks of the operating system when it writes."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, fd: int, data: memoryview) -> None:
        while data:
            data = data[os.write(fd, data[:_CHUNK]) :]

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def fsync_dir(self, path: Path) -> None:
        if os.name == "nt":
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)


operations = Operations()
_numbers = itertools.count()


# errors


@contextlib.contextmanager
def machine_errors(path: str | os.PathLike, doing: str = "written") -> Iterator[None]:
    """Within, an OSError becomes MachineError naming `path` and what the disk or the system refused."""
    try:
        yield
    except (MachineError, CheckpointError, UsageError, NotThereError):
        raise
    except OSError as error:
        raise _machine_error(error, path, doing) from error


def _machine_error(error: OSError, path: str | os.PathLike, doing: str) -> MachineError:
    what, code, next = {
        errno.ENOSPC: ("the disk is full", "E505", "free some space or take another folder, then --resume"),
        errno.EDQUOT: ("the disk quota is used up", "E505", "free some space or take another folder, then --resume"),
        errno.EFBIG: ("the file would be larger than this process may write", "E506", "raise ulimit -f, then --resume"),
        errno.EIO: ("the disk reports an input/output error", "E507", "check the disk, or take another folder"),
        errno.EACCES: ("permission denied", "E314", "take a folder you may write to"),
        errno.EPERM: ("permission denied", "E314", "take a folder you may write to"),
        errno.EROFS: ("the file system is read-only", "E314", "take a folder you may write to"),
    }.get(error.errno, (error.strerror or str(error), "E508", "look at the folder, or take another one"))
    mapped = MachineError(f"cannot be {doing}: {what}", where=str(path), code=code, next=next)
    mapped.errno = error.errno
    return mapped


# files


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` by `data`: afterwards, and after a crash at any moment, it is the old file or the new one.

    Raises MachineError where the disk or the permissions refuse; the old file is then still there.
    """
    _write(Path(path), [data])


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Replaces `path` by `content` as strict JSON: keys in their order, what is not finite as null."""
    _write(Path(path), [_json_bytes(content, indent=2)])


def write_json_lines(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Replaces `path` by one line of strict JSON per row."""
    _write(Path(path), [_json_bytes(row) for row in rows])


def append_json(path: str | os.PathLike, content: Any) -> None:
    """Adds `content` as one line of strict JSON. Where that fails (MachineError), no half line is left behind."""
    append_bytes(path, _json_bytes(content))


def append_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Adds `data` to the end of a file, which is made where it is not there; where that fails, nothing of it."""
    path = Path(path)
    with machine_errors(path):
        fd = operations.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(fd).st_size
            try:
                operations.write(fd, memoryview(data))
            except OSError:
                with contextlib.suppress(OSError):
                    operations.truncate(fd, size)
                raise
        finally:
            os.close(fd)


def json_line(content: Any) -> bytes:
    """The line that `append_json` would write."""
    return _json_bytes(content)


def sync_file(path: str | os.PathLike) -> None:
    """Brings a file and its name to the disk; nothing where there is none."""
    path = Path(path)
    with machine_errors(path), contextlib.suppress(FileNotFoundError):
        fd = operations.open(path, os.O_RDWR)
        try:
            operations.fsync(fd)
        finally:
            os.close(fd)
        operations.fsync_dir(path.parent)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. Raises NotThereError, or CheckpointError where it is no JSON."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise NotThereError("no such file", where=str(path), next="check the path") from None
    except OSError as error:
        raise _machine_error(error, path, "read") from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", where=str(path), code="E501", next=_RESTORE) from None


def _write(path: Path, parts: list) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
    with machine_errors(path):
        try:
            fd = operations.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                for part in parts:
                    operations.write(fd, memoryview(part() if callable(part) else part).cast("B"))
                operations.fsync(fd)
            finally:
                os.close(fd)
            operations.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                operations.unlink(temporary)
            raise
        operations.fsync_dir(path.parent)


def _json_bytes(content: Any, indent: int | None = None) -> bytes:
    content = strict_json(content)
    try:
        return (json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, as broken data brings: only its escape can be written
        return (json.dumps(content, indent=indent, allow_nan=False) + "\n").encode()


def strict_json(value: Any) -> Any:
    """`value` made of what strict JSON has."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return [strict_json(item) for item in sorted(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch, numbers and arrays
        return strict_json(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def sha256_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(name: str) -> str:
    """`name`, which is one visible path component and nothing else. Raises UsageError (E504) for others."""
    if (
        not isinstance(name, str)
        or not name
        or name.startswith((".", "-"))
        or name != name.strip()
        or len(name.encode("utf-8", "surrogatepass")) > 200
        or any(not c.isprintable() or c in '/\\:*?"<>|' for c in name)
    ):
        raise UsageError(f"{name!r} cannot be the name of a file", code="E504", next="use letters, digits, - and _")
    return name


# tensors

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Replaces `path` by a safetensors file of torch tensors or numpy arrays; each element once, nothing around it.

    Tensors are copied from their device one by one. Safe where they are mapped from `path` itself: it is never
    written in place. metadata: strings, in the header. Raises TypeError for a dtype that safetensors has not.
    """
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name][1], name))  # wide elements first: all stay aligned
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {str(key): str(value) for key, value in metadata.items()}
    offset = 0
    for name in order:
        kind, width, shape = kinds[name]
        end = offset + width * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    parts: list = [len(text).to_bytes(8, "little") + text]
    _write(Path(path), parts + [lambda name=name: _bytes_of(tensors[name]) for name in order])


def load_tensors(path: str | os.PathLike, *, framework: str = "pt") -> dict[str, Any]:
    """Name to tensor of a safetensors file: torch tensors on the CPU ("pt") or numpy arrays ("np").

    Raises NotThereError, or CheckpointError where it is no whole safetensors file. Says nothing of flipped bits: a
    manifest does.
    """
    import safetensors

    if framework == "pt":
        from safetensors.torch import load_file
    else:
        from safetensors.numpy import load_file
    try:
        return load_file(os.fspath(path))
    except FileNotFoundError:
        raise NotThereError("no such file", where=str(path), next="check the path") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        what = f"is no whole safetensors file: {error}"
        raise CheckpointError(what, where=str(path), code="E501", next=_RESTORE) from None
    except OSError as error:
        raise _machine_error(error, path, "read") from error


def tensor_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings in the header of a safetensors file."""
    import safetensors

    with safetensors.safe_open(os.fspath(path), framework="np") as file:
        return file.metadata() or {}


def _kind(name: str, tensor: Any) -> tuple[str, int, tuple[int, ...]]:
    dtype = getattr(tensor.dtype, "name", None) or str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"{name}: {dtype} cannot be stored in a safetensors file")
    width = tensor.dtype.itemsize
    return _DTYPES[dtype], width, tuple(tensor.shape)


def _bytes_of(tensor: Any):
    if hasattr(tensor, "detach"):
        import torch

        tensor = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return tensor.data if tensor.size else b""
    tensor = tensor.astype(tensor.dtype.newbyteorder("<"), order="C", copy=False).reshape(-1)
    return tensor.view("uint8").data if tensor.size else b""


# folders


@contextlib.contextmanager
def new_folder(final: str | os.PathLike, metadata: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A hidden folder beside `final` to fill; at the end it is `final`, whole and verified, or gone.

    Every file is synced, `manifest.json` (size and SHA-256 of each, and `metadata`) comes last. metadata may still be
    changed within. Raises UsageError (E313) where `final` exists: a folder is never written over.
    """
    final = Path(final)
    _refuse_existing(final)
    with machine_errors(final):
        make_folder(final.parent)
        temporary = _fresh_folder(final)
    try:
        yield temporary
        with machine_errors(final):
            _seal(temporary, metadata or {})
            _share(temporary)
            _refuse_existing(final)
            operations.rename(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        raise
    with machine_errors(final):
        operations.fsync_dir(final.parent)
    verify_folder(final)


def _share(folder: Path) -> None:
    """Gives every file the permissions of the manifest, a common new file: safetensors keeps its own to their owner."""
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for file in _walk(folder):
        if not file.is_symlink() and file.stat().st_mode & 0o777 != mode:
            with contextlib.suppress(OSError):  # a file system that knows no permissions
                file.chmod(mode)


def verify_folder(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a folder that is byte for byte what was written.

    Raises CheckpointError (E501) naming the first file that is missing, cut, changed or was not written by palate, or
    the manifest; E504 for a link; E311 for the format of a later palate; NotThereError where there is no folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotThereError("no such folder", where=str(path), next="check the path")
    manifest = _read_manifest(path)
    with machine_errors(path, "read"):
        present = {}
        for file in _walk(path):
            name = file.relative_to(path).as_posix()
            if file.is_symlink():
                raise CheckpointError("is a link", where=str(file), code="E504", next="remove the link")
            present[name] = file
        del present[MANIFEST]
        for name, facts in manifest["files"].items():
            if name not in present:
                raise _damaged(path / name, "is missing")
            file = present.pop(name)
            size = file.stat().st_size
            if size != facts["size"]:
                raise _damaged(file, f"has {size} bytes, {facts['size']} were written")
            if (digest := sha256_file(file)) != facts["sha256"]:
                raise _damaged(file, f"was changed: SHA-256 {digest[:16]}, {facts['sha256'][:16]} was written")
        if present:
            raise _damaged(next(iter(present.values())), "is not in the manifest: palate did not write it here")
    return manifest


def check_new(path: str | os.PathLike) -> None:
    """Nothing, where `path` could be made; UsageError (E313) where a file stands above it, MachineError (E314) where
    its folder may not be written."""
    whole = Path(os.path.abspath(path))
    above = next(folder for folder in (whole, *whole.parents) if os.path.lexists(folder))
    if not above.is_dir():
        raise UsageError(f"{above} is a file, no folder", where=str(path), code="E313", next="take another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _machine_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), above, "written")


def make_folder(path: str | os.PathLike) -> None:
    """Makes `path` and its parents where they are missing, each synced into its parent."""
    path = Path(path)
    if path.is_dir():
        return
    with machine_errors(path, "made"):
        if path.parent != path:
            make_folder(path.parent)
        try:
            operations.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        else:
            operations.fsync_dir(path.parent)


def remove_file(path: str | os.PathLike) -> None:
    """Removes a file; nothing where there is none."""
    with machine_errors(path, "removed"), contextlib.suppress(FileNotFoundError):
        operations.unlink(Path(path))


def remove_halves(folder: str | os.PathLike) -> None:
    """Removes what killed processes left half written in a folder and below it; for its only writer to call."""
    for half in sorted(Path(folder).rglob(".*.tmp")):  # what holds others comes before them
        if half.is_dir() and not half.is_symlink():
            remove_tree(half)
        else:
            remove_file(half)


def remove_tree(path: str | os.PathLike) -> None:
    """Removes a folder and all in it, links as links; nothing where there is none. A crash leaves a damaged folder."""
    path = Path(path)
    if not path.is_dir():
        return
    if (manifest := path / MANIFEST).exists():  # first, so that what is half removed never verifies
        operations.unlink(manifest)
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.is_symlink():
            remove_tree(child)
        else:
            operations.unlink(child)
    operations.rmdir(path)


def move_aside(path: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Where `path` now lies inside `folder`: under its name, or that and a number. Nothing is written over."""
    path, folder = Path(path), Path(folder)
    with machine_errors(path, "moved aside"):
        make_folder(folder)
        name = path.name.lstrip(".")
        for number in itertools.count():
            target = folder / (f"{name}.{number}" if number else name)
            if not os.path.lexists(target):
                operations.rename(path, target)
                operations.fsync_dir(path.parent)
                return target
    raise AssertionError


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise UsageError("exists already", where=str(final), code="E313", next="take a new name")


def _fresh_folder(final: Path) -> Path:
    """`.NAME.PID.tmp`; with a number where a dead process of the same pid left one."""
    for number in itertools.count():
        temporary = final.with_name(f".{final.name}.{os.getpid()}{f'-{number}' if number else ''}.tmp")
        try:
            operations.mkdir(temporary)
            return temporary
        except FileExistsError:
            continue
    raise AssertionError


def _seal(folder: Path, metadata: Mapping[str, Any]) -> None:
    facts = {}
    folders = {folder}
    for file in _walk(folder):
        folders.add(file.parent)
        fd = operations.open(file, os.O_RDWR)
        try:
            operations.fsync(fd)
        finally:
            os.close(fd)
        facts[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    if MANIFEST in facts:
        raise ValueError(f"{MANIFEST} is written here and by nobody else")
    for inner in sorted(folders - {folder}, key=lambda path: -len(path.parts)):
        operations.fsync_dir(inner)
    content = {**metadata, "format": FORMAT, "files": facts}
    _write(folder / MANIFEST, [_manifest_bytes(content)])


def _walk(folder: Path) -> Iterator[Path]:
    """Every file and link below `folder`, sorted by name."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from _walk(child)
        else:
            yield child


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The manifest's file: it carries its own SHA-256, taken without that entry, so no bit in it flips unseen."""
    content = {key: value for key, value in strict_json(content).items() if key != "sha256"}
    return _json_bytes(content | {"sha256": hashlib.sha256(_json_bytes(content, indent=1)).hexdigest()}, indent=1)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise _damaged(file, "is missing: the folder was not finished") from None
    except OSError as error:
        raise _machine_error(error, file, "read") from error
    try:
        content = json.loads(data)
        whole = isinstance(content, dict) and data == _manifest_bytes(content)
        later = (
            whole and content["format"] > FORMAT
        )  # how a manifest is sealed never changes, so this is no flipped bit
        whole = whole and all(
            isinstance(facts["size"], int) and isinstance(facts["sha256"], str) for facts in content["files"].values()
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        whole = later = False
    if later:
        raise CheckpointError(
            f"has format {content['format']}, this palate reads up to {FORMAT}",
            where=str(file),
            code="E311",
            next="upgrade palate",
        )
    if not whole:
        raise _damaged(file, "was changed")
    return content


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(file), code="E501", next="use an earlier checkpoint, or make it again")


# locks


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    pid: int | None = None
    host: str | None = None
    since: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid or '(unknown)'} on {self.host or '(unknown host)'} since {self.since or '(unknown)'}"


class Lock:
    """One owner of `path` at a time, until `close` or the end of the process, however it ends.

    POSIX lockf: a forked child does not inherit it. Raises MachineError (E503) naming the owner's pid, host and start.
    """

    _mine: ClassVar[set[str]] = set()  # lockf lets a process lock twice, and closing either would free both

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._name = os.path.realpath(self.path)
        self._fd: int | None = None
        if self._name in Lock._mine:
            raise self._taken(Owner(os.getpid(), socket.gethostname(), "it began"))
        with machine_errors(self.path, "locked"):
            fd = operations.open(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if fcntl is not None:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = self._owner(fd)
                os.close(fd)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise self._taken(owner) from None
                raise
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            try:
                operations.truncate(fd, 0)
                operations.write(fd, memoryview(_json_bytes(facts)))
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd
        Lock._mine.add(self._name)

    @classmethod
    def held(cls, path: str | os.PathLike) -> bool:
        """Whether a process owns `path` now; False where that cannot be told."""
        if os.path.realpath(path) in cls._mine:
            return True
        if fcntl is None:
            return False
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def close(self) -> None:
        """Frees the lock. The file stays: removing it would let two processes lock two files of one name."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            Lock._mine.discard(self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _taken(self, owner: Owner) -> MachineError:
        return MachineError(
            f"is in use by {owner}", where=str(self.path.parent), code="E503", next="wait for it or take another folder"
        )

    @staticmethod
    def _owner(fd: int) -> Owner:
        try:
            facts = json.loads(os.pread(fd, 4096, 0))
            return Owner(facts["pid"], facts["host"], facts["since"])
        except (OSError, ValueError, KeyError, TypeError):
            return Owner()
