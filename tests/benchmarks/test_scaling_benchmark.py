"""The scaling benchmark runs, and counts a prompt once; how long a step takes is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.mark.slow
def test_quick_writes_a_row_a_point(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--quick", "--repeats", "1", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["axis"] for row in rows] == [
        axis for axis in ("prompt", "completions", "groups", "model") for _ in "abc"
    ]
    for row in rows:
        assert row["seconds"] > 0
        # all but one of a group's completions find their prompt there already; a completion's last token is no input
        missing = row["row_tokens"] - row["stream_tokens"]
        sequences = row["groups"] * row["completions"]
        prompts = (missing - sequences) / (row["completions"] - 1) / row["groups"]
        assert prompts == pytest.approx(row["prompt"], rel=0.1)
