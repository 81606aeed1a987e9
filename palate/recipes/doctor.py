"""Preference data to findings: what is wrong with it, where, and what to do."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from palate.recipes.verbs import stderr


class DoctorConfig(BaseModel):
    """Options of `palate doctor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[str, Field(description="File of pairs, ranked lists, feedback or demonstrations")]
    columns: Annotated[dict[str, str], Field(description="Column names, as chosen=good,rejected=bad")] = {}
    format: Annotated[str | None, Field(description="jsonl, json, csv, parquet, text: where the name is silent")] = None


def run(config: DoctorConfig, *, verb: str = "doctor", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """The findings, as rows and as a table; exit code 3 where one of them is an error."""
    from palate.data.doctor import doctor

    findings = doctor(config.data, columns=config.columns or None, format=config.format)
    return findings.as_dict() | {"exit_code": findings.exit_code, "summary": table(config.data, findings)}


def table(name: str, findings) -> list[str]:
    """The findings as lines: check, count, what, examples, what to do."""
    kind = f"{findings.rows} {findings.kind or 'row'}s" if findings.rows else "no rows"
    counts = ", ".join(f"{findings.count(severity)} {severity}s" for severity in ("error", "warning", "note"))
    lines = [f"{name}: {kind} · {counts}", *(f"  {note}" for note in findings.notes)]
    for finding in findings:
        code = f" [{finding.code}]" if finding.code else ""
        lines.append(f"{finding.severity:8}{finding.check}: {finding.count}{code} {finding.what}".rstrip())
        if finding.rows:
            lines.append(f"        at {'; '.join(finding.rows)}")
        if finding.fix:
            lines.append(f"        do {finding.fix}")
    return lines
