"""A grid of options to cells: every combination of the values, as the config of a run, named after its options."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from palate.errors import PalateError, UsageError
from palate.recipes.standings import Cell

MOST_CELLS = 1000
# what a grid cannot vary: where and how a run is shown, and what its cells are compared on
FIXED = {"model", "data", "eval", "eval_every", "out", "resume", "dry_run", "json"}
FIXED |= {"require_better", "log_every", "save_every"}


def cells_of(config) -> list[Cell]:
    """Every combination of the grid's values, in its order, each with the config of its run.

    Raises UsageError: E301 for a key that the verb does not take, E302 for one value twice, E307 for a value that does
    not fit, E308 where an option is given beside the grid or a combination cannot be, E317 for a grid without values.
    """
    if not config.grid:
        raise UsageError("names no values to try", where="grid", code="E317", next="give --grid beta=0.05,0.1,0.3")
    base = config.model_dump(include=set(config.inner.model_fields), exclude_unset=True)
    keys = {key: _option(config, key) for key in config.grid}
    if len(set(keys.values())) < len(keys):
        raise UsageError("names one option twice", where="grid", code="E302", next="give each option once")
    for key, values in config.grid.items():
        if not values:
            raise UsageError("has no values", where=f"grid.{key}", code="E317", next=f"write {key}=0.1,0.3")
        if len({repr(value) for value in _values(config.inner, base, key, keys[key], values)}) < len(values):
            raise UsageError("has one value twice", where=f"grid.{key}", code="E302", next="keep one")
    if (count := math.prod(map(len, config.grid.values()))) > MOST_CELLS:
        what = f"makes {count:,} cells; {MOST_CELLS:,} are allowed"
        raise UsageError(what, where="grid", code="E307", next="give fewer values")
    cells, names = [], set()
    for values in itertools.product(*config.grid.values()):
        options = dict(zip(keys.values(), values, strict=True))
        name = _name(options, names)
        names.add(name)
        cells.append(Cell(name, options, filled(config.inner, base, options, f"cell {name}", where_of(config))))
    return cells


def where_of(config) -> str:
    """The grid's keys as the place of an error that belongs to all of them."""
    return ", ".join(f"grid.{key}" for key in config.grid)


def _option(config, key: str) -> str:
    """The key of the inner config that a key of the grid names."""
    path = key.replace("-", "_")
    group, _, rest = path.partition(".")
    fields = config.inner.model_fields
    takes = [name for name in paths(config.inner) if name.partition(".")[0] not in FIXED]
    if group not in fields or group in FIXED or not (path in takes or (group == "loss_options" and rest)):
        raise UsageError("no such option", where=f"grid.{key}", code="E301", next=nearest(path, takes))
    given, plain = getattr(config, group), fields[group].default
    if rest and not isinstance(given, dict):
        given, plain = getattr(given, rest), getattr(plain, rest)
    if rest in given if isinstance(given, dict) else given != plain:
        what = "is given beside the grid too"
        raise UsageError(what, where=f"grid.{key}", code="E308", next="keep one of the two")
    return path


def paths(kind: type[BaseModel]) -> list[str]:
    """The options of a config type; those of its groups dotted."""
    found = []
    for name, info in kind.model_fields.items():
        inside = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        found += [f"{name}.{inner}" for inner in info.annotation.model_fields] if inside else [name]
    return found


def nearest(word: str, known: Sequence[str]) -> str:
    """What to do about a word that is none of the known ones."""
    import difflib

    found = difflib.get_close_matches(word, known, n=1) or [k for k in known if k.endswith(f".{word}")]
    return f"did you mean {found[0]}" if found else f"use one of {', '.join(sorted(known))}"


def _values(kind, base: dict, key: str, path: str, values: Sequence) -> list:
    """The values as the config holds them, each tried alone."""
    found = []
    for value in values:
        config = filled(kind, base, {path: value}, None, f"grid.{key}")
        for name in path.split("."):
            config = config[name] if isinstance(config, dict) else getattr(config, name)
        found.append(config)
    return found


def filled(kind, base: dict, options: dict[str, Any], cell: str | None, where: str | None):
    """The inner config with these options. cell: its name; without one they are tried alone, without what they need."""
    tables = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for path, value in options.items():
        *groups, last = path.split(".", 1)
        table = tables
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = value
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[-1]  # of a choice or a number it is the number that was meant
        own = first.get("ctx", {}).get("error")
        if isinstance(own, PalateError):
            if cell is None:  # what is missing may be in the grid
                return kind.model_construct(**tables)
            raise UsageError(f"{cell}: {own.what}", where=where, code=own.code, next=own.next) from None
        shown = ", ".join(str(value) for value in options.values())
        what = f"{shown}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise UsageError(what, where=where, code="E307", next="give values that the option takes") from None


def _name(options: dict[str, Any], taken: set[str]) -> str:
    """A folder's name that says the options; numbered where another cell has it."""
    shown = {path: f"{value:g}" if isinstance(value, float) else value for path, value in options.items()}
    text = ",".join(f"{path.rpartition('.')[2]}={value}" for path, value in shown.items())
    text = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", text)[:150].rstrip(".")
    return next(name for n in itertools.count(1) if (name := text if n == 1 else f"{text}-{n}") not in taken)
