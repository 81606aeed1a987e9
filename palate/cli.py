"""The verbs of the command line: parse, call the recipe, print. Results go to stdout, everything said to stderr.

cyclopts finds the verb and its flags and draws the help; values stay text there, because `config.fill` knows where each
one came from and says so in its errors. Recipes, and with them torch, are imported once the line was understood.
"""

import contextlib
import errno
import importlib
import importlib.util
import inspect
import keyword
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from palate import __version__
from palate.errors import Interrupted, MachineError, PalateError, UsageError, visible
from palate.files import json_line


@dataclass(frozen=True)
class Verb:
    """One row of the table of verbs.

    config: `module:Type` with the options; the module's `run(config, *, verb, say, panel, argv) -> dict` does the work.
    operands: options that may be given without their flag, in this order; one that is a list takes all that are left.
    of: verbs, one of which is the next word; the module's `SWEEPS` has the options for each.
    """

    help: str
    config: str
    operands: tuple[str, ...] = ()
    of: tuple[str, ...] = ()

    @property
    def exists(self) -> bool:
        return importlib.util.find_spec(self.config.partition(":")[0]) is not None

    def load(self, inner: str | None = None) -> tuple[type, Callable[..., dict]]:
        name, _, type_name = self.config.partition(":")
        module = importlib.import_module(name)
        return module.SWEEPS[inner] if inner else getattr(module, type_name), module.run


VERBS = {
    "demo": Verb(
        "The main job on a small built-in model, in minutes: train, compare, report.", "palate.recipes.demo:DemoConfig"
    ),
    "doctor": Verb("Check preference data, and say what to do.", "palate.recipes.doctor:DoctorConfig", ("data",)),
    "pretrain": Verb("Train on running text, from nothing or onward.", "palate.recipes.pretrain:PretrainConfig"),
    "sft": Verb("Train on demonstrations: completions, conversations or text.", "palate.recipes.sft:SftConfig"),
    "reward": Verb("Train a reward model on preference pairs.", "palate.recipes.reward:RewardConfig"),
    "dpo": Verb(
        "Train on preference pairs; --loss names one of the DPO family.", "palate.recipes.preference:PreferenceConfig"
    ),
    "kto": Verb("Train on single completions, liked or not.", "palate.recipes.preference:FeedbackConfig"),
    "ppo": Verb("Train on own samples by what a reward says of them: PPO, RLOO, GRPO.", "palate.recipes.ppo:PpoConfig"),
    "spin": Verb("Train on demonstrations against own samples, in rounds: SPIN.", "palate.recipes.spin:SpinConfig"),
    "online-dpo": Verb(
        "Train on own samples as a judge orders them, sampled anew for every step: online DPO.",
        "palate.recipes.online:OnlineConfig",
    ),
    "self-reward": Verb(
        "Train on own samples by own judgement, in rounds: Self-Rewarding.",
        "palate.recipes.self_rewarding:SelfRewardConfig",
    ),
    "sweep": Verb(
        "One of dpo, kto, sft over a grid of options: best cell, table, plot.",
        "palate.recipes.sweep:SweepConfig",
        of=("dpo", "kto", "sft"),
    ),
    "score": Verb("Log-probs, implicit rewards and margins of pairs.", "palate.recipes.score:ScoreConfig"),
    "generate": Verb("Completions of the prompts of a file.", "palate.recipes.generate:GenerateConfig"),
    "pairs": Verb(
        "A preference file out of prompts: samples in a judge's order, or of two models, one stronger.",
        "palate.recipes.pairs:PairsConfig",
    ),
    "compare": Verb(
        "Win rates of models, or of files of completions, by a judge.",
        "palate.recipes.compare:CompareConfig",
        ("contestants",),
    ),
    "frontier": Verb(
        "Reward against KL for several methods and settings: points, hulls, table, plot.",
        "palate.recipes.frontier:FrontierConfig",
    ),
    "chat": Verb("Talk to a model, beside the one it was made from.", "palate.recipes.chat:ChatConfig", ("run",)),
    "report": Verb("One HTML page of one or several runs.", "palate.recipes.report:ReportConfig", ("runs",)),
    "runs": Verb("List runs; show RUN; diff A B.", "palate.recipes.runs:RunsConfig", ("action", "run", "other")),
}


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """The exit code: 0 done, 1 our bug, 2 usage, 3 refused, 4 not better, 5 machine, 6 interrupted and resumable."""
    if argv is None:  # a process of our own: leave by the same door on a polite kill
        argv = sys.argv[1:]
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, _interrupt)
    environ = os.environ if environ is None else environ
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # text from data must never end a run
    argv = [str(part) for part in argv]
    result, as_json = {}, "--json" in argv
    verb = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        result, as_json = _command(argv, environ)
        code = int(result.pop("exit_code", 0))
    except BaseException as caught:  # the one place where everything ends
        error, code = _understood(caught)
        result = dict(getattr(caught, "result", None) or {}) | {"error": str(error)}
        if getattr(error, "code", None):
            result["error_code"] = error.code
        if code == 1:
            say("".join(traceback.format_exception(caught)).rstrip())
        say(f"palate: {error}")
    if as_json and verb:
        result.pop("summary", None)
        head = {"verb": verb, "status": _STATUS.get(code, "error"), "exit_code": code, "out": result.pop("out", None)}
        _print(json_line(head | result).decode().rstrip("\n"))
    elif code == 0 or "summary" in result:
        lines = result.get("summary") or [f"{k:<12} {v}" for k, v in result.items() if isinstance(v, str | int | float)]
        if lines:
            _print(visible(lines if isinstance(lines, str) else "\n".join(lines)))
    return code


_STATUS = {0: "done", 1: "bug", 2: "usage", 3: "refused", 4: "not better", 5: "machine", 6: "interrupted"}


def entry() -> None:
    """What the installed `palate` command calls."""
    sys.exit(main())


def say(text: str = "") -> None:
    """A message for the person at the terminal: one line on stderr; a reader who went away stops nothing."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(visible(text), file=sys.stderr, flush=True)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        _drop_stdout()


def _drop_stdout() -> None:
    """Sends what stdout still holds nowhere, so that nothing is flushed into a closed pipe at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number, frame):
    raise KeyboardInterrupt


def _understood(caught: BaseException) -> tuple[BaseException | str, int]:
    """The exception as a person should read it, and the exit code."""
    if isinstance(caught, PalateError):
        return caught, caught.exit_code
    if isinstance(caught, KeyboardInterrupt):
        return Interrupted("interrupted", next="the same command with --resume goes on from the last checkpoint"), 6
    if isinstance(caught, SystemExit):
        return f"left with {caught.code}", caught.code if isinstance(caught.code, int) else 1
    machine = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE}
    if isinstance(caught, OSError) and caught.errno in machine:
        where = str(caught.filename) if caught.filename else None
        return MachineError(os.strerror(caught.errno), where=where, next="mend it, then --resume"), 5
    if isinstance(caught, OSError) and caught.errno == errno.ENAMETOOLONG:
        where = str(caught.filename)[:80] + "…"
        return UsageError("this name is too long", where=where, code="E119", next="take a shorter one"), 2
    if isinstance(caught, MemoryError) or type(caught).__name__ == "OutOfMemoryError":
        return MachineError("out of memory", next="lower --train.tokens or --max-length, or use --lora-rank"), 5
    return f"a bug of ours, {type(caught).__name__}; please report it with the lines above", 1


def _command(argv: list[str], environ: Mapping[str, str]) -> tuple[dict, bool]:
    """Finds the verb, fills its config, runs it: its result, and whether JSON was asked for."""
    from cyclopts import App

    app = App(
        name="palate",
        version=f"palate {__version__}",
        help="Teach a language model what people prefer: preference pairs in, a better model and the evidence out.",
        help_format="plaintext",
        result_action="return_value",
        help_epilogue="palate VERB --help lists a verb's options. Any of them may stand in a YAML file (-c FILE).",
    )
    there = {name: verb for name, verb in VERBS.items() if verb.exists}
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] not in ("--help", "-h", "--version"):
            raise UsageError("no such option", where=argv[0][:80], code="E301", next="see palate --help")
        for name, verb in there.items():
            app.command(_placeholder(), name=name, help=verb.help)
        _parse(app, argv, [])
        return {}, False
    name = argv[0]
    if name not in there:
        from palate.config import nearest

        near = nearest(name, there)
        hint = f"did you mean palate {near}" if near else f"use one of {', '.join(there)}"
        raise UsageError(f'no verb "{name[:80]}"', code="E301", next=hint)

    from palate.config import fill, leaves, locate

    verb, words = there[name], argv[1:]
    if verb.of:
        app = App(name=f"palate {name}", help=verb.help, help_format="plaintext", result_action="return_value")
        if not words or words[0] in ("--help", "-h"):
            for inner in verb.of:
                app.command(_placeholder(), name=inner, help=there[inner].help)
            _parse(app, words, [])
            return {}, False
        words = [_inner(name, verb, words[0]), *words[1:]]
    config_type, run = verb.load(words[0] if verb.of else None)
    known = leaves(config_type)
    given = {}
    called, words = (words[0], words[1:]) if verb.of else (name, words)
    app.command(_taker(given, known, verb.operands, "json" not in known), name=called, help=verb.help)
    _parse(app, [called, *_open_flags(words, known)], known)
    if not given:
        return {}, False  # --help was answered
    flags = given["flags"]
    as_json = bool(flags.get("json") if "json" in known else flags.pop("json", False))
    config, origins = fill(config_type, flags, given["config"], environ)
    if "json" in known:
        as_json = bool(config.json)
    try:
        result = run(
            config, verb=f"{name} {called}" if verb.of else name, say=say, panel=_panel, argv=["palate", *argv]
        )
    except PalateError as error:
        raise locate(error, origins) from error.__cause__
    result = dict(result or {})
    result.setdefault("out", getattr(config, "out", None))
    return result, as_json


def _inner(name: str, verb: Verb, word: str) -> str:
    """The verb that `palate NAME WORD` runs. Raises UsageError (E301) for another word."""
    from palate.config import nearest

    if word.startswith("-"):
        raise UsageError("no such option", where=word[:80], code="E301", next=f"see palate {name} --help")
    if word not in verb.of:
        near = nearest(word, verb.of)
        hint = f"did you mean palate {name} {near}" if near else f"use one of {', '.join(verb.of)}"
        raise UsageError(f'palate {name} does not run "{word[:80]}"', code="E301", next=hint)
    return word


def _panel(total_steps: int, stream=None):
    """A live panel on the terminal, plain lines elsewhere; imported with the run, not with the help."""
    from palate.panel import make_panel

    return make_panel(total_steps, stream or sys.stderr)


def _parse(app, argv: list[str], known) -> None:
    """Runs cyclopts over the line; what it refuses becomes one UsageError."""
    from cyclopts.exceptions import CycloptsError, UnknownOptionError, UnusedCliTokensError

    try:
        app(argv, exit_on_error=False, print_error=False)
    except (BrokenPipeError, SystemExit):  # the reader of the help (head, less) has seen enough
        _drop_stdout()
    except UnknownOptionError as error:
        from palate.config import nearest

        word = str(error.token.keyword or error.token.value).partition("=")[0]
        shown = {"--" + path.replace("_", "-"): path for path in known} | {"--config": "config", "--json": "json"}
        near = nearest(word.removeprefix("--"), [flag.removeprefix("--") for flag in shown])
        verb = argv[0] if known else ""
        hint = f"did you mean --{near}" if near else f"see {app.name[0]} {verb} --help".replace("  ", " ")
        raise UsageError("no such option", where=word, code="E301", next=hint) from None
    except UnusedCliTokensError as error:
        words = " ".join(error.unused_tokens or [])
        hint = f"give every option one value, in quotes where it has blanks; see {app.name[0]} {argv[0]} --help"
        raise UsageError(f"{words!r} belongs to no option", code="E300", next=hint) from None
    except CycloptsError as error:
        raise UsageError(str(error).rstrip("."), code="E300", next=f"see {app.name[0]} {argv[0]} --help") from None


def _placeholder() -> Callable:
    return lambda: None


def _taker(given: dict, known, operands: tuple[str, ...], own_json: bool) -> Callable:
    """A function whose signature is the verb's options, for cyclopts to fill; it keeps what was typed in `given`."""
    from cyclopts import Group, Parameter

    kinds = inspect.Parameter
    parameters, paths = [], {}
    for path, leaf in sorted(known.items(), key=lambda item: operands.index(item[0]) if item[0] in operands else 99):
        wants = leaf.wants
        annotation = bool | None if wants <= {bool, None} else dict[str, str] | None if leaf.open else str | None
        if wants & {list, tuple}:
            annotation = list[str] | None
        group = Group(path.split(".")[0].replace("_", "-"), sort_key=1) if "." in path else Group("options", sort_key=0)
        default = default_text(leaf.field)
        options = Parameter(
            name=leaf.flag,
            help=leaf.field.description or "",
            show_default=(lambda value, text=default: text) if default else False,
            negative_iterable=(),
            group=group,
        )
        name = path.replace(".", "__") + "_" * keyword.iskeyword(path)  # --with is a word of Python's
        paths[name] = path
        kind = kinds.POSITIONAL_OR_KEYWORD if path in operands else kinds.KEYWORD_ONLY
        parameters.append(kinds(name, kind, default=None, annotation=Annotated[annotation, options]))
    config_help = "YAML file of options; the environment (PALATE_LR) and flags overrule it."
    house = Group("every verb", sort_key=2)
    config_flag = Parameter(name=["--config", "-c"], help=config_help, group=house, show_default=False)
    extra = [kinds("config__", kinds.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, config_flag])]
    if own_json:
        json_flag = Parameter(
            name="--json", negative="", help="One JSON object as the last line of stdout.", group=house
        )
        extra.append(kinds("json__", kinds.KEYWORD_ONLY, default=None, annotation=Annotated[bool | None, json_flag]))

    signature = inspect.Signature(parameters + extra)

    def take(*given_operands, **options):
        values = signature.bind(*given_operands, **options).arguments
        flags: dict[str, Any] = {"json": True} if own_json and values.pop("json__", None) else {}
        given["config"] = values.pop("config__", None)
        for name, value in values.items():
            if isinstance(value, dict):
                flags |= {f"{paths[name]}.{key.replace(_DOT, '.')}": text for key, text in value.items()}
            elif isinstance(value, list) and paths[name] not in operands:
                flags[paths[name]] = ",".join(value)
            elif value is not None:
                flags[paths[name]] = value
        given["flags"] = flags

    setattr(take, "__signature__", signature)  # noqa: B010, a function's signature is no declared attribute
    take.__annotations__ = {p.name: p.annotation for p in parameters + extra}
    return take


def default_text(field) -> str:
    if field.is_required():
        return "needed"
    default = field.get_default(call_default_factory=True)
    if default is None or default is False or default in ({}, [], (), ""):
        return ""
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


_DOT = "\ue000"  # a dot inside a name, which cyclopts would take for a table of its own


def _open_flags(argv: list[str], known) -> list[str]:
    """`--columns chosen=good,rejected=bad` as `--columns.chosen good --columns.rejected bad`, which cyclopts reads.

    Where every name takes a list, as in `--grid beta=0.1,0.3`, a flag gives one name, and a name stands once.
    """
    open_flags = {leaf.flag: leaf.many for leaf in known.values() if leaf.open}
    out, at = [], 0
    while at < len(argv):
        word, equals, value = argv[at].partition("=")
        at += 1
        if word not in open_flags:
            out.append(argv[at - 1])
            continue
        if not equals:
            value, at = (argv[at], at + 1) if at < len(argv) else ("", at)
        for part in [value] if open_flags[word] else value.split(","):
            key, equals, text = part.partition("=")
            if not key.strip() or not equals:
                raise UsageError(
                    f'"{part[:80]}" is no NAME=VALUE', where=word, code="E303", next=f"write {word} name=value"
                )
            flag = f"{word}.{key.strip().replace('.', _DOT)}="
            if open_flags[word] and any(other.startswith(flag) for other in out):
                raise UsageError(f'"{key.strip()[:80]}" is given twice', where=word, code="E302", next="keep one")
            out.append(flag + text.strip())
    return out
