"""Long work on many prompts, cut into chunk files: what is there is never made again, what is not is made whole.

A chunk is a pure function of the plan and its number, and its file appears by one rename: so a process may be killed
anywhere, several may share the chunks among them, and the files end in the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palate.errors import AwaitsVotes, CheckpointError
from palate.files import make_folder, read_json, remove_file, write_json, write_json_lines
from palate.run import read_lines

Row = dict[str, Any]
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Chunks:
    """Files 000.jsonl, 001.jsonl, ... of `size` items each in a folder, `count` items in all.

    facts: plain values that decide what the files hold; they stand in plan.json.
    """

    folder: Path
    count: int
    size: int
    facts: dict[str, Any]

    @classmethod
    def there(cls, folder: Path) -> "Chunks":
        """Those that were begun in a folder, as its plan says; nothing of them where there is no plan."""
        plan = read_json(folder / "plan.json") if (folder / "plan.json").exists() else {"count": 0, "size": 1}
        return cls(folder, plan.pop("count"), plan.pop("size"), plan)

    def __len__(self) -> int:
        """How many files there are in the end."""
        return (self.count + self.size - 1) // self.size

    def path(self, number: int) -> Path:
        """The file of a chunk, from 0."""
        return self.folder / f"{number:03d}.jsonl"

    def missing(self, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Chunks that are not there. part: (k, n), every n-th of them from the k-th, k from 1."""
        k, n = part
        return [number for number in range(k - 1, len(self), n) if not self.path(number).exists()]

    def make(
        self, work: Callable[[int, int], Iterable[Row]], *, part: tuple[int, int] = (1, 1), tell: Tell | None = None
    ) -> None:
        """Makes every chunk of the part that is missing. work: (first item, item after the last) -> its rows.

        tell: called with (items done, items to do). Raises CheckpointError (E502) where the folder holds other work;
        AwaitsVotes, once all other chunks are there, where people have not voted on some.
        """
        plan = {"count": self.count, "size": self.size, **self.facts}
        file = self.folder / "plan.json"
        if not file.exists():
            make_folder(self.folder)
            write_json(file, plan)
        elif differing := [name for name, value in read_json(file).items() if plan.get(name) != value]:
            what = f"was begun with other {', '.join(differing)}"
            hint = "put these back, or take a new --out"
            raise CheckpointError(what, where=str(self.folder), code="E502", next=hint)
        todo = [(number * self.size, min(self.count, (number + 1) * self.size)) for number in self.missing(part)]
        done, whole, waits = 0, sum(stop - start for start, stop in todo), None
        for start, stop in todo:
            path = self.path(start // self.size)
            for half in self.folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed at it
                remove_file(half)
            try:
                write_json_lines(path, work(start, stop))
            except AwaitsVotes as error:  # the ballots of the other chunks shall be there at once, too
                waits = error
                continue
            done += stop - start
            if tell is not None:
                tell(done, whole)
        if waits is not None:
            raise waits

    def rows(self) -> list[Row]:
        """The rows of all chunks, in order. Raises CheckpointError (E501) where some are not there."""
        if missing := self.missing():
            what = f"{len(missing)} of {len(self)} chunks are missing, the first is {self.path(missing[0]).name}"
            raise CheckpointError(what, where=str(self.folder), code="E501", next="make them, then go on")
        return [row for number in range(len(self)) for row in read_lines(self.path(number))]


@dataclass(frozen=True)
class Draw:
    """How samples are drawn, as for `generate`."""

    max_tokens: int
    temperature: float = 1.0
    samples: int = 1
    seed: int = 0


def samples(folder: Path, identity: str, prompts: Sequence[np.ndarray], how: Draw, *, size: int) -> Chunks:
    """The chunks of samples of these prompts (token ids) by the model of this identity; `sample` makes their rows."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
    return Chunks(folder, len(prompts), size, {"model": identity, "prompts": digest.hexdigest(), **asdict(how)})


def sample(model, tokenizer, prompts: Sequence[np.ndarray], how: Draw) -> Callable[[int, int], Iterable[Row]]:
    """What makes a chunk's rows: `prompt` (its number), `sample`, `completion`, `finished`, `tokens`, `logp`, `ids`.

    Every sample has its own stream of (seed, prompt, sample), so a chunk holds what a whole call would draw. `logp`:
    nats, at temperature 1. `ids`: with the end token.
    """
    from palate.data.tokens import end_tokens
    from palate.sampling.generate import generate, text_of

    def work(start: int, stop: int) -> Iterable[Row]:
        mine = prompts[start:stop]
        for one in generate(
            model, tokenizer, mine, numbers=range(start, stop), end_ids=end_tokens(tokenizer), **asdict(how)
        ):
            yield {
                "prompt": start + one.prompt,
                "sample": one.sample,
                "completion": text_of(one, mine[one.prompt], tokenizer),
                "finished": one.finished,
                "tokens": len(one.ids),
                "logp": one.logp,
                "ids": one.ids.tolist(),
            }

    return work
