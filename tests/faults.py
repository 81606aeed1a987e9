"""A disk that fails at one operation, in one of six ways, and what a test needs around it."""

import contextlib
import errno

from palate import files

KINDS = ("crash before", "crash after", "half write and crash", "ENOSPC", "EIO", "EFBIG")


class Crash(BaseException):
    """The process is gone: nothing that it does afterwards reaches the disk."""


class FaultyDisk(files.Operations):
    """Fails operation number `at`, from 1; counts all. Syncs count but do nothing: no test can cut the power."""

    def __init__(self, at=0, kind="crash before"):
        self.at, self.kind, self.count, self.dead = at, kind, 0, False

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if name.startswith("_") or not hasattr(files.Operations, name):
            return method
        return lambda *arguments: self._call(name, method, arguments)

    def fsync(self, fd):
        pass

    def fsync_dir(self, path):
        pass

    def _call(self, name, method, arguments):
        if self.dead:
            raise Crash
        self.count += 1
        if self.count != self.at:
            return method(*arguments)
        if name == "write" and self.kind not in ("crash before", "crash after"):
            fd, data = arguments
            method(fd, data[: len(data) // 2])
        if self.kind == "crash after":
            method(*arguments)
        if self.kind in errno.__dict__:
            raise OSError(getattr(errno, self.kind), self.kind)
        self.dead = True
        raise Crash


@contextlib.contextmanager
def disk(at=0, kind="crash before"):
    """Within, all files are written on a FaultyDisk."""
    before, files.operations = files.operations, FaultyDisk(at, kind)
    try:
        yield files.operations
    finally:
        files.operations = before


def died(work, at) -> bool:
    """Whether the work met a disk that is gone at operation `at`, and the process with it."""
    with disk(at) as found:
        try:
            work()
        except Crash:
            return True
        except BaseException:
            assert found.dead
            return True
    return found.dead
