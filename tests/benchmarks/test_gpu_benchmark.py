"""The GPU benchmark runs in its quick form on the CPU: its check of equality, both sides, its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_quick_checks_equality_and_writes_a_row_a_model(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--quick", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["check"]["float32"] < 1e-3
    assert [row["model"] for row in found["rows"]] == ["qwen2-tiny", "llama-tiny"]
    for row in found["rows"]:
        assert row["loss_ours"] == pytest.approx(row["loss_trl"], rel=1e-2)
        assert row["ratio"] > 0 and row["mfu"] is None


def test_without_a_gpu_the_whole_is_refused():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--quick tries the script on the CPU" in done.stderr
