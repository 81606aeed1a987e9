"""Dialects of preference data -> one meaning. A dialect is a row of a table: the columns it needs, how a row is read.

The dialect is chosen once per file, from its first rows, and said aloud. Columns whose home framework always renders a
conversation (ShareGPT, axolotl, ms-swift, Alpaca) are read as conversations; `prompt/...` strings stay plain.
"""

import contextlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations
from typing import Any

from palate.data.records import Demonstration, Feedback, Message, PreferencePair, Prompt, Ranking, Record, Source, Text
from palate.data.rows import FIX, RowError, shown
from palate.errors import DataError, UsageError

MAX_TURNS = 1000
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
} | {role: role for role in ROLES}
_HH = "\n\nAssistant:"
_MARKERS = re.compile(
    r"(?:^|\n)(?:Assistant|ASSISTANT|AI|Bot|GPT|Response|Answer|A|Summary|TL;DR):"
    r"|### ?(?:Response|Assistant|Answer):|\[/INST\]|<\|assistant\|>\n?|<\|im_start\|>assistant\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n|<\|Assistant\|>"
)


class Dropped(Exception):
    """A row that is whole but says nothing, such as a tie."""

    def __init__(self, reason: str):
        self.reason = reason


@dataclass(slots=True)
class View:
    """One row under the names that a dialect asks for. `names`: our name -> the row's own, "" hides a column."""

    row: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    untyped: bool = False
    warnings: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def has(self, column: str) -> bool:
        return self.name(column) in self.row if self.name(column) else False

    def get(self, column: str) -> Any:
        """The value; raises RowError where the column is not there."""
        if not self.has(column):
            raise absent(self.name(column) or column, self.row)
        return self.row[self.name(column)]

    def first(self, columns: tuple[str, ...]) -> str:
        """The first of several spellings that the row has, or the first of all."""
        return next((c for c in columns if self.has(c)), columns[0])

    def text(self, column: str) -> str:
        return string(self.get(column), self.name(column))

    def optional(self, column: str) -> str:
        """A text that may be absent or null: then empty."""
        return string(self.row[self.name(column)], self.name(column)) if self._there(column) else ""

    def _there(self, column: str) -> bool:
        return self.has(column) and self.row[self.name(column)] is not None

    def side(self, column: str) -> Text:
        return side(self.get(column), self.name(column))

    def list(self, column: str) -> list:
        value, name = self.get(column), self.name(column)
        if self.untyped and isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise RowError("E203", "text that is not a JSON list", FIX, name) from None
        if value is None:
            raise RowError("E204", "null", FIX, name)
        if not isinstance(value, list):
            raise RowError("E203", f"{kind(value)} where a list belongs", FIX, name)
        return value

    def messages(self, column: str) -> tuple[Message, ...]:
        return messages(self.list(column), self.name(column))


def absent(name: str, row: Mapping[str, Any]) -> RowError:
    """The error for a column that is not in the row: what is there, and the nearest name."""
    found = [shown(key, 40) for key in list(row)[:12]]
    near = get_close_matches(name, [str(key) for key in row], n=1, cutoff=0.6)
    what = f"not there; the row has {', '.join(found) or 'no fields'}" + (", …" if len(row) > 12 else "")
    example = shown(near[0], 40) if near else "NAME"
    return RowError("E202", what, f"use --columns {shown(name, 40)}={example}, or fix the row", shown(name))


# values


def kind(value: Any) -> str:
    """What a value from JSON is called."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def string(value: Any, name: str) -> str:
    """The value as text that can be written again; raises RowError."""
    if value is None:
        raise RowError("E204", "null where text belongs", FIX, shown(name))
    if not isinstance(value, str):
        raise RowError("E203", f"{kind(value)} where text belongs", FIX, shown(name))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = (
                f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start + 1} cannot be written"
            )
            raise RowError("E107", what, "replace the character", shown(name)) from None
    if "\0" in value:
        raise RowError("E108", f"U+0000 at character {value.index(chr(0)) + 1}", "remove it", shown(name))
    return value


def message(value: Any, name: str) -> Message:
    """{"role", "content"} or ShareGPT's {"from", "value"} as a Message; raises RowError."""
    if not isinstance(value, dict):
        code = "E204" if value is None else "E203"
        raise RowError(code, f"{kind(value)} where a message belongs", FIX, name)
    share = "role" not in value and "from" in value
    role_name, content_name = ("from", "value") if share else ("role", "content")
    for key in (role_name, content_name):
        if key not in value:
            raise absent(f"{name}.{key}", {f"{name}.{k}": v for k, v in list(value.items())[:20]})
    role = string(value[role_name], f"{name}.{role_name}")
    known = (_SHAREGPT if share else {r: r for r in ROLES}).get(role)
    if known is None:
        allowed = ", ".join(("human", "gpt", *ROLES) if share else ROLES)
        raise RowError(
            "E214", f'unknown role "{shown(role, 40)}"; known: {allowed}', "rename the role", f"{name}.{role_name}"
        )
    content = value[content_name]
    if content is None or isinstance(content, list):
        what = "null where text belongs" if content is None else "a list of parts"
        raise RowError("E218", what, "give text only", f"{name}.{content_name}")
    if value.get("tool_calls"):
        raise RowError("E218", "tool calls are not text", "give text only", f"{name}.tool_calls")
    return Message(known, string(content, f"{name}.{content_name}"))


def messages(value: list, name: str) -> tuple[Message, ...]:
    """A list of messages; raises RowError."""
    if len(value) > MAX_TURNS:
        raise RowError("E229", f"{len(value)} turns, the cap is {MAX_TURNS}", "split the row", shown(name))
    return tuple(message(item, f"{shown(name)}[{index}]") for index, item in enumerate(value))


def side(value: Any, name: str) -> Text:
    """Text, a list of messages, or one message alone; raises RowError."""
    if isinstance(value, list):
        return messages(value, name)
    if isinstance(value, dict):
        return (message(value, shown(name)),)
    return string(value, name)


# prompts and completions


def checked_prompt(prompt: Text, name: str) -> Text:
    """The prompt, which must say something."""
    blank = not prompt.strip() if isinstance(prompt, str) else not any(m.content.strip() for m in prompt)
    if blank:
        raise RowError("E207", "empty prompt", "fill it in or use --bad-rows skip", shown(name))
    return prompt


def checked_completion(completion: Text, name: str) -> Text:
    """The completion, which must say something and, as messages, begin and end with the assistant."""
    if isinstance(completion, str):
        if not completion.strip():
            raise RowError("E208", "empty", "fix the row or use --bad-rows skip", shown(name))
        return completion
    if not completion:
        raise RowError("E208", "empty: no message", "fix the row or use --bad-rows skip", shown(name))
    if completion[-1].role != "assistant":
        what = f"does not end with an assistant message but with {completion[-1].role}"
        raise RowError("E215", what, "fix the row or use --bad-rows skip", shown(name))
    if not completion[-1].content.strip() or not any(m.content.strip() for m in completion if m.role == "assistant"):
        raise RowError("E208", "empty assistant message", "fix the row or use --bad-rows skip", shown(name))
    return completion


def user(content: str, system: str = "", history: Iterable[tuple[str, str]] = ()) -> tuple[Message, ...]:
    """A conversation up to and with a user's message."""
    turns = [Message("system", system)] if system else []
    for asked, answered in history:
        turns += [Message("user", asked), Message("assistant", answered)]
    return (*turns, Message("user", content))


def assistant(completion: Text) -> tuple[Message, ...]:
    return (Message("assistant", completion),) if isinstance(completion, str) else completion


def one_form(sides: Mapping[str, Text]) -> None:
    """Refuses completions of which some are text and others messages."""
    texts = [name for name, value in sides.items() if isinstance(value, str)]
    if 0 < len(texts) < len(sides):
        other = next(name for name in sides if name not in texts)
        what = f'text, while "{shown(other)}" holds messages'
        raise RowError("E219", what, "use one form for both", shown(texts[0]))


def under_prompt(prompt: Text, sides: dict[str, Text], prompt_name: str) -> tuple[Text, list[Text]]:
    """Prompt and completions in one form, none of them repeating the prompt; raises RowError."""
    one_form(sides)
    checked_prompt(prompt, prompt_name)
    for name, value in sides.items():
        checked_completion(value, name)
    texts = [value for value in sides.values() if isinstance(value, str)]
    if texts:
        if not isinstance(prompt, str):
            return prompt, [assistant(text) for text in texts]
        if len(texts) > 1 and all(text.startswith(prompt) and len(text) > len(prompt) for text in texts):
            what = "repeats the prompt: it holds the whole conversation"
            raise RowError("E213", what, "use --columns prompt= to read the prompt from it", shown(next(iter(sides))))
        return prompt, list(texts)
    chats = conversations(sides)
    if not isinstance(prompt, str):
        return prompt, _after_messages(prompt, chats)
    if all(chat[0].role == "assistant" for chat in chats.values()):
        return user(prompt), list(chats.values())
    shared, rests = split_messages(chats)
    asked = [m.content for m in shared if m.role != "assistant" and m.content.strip()]
    if prompt.strip() not in [content.strip() for content in (*asked, "\n".join(m.content for m in shared))]:
        what = "the conversation does not hold the prompt column's text"
        hint = "fix the row, or --columns prompt= to read the prompt from it"
        raise RowError("E217", what, hint, shown(next(iter(sides))))
    return shared, rests


def conversations(sides: Mapping[str, Text]) -> dict[str, tuple[Message, ...]]:
    """The sides that are messages."""
    return {name: value for name, value in sides.items() if not isinstance(value, str)}


def _after_messages(prompt: tuple[Message, ...], chats: dict[str, tuple[Message, ...]]) -> list[Text]:
    """What follows the prompt, where the sides repeat it, else the sides; raises RowError."""
    size = len(prompt)
    repeated = all(chat[:size] == prompt for chat in chats.values())
    rests: list[Text] = []
    for name, chat in chats.items():
        rest = chat[size:] if repeated else chat
        if not rest or rest[0].role not in ("assistant", "tool"):
            turn = next((i for i, (a, b) in enumerate(zip(prompt, rest, strict=False)) if a != b), size)
            what = "does not continue the prompt: " + (f"they part at turn {turn + 1}" if rest else "no reply follows")
            raise RowError("E217", what, "fix the row or use --bad-rows skip", shown(name))
        rests.append(checked_completion(rest, name))
    return rests


def split_messages(chats: dict[str, tuple[Message, ...]]) -> tuple[tuple[Message, ...], list[Text]]:
    """The leading messages that all sides share and what follows, which begins with the assistant; raises RowError."""
    for name, chat in chats.items():
        checked_completion(chat, name)
    values = list(chats.values())
    shared = 0
    for turns in zip(*values, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    if shared == min(map(len, values)):
        # one side is a beginning of the other: its last reply must stay a completion
        shared -= 1
        while shared and values[0][shared].role != "assistant":
            shared -= 1
    for name, chat in chats.items():
        if chat[shared].role not in ("assistant", "tool"):
            what = f"the prompts of the sides differ: turn {shared + 1} is from the {chat[shared].role}"
            raise RowError("E217", what, "fix the pair or use --bad-rows skip", shown(name))
    prompt = values[0][:shared]
    checked_prompt(prompt, next(iter(chats)))
    return prompt, [chat[shared:] for chat in values]


def split_strings(chosen: str, rejected: str, names: tuple[str, str]) -> tuple[str, str, str, str]:
    """(prompt, chosen, rejected) of two whole dialogues, and where they were split; raises RowError.

    Human/Assistant transcripts split at the last "\\n\\nAssistant:", other text at the longest common beginning that
    ends before the last reply: at its last marker of a reply, else at its last white space.
    """
    for name, value in zip(names, (chosen, rejected), strict=True):
        checked_completion(value, name)
    cuts = [value.rfind(_HH) + len(_HH) for value in (chosen, rejected)]
    if min(cuts) >= len(_HH):
        if chosen[: cuts[0]] != rejected[: cuts[1]]:
            common = _common(chosen[: cuts[0]], rejected[: cuts[1]])
            turn = chosen.count("\n\nHuman:", 0, common) + chosen.count(_HH, 0, common)
            what = f"the prompts of the two sides differ, first in turn {max(turn, 1)} (character {common + 1})"
            raise RowError("E217", what, "fix the pair or use --bad-rows skip", names[1])
        cut, where = cuts[0], 'the last "\\n\\nAssistant:"'
    else:
        common = _common(chosen, rejected)
        if chosen == rejected:
            common = max((m.end() for m in _MARKERS.finditer(chosen)), default=len(chosen) - 1)
        marks = [m.end() for m in _MARKERS.finditer(chosen) if m.end() <= common]
        marks = [end for end in marks if chosen[end:].strip() and rejected[end:].strip()]
        cut = marks[-1] if marks else _word_cut(chosen, rejected, common)
        where = "the last marker of a reply" if marks else "the longest common beginning in whole words"
    prompt, chosen_rest, rejected_rest = chosen[:cut], chosen[cut:], rejected[cut:]
    if not prompt.strip():
        what = "chosen and rejected share no beginning that could be the prompt"
        raise RowError("E217", what, "name the prompt's column: --columns prompt=NAME", names[1])
    checked_completion(chosen_rest, names[0])
    checked_completion(rejected_rest, names[1])
    return prompt, chosen_rest, rejected_rest, where


def _common(a: str, b: str) -> int:
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def _word_cut(chosen: str, rejected: str, common: int) -> int:
    """The last end of a word (or of a character that is one) within the common beginning that leaves two replies."""
    for cut in range(common, 0, -1):
        before, after = chosen[cut - 1], (chosen[cut : cut + 1], rejected[cut : cut + 1])
        kind = unicodedata.category(before)
        boundary = before == "\n" or kind == "Lo" or kind[0] == "P" or all(c.isspace() for c in after)
        if boundary and (before == "\n" or not before.isspace()) and chosen[cut:].strip() and rejected[cut:].strip():
            return cut
    return 0


def pair(
    prompt: Text | None,
    view: View,
    chosen: Text,
    rejected: Text,
    columns=("chosen", "rejected"),
    prompt_column="prompt",
):
    """A PreferencePair of one form whose completions differ; raises RowError."""
    names = view.name(columns[0]), view.name(columns[1])
    if names[0] == names[1]:
        what = f'both completions are read from the column "{shown(names[0])}"'
        raise UsageError(what, where="--columns", code="E308", next="name a column for each")
    sides: dict[str, Text] = {names[0]: chosen, names[1]: rejected}
    if prompt is None:
        one_form(sides)
        if isinstance(chosen, str) and isinstance(rejected, str):
            prompt, *rests, where = split_strings(chosen, rejected, names)
        else:
            prompt, rests = split_messages(conversations(sides))
            where = "the first message that differs"
        view.splits.append(where)
    else:
        prompt, rests = under_prompt(prompt, sides, view.name(prompt_column))
    if rests[0] == rests[1]:
        raise RowError("E209", f'equal to "{shown(names[0])}": the pair teaches nothing', FIX, shown(names[1]))
    if _squeezed(rests[0]) == _squeezed(rests[1]):
        view.warnings.append("W210")
    return PreferencePair(prompt, rests[0], rests[1], margin=_margin(view))


def _margin(view: View) -> float | None:
    """What a column `margin` says, where it is a finite number from 0; other things of that name are let be."""
    value = view.get("margin") if view.has("margin") else None
    if view.untyped and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
    return float(value) if fine else None


def _squeezed(text: Text) -> str:
    return "".join((text if isinstance(text, str) else "\0".join(m.role + m.content for m in text)).split())


# how the rows of each dialect are read


def _system(view: View) -> str:
    return view.optional("system") if view.has("system") else ""


def _history(view: View) -> list[tuple[str, str]]:
    if not view._there("history") or (view.untyped and not view.row[view.name("history")]):
        return []
    turns, name = view.list("history"), shown(view.name("history"))
    if len(turns) > MAX_TURNS:
        raise RowError("E229", f"{len(turns)} turns, the cap is {MAX_TURNS}", "split the row", name)
    for index, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("E203", "not a list of two texts", FIX, f"{name}[{index}]")
    return [(string(q, f"{name}[{i}][0]"), string(a, f"{name}[{i}][1]")) for i, (q, a) in enumerate(turns)]


_QUESTIONS = ("instruction", "question", "query", "input")
_EXTRAS = ("input", "context")


def _question(view: View) -> tuple[Text, str]:
    """The conversation up to the user's question, from axolotl, ms-swift and Alpaca columns, and its column."""
    column = view.first(_QUESTIONS)
    asked = view.text(column)
    extra = next((view.optional(c) for c in _EXTRAS if c != column and view.optional(c).strip()), "")
    if column == "instruction" and extra:
        asked = f"{asked}\n\n{extra}" if asked.strip() else extra
    if not asked.strip():
        raise RowError("E207", "empty prompt", "fill it in or use --bad-rows skip", shown(view.name(column)))
    return user(asked, _system(view), _history(view)), column


def _prompt(view: View) -> Text:
    """The `prompt` column; beside a system message it is a conversation."""
    prompt, system = view.side("prompt"), _system(view)
    if not system.strip():
        return prompt
    checked_prompt(prompt, view.name("prompt"))
    if isinstance(prompt, str):
        return user(prompt, system)
    return prompt if prompt[0].role == "system" else (Message("system", system), *prompt)


def _explicit(view: View) -> Record:
    return pair(_prompt(view), view, view.side("chosen"), view.side("rejected"))


def _explicit_system(view: View) -> Record:
    prompt, chosen, rejected = _prompt(view), view.side("chosen"), view.side("rejected")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        checked_prompt(prompt, view.name("prompt"))
        prompt = user(prompt)  # this row's system message is empty
    return pair(prompt, view, chosen, rejected)


def _implicit(view: View) -> Record:
    return pair(None, view, view.side("chosen"), view.side("rejected"))


def _questions_pair(chosen: str, rejected: str) -> Callable[[View], Record]:
    def read(view: View) -> Record:
        prompt, column = _question(view)
        sides = view.side(chosen), view.side(rejected)
        return pair(prompt, view, *sides, (chosen, rejected), column)

    return read


def _messages_pair(column: str) -> Callable[[View], Record]:
    def read(view: View) -> Record:
        prompt = view.messages(column)
        if prompt and prompt[0].role != "system" and _system(view).strip():
            prompt = (Message("system", _system(view)), *prompt)
        return pair(prompt, view, view.side("chosen"), view.side("rejected"), prompt_column=column)

    return read


def _messages_rejected(view: View) -> Record:
    whole = checked_completion(view.messages("messages"), view.name("messages"))
    prompt, reply = whole[:-1], whole[-1:]
    return pair(
        prompt, view, reply, assistant(view.side("rejected_response")), ("messages", "rejected_response"), "messages"
    )


def _two_messages(view: View) -> Record:
    return pair(
        None, view, view.messages("messages"), view.messages("rejected_messages"), ("messages", "rejected_messages")
    )


_WINNERS = {"a": 0, "model_a": 0, "response_a": 0, "b": 1, "model_b": 1, "response_b": 1} | dict.fromkeys(
    ("tie", "tie (bothbad)", "both_bad", "bothbad", "both bad", "neither", "draw"), -1
)


def _winner(view: View) -> int:
    """0 for the first reply, 1 for the second, -1 for a tie."""
    if view.has("winner"):
        value = view.text("winner").strip().lower()
        if value not in _WINNERS:
            raise RowError(
                "E225", f'unknown winner "{shown(value, 40)}"', "use a, b or tie", shown(view.name("winner"))
            )
        return _WINNERS[value]
    votes, name = view.list("labels"), shown(view.name("labels"))
    for index, vote in enumerate(votes):
        if type(vote) is not int or vote not in (0, 1, 2):
            raise RowError("E225", "a vote is 0 (equal), 1 (first) or 2 (second)", FIX, f"{name}[{index}]")
    for vote in (1, 2):
        if 2 * votes.count(vote) > len(votes):
            return vote - 1
    return -1


def _arena(view: View) -> Record:
    if view.has("prompt"):
        prompt, column = _prompt(view), "prompt"
    else:
        prompt, column = _question(view)
    return _won(view, prompt, ("response_a", "response_b"), column)


def _arena_conversations(view: View) -> Record:
    return _won(view, None, ("conversation_a", "conversation_b"), "conversation_a")


def _won(view: View, prompt: Text | None, columns: tuple[str, str], prompt_column: str) -> Record:
    winner = _winner(view)
    if winner == -1:
        raise Dropped("tie")
    if winner == 1:
        columns = columns[::-1]
    return pair(prompt, view, view.side(columns[0]), view.side(columns[1]), columns, prompt_column)


def _ranked(columns: tuple[str, ...], order: Callable[[View, int], tuple]) -> Callable[[View], Record]:
    def read(view: View) -> Record:
        column = view.first(columns)
        name = view.name(column)
        items = view.list(column)
        if len(items) < 2:
            raise RowError("E203", f"a list of {len(items)}: a ranking needs at least two", FIX, shown(name))
        if len(items) > MAX_TURNS:
            raise RowError("E229", f"{len(items)} completions, the cap is {MAX_TURNS}", "split the row", shown(name))
        sides = {f"{name}[{i}]": side(item, f"{name}[{i}]") for i, item in enumerate(items)}
        if view.has("prompt"):
            prompt, prompt_column = _prompt(view), "prompt"
        else:
            prompt, prompt_column = _question(view)
        prompt, completions = under_prompt(prompt, sides, view.name(prompt_column))
        preferences = tuple((a, b) for a, b in order(view, len(items)) if completions[a] != completions[b])
        if not preferences:
            raise Dropped("tie")
        return Ranking(prompt, tuple(completions), preferences)

    return read


def _best_first(view: View, size: int) -> tuple:
    return tuple(combinations(range(size), 2))


def _by_preferences(view: View, size: int) -> tuple:
    verdicts, name = view.list("preferences"), shown(view.name("preferences"))
    pairs = list(combinations(range(size), 2))
    if len(verdicts) != len(pairs):
        what = f"{len(verdicts)} verdicts where {size} responses make {len(pairs)} pairs"
        raise RowError("E203", what, FIX, name)
    for index, verdict in enumerate(verdicts):
        if type(verdict) is not int or verdict not in (0, 1, 2):
            raise RowError("E225", "a verdict is 0 (equal), 1 (first better) or 2 (second)", FIX, f"{name}[{index}]")
    return tuple((a, b) if v == 1 else (b, a) for (a, b), v in zip(pairs, verdicts, strict=True) if v)


def _by_scores(view: View, size: int) -> tuple:
    column = view.first(("scores", "rewards"))
    scores, name = view.list(column), shown(view.name(column))
    if len(scores) != size:
        raise RowError("E203", f"{len(scores)} scores for {size} responses", FIX, name)
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise RowError(
                "E204" if score is None else "E203", f"{kind(score)} where a score belongs", FIX, f"{name}[{index}]"
            )
        if score != score or score in (float("inf"), float("-inf")):
            raise RowError("E205", f"the score is {score}", "use a number", f"{name}[{index}]")
    pairs = combinations(range(size), 2)
    return tuple((a, b) if scores[a] > scores[b] else (b, a) for a, b in pairs if scores[a] != scores[b])


def _demonstration(view: View, prompt: Text, column: str, prompt_column: str) -> Demonstration:
    sides = {view.name(column): view.side(column)}
    prompt, (completion,) = under_prompt(prompt, sides, view.name(prompt_column))
    return Demonstration(prompt, completion)


def split_reply(turns: tuple[Message, ...], name: str, last: bool = False) -> tuple[Text, Text]:
    """(messages before the first assistant turn, or the last; the rest); raises RowError."""
    checked_prompt(turns, name)
    if not any(m.role == "assistant" for m in turns):
        raise RowError("E215", "no assistant message", "fix the row or use --bad-rows skip", shown(name))
    checked_completion(turns, name)
    cut = len(turns) - 1 if last else next(i for i, m in enumerate(turns) if m.role == "assistant")
    checked_prompt(turns[:cut], name)
    return turns[:cut], turns[cut:]


def _prompt_completion(view: View) -> Record:
    prompt, column = _prompt(view), view.first(("completion", "response"))
    if view.has("label") and type(view.get("label")) is bool and not view.get("label"):
        raise Dropped("unwanted")
    return _demonstration(view, prompt, column, "prompt")


def _instruction(view: View) -> Demonstration:
    prompt, column = _question(view)
    reply = view.first(("output", "response", "completion", "answer"))
    return _demonstration(view, prompt, reply, column)


def _conversation(column: str) -> Callable[[View], Record]:
    def read(view: View) -> Record:
        turns = _with_system(view, view.messages(column))
        return Demonstration(*split_reply(turns, view.name(column)))

    return read


def _with_system(view: View, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    system = _system(view) if view.has("system") else ""
    return (Message("system", system), *turns) if system.strip() and turns and turns[0].role != "system" else turns


def _text(view: View) -> Record:
    return Demonstration("", checked_completion(view.text("text"), view.name("text")))


def _label(view: View) -> bool:
    column = view.first(("label", "kto_tag"))
    value, name = view.get(column), shown(view.name(column))
    if view.untyped and isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if value is None:
        raise RowError("E204", "null where true or false belongs", "use true or false", name)
    if type(value) is not bool:
        seen = f'"{shown(value, 20)}"' if isinstance(value, (str, int, float)) else kind(value)
        raise RowError("E225", f"{seen} is not a label", "use true (wanted) or false", name)
    return value


def _labelled(read: Callable[[View], Demonstration]) -> Callable[[View], Record]:
    def labelled(view: View) -> Record:
        label = _label(view)
        shown_row = read(view)
        return Feedback(shown_row.prompt, shown_row.completion, label)

    return labelled


def _plain_feedback(view: View) -> Demonstration:
    return _demonstration(view, _prompt(view), view.first(("completion", "response")), "prompt")


def _conversation_last(column: str) -> Callable[[View], Demonstration]:
    def read(view: View) -> Demonstration:
        return Demonstration(*split_reply(_with_system(view, view.messages(column)), view.name(column), last=True))

    return read


def _prompt_alone(view: View) -> Record:
    """The prompt as the row's completions would make it: a conversation where they are messages."""
    prompt = checked_prompt(_prompt(view), view.name("prompt"))
    replies = [view.get(c) for c in ("chosen", "rejected", "completion") if view.has(c)]
    if isinstance(prompt, str) and replies and all(isinstance(reply, (list, dict)) for reply in replies):
        if view.has("chosen") and view.has("rejected"):
            return Prompt(_explicit(view).prompt)
        return Prompt(user(prompt))
    return Prompt(prompt)


def _prompt_system(view: View) -> Record:
    prompt = _prompt_alone(view).prompt
    return Prompt(user(prompt) if isinstance(prompt, str) else prompt)


def _open_conversation(column: str) -> Callable[[View], Record]:
    def read(view: View) -> Record:
        turns = _with_system(view, view.messages(column))
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return Prompt(checked_prompt(turns, view.name(column)))

    return read


def _question_alone(view: View) -> Record:
    return Prompt(_question(view)[0])


def _text_prompt(view: View) -> Record:
    return Prompt(checked_prompt(view.text("text"), view.name("text")))


# the table


@dataclass(frozen=True, slots=True)
class Dialect:
    """kind: what a row becomes. needs: columns, each one name or several spellings. hint: a column that must be met."""

    name: str
    kind: str
    needs: tuple[str | tuple[str, ...], ...]
    read: Callable[[View], Record]
    hint: str | None = None
    optional: tuple[str, ...] = ()

    def matches(self, view: View) -> bool:
        return all(any(view.has(c) for c in ((n,) if isinstance(n, str) else n)) for n in self.needs)

    def columns(self, view: View) -> list[str]:
        """The row's columns that this dialect reads, under their own names."""
        used = [view.first((n,) if isinstance(n, str) else n) for n in self.needs]
        return [view.name(c) for c in dict.fromkeys((*used, *(c for c in self.optional if view.has(c))))]


_ASIDE = ("system", "history", "input", "context")
_REPLY = ("completion", "response")
_OUTPUT = ("output", "response", "completion", "answer")
_LABELS = ("label", "kto_tag")
_Q = ("instruction", "question", "query")
_JUDGED = ("winner", "labels")

PAIRS = [
    Dialect(
        "pairs with a system message", "pair", ("prompt", "chosen", "rejected"), _explicit_system, "system", ("system",)
    ),
    Dialect("pairs", "pair", ("prompt", "chosen", "rejected"), _explicit, optional=("system",)),
    Dialect(
        "arena conversations with a winner",
        "pair",
        ("conversation_a", "conversation_b", "winner"),
        _arena_conversations,
    ),
    Dialect(
        "two replies with a verdict",
        "pair",
        (("prompt", *_Q), "response_a", "response_b", _JUDGED),
        _arena,
        optional=_ASIDE,
    ),
    Dialect(
        "messages with two replies (axolotl)", "pair", ("messages", "chosen", "rejected"), _messages_pair("messages")
    ),
    Dialect(
        "ShareGPT with two replies",
        "pair",
        ("conversations", "chosen", "rejected"),
        _messages_pair("conversations"),
        optional=("system",),
    ),
    Dialect("two conversations (ms-swift)", "pair", ("messages", "rejected_messages"), _two_messages),
    Dialect("messages with a rejected reply (ms-swift)", "pair", ("messages", "rejected_response"), _messages_rejected),
    Dialect(
        "query, response, rejected reply (ms-swift)",
        "pair",
        ("query", "response", "rejected_response"),
        _questions_pair("response", "rejected_response"),
        optional=_ASIDE,
    ),
    Dialect(
        "questions with two replies (axolotl)",
        "pair",
        (_QUESTIONS, "chosen_response", "rejected_response"),
        _questions_pair("chosen_response", "rejected_response"),
        optional=_ASIDE,
    ),
    Dialect(
        "questions with two replies (axolotl)",
        "pair",
        (_QUESTIONS, "chosen", "rejected"),
        _questions_pair("chosen", "rejected"),
        optional=_ASIDE,
    ),
    Dialect("pairs that hold the prompt", "pair", ("chosen", "rejected"), _implicit),
]
RANKINGS = [
    Dialect(
        "replies with pairwise verdicts",
        "ranking",
        (("prompt", *_Q), "responses", "preferences"),
        _ranked(("responses",), _by_preferences),
        optional=("system",),
    ),
    Dialect(
        "replies with scores",
        "ranking",
        (("prompt", *_Q), ("responses", "completions"), ("scores", "rewards")),
        _ranked(("responses", "completions"), _by_scores),
        optional=("system",),
    ),
    Dialect(
        "replies, best first",
        "ranking",
        (("prompt", *_Q), "completions"),
        _ranked(("completions",), _best_first),
        optional=("system",),
    ),
]
FEEDBACK = [
    Dialect(
        "replies with a label",
        "feedback",
        ("prompt", _REPLY, _LABELS),
        _labelled(_plain_feedback),
        optional=("system",),
    ),
    Dialect("conversations with a label", "feedback", ("messages", _LABELS), _labelled(_conversation_last("messages"))),
    Dialect(
        "ShareGPT with a label", "feedback", ("conversations", _LABELS), _labelled(_conversation_last("conversations"))
    ),
    Dialect(
        "questions with a labelled reply", "feedback", (_Q, _OUTPUT, _LABELS), _labelled(_instruction), optional=_ASIDE
    ),
]
DEMONSTRATIONS = [
    Dialect("prompts with a completion", "demonstration", ("prompt", _REPLY), _prompt_completion, optional=("system",)),
    Dialect("messages", "demonstration", ("messages",), _conversation("messages"), optional=("system",)),
    Dialect("ShareGPT", "demonstration", ("conversations",), _conversation("conversations"), optional=("system",)),
    Dialect("questions with a reply", "demonstration", (_QUESTIONS, _OUTPUT), _instruction, optional=_ASIDE),
]
TEXTS = [Dialect("running text", "demonstration", ("text",), _text)]
PROMPTS = [
    Dialect("prompts with a system message", "prompt", ("prompt",), _prompt_system, "system", ("system",)),
    Dialect("prompts", "prompt", ("prompt",), _prompt_alone, optional=("system",)),
    Dialect(
        "conversations to go on with", "prompt", ("messages",), _open_conversation("messages"), optional=("system",)
    ),
    Dialect(
        "ShareGPT to go on with",
        "prompt",
        ("conversations",),
        _open_conversation("conversations"),
        optional=("system",),
    ),
    Dialect("questions", "prompt", (_QUESTIONS,), _question_alone, optional=_ASIDE),
]
TEXT_PROMPTS = [Dialect("running text as prompts", "prompt", ("text",), _text_prompt)]

NAMES = sorted(
    {
        name
        for table in (PAIRS, RANKINGS, FEEDBACK, DEMONSTRATIONS, TEXTS, PROMPTS)
        for dialect in table
        for need in (*dialect.needs, dialect.optional)
        for name in ((need,) if isinstance(need, str) else need)
    }
    | {"id", "margin"}
)


def check_columns(columns: Mapping[str, str | None] | None) -> dict[str, str]:
    """The mapping our name -> the data's name, as `--columns` gives it; raises UsageError."""
    checked = {}
    for ours, theirs in (columns or {}).items():
        if ours not in NAMES:
            near = get_close_matches(str(ours), NAMES, n=1)
            hint = f'use "{near[0]}"' if near else f"the names are {', '.join(NAMES)}"
            what = f'there is no column "{shown(ours)}" to fill'
            raise UsageError(what, where="--columns", code="E303", next=hint)
        if theirs is not None and not isinstance(theirs, str):
            what = f'"{ours}" is to be read from {kind(theirs)}'
            raise UsageError(what, where="--columns", code="E303", next="give a column's name")
        checked[ours] = theirs or ""
    return checked


def recognise(
    rows: Sequence[tuple[Source, Mapping]], dialects: list[Dialect], names: Mapping[str, str], wanted: str
) -> Dialect:
    """The dialect of a file by its first rows: the first that half of them fit, else the one most fit.

    Raises DataError (E202) where none fits any row, with the columns found and the nearest dialect.
    """
    for column in names.values():
        if column and not any(column in row for _, row in rows):
            place, row = rows[0]
            raise absent(column, row).at(place)
    views = [View(row, names) for _, row in rows]
    best, most = None, 0
    for dialect in dialects:
        if dialect.hint and not any(view.has(dialect.hint) and view.get(dialect.hint) for view in views):
            continue
        count = sum(dialect.matches(view) for view in views)
        if 2 * count >= len(views):
            return dialect
        if count > most:
            best, most = dialect, count
    if best is not None:
        return best
    place, row = rows[0]
    view = views[0]

    def met(dialect: Dialect) -> float:
        needs = [(n,) if isinstance(n, str) else n for n in dialect.needs]
        return sum(any(view.has(c) for c in n) for n in needs) / len(needs)

    nearest = max(dialects, key=met)
    everything = [d for table in (PAIRS, RANKINGS, FEEDBACK, DEMONSTRATIONS, TEXTS) for d in table]
    everything += PROMPTS if len(row) == 1 else []  # beside other columns a prompt alone says little
    other = next((d for d in everything if d.matches(view)), None)
    if met(nearest) and other is None:
        need = next(n for n in ((n,) if isinstance(n, str) else n for n in nearest.needs) if not any(map(view.has, n)))
        raise absent(view.name(need[0]) or need[0], row).at(place)
    found = ", ".join(shown(k, 40) for k in list(row)[:12]) or "none"
    what = f"no {wanted} in the columns {found}" + (f" (they look like {other.name})" if other else "")
    fields = ", ".join(n if isinstance(n, str) else n[0] for n in dialects[0].needs)
    example = dialects[0].needs[-1] if isinstance(dialects[0].needs[-1], str) else dialects[0].needs[-1][0]
    raise DataError(what, where=str(place), code="E202", next=f"give {fields}, or name them: --columns {example}=NAME")
