"""The sampling benchmark runs and proves equal work; how fast it is depends on the machine and is no test."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generate.py"


def test_quick_writes_a_row_with_the_same_greedy_tokens_and_log_probs(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--quick", "--prompts", "4", "--max-tokens", "8", "--pairs", "1", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["model"], row["prompts"], row["samples"], row["ends"]) == ("builtin:tiny", 4, 4, True)
    assert row["greedy_same"] == 1
    assert row["logp_difference"] < 1e-4
    assert row["ratio"] == row["tokens_per_second_ours"] / row["tokens_per_second_peer"] > 0


def test_a_folder_without_a_model_is_a_usage_error(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--model", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no config.json" in done.stderr
