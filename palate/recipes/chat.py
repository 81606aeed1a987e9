"""Talk to a model, and see what the model that it was made from would have said."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from palate.errors import DataError, PalateError, visible
from palate.recipes.generate import load_policy
from palate.recipes.verbs import check_model_options, stderr

_HELP = "/reset forgets the conversation, /exit leaves"
# What a model says must not steer a terminal.


class _ChatConfig(BaseModel):
    """Options of `palate chat`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Annotated[str, Field(description="Run folder, or any model as --model takes it")]
    max_tokens: Annotated[int, Field(gt=0, description="New tokens of a reply at most")] = 256
    temperature: Annotated[float, Field(ge=0, le=100, description="0 takes the likeliest token")] = 0.7
    seed: Annotated[int, Field(ge=0, description="Of the draws; both sides get the same")] = 0
    chat_template: Annotated[str | None, Field(description="Jinja file to use instead of the models' template")] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, mps")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="Run Python code that the model brings")] = False
    revision: Annotated[str | None, Field(description="Commit of a Hub model; 40 hex digits with remote code")] = None


_WITH = "Model beside it; auto: the one that the run began from; none"
# "with" is a word of Python's, so this one field cannot stand in the class.
ChatConfig = create_model(
    "ChatConfig", __base__=_ChatConfig, __doc__=_ChatConfig.__doc__, **{"with": (str, Field("auto", description=_WITH))}
)


@dataclass
class Side:
    """One model of the conversation and what was said with it: (user, assistant) texts, oldest first."""

    label: str
    loaded: Any
    turns: list[tuple[str, str]] = field(default_factory=list)

    def reply(self, text: str, config, number: int, say: Callable[[str], None]) -> str:
        """What the model answers; the turn is remembered. number: of the turn, which draws anew in each.

        With a chat template the whole conversation is read, its oldest turns left out where they no longer fit;
        without one the text alone. Raises DataError where the text alone does not fit.
        """
        from palate.data.tokens import end_tokens
        from palate.sampling.generate import generate, text_of

        chat = bool(self.loaded.tokenizer.chat_template)
        ids = self._fitting(text, config.max_tokens, say) if chat else self._alone(text)
        (sample,) = generate(
            self.loaded.model,
            self.loaded.tokenizer,
            [ids],
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=config.seed + number,
            end_ids=end_tokens(self.loaded.tokenizer, chat),
        )
        answer = text_of(sample, ids, self.loaded.tokenizer)
        if chat:
            self.turns.append((text, answer))
        return answer

    def _alone(self, text: str):
        from palate.data.tokens import encode_prompt

        return self._checked(encode_prompt(text, self.loaded.tokenizer))

    def _fitting(self, text: str, max_tokens: int, say: Callable[[str], None]):
        """Ids of the conversation with `text` at its end; a quarter of the context at least is kept for the reply."""
        from palate.data.records import Message
        from palate.data.tokens import encode_prompt
        from palate.model.load import context

        limit = context(self.loaded.model) or 1 << 60
        most, dropped = limit - min(max_tokens, limit // 4), 0
        while True:
            said = [Message(role, part) for turn in self.turns for role, part in zip(_ROLES, turn, strict=True)]
            ids = encode_prompt((*said, Message("user", text)), self.loaded.tokenizer)
            if len(ids) <= most or not self.turns:
                break
            del self.turns[0]
            dropped += 1
        if dropped:
            turns = "the oldest turn does" if dropped == 1 else f"the {dropped} oldest turns do"
            say(f"{self.label}: {turns} not fit into {limit} tokens any more and {_WAS[dropped == 1]} left out")
        return self._checked(ids)

    def _checked(self, ids):
        from palate.model.load import context

        limit = context(self.loaded.model)
        if limit is not None and len(ids) >= limit:
            what = f"{self.label}: this has {len(ids)} tokens, the model takes {limit} with its reply"
            raise DataError(what, code="E223", next="say it shorter")
        if not len(ids):
            raise DataError(
                f"{self.label}: no token, so nothing predicts a first one", code="E222", next="say something"
            )
        return ids


_ROLES, _WAS = ("user", "assistant"), ("were", "was")


def run(config, *, verb: str = "chat", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Talks until /exit, the end of stdin or Ctrl-C; returns the turns: {"prompt", "tuned", "base"} each."""
    base = getattr(config, "with")
    other = parent_of(config.run) if base == "auto" else None if base == "none" else base
    check_model_options(config, *([config.run] if other is None or base == "auto" else [config.run, other]))
    tuned = Side("tuned" if other else "model", load_policy(config, config.run))
    sides = [tuned]
    if other is not None:
        try:
            sides.insert(0, Side("base", load_policy(config.model_copy(update={"revision": None}), other)))
        except PalateError as error:
            if base != "auto":
                raise
            say(f"base: {error} You talk to the result alone.")
            tuned.label = "model"
    named = " beside ".join(f"{side.label} {side.loaded.name}" for side in sides[::-1])
    say(f"{named}; {_HELP}")
    for side in sides:
        if not side.loaded.tokenizer.chat_template:
            say(f"{side.label}: no chat template, so every line is a prompt of its own")
    show = columns() if sys.stdout.isatty() else plain
    turns: list[dict[str, Any]] = []
    try:
        for text in lines():
            if text in ("/exit", "/quit"):
                break
            if text == "/reset":
                for side in sides:
                    side.turns.clear()
                say("forgotten")
            elif text.startswith("/"):
                say(_HELP)
            else:
                try:
                    said = {side.label: side.reply(text, config, len(turns), say) for side in sides}
                except DataError as error:
                    say(str(error))
                    continue
                show(said)
                turns.append({"prompt": text} | said)
    except KeyboardInterrupt:
        say("")
    return {"conversation": turns}


def parent_of(name: str) -> str | None:
    """The model that a run began from, as its run.json names it; None where `name` is no run."""
    from palate.files import read_json

    for folder in (Path(name).expanduser(), Path(name).expanduser().parent):
        if (folder / "run.json").is_file():
            record = read_json(folder / "run.json")
            parents = record.get("parents") if isinstance(record, dict) else None
            named = [parent["model"] for parent in parents or [] if isinstance(parent, dict) and parent.get("model")]
            return str(named[0]) if named else None
    return None


def lines() -> Iterator[str]:
    """What the person says, a line a turn, without blank ones: typed after a mark, or piped and then shown again."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history)

        while True:
            try:
                text = input("you    ").strip()
            except EOFError:
                return
            if text:
                yield text
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        if text := line.strip():
            print(f"you    {visible(text)}", flush=True)
            yield text


def plain(said: dict[str, str]) -> None:
    """The replies one after the other, each under its label."""
    for label, text in said.items():
        first, *rest = visible(text).strip("\n").split("\n")
        print("\n".join([f"{label:<6} {first}", *(f"       {line}" for line in rest)]), flush=True)


def columns(console=None) -> Callable[[dict[str, str]], None]:
    """A function that shows the replies side by side on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()

    def show(said: dict[str, str]) -> None:
        grid = Table(expand=True, show_edge=False, pad_edge=False)
        for label in said:
            grid.add_column(label, ratio=1, overflow="fold")
        grid.add_row(*(Text(visible(text).strip("\n")) for text in said.values()))
        console.print(grid)

    return show
