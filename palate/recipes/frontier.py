"""Reward against KL for several methods and settings: where each ends up, what it cost, and the hull of each.

One reference a seed, one set of pairs drawn from it and labelled by the reward that counts; every setting is a run of
an ordinary verb, measured on the way. Source: Rafailov et al. 2023, arXiv:2305.18290, section 6.1 and appendix C.1.
Departs: PPO's coefficient begins where a normal reward of deviation 1 would have its target KL at the optimum;
best-of-N and RLOO stand beside the paper's methods.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from palate.errors import DataError, Interrupted, ModelError, NotFiniteError, PalateError, UsageError
from palate.recipes.cells import VERBS, Cell, cells_of, is_done, points_of, refuse_above
from palate.recipes.grounds import Drawn, ground_of
from palate.recipes.hulls import METHODS, Method, draw, standings, table_lines
from palate.recipes.training import MAY_CHANGE, Watch, open_folder, reported, resolved
from palate.recipes.verbs import Say, stderr

Rising = Annotated[float, Field(gt=0, lt=math.inf)]

# what is not given, by world; `options` are those of the runs
DEFAULTS: dict[str, dict[str, Any]] = {
    "enumerable": {
        "betas": [0.1, 0.25, 0.5, 1.0],
        "target_kls": [0.25, 0.5, 1.0, 2.0],
        "alphas": [0.05, 0.1, 0.5, 1.0],
        "best_of": [2, 4, 16, 64],
        "pairs": 6144,
        "sharpness": 1.0,
        "steps": 24,
        "rollouts": 20,
        "at": [0.25, 0.5, 1.0, 2.0],
        "options": {
            "reference": {"batch": 256, "lr": 5e-3, "train": {"schedule": "cosine"}},
            "reward": {"batch": 256, "lr": 3e-3, "train": {"schedule": "cosine"}},
            "dpo": {"batch": 256, "lr": 5e-3, "train": {"schedule": "cosine"}},
            "unlikelihood": {"batch": 256, "lr": 1e-3},
            "preferred_ft": {"batch": 256, "lr": 3e-3},
            "ppo": {"batch": 64, "lr": 3e-3, "max_tokens": 5, "missing_end": "keep"},
        },
    },
    "reviews": {
        "model": "builtin:tiny",
        "data": "builtin:reviews[:800]",
        "prompts": "builtin:prompts[:300]",
        "reward": "rule",
        "betas": [0.05, 0.1, 0.5, 2.0],
        "target_kls": [1.0, 2.0, 4.0, 8.0],
        "alphas": [0.05, 0.1, 0.5, 1.0],
        "best_of": [2, 4, 16],
        "samples": 4,
        "pairs": 4096,
        "sharpness": math.inf,
        "steps": 60,
        "rollouts": 40,
        "at": [1.0, 2.0, 4.0, 8.0],
        "options": {"ppo": {"batch": 64}},
    },
}
OWN = ("model", "data", "prompts", "reward", "samples")  # what the enumerable world brings along


class FrontierConfig(BaseModel):
    """Options of `palate frontier`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: Annotated[
        Literal["reviews", "enumerable"],
        Field(description="reviews: built-in, or --model and what else is yours; enumerable: needs nothing, is exact"),
    ] = "reviews"
    model: Annotated[str | None, Field(description="The reference; default: builtin:tiny")] = None
    data: Annotated[
        str | None, Field(description="Prompts, or pairs, that are trained on; default: builtin:reviews[:800]")
    ] = None
    prompts: Annotated[
        str | None, Field(description="Held-out prompts that are measured on; default: builtin:prompts[:300]")
    ] = None
    reward: Annotated[
        str | None,
        Field(description="The reward that counts: rule (default), a reward model's folder, module:function"),
    ] = None
    methods: Annotated[list[Method], Field(min_length=1, description="Which are run; sft is the reference itself")] = [
        *METHODS
    ]
    betas: Annotated[
        list[Rising] | None,
        Field(min_length=1, description="Of dpo; default: 0.05,0.1,0.5,2, enumerable 0.1,0.25,0.5,1"),
    ] = None
    target_kls: Annotated[
        list[Rising] | None,
        Field(min_length=1, description="Of ppo and its kin, nats; default: 1,2,4,8, enumerable 0.25,0.5,1,2"),
    ] = None
    true_kls: Annotated[
        list[Rising] | None, Field(min_length=1, description="Of ppo_true, where others than --target-kls are wanted")
    ] = None
    alphas: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]] | None,
        Field(min_length=1, description="Of unlikelihood; default: 0.05,0.1,0.5,1"),
    ] = None
    best_of: Annotated[
        list[Annotated[int, Field(ge=2, le=1024)]] | None,
        Field(min_length=1, description="Of best_of_n; default: 2,4,16, enumerable 64 too"),
    ] = None
    samples: Annotated[
        int | None,
        Field(ge=0, description="Completions of each prompt, to make pairs of; 0: the pairs of --data; default: 4"),
    ] = None
    pairs: Annotated[
        int | None, Field(gt=0, description="Pairs to learn from, at most; default: 4096, enumerable 6144")
    ] = None
    sharpness: Annotated[
        float | None,
        Field(
            gt=0,
            description="Labels follow sigmoid(it x gap); inf never errs, and is the default; enumerable 1",
        ),
    ] = None
    steps: Annotated[
        int | None, Field(gt=0, description="Optimizer steps of what learns from pairs; default: 60, enumerable 24")
    ] = None
    rollouts: Annotated[
        int | None, Field(gt=0, description="Of ppo, ppo_true and rloo; default: 40, enumerable 20")
    ] = None
    points: Annotated[int, Field(gt=0, description="Points of each run, at even distances, the last at its end")] = 4
    max_tokens: Annotated[int, Field(gt=0, description="Tokens of a completion")] = 64
    at: Annotated[
        list[Rising] | None,
        Field(min_length=1, description="KLs of the table, nats; default: those of --target-kls' default"),
    ] = None
    options: Annotated[
        dict[str, float | bool | int | str],
        Field(description="Options of the runs, as ppo.lr=1e-3; also of reward, and reference in the enumerable world"),
    ] = {}
    seed: Annotated[
        int, Field(ge=0, lt=2**31, description="The first seed; in the enumerable world it draws the reward")
    ] = 0
    seeds: Annotated[int, Field(gt=0, le=100, description="How many, one after another")] = 1
    device: Annotated[str, Field(description="auto, cpu, cuda, mps")] = "auto"
    out: Annotated[str | None, Field(description="Run folder; default: runs/frontier-N")] = None
    resume: Annotated[bool, Field(description="Go on with --out; finished cells are not run again")] = False
    dry_run: Annotated[bool, Field(description="Say which runs it would be, and stop")] = False

    @model_validator(mode="after")
    def _has_effect(self):
        if self.world == "enumerable" and (given := [name for name in OWN if getattr(self, name) is not None]):
            what = "has no effect in the enumerable world, which has its own"
            raise UsageError(what, where=given[0], code="E316", next="drop it, or leave --world out")
        for name in ("methods", "betas", "target_kls", "true_kls", "alphas", "best_of", "at"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise UsageError("has one value twice", where=name, code="E302", next="keep one")
        known = [*METHODS[:4], *METHODS[5:7], "reward", *(["reference"] if self.world == "enumerable" else [])]
        for key in self.options:
            if key.partition(".")[0] not in known or "." not in key:
                what = f"{key} names no option of a run"
                raise UsageError(what, where="options", code="E301", next=f"write KIND.OPTION=VALUE, KIND one of {', '.join(known)}")  # fmt: skip  # noqa: E501
        return self

    def value(self, name: str) -> Any:
        """What is given, or the default of the world."""
        found = getattr(self, name)
        return self.defaults.get(name) if found is None else found

    def filled(self) -> "FrontierConfig":
        """The same with nothing left to the world, as config.yaml has it."""
        return self.model_copy(update={name: self.value(name) for name in self.defaults if name != "options"})

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the world."""
        return DEFAULTS[self.world]


def run(config: FrontierConfig, *, verb: str = "frontier", argv=(), say: Say = stderr, panel=None) -> dict[str, Any]:
    """Runs the cells and returns the table; frontier.json and frontier.svg have the points.

    Raises UsageError before anything is written; what reading, loading and training raise; Interrupted, after which
    --resume goes on; PalateError where a point lies above the exact frontier, which would be a bug.
    """
    from palate.run import Run

    config = config.filled()
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    cells = {seed: list(cells_of(config, seed, out)) for seed in seeds_of(config)}
    names = [cell.name for row in cells.values() for cell in row]
    ground_of(config, config.seed, out).check(say)
    say(f"frontier: {len(names)} runs on {len(cells)} seeds")
    if config.dry_run:
        return {"cells": names, "summary": names}
    go_on = f"palate {verb} -c {out / 'config.yaml'} --resume --out {out}"
    try:
        with Run.create(
            out, verb=verb, config=resolved(config), argv=list(argv), resume=config.resume, may_change=MAY_CHANGE
        ) as run:
            result = _run(config, run, cells, list(argv), say)
            run.finish(result)
        result["summary"].append(f"report     {reported(out)}")
    except (Interrupted, KeyboardInterrupt) as error:
        interrupted = Interrupted(str(getattr(error, "what", "interrupted")), next=go_on)
        interrupted.result = {"out": str(out)}
        raise interrupted from error
    except PalateError as error:
        error.result = {"out": str(out)} | (getattr(error, "result", None) or {})
        raise
    return result


def seeds_of(config: FrontierConfig) -> range:
    """The seeds."""
    return range(config.seed, config.seed + config.seeds)


def _run(config: FrontierConfig, run, cells: dict[int, list[Cell]], argv: list[str], say: Say) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    exact: dict[int, list[tuple[float, float]]] = {}
    for seed, row in cells.items():
        done = list(points)
        for mine, curve in _seed(config, run.path, seed, row, argv, say):
            points = done + mine
            exact |= {seed: curve} if curve else {}
            _write(config, run.path, cells, points, exact)
    failed = {cell.name: cell.error for row in cells.values() for cell in row if cell.error}
    rows = standings(points, config.value("at"), exact)
    draw(run.path / "frontier.svg", points, exact, max(config.value("at")))
    return {
        "out": str(run.path),
        "verdict": _verdict(rows),
        "points": len(points),
        "frontier": str(run.path / "frontier.json"),
        "plot": str(run.path / "frontier.svg"),
        "table": rows,
        "failed": failed,
        "summary": [
            *table_lines(rows),
            *(f"failed     {name}: {error}" for name, error in failed.items()),
            f"points     {run.path / 'frontier.json'}: {len(points)}",
            f"plot       {run.path / 'frontier.svg'}",
        ],
    }


def _seed(config: FrontierConfig, out: Path, seed: int, cells: list[Cell], argv, say: Say) -> Iterator[tuple]:
    """Runs what has not been run; after each cell (points of the seed so far, its exact curve)."""
    from palate.files import read_json, write_json

    ground = ground_of(config, seed, out)
    if cells[0].method == "reference":
        ground.prepare()
        _train(cells[0], out, argv)
    ground.open(say)
    path = ground.folder / "drawn.json"
    if not path.exists():
        write_json(path, asdict(ground.draw(say)))
    drawn, curve = Drawn(**read_json(path)), ground.exact(config.value("at"))
    best: dict[int, dict[str, Any]] = {}
    start: dict[str, Any] = {}
    for cell in cells:
        folder = out / "cells" / cell.name
        if cell.method == "sft":
            start = _noted(folder, cell, ground.at_start)
        elif cell.method == "best_of_n":
            counts = config.value("best_of")
            best = best or (dict(zip(counts, ground.best_of(counts), strict=True)) if not is_done(folder) else {})
            _noted(folder, cell, partial(best.get, cell.config))
        elif cell.lends:
            _train(cell, out, argv)
        else:
            steps = cell.config.steps
            _train(cell, out, argv, watch=Watch(ground.measure, -(-steps // config.points), start))
        points = points_of(out, cells, drawn)
        mine = [point for point in points if point["cell"] == cell.name]
        say(f"frontier: {cell.name}: {_shown(cell, mine)}")
        refuse_above(points)
        yield points, curve


def _train(cell: Cell, out: Path, argv: list[str], **watched) -> None:
    """The cell's run, from where it stands; what ends a run and is no fault of the others' is kept in `error`."""
    path = out / "cells" / cell.name
    if is_done(path):
        return
    assert cell.verb is not None
    config = cell.config.model_copy(update={"out": str(path), "resume": True})
    try:
        VERBS[cell.verb][1](config, verb=cell.verb, argv=argv, say=lambda text="": None, **watched)
    except Interrupted as error:
        raise Interrupted(f"cell {cell.name}: {error.what}", next=error.next) from error
    except (NotFiniteError, DataError, ModelError) as error:
        if cell.lends:
            raise
        cell.error = str(error)
    gc.collect()  # the model of this cell, before the next one's


def _noted(path: Path, cell: Cell, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """The numbers of a cell that trains nothing, measured once and kept in a run folder as any cell's are."""
    from palate.run import Run, read_lines

    if not is_done(path):
        what = {"method": cell.method, "setting": cell.setting, "seed": cell.seed}
        with Run.create(path, verb="frontier", config=what, resume=True) as run:
            run.rewind(0)
            run.log({"step": 0} | (measure() or {}))
    (line,) = read_lines(path / "metrics.jsonl")
    return {key: value for key, value in line.items() if key.startswith("eval/")}


def _shown(cell: Cell, points: list[dict[str, Any]]) -> str:
    if cell.error:
        return f"failed: {cell.error}"
    if not points:
        return "done"
    last = points[-1]
    return f"reward {last['reward']:.3f} at KL {last['kl']:.2f}, {last['seconds']:.0f} s, {last['samples']:,} samples"


def _write(config: FrontierConfig, out: Path, cells, points, exact) -> None:
    from palate.files import write_json

    every = [(cell, f"cells/{cell.name}") for row in cells.values() for cell in row]
    table = {
        "world": config.world,
        "seeds": list(cells),
        "at": config.value("at"),
        "points": points,
        "exact": [{"seed": seed, "curve": curve} for seed, curve in exact.items()],
        "cells": [{"name": c.name, "path": p, "done": is_done(out / p), "error": c.error} for c, p in every],
    }
    write_json(out / "frontier.json", table)


def _verdict(rows: list[dict[str, Any]]) -> str:
    """Which method's hull reaches highest at each KL of the table, a clause a method."""
    from palate.report.frontier import NAMES

    best: dict[str, list[tuple[str, str]]] = {}
    for kl in rows[0]["reward"]:
        row = max((row for row in rows if row["method"] != "exact"), key=lambda row: row["reward"][kl]["mean"])
        best.setdefault(NAMES[row["method"]], []).append((kl, f"{row['reward'][kl]['mean']:.3f}"))
    clauses = [
        f"within KL {', '.join(kl for kl, _ in found)}: {name} ({', '.join(value for _, value in found)})"
        for name, found in best.items()
    ]
    return "the most reward " + "; ".join(clauses)
