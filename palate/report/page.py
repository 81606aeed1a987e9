"""The page: read the run folders, choose what to show, fill the templates, write one file."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palate.errors import UsageError
from palate.files import machine_errors, make_folder, write_bytes
from palate.report import tables, words
from palate.report.certainty import certainty
from palate.report.charts import draw
from palate.report.completions import completions
from palate.report.curves import likelihood_charts, overlaid_charts, progress_charts, retention_charts, thinned
from palate.report.episodes import episodes, sampled
from palate.report.frontier import frontier, is_frontier
from palate.report.reading import Reading, read_run
from palate.report.road import is_road, road
from palate.report.rounds import is_rounds, rounds
from palate.report.sweep import is_sweep, sweep
from palate.report.verdict import banner, tiles, verdict

MARK = b"<!-- made by palate report -->"
MOST_REFUSED = 10  # messages about refused rows


def write_report(runs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> Path:
    """Where the page of these runs now lies: RUN/report.html of a single one, ./report.html of several, or `out`.

    The same folders give the same bytes. Raises UsageError for no runs, and (E313) for an `out` that is there and no
    report; NotThereError, CheckpointError where a run is missing or damaged; MachineError where nobody may write.
    """
    paths = [Path(run) for run in runs]
    if not paths:
        raise UsageError("a report needs a run", code="E300", next="name a run folder; palate runs list names them")
    whole = _whole(paths[0]) if len(paths) == 1 else None
    readings = [] if whole else [read_run(path) for path in paths]
    target = Path(out) if out is not None else (paths[0] if len(paths) == 1 else Path()) / "report.html"
    _refuse_other(target)
    text = whole(paths[0]) if whole else page(readings)
    make_folder(target.parent)
    write_bytes(target, text.encode("utf-8"))
    return target


def page(runs: Sequence[Reading]) -> str:
    """The HTML of one run, or of several side by side."""
    if len(runs) == 1:
        return _templates().get_template("run.html").render(one_run(runs[0]))
    return _templates().get_template("runs.html").render(several_runs(runs))


def _whole(path: Path) -> Callable[[Path], str] | None:
    """What makes the page of a folder that holds several runs and what they came to; None for a run's folder."""
    kinds = (
        ("road", is_road, road),
        ("sweep", is_sweep, sweep),
        ("frontier", is_frontier, frontier),
        ("rounds", is_rounds, rounds),
    )
    for name, is_one, shown in kinds:
        if is_one(path):
            return lambda path: _templates().get_template(f"{name}.html").render(shown(path))
    return None


def _templates():
    import jinja2
    from markupsafe import Markup

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: words.clean(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals.update(
        {name: getattr(words, name) for name in ("number", "percent", "interval", "plural", "cut", "duration")}
    )
    templates.globals.update(draw=lambda chart: Markup(draw(chart)), thinned=thinned)
    return templates


def one_run(run: Reading) -> dict[str, Any]:
    """All that run.html shows, in its order."""
    own = episodes(run)
    return {
        "run": run,
        "title": run.name,
        "source": str(run.path),
        "banner": banner(run),
        "verdict": verdict(run),
        "tiles": tiles(run),
        "completions": completions(run),
        "progress": own.progress if own else [*sampled(run), *progress_charts(run)],
        "episodes": own,
        "likelihood": likelihood_charts(run),
        "certainty": certainty(run),
        "wrong": [pair for pair in run.record.result.examples if pair.wrong] if run.record.result else [],
        "displacement": words.displacement(run.sides, run.before, run.after),
        "changes": tables.changes(run),
        "retention": tables.retention(run),
        "retained": retention_charts(run),
        "data": run.data,
        "refused": run.data.rejected[:MOST_REFUSED],
        "cost": tables.cost(run),
        "commands": tables.commands(run),
        "facts": tables.facts(run),
        "config": tables.config(run),
    }


def several_runs(runs: Sequence[Reading]) -> dict[str, Any]:
    """All that runs.html shows; folders of one name are told apart by their paths."""
    short = [run.name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run.path) for run in runs]
    return {
        "title": ", ".join(names),
        "source": f"{len(runs)} run folders",
        "names": names,
        "runs": [(run, name, banner(run), verdict(run)) for run, name in zip(runs, names, strict=True)],
        "rows": tables.side_by_side(runs),
        "charts": overlaid_charts(runs, names),
        "differences": tables.differences(runs),
    }


def _refuse_other(target: Path) -> None:
    """Nothing, where the page may be put at `target`: a file that is no report is never written over."""
    if target.is_dir():
        raise UsageError("is a folder", where=str(target), code="E313", next="name a file")
    if target.exists():
        with machine_errors(target, "read"), target.open("rb") as file:
            if MARK not in file.read(200):
                what = "exists already and is no report"
                raise UsageError(what, where=str(target), code="E313", next="name another --out")
