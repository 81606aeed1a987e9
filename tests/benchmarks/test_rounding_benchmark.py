"""The table of what bfloat16 rounds off, with the smallest model."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rounding.py"


def test_both_sides_are_held_to_float32(tmp_path):
    """In bfloat16 both are off, ours no further than twice the rows; in float32 the rows would be ours."""
    command = [sys.executable, str(SCRIPT), "--quick", "--pairs", "8", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["pairs"] == 8 and row["margin"] > 0
    assert 0 < row["ours_error"] < 2 * row["rows_error"]
    assert f"| {row['profile']} | 8 | {row['margin']:.2f} |" in done.stdout
