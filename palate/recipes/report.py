"""Run folders to one HTML page."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from palate.recipes import chain
from palate.recipes.verbs import stderr


class ReportConfig(BaseModel):
    """Options of `palate report`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Annotated[list[str], Field(min_length=1, description="Run folders; several stand side by side")]
    out: Annotated[
        str | None, Field(description="HTML file; default: RUN/report.html of one run, ./report.html of several")
    ] = None


def run(config: ReportConfig, *, verb: str = "report", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes the page; an earlier report is replaced, another file never. Rounds are held to their manifests first."""
    from palate.report import write_report

    for path in map(Path, config.runs):
        if (path / chain.TABLE).is_file():
            chain.verify(path)
    page = write_report(config.runs, config.out)
    return {"out": str(page), "runs": config.runs, "summary": str(page)}
