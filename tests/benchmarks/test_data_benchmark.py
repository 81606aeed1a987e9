"""The data benchmark runs, and every score that it puts into the store is found; how fast it goes is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


@pytest.mark.slow
def test_quick_writes_a_row_a_size_and_way(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--quick", "--folder", tmp_path, "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *sizes, store = json.loads(out.read_text())["rows"]
    assert [(row["pairs"], row["way"]) for row in sizes] == [
        (count, way) for count in (100, 400) for way in ("lists", "first", "again")
    ]
    for row in sizes:
        assert row["start_seconds"] > 0
        if row["way"] == "again":
            assert row["data_tokens_per_second"] > row["model_tokens_per_second"]
    assert store["store_rows"] == 50_000
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # nothing is left behind
