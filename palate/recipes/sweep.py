"""One training verb over a grid of options: cells are run folders, the worse ones stop early, one table at the end.

Successive halving: all cells train to the first rung, the best third of them to the next, and so on. A rung is an
ordinary checkpoint of a run whose schedule is the whole one's, so a cell that goes on ends as if it had never stopped.
Source: Jamieson and Talwalkar 2016, arXiv:1502.07943, figure 3; Karnin et al. 2013 (the idea).
Departs: cells are resumed, not trained anew, so a rung costs its new steps alone; the rungs follow from what the
whole may cost.
"""

import gc
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
from palate.recipes.grid import cells_of, nearest, where_of
from palate.recipes.standings import HIGHER, LOWER, Cell, as_text, draw, in_order, ranking, table_lines
from palate.recipes.training import MAY_CHANGE, Paused, TrainingConfig, open_folder, reported, resolved
from palate.recipes.verbs import Say, stderr

PART = 3  # halving may cost one part in so many of the full grid's steps
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
                f'"{self.metric}" ranks no cells', where="metric", code="E307", next=nearest(self.ranks_by, known)
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


def rungs(steps: int, cells: int, eta: int) -> list[int]:
    """Steps at which cells are compared, rising, each eta times the one before, the last `steps`.

    The first is as late as a third of the full grid's cost allows, for early numbers mislead; among equals the fewest
    rungs. Where nothing costs a third (under four cells, or few steps), cells are compared once, at steps / eta.
    """
    best: list[int] = []
    for count in itertools.takewhile(lambda count: eta ** (count - 1) < steps, itertools.count(1)):
        firsts = range((steps - 1) // eta ** (count - 1), best[0] if best else 0, -1)
        tried = ([first * eta**i for i in range(count)] + [steps] for first in firsts)
        best = next((found for found in tried if PART * cost(found, cells, eta) <= cells * steps), best)
    return best or ([steps // eta, steps] if steps >= eta and cells > 1 else [steps])


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
            _check(cell, inner, where_of(config))
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    _count_steps(config, inner, cells, say)
    total = sum(cell.rungs[-1] for cell in cells)
    planned = _planned(config, cells)
    steps = " and ".join(str(step) for step in cells[0].rungs)
    say(f"sweep: {len(cells)} cells, compared after {steps} steps; {planned / total:.0%} of the full grid's steps")
    if config.dry_run:
        lines = [f"{cell.name}: after {', '.join(map(str, cell.rungs))} steps" for cell in cells]
        return {"cells": [cell.name for cell in cells], "rungs": cells[0].rungs, "compute_share": planned / total,
                "summary": lines}  # fmt: skip
    go_on = f"palate {verb} -c {out / 'config.yaml'} --resume --out {out}"
    try:
        with Run.create(
            out, verb=verb, config=resolved(config), argv=list(argv), resume=config.resume, may_change=MAY_CHANGE
        ) as run:
            result = _sweep(config, run, inner, cells, argv, say)
            run.finish(result)
        if config.report:
            result["summary"].append(f"report     {reported(out)}")
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
        if every is None and not config.full:
            cell.config = cell.config.model_copy(update={"eval_every": cell.rungs[0]})
        elif every and any(step % every for step in cell.rungs[:-1]):
            what = f"leaves step {cell.rungs[0]}, where cells are compared, without an evaluation"
            raise UsageError(what, where="eval_every", code="E308", next="leave it out")


def _planned(config, cells: list[Cell]) -> float:
    """Steps that the sweep should take; exact where all cells have as many."""
    return sum(cost(cell.rungs, len(cells), config.eta) for cell in cells) / len(cells)


def _quiet(text: str) -> None:
    pass


def _sweep(config, run, inner: str, cells: list[Cell], argv, say: Say) -> dict[str, Any]:
    key, alive, reserve = config.ranks_by, cells, []
    levels = min(len(cell.rungs) for cell in cells)
    for cell in cells:  # unequal lengths: all are compared as often
        cell.rungs = [*cell.rungs[: levels - 1], cell.rungs[-1]]

    def trained(cell: Cell, level: int) -> bool:
        _train_to(cell, level, run, inner, argv, key)
        ends = (cell.line.get(f"{key}_{end}") for end in ("low", "high"))
        found = f"{key.removeprefix('eval/')} {as_text(cell.line.get(key), *ends)}"
        say(f"sweep: rung {level + 1} of {levels}: {cell.name}: {cell.failure if cell.state == 'failed' else found}")
        _write(config, run, cells)
        return cell.state != "failed"

    best_first: list[Cell] = []
    for level in range(levels):
        passed = [cell for cell in alive if trained(cell, level)]
        while not passed and reserve:  # the next best of those that had stopped takes their place
            cell = reserve.pop(0)
            passed = [cell] if trained(cell, level) else []
        if not passed:
            raise RefusedError(
                f"none of the {len(cells)} cells came through; {cells[0].name} {cells[0].failure}",
                where=str(run.path),
                next="look at the cells, then give a grid of smaller steps",
            )
        best_first = ranking(passed, key)
        if level < levels - 1:
            goes_on = survivors(len(cells), config.eta, level + 1)
            for cell in best_first[goes_on:]:
                cell.state = "stopped"
            reserve = [*best_first[goes_on:], *reserve]
            alive = [cell for cell in cells if cell in best_first[:goes_on]]
    best = best_first[0]
    standings = _write(config, run, cells, best)
    draw(run.path / "sweep.svg", cells, key)
    share, scored = standings["compute_share"], sum(cell.facts.get("reference_scored", 0) for cell in cells)
    verdict, model = f"{best.name}: {best.facts['verdict']}", run.path / "cells" / best.name / "model"
    return {
        "out": str(run.path),
        "best": best.name,
        "options": best.options,
        "model": str(model),
        "better": best.facts["better"],
        "verdict": verdict,
        "metric": key,
        "compute_share": share,
        "reference_scored": scored,
        "cells": standings["cells"],
        "summary": [
            *table_lines(in_order(cells, key), key, best),
            f"best       {verdict}",
            *(f"flag       {flag}" for flag in best.facts["flags"]),
            f"reference  {scored} completions scored for all cells",
            f"compute    {share:.0%} of the full grid's steps, {sum(cell.seconds for cell in cells):.0f} s of training",
            f"plot       {run.path / 'sweep.svg'}",
            f"model      {model}",
        ],
    }


def _train_to(cell: Cell, level: int, run, inner: str, argv, key: str) -> None:
    """The cell, trained to its rung; nothing is trained where an earlier try has been there already."""
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
