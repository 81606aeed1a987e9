"""Tables of measurements: written into a page of the docs between two marks, so that no figure is typed by hand."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def machine() -> dict[str, str | int]:
    """What the figures belong to: processor, cores, threads of this process's children, versions of what is timed."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "transformers", "trl", "bitsandbytes")
    found: dict[str, str | int] = {"processor": _processor(), "cores": os.cpu_count() or 1, "threads": threads()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def threads() -> int:
    """Threads that a measured process gets: OMP_NUM_THREADS, else every core it may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def conditions(found: dict) -> str:
    """One sentence about the machine of a measurement, and the command that made it."""
    facts = dict(found["machine"])
    versions = ", ".join(f"{name} {facts[name]}" for name in facts if name not in ("processor", "cores", "threads"))
    where = f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; {versions}"
    return f"`{found['command']}` on {where}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(script: str, argv: list[str] | None) -> str:
    """The command as the docs show it: without where results went and which folders files lie in."""
    words = list(sys.argv[1:] if argv is None else argv)
    for flag in ("--json", "--docs"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return shlex.join(["python", f"benchmarks/{script}", *(Path(word).name if "/" in word else word for word in words)])


def options(parser: argparse.ArgumentParser) -> None:
    """The options of every script whose table stands in the docs."""
    parser.add_argument("--json", metavar="OUT", help="writes what was measured, after every row")
    parser.add_argument("--docs", metavar="PAGE", help="writes the table into this page, between its marks")
    parser.add_argument("--from", dest="given", metavar="JSON", help="measures nothing: the table of this file")


def deliver(given: argparse.Namespace, name: str, found: dict, text: Callable[[dict], str]) -> None:
    """Writes what was found where --json and --docs ask for it."""
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
    if given.docs and found["rows"]:
        publish(Path(given.docs), name, f"{conditions(found)}\n\n{text(found)}")


def told_again(given: argparse.Namespace, name: str, text: Callable[[dict], str]) -> bool:
    """Whether --from names a measurement, whose table is printed and written now, in place of another one."""
    if given.given is None:
        return False
    found = json.loads(Path(given.given).read_text())
    print(text(found))
    deliver(given, name, found, text)
    return True


def publish(page: Path, name: str, text: str) -> None:
    """Puts the text between <!-- name --> and <!-- /name --> of the page. Raises SystemExit where they are not."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(first)
    _, closed, after = rest.partition(last)
    if not (found and closed):
        raise SystemExit(f"{page}: no {first} … {last}; write the two where the table should stand")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")
