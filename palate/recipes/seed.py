"""The seed of Self-Rewarding: rows that show how to answer, and rows that show how to judge.

A row is a judgement where its prompt is the judge's template with a request and a reply in its gaps.
"""

from dataclasses import dataclass, replace
from typing import Any

from palate.data.records import Demonstration, Prompt, Records, Text, plain
from palate.errors import DataError
from palate.recipes.rows import as_they_stood, held_out, prompt_key


@dataclass(frozen=True)
class Judgement:
    """A row that shows how to judge: the request and the reply it is about, and the points they got."""

    record: Demonstration
    request: str
    reply: str
    points: int

    @property
    def key(self) -> str:
        """Of the request: judgements of one stay together."""
        return prompt_key(Prompt(self.request))

    @property
    def before(self) -> Text | None:
        """The turns before the judge's prompt, such as a system message; None where it is plain text."""
        return None if isinstance(self.record.prompt, str) else self.record.prompt[:-1]


@dataclass(frozen=True)
class Seed:
    """The rows by what they show.

    held: keys of the requests that the start does not learn from: the answers', and those that judgements are about.
    """

    records: Records[Demonstration]
    answers: tuple[Demonstration, ...]
    judgements: tuple[Judgement, ...]
    held: set[str]

    @property
    def held_judgements(self) -> list[Judgement]:
        """Those that the start does not learn from."""
        return [one for one in self.judgements if one.key in self.held]

    def rows(self, held: bool) -> list[dict[str, Any]]:
        """The rows that the start learns from, or those held out, in the order of the file."""
        about = {id(one.record): one.key for one in self.judgements}
        mine = [r for r in self.records if (about.get(id(r), prompt_key(r)) in self.held) == held]
        return [{"prompt": plain(r.prompt), "completion": plain(r.completion)} for r in mine]

    @property
    def form(self) -> Text | None:
        """A judge's prompt as it stands here; None where there is none."""
        return self.judgements[0].record.prompt if self.judgements else None

    @property
    def requests(self) -> list[Prompt]:
        """Requests of one turn that new ones are written after."""
        turns = [("user",), ("system", "user")]
        fit = [r for r in self.answers if isinstance(r.prompt, str) or tuple(m.role for m in r.prompt) in turns]
        return [Prompt(one.prompt, one.source) for one in fit]


def read_seed(config, rubric) -> Seed:
    """The seed that --data holds. rubric: the judge's; its template says which rows are judgements.

    Raises what reading raises, and DataError (E207) for a row without a prompt, (E236) for a judgement that gives no
    score, or is asked for in another form than the first; under --bad-rows skip these rows are kept aside.
    """
    from palate.data.sources import read_demonstrations

    found = read_demonstrations(
        config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows
    )
    answers: list[Demonstration] = []
    judgements: list[Judgement] = []
    refused: list[tuple[Demonstration, DataError]] = []
    for record in found:
        try:
            one = _understood(record, rubric, judgements)
        except DataError as error:
            if config.bad_rows == "stop":
                raise
            refused.append((record, error))
            continue
        answers.append(one) if isinstance(one, Demonstration) else judgements.append(one)
    stood = zip(refused, as_they_stood(refused, config.format), strict=True)
    rejected = [*found.rejected, *((record.source, raw, error.code, said) for (record, error), (raw, said) in stood)]
    aside = {id(record) for record, _ in refused}
    kept = replace(found, records=tuple(r for r in found if id(r) not in aside), rejected=rejected)
    held: set[str] = set()
    if config.eval != "none":
        held |= held_out([prompt_key(one) for one in answers], config.seed)
        held |= held_out([one.key for one in judgements], config.seed)
    return Seed(kept, tuple(answers), tuple(judgements), held)


def _understood(record: Demonstration, rubric, judgements: list[Judgement]) -> Demonstration | Judgement:
    """The row as what it is. judgements: those before it."""
    from palate.sampling.rubric import parse_score

    where, prompt, said = str(record.source), record.prompt, record.completion
    if not prompt:
        what = "has no prompt, so there is nothing that it answers"
        raise DataError(what, where=where, code="E207", next="give demonstrations with prompts")
    about = rubric.parse(prompt if isinstance(prompt, str) else prompt[-1].content)
    if about is None:
        return record
    points = parse_score(said if isinstance(said, str) else said[-1].content)
    if points is None:
        what = "is a judgement that does not end in one line of the form Score: N, with N from 0 to 5"
        raise DataError(what, where=where, code="E236", next="mend the row, or leave it out")
    request, reply = about
    one = Judgement(record, request, reply, points)
    if judgements and one.before != judgements[0].before:
        what = f"asks the judge in another form than {judgements[0].record.source}: other turns before, or no turns"
        raise DataError(what, where=where, code="E236", next="ask in one form everywhere")
    return one
