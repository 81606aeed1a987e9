"""One training verb over a grid of options: cells are run folders, the worse ones stop early, one table at the end.

Successive halving: all cells train to the first rung, the best third of them to the next, and so on. A rung is an
ordinary checkpoint of a run whose schedule is the whole one's, so a cell that goes on ends as if it had never stopped.
Source: Jamieson and Talwalkar 2016, arXiv:1502.07943, figure 3; Karnin et al. 2013 (the idea).
Departs: cells are resumed, not trained anew, so a rung costs its new steps alone; the number of rungs follows from what
the whole may cost.
"""

import gc
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from palate.errors import (
    DataError,
    Interrupted,
    ModelError,
    NotBetterError,
    NotFiniteError,
    PalateError,
    RefusedError,
    UsageError,
)
from palate.recipes import preference, sft
from palate.recipes.training import MAY_CHANGE, Paused, TrainingConfig, open_folder, resolved
from palate.recipes.verbs import Say, number, stderr

SHARE = 1 / 3  # of the full grid's steps that halving may cost
HIGHER = ("eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/accuracies", "eval/logps/chosen")
LOWER = ("eval/loss", "eval/displaced", "eval/kl", "eval/retain/loss")
MOST_CELLS = 1000
# what a grid cannot vary: where and how a run is shown, and what its cells are compared on
FIXED = {
    "model",
    "data",
    "out",
    "resume",
    "dry_run",
    "json",
    "eval",
    "eval_every",
    "require_better",
    "log_every",
    "save_every",
}
# what cannot change how many rows and steps there are, so that one dry run counts for all
SAME_ROWS = re.compile(r"(lr|beta|loss_options\..+|lora_rank|lora_alpha|train\..+)\Z")


class SweepConfig(BaseModel):
    """Options of `palate sweep` beside those of the verb that it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    inner: ClassVar[type[TrainingConfig] | None] = None
    measure: ClassVar[str] = "eval/rewards/accuracies"

    grid: Annotated[
        dict[str, list[bool | int | float | str]],
        Field(description="An option and the values to try, as beta=0.05,0.1,0.3; once for each option"),
    ]
    metric: Annotated[
        str | None,
        Field(description="Held-out number that ranks the cells; default: eval/rewards/accuracies, for sft eval/loss"),
    ] = None
    eta: Annotated[int, Field(ge=2, le=16, description="About one cell in eta goes on from rung to rung")] = 3
    full: Annotated[bool, Field(description="Train every cell to its end: no halving")] = False

    @property
    def ranks_by(self) -> str:
        """The evaluation's key, without a sign."""
        return (self.metric or self.measure).removeprefix("-")

    @model_validator(mode="after")
    def _can_be_run(self):
        known = [*HIGHER, *LOWER]
        if self.ranks_by not in known or ((self.metric or "").startswith("-") and self.ranks_by in HIGHER):
            raise UsageError(
                f'"{self.metric}" ranks no cells', where="metric", code="E307", next=_nearest(self.ranks_by, known)
            )
        if getattr(self, "eval", None) == "none":
            raise UsageError("ranks cells by held-out rows", where="eval", code="E316", next="leave --eval out")
        if self.inner is not None:
            cells_of(self)
        return self


class DpoSweep(SweepConfig, preference.PreferenceConfig):
    """Options of `palate sweep dpo`."""

    inner: ClassVar = preference.PreferenceConfig


class KtoSweep(SweepConfig, preference.FeedbackConfig):
    """Options of `palate sweep kto`."""

    inner: ClassVar = preference.FeedbackConfig


class SftSweep(SweepConfig, sft.SftConfig):
    """Options of `palate sweep sft`."""

    inner: ClassVar = sft.SftConfig
    measure: ClassVar[str] = "eval/loss"


SWEEPS = {"dpo": DpoSweep, "kto": KtoSweep, "sft": SftSweep}
RUNS: dict[str, Callable] = {"dpo": preference.run, "kto": preference.run, "sft": sft.run}


@dataclass
class Cell:
    """One point of the grid and what became of it. rungs: steps at which it is compared; the last is its end."""

    name: str
    options: dict[str, Any]
    config: Any
    rungs: list[int] = field(default_factory=list)
    steps: int = 0
    state: str = "waiting"  # then stopped (at a rung), done or failed
    curve: list[tuple[int, float | None]] = field(default_factory=list)
    line: dict[str, Any] = field(default_factory=dict)  # its last evaluation
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failure(self) -> str:
        """Why it failed, in short."""
        return "failed: " + str(self.facts.get("error")).partition(";")[0][:100]

    def row(self, key: str) -> dict[str, Any]:
        """Its entry of sweep.json."""
        line = {} if self.state == "failed" else self.line
        return {
            "name": self.name,
            "options": self.options,
            "steps": self.steps,
            "metric": line.get(key),
            "low": line.get(f"{key}_low"),
            "high": line.get(f"{key}_high"),
            "margin": line.get("eval/rewards/margins"),
            "loss": line.get("eval/loss"),
            "seconds": round(self.seconds, 3),
            "path": f"cells/{self.name}",
            "state": self.state,
            "curve": [list(point) for point in self.curve],
            **self.facts,
        }


def cells_of(config: SweepConfig) -> list[Cell]:
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
        cells.append(Cell(name, options, _filled(config.inner, base, options, f"cell {name}", _where(config))))
    return cells


def _where(config: SweepConfig) -> str:
    return ", ".join(f"grid.{key}" for key in config.grid)


def _option(config: SweepConfig, key: str) -> str:
    """The key of the inner config that a key of the grid names."""
    path = key.replace("-", "_")
    group, _, rest = path.partition(".")
    fields = config.inner.model_fields
    takes = [name for name in _paths(config.inner) if name.partition(".")[0] not in FIXED]
    if group not in fields or group in FIXED or not (path in takes or (group == "loss_options" and rest)):
        raise UsageError("no such option", where=f"grid.{key}", code="E301", next=_nearest(path, takes))
    given, plain = getattr(config, group), fields[group].default
    if rest and not isinstance(given, dict):
        given, plain = getattr(given, rest), getattr(plain, rest)
    if rest in given if isinstance(given, dict) else given != plain:
        what = "is given beside the grid too"
        raise UsageError(what, where=f"grid.{key}", code="E308", next="keep one of the two")
    return path


def _paths(kind: type[BaseModel]) -> list[str]:
    """The options of a config type; those of its groups dotted."""
    found = []
    for name, info in kind.model_fields.items():
        inside = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        found += [f"{name}.{inner}" for inner in info.annotation.model_fields] if inside else [name]
    return found


def _nearest(word: str, known: Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(word, known, n=1) or [k for k in known if k.endswith(f".{word}")]
    return f"did you mean {found[0]}" if found else f"use one of {', '.join(sorted(known))}"


def _values(kind, base: dict, key: str, path: str, values: Sequence) -> list:
    """The values as the config holds them, each tried alone."""
    found = []
    for value in values:
        config = _filled(kind, base, {path: value}, None, f"grid.{key}")
        for name in path.split("."):
            config = config[name] if isinstance(config, dict) else getattr(config, name)
        found.append(config)
    return found


def _filled(kind, base: dict, options: dict[str, Any], cell: str | None, where: str):
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


def rungs(steps: int, cells: int, eta: int) -> list[int]:
    """Steps at which cells are compared, rising, each eta times the one before, the last `steps`.

    As few as bring the cost to a third of the full grid's; where none does (under four cells, or few steps), one.
    """
    for count in itertools.count(1):
        first = steps // eta**count
        if not first:
            break
        found = [first * eta**i for i in range(count)] + [steps]
        if cost(found, cells, eta) <= SHARE * cells * steps:
            return found
    return [steps // eta, steps] if steps >= eta and cells > 1 else [steps]


def cost(found: Sequence[int], cells: int, eta: int) -> int:
    """Steps that halving takes over these rungs."""
    return sum(survivors(cells, eta, i) * (step - (found[i - 1] if i else 0)) for i, step in enumerate(found))


def survivors(cells: int, eta: int, rung: int) -> int:
    """Cells that train to this rung, the first being 0: one in eta of those before, at least one."""
    return max(1, cells // eta**rung)


def run(config, *, verb: str = "sweep dpo", argv=(), say: Say = stderr, panel=None) -> dict[str, Any]:
    """Trains the cells, ranks them, and returns the table; sweep.json and sweep.svg have it too.

    Raises UsageError before anything is written; RefusedError where no cell came through; Interrupted, after which
    --resume goes on; NotBetterError under --require-better.
    """
    from palate.run import Run

    inner = verb.split()[-1]
    cells = cells_of(config)
    if inner != "sft":
        for cell in cells:
            _check(cell, inner, _where(config))
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    _count_steps(config, inner, cells, say)
    total = sum(cell.rungs[-1] for cell in cells)
    planned = _planned(config, cells)
    steps = " and ".join(str(step) for step in cells[0].rungs)
    say(f"sweep: {len(cells)} cells, compared after {steps} steps; {planned / total:.0%} of the full grid's steps")
    if config.dry_run:
        lines = [f"{cell.name}: at most {cell.rungs[-1]} steps, {sum(1 for _ in cell.rungs)} rungs" for cell in cells]
        return {"cells": [cell.name for cell in cells], "rungs": cells[0].rungs, "compute_share": planned / total,
                "summary": lines}  # fmt: skip
    go_on = f"palate {verb} -c {out / 'config.yaml'} --resume --out {out}"
    try:
        with Run.create(
            out, verb=verb, config=resolved(config), argv=list(argv), resume=config.resume, may_change=MAY_CHANGE
        ) as run:
            result = _sweep(config, run, inner, cells, argv, say)
            run.finish(result)
    except (Interrupted, KeyboardInterrupt) as error:
        interrupted = Interrupted(str(getattr(error, "what", "interrupted")), next=go_on)
        interrupted.result = {"out": str(out)}
        raise interrupted from error
    except PalateError as error:
        error.result = {"out": str(out)} | (getattr(error, "result", None) or {})
        raise
    if config.require_better and not result["better"]:
        error = NotBetterError(result["verdict"], next="widen the grid, train longer, or look at the data")
        error.result = result
        raise error
    return result


def _check(cell: Cell, inner: str, where: str) -> None:
    """Nothing, where the cell's loss takes its options; else UsageError naming the cell."""
    try:
        preference.check_loss(cell.config, inner)
    except UsageError as error:
        raise UsageError(f"cell {cell.name}: {error.what}", where=where, code=error.code, next=error.next) from None


def _count_steps(config, inner: str, cells: list[Cell], say: Say) -> None:
    """Fills the cells' rungs and evaluation steps from dry runs, which also refuse what cannot be read or loaded."""
    known: dict[str, int] = {}
    for cell in cells:
        shape = repr({path: value for path, value in cell.options.items() if not SAME_ROWS.match(path)})
        if shape not in known:
            trial = cell.config.model_copy(update={"out": None, "resume": False, "dry_run": True})
            found = RUNS[inner](trial, verb=inner, say=_quiet if known else say)
            if not found["held"]:
                what = "no row is held out, so nothing ranks the cells"
                raise UsageError(what, where="eval", code="E316", next="give --eval, or more rows")
            known[shape] = found["steps"]
        steps, every = known[shape], cell.config.eval_every
        cell.rungs = [steps] if config.full else rungs(steps, len(cells), config.eta)
        if every is None:
            cell.config = cell.config.model_copy(update={"eval_every": cell.rungs[0]})
        elif any(step % every for step in cell.rungs[:-1]):
            what = f"leaves step {cell.rungs[0]}, where cells are compared, without an evaluation"
            raise UsageError(what, where="eval_every", code="E308", next="leave it out")


def _planned(config, cells: list[Cell]) -> float:
    """Steps that the sweep should take; exact where all cells have as many."""
    return sum(cost(cell.rungs, len(cells), config.eta) for cell in cells) / len(cells)


def _quiet(text: str) -> None:
    pass


def _sweep(config, run, inner: str, cells: list[Cell], argv, say: Say) -> dict[str, Any]:
    key, alive = config.ranks_by, cells
    levels = min(len(cell.rungs) for cell in cells)
    for cell in cells:  # unequal lengths: all are compared as often
        cell.rungs = [*cell.rungs[: levels - 1], cell.rungs[-1]]
    reserve: list[Cell] = []
    for level in range(levels):
        queue = list(alive)
        while queue:
            cell = queue.pop(0)
            _train_to(cell, level, run, inner, argv, key)
            low, high = (cell.line.get(f"{key}_{end}") for end in ("low", "high"))
            found = f"{key.removeprefix('eval/')} {_shown(cell.line.get(key), low, high)}"
            found = cell.failure if cell.state == "failed" else found
            say(f"sweep: rung {level + 1} of {levels}: {cell.name}: {found}")
            _write(config, run, cells)
            if not queue and reserve and all(cell.state == "failed" for cell in alive):
                queue.append(reserve.pop(0))  # the next best of those that had stopped takes their place
                alive = [*alive, queue[0]]
        ranked = _ranked([cell for cell in alive if cell.state != "failed"], key)
        if not ranked:
            raise RefusedError(
                f"none of the {len(cells)} cells came through; {cells[0].name} {cells[0].failure}",
                where=str(run.path),
                next="look at the cells, then give a grid of smaller steps",
            )
        if level < levels - 1:
            keep = survivors(len(cells), config.eta, level + 1)
            ranked, lost = ranked[:keep], ranked[keep:]
            for cell in lost:
                cell.state = "stopped"
            reserve = [*lost, *reserve]
            alive = [cell for cell in cells if cell in ranked]
    best = ranked[0]
    table = _write(config, run, cells, best)
    _draw(run.path / "sweep.svg", cells, key, best)
    ended = best.facts
    share = table["compute_share"]
    flags = [f"flag       {flag}" for flag in ended.get("flags", [])]
    return {
        "out": str(run.path),
        "best": best.name,
        "options": best.options,
        "model": str(run.path / "cells" / best.name / "model"),
        "better": ended["better"],
        "verdict": f"{best.name}: {ended['verdict']}",
        "metric": key,
        "compute_share": share,
        "reference_scored": sum(cell.facts.get("reference_scored", 0) for cell in cells),
        "cells": table["cells"],
        "summary": [
            *_table(_order(cells, key), key, best),
            f"best       {best.name}: {ended['verdict']}",
            *flags,
            f"compute    {share:.0%} of the full grid's steps, {sum(cell.seconds for cell in cells):.0f} s of training",
            f"plot       {run.path / 'sweep.svg'}",
            f"model      {run.path / 'cells' / best.name / 'model'}",
        ],
    }


def _train_to(cell: Cell, level: int, run, inner: str, argv, key: str) -> None:
    """The cell, trained to its rung; nothing is trained where an earlier try has been there already."""
    from palate.errors import CheckpointError

    path, target = run.path / "cells" / cell.name, cell.rungs[level]
    last = level == len(cell.rungs) - 1
    config = cell.config.model_copy(update={"out": str(path), "resume": True, "require_better": False})
    if last or not _stands(path, target):
        try:
            result = RUNS[inner](config, verb=inner, argv=argv, say=_quiet, stop=None if last else target)
            cell.state = "done"
            cell.facts |= {name: result[name] for name in ("better", "verdict")}
            cell.facts["flags"] = result.get("retention", {}).get("flags", [])
        except Paused:
            pass
        except CheckpointError:
            raise
        except Interrupted as error:
            raise Interrupted(f"cell {cell.name}: {error.what}", next=error.next) from error
        except (NotFiniteError, DataError, ModelError, UsageError) as error:
            cell.state = "failed"
            cell.facts["error"] = str(error)
        gc.collect()  # the model of this cell, before the next one's
    _read(cell, path, key, target)


def _stands(path: Path, target: int) -> bool:
    """Whether the run in `path` has been evaluated at this step and has a checkpoint from there on."""
    from palate.run import read_lines

    saved = [int(folder.name[5:]) for folder in (path / "checkpoints").glob("step-*")]
    if not saved or max(saved) < target:
        return False
    return any(line["step"] == target and "eval/loss" in line for line in read_lines(path / "metrics.jsonl"))


def _read(cell: Cell, path: Path, key: str, target: int) -> None:
    """Takes the cell's numbers, up to the rung, from its folder: the same whether it was trained now or before."""
    from palate.run import read_lines

    lines = [line for line in read_lines(path / "metrics.jsonl") if line["step"] <= target]
    evals = [line for line in lines if "eval/loss" in line]
    trained = [line for line in lines if "loss" in line]
    cell.steps = max((line["step"] for line in trained), default=0)
    cell.seconds = sum(line["seconds"] for line in trained)
    cell.curve = [(line["step"], line.get(key)) for line in evals]
    if cell.state != "failed" and evals and evals[-1]["eval/loss"] is None:
        cell.state, cell.facts["error"] = "failed", f"step {target}: its held-out loss is not finite"
    cell.line = evals[-1] if evals else {}
    if cell.state != "failed" and evals and key not in cell.line:
        has = sorted(name for name in (*HIGHER, *LOWER) if name in cell.line)
        raise UsageError(f"these runs have no {key}", where="metric", code="E307", next=f"use one of {', '.join(has)}")
    facts = _pinned(path / "reference.safetensors")
    if facts is not None:
        cell.facts["reference_scored"] = facts


def _pinned(path: Path) -> int | None:
    """Completions that were scored for the reference column of this file; None where there is none."""
    import json

    from palate.files import tensor_metadata

    return json.loads(tensor_metadata(path)["facts"])["scored"] if path.is_file() else None


def _ranked(cells: Iterable[Cell], key: str) -> list[Cell]:
    """Best first: by the metric, then the margin, then the loss, then the grid's order."""

    def value(cell: Cell, name: str) -> float:
        found = cell.line.get(name)
        if found is None or not math.isfinite(found):
            return math.inf
        return found if name in LOWER else -found

    return sorted(cells, key=lambda cell: [value(cell, name) for name in (key, "eval/rewards/margins", "eval/loss")])


def _order(cells: list[Cell], key: str) -> list[Cell]:
    """Rows of the table: those that came farthest first, best first among them, failed ones last."""
    ranked = _ranked(cells, key)
    states = {"done": 0, "failed": 2}
    return sorted(ranked, key=lambda cell: (states.get(cell.state, 1), -cell.steps))


def _write(config, run, cells: list[Cell], best: Cell | None = None) -> dict[str, Any]:
    from palate.files import write_json

    total = sum(cell.rungs[-1] for cell in cells)
    table = {
        "verb": run.verb.split()[-1],
        "metric": config.ranks_by,
        "lower_is_better": config.ranks_by in LOWER,
        "eta": config.eta,
        "full": config.full,
        "rungs": cells[0].rungs,
        "cells": [cell.row(config.ranks_by) for cell in cells],
        "best": None if best is None else best.name,
        "compute_share": sum(cell.steps for cell in cells) / total,
    }
    write_json(run.path / "sweep.json", table)
    return table


def _shown(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share in percent with its interval, another number with four places."""
    if value is not None and low is not None and high is not None:
        return f"{value:.1%} [{low:.1%}, {high:.1%}]"
    return number(value)


def _table(cells: list[Cell], key: str, best: Cell) -> list[str]:
    head = ["", "cell", "steps", key.removeprefix("eval/"), "loss", "seconds", ""]
    rows = [head]
    for cell in cells:
        row = cell.row(key)
        shown = _shown(row["metric"], row["low"], row["high"])
        said = {"done": "", "failed": cell.failure}
        rows.append(["*" if cell is best else "", cell.name, str(cell.steps), shown, number(row["loss"]),
                     f"{cell.seconds:.0f}", said.get(cell.state, cell.state)])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = {0, 1, 6}
    return [
        "  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in rows
    ]  # fmt: skip


def _draw(path: Path, cells: list[Cell], key: str, best: Cell) -> None:
    """The held-out metric of every cell against its steps, as an SVG of always the same bytes."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from palate.files import write_bytes

    with matplotlib.rc_context({"svg.hashsalt": "palate", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for cell in cells:
            points = [(step, value) for step, value in cell.curve if value is not None]
            if not points:
                continue
            style = {"best": ("#0b6e99", 2.2, 3), "done": ("#c2703d", 1.4, 2)}
            colour, width, order = style.get("best" if cell is best else cell.state, ("#9a9a9a", 0.9, 1))
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=width, zorder=order, marker="o", markersize=2.5)
            if cell.state == "done":
                axes.annotate(cell.name, points[-1], xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8,
                              color=colour)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(f"held-out {key.removeprefix('eval/')}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_bytes(path, buffer.getvalue())
