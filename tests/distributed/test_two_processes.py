"""Two gloo processes and one: the same losses, norms, metrics and weights, in float64, also where a share is empty."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import lifted
from ranks_worker import train

from palate.distributed import Ranks

WORKER = Path(__file__).parents[1] / "ranks_worker.py"
# rows 2k + 1 everywhere; a batch of 1 leaves one rank without a share in every step, a last step of 1 in the last
CASES = {
    "dpo": {"loss": "dpo", "rows": 7, "batch": 4, "steps": 6, "clip": 1e9},
    "clipped": {"loss": "dpo", "rows": 9, "batch": 4, "steps": 20, "clip": 0.05},
    "kto": {"loss": "kto", "rows": 9, "batch": 4, "steps": 6, "clip": 10.0},
    "sft": {"loss": "completion_nll", "rows": 5, "batch": 3, "steps": 6, "clip": 1.0},
    "lists": {"loss": "plackett_luce", "rows": 5, "batch": 3, "steps": 4, "clip": 1.0},
    "empty share": {"loss": "dpo", "rows": 3, "batch": 1, "steps": 4, "clip": 1.0},
    "empty share kto": {"loss": "kto", "rows": 3, "batch": 1, "steps": 4, "clip": 1.0},
    "poison": {"loss": "dpo", "rows": 7, "batch": 7, "steps": 3, "clip": 1.0, "poison": 2},
}


def run(folder: Path, size: int):
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(WORKER.parents[1]))
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(folder), str(rank), str(size)], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]  # fmt: skip
    try:
        for process in processes:
            _, said = process.communicate(timeout=150)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [json.loads((folder / f"rank-{rank}-of-{size}.json").read_text()) for rank in range(size)]
    return [dict(zip(CASES, one, strict=True)) for one in found]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with lifted():
        alone = {name: train(case, Ranks.single()) for name, case in CASES.items()}
    return alone, run(folder, 2)


@pytest.mark.parametrize("case", [name for name in CASES if name != "poison"])
def test_one_process_and_two_are_the_same_run(found, case):
    alone, (first, second) = found[0][case], (ranks[case] for ranks in found[1])
    assert len(alone["seen"]) == CASES[case]["steps"]
    for ours in (first, second):
        assert ours["cursor"] == alone["cursor"]
        assert np.allclose(ours["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(ours["seen"], alone["seen"], strict=True):
            assert mine[:3] == pytest.approx(theirs[:3], rel=1e-9)
            assert mine[3].keys() == theirs[3].keys()
            for name, value in theirs[3].items():
                same = (
                    math.isnan(mine[3][name])
                    if math.isnan(value)
                    else mine[3][name] == pytest.approx(value, rel=1e-8, abs=1e-9)
                )
                assert same, name
    assert first["weights"] == second["weights"]  # the same bits on both
    if case == "clipped":
        assert all(step[1] > CASES[case]["clip"] for step in alone["seen"])


def test_all_ranks_stop_together_and_nothing_moved(found):
    alone, ranks = found[0]["poison"], [rank["poison"] for rank in found[1]]
    for one in (alone, *ranks):
        assert one["seen"][0][:2] == ["stopped", 0]
        assert one["weights"] == alone["weights"]
    assert any("rows.jsonl:3" in one["seen"][0][2] for one in ranks)
