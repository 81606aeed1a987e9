"""A language model as a judge: it is asked for points, and one line of its answer, `Score: N`, is the score.

An answer without exactly one such line has no score. None is put in its place: one by default would make the completion
the worst of its prompt or the best of it, whatever it says.

Source: Yuan et al. 2024 (Self-Rewarding Language Models), arXiv:2401.10020, section 2.2 and figure 2.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.data.records import Message, Text
from palate.data.tokens import encode_prompt, end_tokens
from palate.errors import DataError, NotThereError
from palate.worlds.instructions import JUDGE

LEAST, MOST = 0, 5  # points

# The five additive points of figure 2, in other words.
ADDITIVE = """\
Judge the reply to a user's request that stands below. Begin with 0 points and add one for each of these that is true:
1. The reply is about the request and gives some of what was asked for, even if much is missing or beside the point.
2. It deals with a substantial part of what was asked for, though perhaps not with all of it.
3. It answers the basics of the request in a useful way, whoever may have written it.
4. It is clearly an assistant's own answer to this request: direct, complete, well organised, with little to improve.
5. It is made for just this request and shows an expert's knowledge: nothing is missing, nothing is padding.

Request:
{prompt}

Reply:
{completion}

First justify the points in at most 100 words. Then write one last line of this form, where N is their sum from 0 to 5:
Score: N"""
BUILTIN = {"additive": ADDITIVE, "reviews": JUDGE}
_GAPS = re.compile(r"\{(prompt|completion)\}")


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked: a text with one gap {prompt} and one gap {completion}. Other braces are text.

    Raises DataError (E604) where a gap is missing or stands twice.
    """

    name: str
    template: str

    def __post_init__(self):
        for gap in ("{prompt}", "{completion}"):
            if (count := self.template.count(gap)) != 1:
                what = f"a judge's template has the gap {gap} once, this one has it {count} times"
                raise DataError(what, where=self.name, code="E604", next=f"write {gap} where it belongs")

    def fill(self, prompt: Text, completion: str) -> str:
        """The judge's prompt for a completion. Of a conversation of one turn its content, of a longer one every turn.

        What prompt and completion say is text, also where it looks like a gap.
        """
        if not isinstance(prompt, str):
            turns = [f"{turn.role}: {turn.content}" for turn in prompt]
            prompt = prompt[0].content if len(prompt) == 1 else "\n".join(turns)
        values = {"prompt": prompt, "completion": completion}
        return _GAPS.sub(lambda gap: values[gap[1]], self.template)

    def parse(self, text: str) -> tuple[str, str] | None:
        """(prompt, completion) of a judge's prompt that was filled from this template; None of any other text."""
        parts = _GAPS.split(self.template)
        pattern = "".join(f"(?P<{part}>.*?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        found = re.fullmatch(pattern, text, re.DOTALL)
        return None if found is None else (found["prompt"], found["completion"])


def load_rubric(name: str) -> Rubric:
    """A built-in rubric by its name, "additive" or "reviews", or that of a file; its last line break is left out.

    Raises NotThereError (E101) and DataError (E604).
    """
    if name in BUILTIN:
        return Rubric(name, BUILTIN[name])
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f"name a file, or one of {', '.join(BUILTIN)}"
        raise NotThereError("there is no such judge's template", where=name[:200], code="E101", next=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        what = f"the judge's template cannot be read: {' '.join(str(error).split())[:200]}"
        raise DataError(what, where=name[:200], code="E604", next="name a text file in UTF-8") from None
    return Rubric(name, text.removesuffix("\n").removesuffix("\r"))


def default_rubric(model: str) -> Rubric:
    """The rubric for a model of this name: that of the world it was made for, or the one for any request."""
    from palate.run import from_builtin

    return load_rubric("reviews" if from_builtin(model) else "additive")


def parse_score(text: str, finished: bool = True) -> int | None:
    """The score that a judgement ends in, 0 to 5; None where it gives none that is beyond doubt.

    One line is `Score: N` and no other line begins with "score:", in whatever case. finished: whether the judgement
    ended by itself: what was cut may have been going on, as from `Score: 1` to `Score: 10`.
    """
    lines = [line.strip(" \t\r") for line in text.split("\n")]
    said = [line for line in lines if line.casefold().startswith("score:")]
    found = re.fullmatch(f"Score: ([{LEAST}-{MOST}])", said[0]) if finished and len(said) == 1 else None
    return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge said once of a completion. score: 0 to 5, None where it cannot be read."""

    text: str
    finished: bool
    score: int | None


@dataclass(frozen=True, slots=True)
class Judged:
    """All that a judge said of a completion."""

    judgements: tuple[Judgement, ...]

    @property
    def score(self) -> float | None:
        """The mean of the scores that can be read; None where none can."""
        read = [one.score for one in self.judgements if one.score is not None]
        return sum(read) / len(read) if read else None


@dataclass(frozen=True)
class ModelJudge:
    """A language model that is asked by a rubric.

    loaded: model and tokenizer. judgements: of each completion, each sampled from a stream of its own. max_tokens: of
    a judgement. chat: whether the judge's prompt is a user's turn, under the chat template, rather than plain text;
    None: where the tokenizer has a template. before: turns before that one, such as the system message of training.
    """

    loaded: Any
    rubric: Rubric
    judgements: int = 3
    temperature: float = 0.7
    max_tokens: int = 256
    seed: int = 0
    chat: bool | None = None
    before: tuple[Message, ...] = ()

    def ask(self, prompt: Text, completion: str) -> Text:
        """The judge's prompt, as it stands in training too."""
        text = self.rubric.fill(prompt, completion)
        chat = bool(self.loaded.tokenizer.chat_template) if self.chat is None else self.chat
        return (*self.before, Message("user", text)) if chat else text

    def judge(
        self, prompts: Sequence[Text], completions: Sequence[str], numbers: Sequence[int] | None = None
    ) -> list[Judged]:
        """What is said of each completion. numbers: as for `generate`, where these are a part of a longer list.

        Where a judge's prompt fills the context its beginning is cut and no room is left for a score.
        """
        from palate.model.load import context
        from palate.sampling.generate import generate, text_of

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        limit = context(model)
        asked = [encode_prompt(self.ask(*case), tokenizer) for case in zip(prompts, completions, strict=True)]
        asked = asked if limit is None else [ids[-(limit - 1) :] for ids in asked]
        made = generate(
            model,
            tokenizer,
            asked,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            samples=self.judgements,
            seed=self.seed,
            numbers=numbers,
            end_ids=end_tokens(tokenizer),
        )
        said = []
        for sample in made:
            text = text_of(sample, asked[sample.prompt], tokenizer)
            said.append(Judgement(text, sample.finished, parse_score(text, sample.finished)))
        k = self.judgements
        return [Judged(tuple(said[at : at + k])) for at in range(0, len(said), k)]
