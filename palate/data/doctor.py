"""What is wrong with preference data, and what to do: findings with counts, examples and a remedy.

Works on text alone. Every file gets an answer: what cannot be read is itself a finding.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from palate.data.records import Demonstration, Feedback, PreferencePair, Prompt, Ranking, Record, Records, Text
from palate.data.sources import read_any
from palate.errors import DataError

EXAMPLES = 3
_REPEATED_CHARACTERS = 20
_LENGTH_BIAS = 0.65

_CHECKS = {
    "E201": "rows that are no object",
    "E202": "columns",
    "E203": "values of the wrong type",
    "E204": "null values",
    "E207": "empty prompts",
    "E208": "empty completions",
    "E209": "equal completions",
    "E213": "prompt repeated in completions",
    "E214": "unknown roles",
    "E215": "conversations without a last reply",
    "E217": "prompts that differ between the sides",
    "E225": "labels and verdicts",
    "E226": "one class only",
    "E228": "repeated ids",
    "E230": "mixed forms",
    "W210": "completions that differ in white space only",
    "W211": "one pair in both orders",
    "W212": "duplicates",
    "W227": "chosen scored below rejected",
}
_FIXES = {
    "W210": "look at the listed rows and drop them",
    "W211": "choose one label for each",
    "W212": "drop the copies, unless they are meant to weigh more",
    "W227": "swap or drop the listed rows",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check that has something to say.

    severity: "error" (training refuses the data), "warning" (look at it) or "note".
    count: rows concerned. rows: at most three examples. fix: what to do, empty for a note that asks for nothing.
    """

    check: str
    severity: str
    count: int
    rows: tuple[str, ...]
    fix: str
    what: str = ""
    code: str | None = None


@dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """The findings on one data set, errors first. exit_code: 3 where one is an error, else 0.

    kind: what a row is ("pair", "ranking", "feedback", "demonstration", "prompt"), or None where nothing was read.
    """

    findings: tuple[Finding, ...]
    kind: str | None = None
    rows: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index):
        return self.findings[index]

    def count(self, severity: str) -> int:
        """How many findings are of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def exit_code(self) -> int:
        return 3 if self.count("error") else 0

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "kind": self.kind,
            "rows": self.rows,
            **{f"{severity}s": self.count(severity) for severity in ("error", "warning", "note")},
            "notes": list(self.notes),
            "findings": [asdict(finding) for finding in self.findings],
        }


def doctor(data, *, columns=None, format=None) -> Findings:
    """What is wrong with `data` (as in `read_pairs`), of whatever kind its rows are.

    Raises NotThereError for a missing file, MachineError for an unreadable one, UsageError for wrong options.
    """
    try:
        records = read_any(data, columns=columns, format=format, bad_rows="keep")
    except DataError as error:
        finding = Finding(
            _CHECKS.get(error.code or "", "reading"),
            "error",
            1,
            (error.where or "",),
            error.next or "",
            error.what,
            error.code,
        )
        return Findings((finding,))
    found = [*_refused(records), *_warned(records), *_left_out(records), *_feedback(records), *_contents(records)]
    severities = ("error", "warning", "note")
    found.sort(key=lambda finding: severities.index(finding.severity))
    kinds = {
        PreferencePair: "pair",
        Ranking: "ranking",
        Feedback: "feedback",
        Demonstration: "demonstration",
        Prompt: "prompt",
    }
    kind = kinds[type(records[0])] if len(records) else None
    return Findings(tuple(found), kind, len(records), tuple(records.notes))


def _refused(records: Records) -> Iterator[Finding]:
    by_code: dict[str, list[str]] = {}
    for _, _, code, message in records.rejected:
        by_code.setdefault(code, []).append(message)
    for code, messages in by_code.items():
        fix = messages[0].rpartition("Next: ")[2].rstrip(".")
        examples = tuple(message.partition(f" [{code}]")[0] for message in messages[:EXAMPLES])
        yield Finding(_CHECKS.get(code, "unreadable rows"), "error", len(messages), examples, fix, "", code)


def _warned(records: Records) -> Iterator[Finding]:
    for warned in records.warnings:
        examples = tuple(" and ".join(map(str, case)) for case in warned.rows)
        yield Finding(
            _CHECKS[warned.code], "warning", warned.count, examples, _FIXES[warned.code], warned.what, warned.code
        )


def _left_out(records: Records) -> Iterator[Finding]:
    for reason, count in records.dropped.items():
        yield Finding(f"rows left out: {reason}", "note", count, (), "", "they say nothing a loss could learn from")


def _feedback(records: Records) -> Iterator[Finding]:
    rows = [record for record in records if isinstance(record, Feedback)]
    if not rows:
        return
    wanted = sum(row.label for row in rows)
    what = f"{wanted} wanted, {len(rows) - wanted} unwanted"
    if wanted in (0, len(rows)):
        yield Finding("one class only", "error", len(rows), (), "add rows of the other class", what, "E226")
    else:
        yield Finding("classes", "note", len(rows), (), "", what)
    if len(rows) and all(row.prompt == rows[0].prompt for row in rows):
        fix = "add rows under another prompt, or use pairs and dpo"
        yield Finding("one prompt only", "error", len(rows), _places(rows), fix, "KTO compares across prompts", "E233")


def _contents(records: Records) -> Iterator[Finding]:
    if not len(records):
        return
    prompts = Counter(record.prompt for record in records if record.prompt)
    shared = sum(count for count in prompts.values() if count > 1)
    if shared:
        what = f"{len(prompts)} distinct prompts in {len(records)} rows"
        fix = "" if shared < len(records) else "check that held-out rows are split by prompt"
        rows = [record for record in records if prompts.get(record.prompt, 0) > 1]
        yield Finding("prompts shared by rows", "note", shared, _places(rows), fix, what)
    repeated = [record for record in records if _repeats_prompt(record)]
    if repeated:
        fix = "strip the prompt from the completions, or hide it with --columns prompt="
        what = "a completion begins with the words of its prompt"
        yield Finding("prompt repeated in completions", "warning", len(repeated), _places(repeated), fix, what)
    yield from _lengths(records)


def _lengths(records: Records) -> Iterator[Finding]:
    """How much longer the preferred completions are, in characters, and how often length alone finds them."""
    pairs = [sizes for record in records for sizes in _preferred_lengths(record)]
    if not pairs:
        sizes = sorted(len(_said(side)) for record in records for side in _sides(record))
        if sizes:
            what = f"completions have {sizes[len(sizes) // 2]} characters in the median, {sizes[-1]} at most"
            yield Finding("lengths", "note", len(sizes), (), "", what)
        return
    chosen, rejected = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    judged = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    percent = 100 * (chosen / rejected - 1)
    side = "longer" if percent > 0 else "shorter"
    direction = f"{abs(percent):.0f}% {side}" if abs(percent) >= 0.5 else "as long as rejected"
    what = f"chosen {direction} ({chosen:.0f} against {rejected:.0f} characters); length alone is right on {judged:.0%}"
    biased = len(pairs) >= 20 and not 1 - _LENGTH_BIAS < judged < _LENGTH_BIAS
    fix = (
        "compare results at equal length, or use a loss that counts tokens (--loss simpo, r_dpo, ln_dpo)"
        if biased
        else ""
    )
    yield Finding("lengths", "warning" if biased else "note", len(pairs), (), fix, what)


def _preferred_lengths(record: Record) -> Iterator[tuple[int, int]]:
    if isinstance(record, PreferencePair):
        yield len(_said(record.chosen)), len(_said(record.rejected))
    elif isinstance(record, Ranking):
        sizes = [len(_said(completion)) for completion in record.completions]
        yield from ((sizes[better], sizes[worse]) for better, worse in record.preferences)


def _sides(record: Record) -> tuple[Text, ...]:
    if isinstance(record, PreferencePair):
        return record.chosen, record.rejected
    if isinstance(record, Ranking):
        return record.completions
    return () if isinstance(record, Prompt) else (record.completion,)


def _said(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(m.content for m in text if m.role == "assistant")


def _repeats_prompt(record: Record) -> bool:
    prompt = record.prompt
    if not isinstance(prompt, str):
        prompt = next((m.content for m in reversed(prompt) if m.role == "user"), "")
    prompt = prompt.strip()
    return len(prompt) >= _REPEATED_CHARACTERS and any(_said(s).lstrip().startswith(prompt) for s in _sides(record))


def _places(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(str(record.source) for record in records[:EXAMPLES])
