"""Messages to text: the tokenizer's own chat template in transformers' sandbox, its refusals in its own words.

A template comes with a model or from a file; it is code by strangers. It is tried once in a child process with little
time and memory before it meets data.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from palate.data.records import Message
from palate.errors import DataError, ModelError, NotThereError

_PROBE = "palateprobe"
_SECONDS, _BYTES = 2, 1 << 30


def render(messages: Sequence[Message], tokenizer, *, prompt: bool, where: str | None = None) -> str:
    """Text of a conversation under `tokenizer`'s chat template.

    prompt: also write what opens the assistant's next turn, as generation does.
    Errors: ModelError E408 where there is no usable template, DataError E216 with the template's own words where it
    refuses this conversation.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, and this row is a conversation",
            where=where,
            code="E408",
            next="give one with --chat-template FILE, or use rows of plain strings",
        )
    if not messages:
        raise DataError("the prompt has no message", where=where, code="E207", next="fix the row or skip it")
    check_template(_chosen(tokenizer), tokenizer, where=where)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateSyntaxError as error:
        raise _broken(f"line {error.lineno} of the chat template: {error.message}", where) from None
    except (jinja2.exceptions.SecurityError, OverflowError, RecursionError, MemoryError) as error:
        raise _broken(f"the chat template does what a template may not: {_words(error)}", where) from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        roles = " ".join(message.role for message in messages)
        raise DataError(
            f'the chat template refuses this conversation ({roles}): "{_words(error)}"',
            where=where,
            code="E216",
            next="fix or skip the row, or give another template with --chat-template FILE",
        ) from None


def load_template(template: str | Path, tokenizer) -> str:
    """The template's text, set as `tokenizer.chat_template` after a trial.

    template: a path, or the template itself (a string with a brace in it).
    Errors: NotThereError where the path does not exist; ModelError E408 naming the line or the limit.
    """
    name = "the chat template"
    if isinstance(template, Path) or "{" not in template:
        path = Path(template)
        name = str(path)
        try:
            template = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotThereError(
                "there is no such file", where=name, code="E408", next="name a file that exists"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise _broken(f"the template cannot be read: {_words(error)}", name) from None
    check_template(template, tokenizer, where=name)
    tokenizer.chat_template = template
    return template


def check_template(template: str, tokenizer, *, where: str | None = None) -> None:
    """Nothing, if `template` compiles and renders a short conversation within two seconds and a GiB of memory.

    Raises ModelError E408 that names the line or the limit. That it refuses the conversation in words is no fault.
    """
    fault = _fault(template, tuple(sorted(_variables(tokenizer).items())))
    if fault is not None:
        raise _broken(fault, where)


@lru_cache(maxsize=256)
def _fault(template: str, variables: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with a template, tried in a child; None if nothing is."""
    job = {"template": template, "variables": dict(variables), "bytes": _BYTES, "seconds": _SECONDS}
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps(job).encode(),
            capture_output=True,
            check=False,
            timeout=30 * _SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"the template was not done after {30 * _SECONDS} seconds"
    if child.returncode < 0:
        return f"the template was not done after {_SECONDS} seconds of computing"
    try:
        kind, words = json.loads(child.stdout)
    except ValueError:
        return "the template's trial ended without an answer"
    if kind == "limit":
        return f"the template does what a template may not: {words}"
    return words if kind == "syntax" else None


def turn_tail(tokenizer) -> str | None:
    """What the template writes after an assistant's last content, or None where it tells of no such place.

    Found by rendering a short conversation, so it holds for whatever the template is called.
    """
    user, reply = Message("user", "hello"), Message("assistant", _PROBE)
    for chat in ((user, reply), (Message("system", "hello"), user, reply)):
        try:
            text = render(chat, tokenizer, prompt=False)
        except (DataError, ModelError):
            continue
        _, found, tail = text.rpartition(_PROBE)
        if found:
            return tail
    return None


def opened_thought(tokenizer) -> str:
    """A tag and blanks, as "<think>\\n", that end what generation sees and that no stored reply begins with; or ""."""
    user, reply = Message("user", "hello"), Message("assistant", _PROBE)
    for chat in ((user,), (Message("system", "hello"), user)):
        try:
            opening = render(chat, tokenizer, prompt=True)
            stored = render((*chat, reply), tokenizer, prompt=False)
        except (DataError, ModelError):
            continue
        tag = re.search(r"<\w+>\s*\Z", opening)
        return tag[0] if tag and not stored.startswith(opening) else ""
    return ""


def _chosen(tokenizer) -> str:
    """The template that conversations get, where the tokenizer has several by name."""
    known = tokenizer.chat_template
    return known if isinstance(known, str) else tokenizer.get_chat_template()


def _variables(tokenizer) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _words(error: BaseException) -> str:
    """The error's own words on one line, at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _broken(what: str, where: str | None) -> ModelError:
    return ModelError(what, where=where, code="E408", next="give another template with --chat-template FILE")


# The child sees jinja2 alone. The parent does not trust what it prints beyond two strings.
_CHILD = r"""
import json, resource, sys
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
try:
    resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))
except (ValueError, OSError):
    pass
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
def refuse(message):
    raise jinja2.TemplateError(message)
def answer(kind, words):
    print(json.dumps([kind, " ".join(str(words).split())[:200]]))
    sys.exit(0)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: form
chat = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user")]
try:
    template = environment.from_string(job["template"])
    template.render(messages=chat, tools=None, documents=None, add_generation_prompt=True, **job["variables"])
except jinja2.TemplateSyntaxError as error:
    answer("syntax", f"line {error.lineno}: {error.message}")
except jinja2.exceptions.SecurityError as error:
    answer("limit", error)
except (OverflowError, RecursionError, MemoryError) as error:
    answer("limit", str(error) or type(error).__name__)
except Exception as error:
    answer("words", error)
answer("good", "")
"""
