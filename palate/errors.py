"""The exceptions of palate: few, each also the built-in it refines, each with the exit code it ends a command with."""


class PalateError(Exception):
    """What went wrong, where, and what to do next; printed as one line, without a traceback.

    what: the fact, without a full stop.
    where: `file:line: field "name"` or the like; a name from data is escaped by whoever builds it.
    code: a short stable code such as "E208".
    next: the next step as an imperative, without a full stop.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, code: str | None = None, next: str | None = None):
        self.what, self.where, self.code, self.next = what, where, code, next
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: " if self.where else ""
        text += self.what
        if self.code:
            text += f" [{self.code}]"
        if self.next:
            text += f". Next: {self.next}"
        return text if text.endswith((".", "\n")) else text + "."

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.code, self.next)


def _rebuild(cls, what, where, code, next):
    return cls(what, where=where, code=code, next=next)


class UsageError(PalateError, ValueError):
    """The command line or the config asks for something that cannot be (exit 2)."""

    exit_code = 2


class RefusedError(PalateError, ValueError):
    """Data, a model or a checkpoint was read and refused (exit 3)."""

    exit_code = 3


class DataError(RefusedError):
    """A data file or some of its rows cannot be used."""


class ModelError(RefusedError):
    """A model, tokenizer, template or adapter cannot be used."""


class CheckpointError(RefusedError):
    """A checkpoint or run folder does not verify, or belongs to another run."""


class NotThereError(RefusedError, FileNotFoundError):
    """A path that was named does not exist (exit 3)."""


class NotFiniteError(RefusedError, ArithmeticError):
    """A loss, log-prob or gradient is not finite; nothing was updated (exit 3)."""


class NotBetterError(PalateError):
    """The run finished, but the result is not shown to be better (exit 4)."""

    exit_code = 4


class MachineError(PalateError, OSError):
    """Disk, memory, permission or lock (exit 5)."""

    exit_code = 5


class Interrupted(PalateError):
    """Stopped by a signal after saving; `--resume` goes on from there (exit 6)."""

    exit_code = 6


class AwaitsVotes(Interrupted):
    """Stopped until people have voted; `--resume` goes on with what they said (exit 6)."""


def visible(text: str) -> str:
    """The text with its control characters shown, not sent: what data says must not steer a terminal."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
