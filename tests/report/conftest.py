"""Run folders as runs write them, with any file of theirs changed."""

import json
from pathlib import Path

import pytest
from report_kit import CONFIG, DATA, LINES, RESULT, SAMPLES, Page

from palate.run import Run


@pytest.fixture
def folder(tmp_path):
    """A function that writes a run folder. status: done, interrupted or failed; changes: files as they should be."""

    def make(
        name="run", *, verb="dpo", lines=LINES, samples=SAMPLES, result=RESULT, status="done", record=None, **changes
    ) -> Path:
        out = tmp_path / name
        argv = ["palate", verb, "--model", "models/start", "--out", name]
        parents = [{"model": "models/start", "identity": "cd" * 16}]
        with Run.create(out, verb=verb, config=CONFIG, argv=argv, parents=parents, hardware="CPU, 2 cores") as run:
            run.write_data(DATA)
            for line in lines:
                run.log(line)
            run.samples(samples)
            run.finish(result)
        if status != "done" or record:
            written = json.loads((out / "run.json").read_text())
            if status != "done":
                written = {k: v for k, v in written.items() if k not in ("verdict", "result")} | {"status": status}
                written["error"] = "stopped by SIGINT after step 4, which is saved"
            (out / "run.json").write_text(json.dumps(written | (record or {})))
        for file, content in changes.items():
            path = out / {"comparison": "comparison.json", "data": "data.json", "config": "config.yaml"}[file]
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return out

    return make


@pytest.fixture
def report():
    """`write_report`, then the page read back."""
    from palate.report import write_report

    def make(*runs, out=None) -> Page:
        return Page(write_report(runs, out))

    return make
