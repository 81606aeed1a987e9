"""doctor: what is wrong with a file of preference data, and what to do about it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class DoctorConfig(BaseModel):
    """Options of `palate doctor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[str, Field(description="JSONL, JSON, CSV or Parquet file, slice of one as FILE[:500], or Hub id")]
    columns: Annotated[dict[str, str], Field(description="Column names, as chosen=good,rejected=bad")] = {}
    format: Annotated[str | None, Field(description="jsonl, json, csv or parquet, where the name does not tell")] = None


def run(config: DoctorConfig, *, verb: str = "doctor", say=print, panel=None, argv=()) -> dict[str, Any]:
    """The findings as a dict for --json and a table for the screen; exit code 3 where one is an error."""
    from palate.data.doctor import doctor

    findings = doctor(config.data, columns=dict(config.columns) or None, format=config.format)
    rows = [
        {"check": f.check, "severity": f.severity, "count": f.count, "rows": list(f.rows), "fix": f.fix}
        for f in findings
    ]
    errors = sum(row["severity"] == "error" for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row['severity']:<8} {row['check']:<28} {row['count']:>8,}  {row['fix']}")
        lines += [f"         {example}" for example in row["rows"]]
    notes = sum(row["severity"] != "error" for row in rows)
    lines.append(f"{config.data}: {errors} errors, {notes} notes" if rows else f"{config.data}: nothing found")
    return {"exit_code": 3 if errors else 0, "errors": errors, "findings": rows, "summary": lines}
