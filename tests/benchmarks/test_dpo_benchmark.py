"""The benchmark script runs, and proves equal work; how fast it is depends on the machine and is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "dpo.py"
FIELDS = {
    "model", "profile", "dtype", "peer", "setting", "ratio_step", "ratio_memory", "loss_ours", "loss_peer",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_writes_a_row_a_setting_with_equal_losses_and_norms(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--quick", "--steps", "1", "--scale", "0.1", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, details = (json.loads(out.read_text())[name] for name in ("rows", "details"))
    sides = [(peer, setting) for peer in ("trl", "reference") for setting in ("default", "best")]
    assert [(row["peer"], row["setting"]) for row in rows] == sides
    for row, more in zip(rows, details, strict=True):
        assert row.keys() == FIELDS
        assert more["norms_ours"][0] == pytest.approx(more["norms_peer"][0], rel=1e-3)
        assert 0 < sum(more["shares"].values()) < 1
        assert (row["profile"], row["dtype"]) == ("tldr", "float32")
        assert row["loss_ours"] == pytest.approx(row["loss_peer"], rel=2e-5)
        assert row["ratio_step"] > 0
        assert 0 < row["ratio_memory"] < 1.2
    assert "every position" in done.stdout  # no CPU ratio without saying where it comes from


def test_a_folder_without_a_model_is_a_usage_error(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--model", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no config.json" in done.stderr
