"""The memory benchmark runs, and counts what it says it counts; how much a step takes is no test here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_sets_plan_beside_run(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--quick", "--steps", "3", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["profile"], row["dtype"], row["casts"]) == ("tldr", "float32", 0)
    assert row["weights"] == row["gradients"] == row["optimizer"] / 2
    # what the script counts in a forward of its own is what the plan rehearses, but for the logits
    assert 0 < row["activations"] < row["plan"]["activations"] < 1.6 * row["activations"]
    assert row["step"] > row["weights"] + row["activations"]
    assert row["plan_peak"] == pytest.approx(row["run_peak"], rel=0.3)
    assert row["plan_seconds"] > 0 < row["run_seconds"]
    assert f"{row['step_over_ideal']:.2f}" in done.stdout
