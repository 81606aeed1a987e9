"""The benchmark of the whole path runs both commands and proves equal work; how fast they are is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "whole.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_runs_both_commands_to_equal_losses_and_writes_the_table(tmp_path):
    pytest.importorskip("trl")
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text("before\n<!-- whole -->\nold\n<!-- /whole -->\nafter\n")
    command = [sys.executable, SCRIPT, "--quick", "--json", out, "--docs", page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["model"], row["setting"], row["pairs"], row["steps"]) == ("builtin:tiny", "best", 16, 2)
    assert row["losses_ours"] == pytest.approx(row["losses_peer"], rel=2e-5)
    assert row["losses_ours"][0] == pytest.approx(0.693147, abs=1e-5)
    assert row["losses_ours"][1] != row["losses_ours"][0]
    assert row["ratio"] == pytest.approx(row["seconds_peer"] / row["seconds_ours"])
    assert row["stepping_ours"] + row["reference_ours"] < row["seconds_ours"]
    written = page.read_text()
    assert written.startswith("before\n<!-- whole -->\n`python benchmarks/whole.py --quick` on ")
    assert "old" not in written and written.endswith("<!-- /whole -->\nafter\n")
    again = subprocess.run([sys.executable, SCRIPT, "--from", out], capture_output=True, text=True, timeout=60)
    assert again.stdout.strip() in written


def test_a_folder_without_a_model_is_a_usage_error(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--model", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no config.json" in done.stderr
