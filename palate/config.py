"""Defaults, a YAML file, the environment and flags become one typed config; each value remembers where it came from.

The YAML read here is a plain subset of YAML 1.2: mappings, sequences and scalars. PyYAML only cuts the text into
events; scalars are resolved here, because PyYAML's own rules are YAML 1.1, where `5e-7` is text, `off` is False, `012`
is 10 and the last of two equal keys wins. Tags are refused, so nothing in a file can name code.
"""

import difflib
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from palate.errors import MachineError, PalateError, UsageError

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 64, 10_000
RESERVED = {"PALATE_CACHE", "PALATE_TEST_DATA"}  # environment variables that are no config keys

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,19})\Z")  # no leading zero: 012 is octal to some readers, decimal to others
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WORDS |= {sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}
_WORDS |= {word: math.nan for word in (".nan", ".NaN", ".NAN", "nan", "NaN")}
_WORDS |= {sign + word: float(sign + "inf") for sign in ("", "-") for word in ("inf", "Infinity")}
_NO_VALUE = {"None", "null", "Null", "NULL"}  # not "none": that is a word of ours (`--eval none`)


# --- YAML ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One YAML value: a scalar, a list of nodes or a dict of nodes; `text` is a plain scalar as it was written."""

    value: Any
    line: int
    text: str | None = None
    size: int = 1


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar in YAML 1.2's core schema; what is ambiguous (`012`, `1_000`, `12:30`) stays text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text) and not re.match(r"[-+]?[0-9]+\Z", text):
        return float(text)
    return text


class _Events(yaml.SafeLoader):
    """PyYAML's tokens and events, nothing of its constructors."""


class _Builder:
    """Builds nodes from events, refusing what a config has no use for."""

    def __init__(self, text: str, name: str):
        self.name, self.anchors = name, {}
        self.events = []
        try:
            depth = 0
            for event in yaml.parse(text, Loader=_Events):  # bracket by bracket: PyYAML slows down with their depth
                self.events.append(event)
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if len(self.events) > 2 * MAX_NODES:
                    raise self.refuse(f"more than {MAX_NODES:,} values", 1, code="E312", next="check the file")
                if depth > MAX_DEPTH:
                    line = event.start_mark.line + 1
                    raise self.refuse(f"nested deeper than {MAX_DEPTH}", line, code="E312", next="check the file")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            code = error.character if isinstance(error.character, int) else 0
            what = f"control character U+{code:04X} is not allowed"
            raise self.refuse(what, line, next="remove it") from None
        except yaml.MarkedYAMLError as error:
            raise self.broken(error) from None
        self.at = 0

    def refuse(self, what, line, column=None, code="E304", next="write plain keys and values"):
        where = f"{self.name}:{line}" + (f":{column}" if column else "")
        return UsageError(what, where=where, code=code, next=next)

    def broken(self, error: yaml.MarkedYAMLError) -> UsageError:
        open_marks = []
        for event in self.events:
            if isinstance(event, yaml.CollectionStartEvent):
                open_marks.append(event.start_mark if event.flow_style else None)
            elif isinstance(event, yaml.CollectionEndEvent):
                open_marks.pop()
        mark, problem = error.problem_mark or error.context_mark, error.problem or "broken"
        if mark is None:
            return self.refuse(f"not YAML: {problem}", 1)
        if open_marks and open_marks[-1] is not None:  # the bracket that was never closed, not the end of the file
            problem = f"the bracket opened here is not closed by line {mark.line + 1}"
            mark = open_marks[-1]
        elif "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        return self.refuse(f"not YAML: {problem}", mark.line + 1, mark.column + 1, next="mend the line")

    def document(self) -> Node:
        starts = [e for e in self.events if isinstance(e, yaml.DocumentStartEvent)]
        if len(starts) > 1:
            raise self.refuse("a second document begins here", starts[1].start_mark.line + 1, next="keep one document")
        for event in self.events:
            tag = getattr(event, "tag", None)
            if tag is not None:
                line = event.start_mark.line + 1
                raise self.refuse(f'tag "{tag[:80]}" is not allowed', line, code="E305", next="remove the tag")
        if not starts:
            return Node({}, 1)
        self.at = next(i for i, e in enumerate(self.events) if isinstance(e, yaml.DocumentStartEvent)) + 1
        root = self.node()
        if root.value is None:
            return Node({}, root.line)
        if not isinstance(root.value, dict):
            raise self.refuse("the file is not a mapping of keys to values", root.line, next='write "key: value" lines')
        return root

    def node(self) -> Node:
        event = self.events[self.at]
        self.at += 1
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.refuse(f'alias "*{event.anchor[:80]}" has no anchor before it', line, next="write the value")
            return self.anchors[event.anchor]
        if isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0]
            node = Node(scalar(event.value) if plain else event.value, line, event.value if plain else None)
        elif isinstance(event, yaml.SequenceStartEvent):
            items, size = [], 1
            while not isinstance(self.events[self.at], yaml.SequenceEndEvent):
                items.append(self.node())
                size = self.grow(size, items[-1])
            self.at += 1
            node = Node(items, line, size=size)
        else:
            node = self.mapping(line)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def mapping(self, line: int) -> Node:
        table, size, lines = {}, 1, {}
        while not isinstance(self.events[self.at], yaml.MappingEndEvent):
            event = self.events[self.at]
            key_line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise self.refuse("a key must be one plain word", key_line)
            self.at += 1
            key = event.value
            if key in table:
                what = f'key "{key[:80]}" stands on line {lines[key]} and again on line {key_line}'
                raise self.refuse(what, key_line, code="E302", next="keep one")
            lines[key] = key_line
            value = self.node()
            size = self.grow(size, value)
            table[key] = Node(value.value, key_line, value.text, value.size)  # an alias is where it is used
        self.at += 1
        return Node(table, line, size=size)

    def grow(self, size: int, node: Node) -> int:
        if size + node.size > MAX_NODES:
            what = f"the aliases of this file expand to more than {MAX_NODES:,} values"
            raise self.refuse(what, node.line, code="E306", next="remove the aliases")
        return size + node.size


def read_yaml(path: str | Path) -> dict[str, Node]:
    """The top-level keys of a YAML config file, each value with its line.

    Raises UsageError: E302 duplicate key, E304 not YAML (line:column), E305 tag, E306 aliases, E312 size or depth.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        near = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
        hint = f"did you mean {', '.join(near)}" if near else "check the path"
        raise UsageError("no such config file", where=_show(path), code="E101", next=hint) from None
    except IsADirectoryError:
        raise UsageError("a folder, not a config file", where=_show(path), code="E101", next="name the file") from None
    except PermissionError:
        raise MachineError("the config file cannot be read", where=_show(path), code="E103", next="chmod it") from None
    if len(raw) > MAX_BYTES:
        raise UsageError("larger than 1 MiB, no config", where=_show(path), code="E312", next="check the file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start} is not UTF-8"
        raise UsageError(what, where=f"{_show(path)}:{line}", code="E304", next="save it as UTF-8") from None
    return _Builder(text, _show(path)).document().value


# --- the shape of a config type ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """One key that takes a value: its dotted path, the pydantic field, and whether below it any name may stand."""

    path: str
    field: Any
    open: bool

    @property
    def wants(self) -> set:
        return _wants(self.field.annotation)

    @property
    def inf(self) -> bool:
        """Whether infinity is a value here: only where the help text says so."""
        return "inf" in (self.field.description or "").split()

    @property
    def many(self) -> bool:
        """Whether each name below it takes a list."""
        return self.open and list in _wants(_item(self.field.annotation))

    @property
    def flag(self) -> str:
        return "--" + self.path.replace("_", "-")


def leaves(config_type: type[BaseModel], prefix: str = "") -> dict[str, Leaf]:
    """Dotted path to Leaf, for every key of the config type and its groups, in the order they are declared."""
    found = {}
    for name, field in config_type.model_fields.items():
        path = prefix + name
        group = _group(field.annotation)
        if group is not None:
            found |= leaves(group, path + ".")
        else:
            found[path] = Leaf(path, field, open=dict in _wants(field.annotation))
    return found


def _alternatives(annotation) -> list:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [b for a in get_args(annotation) for b in _alternatives(a)]
    return [annotation]


def _group(annotation) -> type[BaseModel] | None:
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _wants(annotation) -> set:
    """The plain types (and literal values) that an annotation lets in."""
    found = set()
    for kind in _alternatives(annotation):
        if get_origin(kind) is Literal:
            found |= set(get_args(kind))
        elif kind is type(None):
            found.add(None)
        else:
            found.add(get_origin(kind) or kind)
    return found


def _item(annotation):
    """The annotation of a dict's or list's values."""
    for kind in _alternatives(annotation):
        if get_origin(kind) in (dict, list, tuple, set):
            return get_args(kind)[-1] if get_args(kind)[-1] is not Ellipsis else get_args(kind)[0]
    return Any


def _bounds(field) -> str:
    """The allowed range in words, from the constraints on a field and inside its annotation."""
    found = list(field.metadata)

    def gather(annotation):
        if get_origin(annotation) is Annotated:
            for extra in get_args(annotation)[1:]:
                found.extend(getattr(extra, "metadata", None) or [extra])
            gather(get_args(annotation)[0])
        elif get_origin(annotation) in (Union, types.UnionType):
            for kind in get_args(annotation):
                gather(kind)

    gather(field.annotation)
    words = []
    for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
        for rule in found:
            if getattr(rule, name, None) not in (None, math.inf):
                words.append(f"{sign} {getattr(rule, name)}")
    text = " and ".join(dict.fromkeys(words))
    literal = _choices(field.annotation)
    return " or ".join(filter(None, [text, literal]))


def _choices(annotation) -> str:
    return ", ".join(f'"{x}"' if isinstance(x, str) else str(x) for x in _literals(annotation))


def _literals(annotation) -> list:
    found = []
    for kind in _alternatives(annotation):
        if get_origin(kind) is Literal:
            found += get_args(kind)
    return found


_NAMES: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "20"),
    float: ("a number", "0.1"),
    bool: ("true or false", "true"),
}
_NAMES |= {str: ("text", "name"), Path: ("a path", "name"), dict: ("names with values", "{name: value}")}
_NAMES |= {list: ("a list", "[a, b]"), tuple: ("a list", "[a, b]"), Any: ("a value", "0.1")}


def describe(annotation) -> tuple[str, str]:
    """What a key takes, in words, and one example value."""
    wants = _wants(annotation)
    found = [_NAMES[kind] for kind in _NAMES if kind in wants]
    words = [words for words, _ in found] + ([_choices(annotation)] if _choices(annotation) else [])
    literals = _literals(annotation)
    return " or ".join(words) or "a value", found[0][1] if found else str(literals[0]) if literals else "value"


# --- filling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a value came from: `default`, `yaml`, `environment` or `flag`, and the words that an error shows."""

    kind: str
    where: str


def fill(
    config_type: type[BaseModel],
    flags: Mapping[str, Any] = types.MappingProxyType({}),
    yaml_path: str | Path | None = None,
    environ: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[BaseModel, dict[str, Origin]]:
    """The config, and for every key the place its value came from: defaults, then YAML, environment, flags.

    flags: dotted path (`train.warmup_steps`) to text, as on a command line, or to a value that is used as it is.
    environ: `PALATE_LR`, `PALATE_TRAIN__WARMUP_STEPS`; other variables are not looked at.
    Raises UsageError naming the file and line, variable or flag: E301 unknown key, E303 type, E307 range, E308
    contradiction, E309 a written "None", E310 unresolved `${X}`, E317 a key that must be given.
    """
    known = leaves(config_type)
    raw: dict[str, Any] = {}
    origins = {path: Origin("default", f'default of "{path}"') for path in known}

    def put(path: str, value, origin: Origin):
        table, parent = raw, _open_parent(path, known)
        # below an open table a name is one key, dots and all: columns {"meta.chosen": ...}
        *groups, last = path.split(".") if parent is None else [*parent.split("."), path[len(parent) + 1 :]]
        for name in groups:
            table = table.setdefault(name, {})
        table[last] = value
        origins[path] = origin

    if yaml_path is not None:
        _from_yaml(read_yaml(yaml_path), known, _show(yaml_path), environ, put)
    for name, path in _environment_keys(environ, known):
        _put_text(path, environ[name], known, Origin("environment", f"environment variable {name}"), put)
    for path, value in flags.items():
        origin = Origin("flag", "--" + path.replace("_", "-"))
        if isinstance(value, str):
            _put_text(path, value, known, origin, put)
        else:
            _leaf_of(path, known, origin.where)
            put(path, value, origin)
    try:
        return config_type.model_validate(raw), origins
    except ValidationError as error:
        raise _explain(error, config_type, known, origins) from None


def locate(error: PalateError, origins: Mapping[str, Origin]) -> PalateError:
    """The same error, its `where` turned from config keys ("lr", or "loss,loss_options.beta") into their places."""
    keys = [k.strip() for k in (error.where or "").split(",")]
    if error.where and all(key in origins for key in keys):
        error.where = ", ".join(_where(key, origins) for key in keys)
    return error


def _where(key: str, origins) -> str:
    return origins[key].where


def _from_yaml(nodes: dict[str, Node], known, name: str, environ, put, prefix: str = ""):
    for key, node in nodes.items():
        path = prefix + key
        origin = Origin("yaml", f'{name}:{node.line}: key "{path}"')
        parent = known.get(prefix.rstrip("."))
        leaf = known.get(path)
        if leaf is None and parent is not None and parent.open:
            put(path, _value(node, _item(parent.field.annotation), path, origin, environ), origin)
        elif leaf is not None and leaf.open and isinstance(node.value, dict):
            put(path, {}, origin)
            _from_yaml(node.value, known, name, environ, put, path + ".")
        elif leaf is not None:
            if node.value == "":
                raise _no_value("", origin)
            put(path, _value(node, leaf.field.annotation, path, origin, environ, leaf.inf), origin)
        elif any(p.startswith(path + ".") for p in known):
            if node.value is None:
                continue  # an empty group, as an editor leaves it
            if not isinstance(node.value, dict):
                raise UsageError(
                    "a group of keys, not a value",
                    where=origin.where,
                    code="E303",
                    next=f'write keys below it, such as "{_first_under(path, known)}"',
                )
            _from_yaml(node.value, known, name, environ, put, path + ".")
        else:
            raise _unknown(path, known, f"{name}:{node.line}", dashes=False)


def _value(node: Node, annotation, path: str, origin: Origin, environ, inf: bool = False):
    wants = _wants(annotation)
    if isinstance(node.value, dict):
        if not wants & {dict, Any}:
            raise _wrong_type("a mapping", annotation, origin)
        return {k: _value(v, _item(annotation), f"{path}.{k}", origin, environ) for k, v in node.value.items()}
    if isinstance(node.value, list):
        if not wants & {list, tuple, set, Any}:
            raise _wrong_type("a list", annotation, origin)
        return [_value(v, _item(annotation), path, origin, environ) for v in node.value]
    value = node.value
    if isinstance(value, str):
        value = _expand(value, environ, origin)
        if value in _NO_VALUE:
            raise _no_value(value, origin)
    elif value is None:
        if not wants & {None, Any}:
            raise _no_value("null", origin)
    elif wants & {str, Path} and not wants & {bool if isinstance(value, bool) else float, int, Any}:
        value = node.text  # a name made of digits is still a name
    return _fits(value, annotation, origin, inf)


def _put_text(path: str, text: str, known, origin: Origin, put):
    leaf, annotation = _leaf_of(path, known, origin.where)
    if leaf.open and path == leaf.path:  # columns "chosen=good,rejected=bad"
        for part in [text] if leaf.many else filter(None, text.split(",")):
            key, equals, value = part.partition("=")
            if not equals or not key.strip():
                example = f"{leaf.path.replace('_', '-')} name=value,other=value"
                raise UsageError(f'"{part}" is no NAME=VALUE', where=origin.where, code="E303", next=f"write {example}")
            put(f"{path}.{key.strip()}", _text(value.strip(), _item(leaf.field.annotation), origin), origin)
        return
    if text == "" and path == leaf.path:  # below an open table it says something: --columns prompt=
        raise _no_value("", origin)
    put(path, _text(text, annotation, origin, leaf.inf), origin)


def _text(text: str, annotation, origin: Origin, inf: bool = False):
    """Text of a flag or a variable, read as the key wants it."""
    wants = _wants(annotation)
    if text in _NO_VALUE:
        raise _no_value(text, origin)
    if text in wants:  # a literal
        return text
    if wants & {list, tuple, set}:
        return [_text(part.strip(), _item(annotation), origin) for part in text.split(",") if part.strip()]
    value = scalar(text)
    if value is not None and (isinstance(value, bool) and wants & {bool, Any}):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and wants & {int, float, Any}:
        return _fits(value, annotation, origin, inf)
    return _fits(text, annotation, origin)


def _fits(value, annotation, origin: Origin, inf: bool = False):
    """The value, where its kind is one that the annotation lets in; pydantic alone would take "off" for False."""
    wants = _wants(annotation)
    if isinstance(value, str) and "\0" in value:
        raise UsageError("U+0000 stands in the text", where=origin.where, code="E303", next="remove it")
    if Any in wants or value in wants:
        fine = True
    elif isinstance(value, bool):
        fine = bool in wants
    elif isinstance(value, str):
        fine = bool(wants & {str, Path}) or not any(isinstance(w, type) for w in wants)  # a choice: pydantic lists it
    elif isinstance(value, int | float):
        fine = bool(wants & {int, float}) or any(isinstance(w, int | float) for w in wants)
    else:
        fine = None in wants
    if isinstance(value, float) and fine and (math.isnan(value) or (math.isinf(value) and not inf)):
        raise UsageError(f"{value} is not finite", where=origin.where, code="E307", next="give a finite number")
    if not fine:
        raise _wrong_type(_shown(value), annotation, origin)
    return value


def _expand(text: str, environ, origin: Origin) -> str:
    def replace(match):
        if match[1] not in environ:
            raise UsageError(f"${{{match[1]}}} is not set", where=origin.where, code="E310", next=f"set {match[1]}")
        return environ[match[1]]

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, text)


def _leaf_of(path: str, known: dict[str, Leaf], where: str) -> tuple[Leaf, Any]:
    """The leaf that a dotted path names or stands under, and the annotation of its value."""
    if path in known:
        return known[path], known[path].field.annotation
    parent = _open_parent(path, known)
    if parent is not None:
        return known[parent], _item(known[parent].field.annotation)
    raise _unknown(path, known, where, dashes=where.startswith("--"))


def _open_parent(path: str, known: dict[str, Leaf]) -> str | None:
    """The open table (`columns`, `loss_options`) that a path stands under."""
    return next((name for name, leaf in known.items() if leaf.open and path.startswith(name + ".")), None)


def _environment_keys(environ, known):
    for name in sorted(environ):
        if not name.startswith("PALATE_") or name in RESERVED:
            continue
        path = name.removeprefix("PALATE_").lower().replace("__", ".")
        if path in known or _open_parent(path, known) is not None:
            yield name, path
        else:  # another verb's key is no mistake, a near miss of ours is
            near = nearest(path, known, cutoff=0.85)
            if near and len(path) > 3:
                right = "PALATE_" + near.upper().replace(".", "__")
                raise UsageError(
                    "no such key", where=f"environment variable {name}", code="E301", next=f"did you mean {right}"
                )


def nearest(name: str, names, cutoff: float = 0.6) -> str | None:
    """The one of `names` that `name` was probably meant to be, also without its group; None where none is near."""
    names = list(names)
    found = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if found:
        return found[0]
    tails = {n.rpartition(".")[2]: n for n in reversed(names)}
    found = difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1, cutoff=max(cutoff, 0.7))
    return tails[found[0]] if found else None


def _unknown(path: str, known, where: str, *, dashes: bool) -> UsageError:
    near = nearest(path, known)
    shown = (lambda p: "--" + p.replace("_", "-")) if dashes else (lambda p: f'"{p}"')
    listed = ", ".join(sorted({shown(p.split(".")[0]) for p in known}))
    hint = f"did you mean {shown(near)}" if near else f"use one of {listed}"
    what = "no such option" if dashes else f'unknown key "{path[:80]}"'
    return UsageError(what, where=where, code="E301", next=hint)


def _first_under(path: str, known) -> str:
    return next(p for p in known if p.startswith(path + "."))


def _no_value(text: str, origin: Origin) -> UsageError:
    return UsageError(f'"{text}" is no value', where=origin.where, code="E309", next="leave the key out")


def _wrong_type(found: str, annotation, origin: Origin) -> UsageError:
    words, example = describe(annotation)
    hint = f"write for example {example}"
    near = difflib.get_close_matches(found.strip('"'), [str(x) for x in _literals(annotation)], n=1)
    if near:
        hint = f'did you mean "{near[0]}"'
    return UsageError(f"wants {words}, found {found}", where=origin.where, code="E303", next=hint)


def _shown(value) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _show(path) -> str:
    """A path safe to print on one line."""
    return str(path).encode("unicode_escape").decode() if not str(path).isprintable() else str(path)


_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "multiple_of"}


def _explain(error: ValidationError, config_type, known: dict[str, Leaf], origins) -> PalateError:
    """pydantic's findings as one error of ours: the first key in the config's order, the number of the others."""
    by_key: dict[str, list] = {}
    for item in error.errors(include_url=False):
        path = ""
        for part in item["loc"]:  # a union adds the names of its members after the key
            longer = f"{path}.{part}" if path else str(part)
            fits = longer in known or any(k.startswith(longer + ".") for k in known)
            inside = path in known and known[path].open and longer in origins
            if not (fits or inside):
                break
            path = longer
        if item["type"] == "extra_forbidden":
            path = ".".join(map(str, item["loc"]))
        by_key.setdefault(path, []).append(item)
    order = {path: i for i, path in enumerate(known)}
    path, items = min(by_key.items(), key=lambda pair: order.get(pair[0], len(order)))
    others = f" (and {len(by_key) - 1} more: {', '.join(p or 'the whole' for p in by_key if p != path)})"
    others = others if len(by_key) > 1 else ""
    for item in items:  # a validator's own error, already in our words
        own = item.get("ctx", {}).get("error")
        if isinstance(own, PalateError):
            own.where = own.where or (path if path in origins else None)
            return locate(own, origins)
        if own is not None:
            where = origins[path].where if path in origins else None
            return UsageError(str(own) + others, where=where, code="E308", next="change one of them")
    kinds = {item["type"] for item in items}
    leaf = known.get(path) or known.get(_open_parent(path, known) or "")
    origin = origins.get(path, Origin("default", f'key "{path}"'))
    if "extra_forbidden" in kinds:
        return _unknown(path, known, origin.where, dashes=origin.kind == "flag")
    if "missing" in kinds:
        flag = "--" + path.replace("_", "-")
        return UsageError(f"{flag} is needed" + others, code="E317", next=f'give {flag} or "{path}" in the config file')
    value = _shown(items[0]["input"])
    if leaf is None:
        return UsageError(items[0]["msg"], where=origin.where, code="E303", next="change it")
    if kinds & _RANGE:
        what = f"{value} is out of range, allowed: {_bounds(leaf.field)}"
        return UsageError(what + others, where=origin.where, code="E307", next="give a value in the range")
    if kinds <= {"literal_error", "enum"}:
        found = difflib.get_close_matches(str(items[0]["input"]), [str(x) for x in _literals(leaf.field.annotation)], 1)
        hint = f'did you mean "{found[0]}"' if found else "give one of these"
        what = f"{value} is not allowed; allowed: {_choices(leaf.field.annotation)}"
        return UsageError(what + others, where=origin.where, code="E307", next=hint)
    words, example = describe(leaf.field.annotation)
    what = f"wants {words}, found {value}{others}"
    return UsageError(what, where=origin.where, code="E303", next=f"write for example {example}")
