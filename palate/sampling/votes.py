"""People as a judge: a JSONL file of votes, each on two completions of a prompt, where open ballots are written too.

A row: `prompt`, `first`, `second` and `vote`: "first", "second", "tie", or null while nobody has voted; `voter`, who
that was, may be left out. A pair is put to people once, whatever the order it is asked in, and a hash says which side
stands first. Of several votes on a pair the mean counts; of several by one voter the last one does.

    python -m palate.sampling.votes VOTES.jsonl [--voter NAME]     # shows the open ballots, one after the other
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from palate.data.columns import absent, kind, side
from palate.data.records import Text, plain
from palate.data.rows import RowError, Rows, shown
from palate.errors import AwaitsVotes, NotThereError, PalateError, visible
from palate.files import append_bytes, json_line, make_folder, write_bytes
from palate.sampling.judge import Completions, Judge

VOTES = {"first": 1.0, "second": 0.0, "tie": 0.5}
Pair: TypeAlias = tuple[Text, str, str]  # a prompt, and two texts in the order of their characters


def people(file: str | os.PathLike) -> Judge:
    """The judge that the voters of a file are.

    Where a pair has no vote yet its ballot is added to the file, once, and AwaitsVotes (E605) says how many are open.
    Raises what `read_votes` raises.
    """
    path = Path(file).expanduser()
    votes = read_votes(path)
    waiting: dict[Pair, None] = {}

    def choose(prompts: Sequence[Text], firsts: Completions, seconds: Completions) -> list[float]:
        asked = [pair_of(p, a.text, b.text) for p, a, b in zip(prompts, firsts, seconds, strict=True)]
        missing = dict.fromkeys(pair for pair in asked if pair[1] != pair[2] and not votes.get(pair))
        if missing:
            waiting.update(missing)
            put(path, [pair for pair in missing if pair not in votes])
            votes.update((pair, []) for pair in missing)
            count = "1 pair waits" if len(waiting) == 1 else f"{len(waiting)} pairs wait"
            what = f"{count} for a vote: write first, second or tie there in place of null"
            raise AwaitsVotes(f"{what}, or run python -m palate.sampling.votes {path}", where=str(path), code="E605")
        means = (sum(cast) / len(cast) if (cast := votes.get(pair)) else 0.5 for pair in asked)
        return [mean if pair[1] == one.text else 1 - mean for mean, pair, one in zip(means, asked, firsts, strict=True)]

    return Judge(f"people:{file}", choose=choose)


def pair_of(prompt: Text, one: str, two: str) -> Pair:
    """What is voted on, the same for both orders."""
    return prompt, min(one, two), max(one, two)


def read_votes(path: Path) -> dict[Pair, list[float]]:
    """Pair -> votes for its first text: 1, 0, or 0.5 for a tie; none where its ballot is open. {} without a file.

    Raises DataError naming line and field, and what reading a file of rows raises.
    """
    found: dict[Pair, dict[Any, float]] = {}
    if not path.exists() or (path.is_file() and not path.read_bytes().strip()):
        return {}
    for row in Rows(str(path), format="jsonl"):
        try:
            if row.problem is not None:
                raise row.problem
            pair, vote, voter = _ballot(row.value)
        except RowError as problem:
            if "--" in problem.next:  # --columns and --bad-rows are of --data
                problem.next = "mend the line, or take it out"
            raise problem.at(f"{path}:{row.line}") from None
        cast = found.setdefault(pair, {})
        if vote is not None:
            cast[row.line if voter is None else voter] = vote
    return {pair: list(cast.values()) for pair, cast in found.items()}


def _ballot(value: Any) -> tuple[Pair, float | None, str | None]:
    """A row's pair, its vote for the pair's first text, and who voted; raises RowError."""
    if not isinstance(value, dict):
        raise RowError("E201", f"{kind(value)} where a row belongs", "make each row an object")
    for key in ("prompt", "first", "second", "vote"):
        if key not in value:
            raise absent(key, value)
    for key in ("first", "second", "voter"):
        if not isinstance(value.get(key, ""), str):
            raise RowError("E203", f"{kind(value[key])} where text belongs", "mend the line", key)
    vote = value["vote"]
    if vote is not None and (not isinstance(vote, str) or vote not in VOTES):
        what = f'unknown vote "{shown(vote, 40)}"' if isinstance(vote, str) else f"{kind(vote)} where a vote belongs"
        raise RowError("E225", what, "write first, second or tie, or null while nobody has voted", "vote")
    pair = pair_of(side(value["prompt"], "prompt"), value["first"], value["second"])
    if vote is None:
        return pair, None, None
    return pair, VOTES[vote] if pair[1] == value["first"] else 1 - VOTES[vote], value.get("voter")


def put(path: Path, pairs: Sequence[Pair]) -> None:
    """Adds open ballots to the file in one write, so that several processes may; who wrote which text is not told."""
    if not pairs:
        return
    lines = b"".join(map(_open_ballot, pairs))
    make_folder(path.parent)
    unended = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    append_bytes(path, b"\n" + lines if unended else lines)


def _open_ballot(pair: Pair) -> bytes:
    prompt, *texts = pair
    turned = hashlib.sha256(repr(pair).encode("utf-8", "surrogatepass")).digest()[0] % 2
    first, second = reversed(texts) if turned else texts
    return json_line({"prompt": plain(prompt), "first": first, "second": second, "vote": None})


# --- at a terminal ---------------------------------------------------------------------------------------------------

KEYS = {"1": "first", "2": "second", "t": "tie"}


def vote(path: Path, voter: str | None = None, ask: Callable[[str], str] = input) -> int:
    """Shows the open ballots and writes each answer into its line at once; how many are open afterwards.

    Raises what `read_votes` raises. ask: shows a text and returns what is typed: 1, 2, t, or q to stop.
    """
    if not path.exists():
        raise NotThereError("no such file", where=str(path), code="E101", next="check the path")
    votes = read_votes(path)
    rows = {raw: json.loads(raw) for raw in _lines(path)}
    ballots = [(raw, row) for raw, row in rows.items() if row["vote"] is None and not votes[_ballot(row)[0]]]
    for number, (raw, row) in enumerate(ballots):
        turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "prompt", "content": row["prompt"]}]
        texts = [(turn["role"], turn["content"]) for turn in turns] + [("1", row["first"]), ("2", row["second"])]
        text = visible("".join(f"\n--- {name}\n{said}\n" for name, said in texts))
        answer = ""
        while answer not in (*KEYS, "q"):
            answer = ask(f"{text}\n[{number + 1} of {len(ballots)}] better: 1, 2, t (tie); q stops: ").strip().lower()
        if answer == "q":
            return len(ballots) - number
        filled = json_line(row | {"vote": KEYS[answer]} | ({} if voter is None else {"voter": voter}))
        lines = _lines(path)  # again: others may have added to it
        lines = [filled if line == raw else line for line in lines]
        write_bytes(path.resolve(), b"".join(line.removesuffix(b"\n") + b"\n" for line in lines))
    return 0


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Votes at the terminal; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m palate.sampling.votes", description="Vote on the open ballots.")
    parser.add_argument("file", type=Path, metavar="VOTES.jsonl")
    parser.add_argument("--voter", metavar="NAME", help="written beside each vote")
    given = parser.parse_args(argv)
    try:
        left = vote(given.file.expanduser(), given.voter)
    except (EOFError, KeyboardInterrupt):
        print("\nstopped; every vote is in the file", file=sys.stderr)
        return 6
    except PalateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{left} ballots are open", file=sys.stderr)
    return 6 if left else 0


if __name__ == "__main__":
    sys.exit(main())
