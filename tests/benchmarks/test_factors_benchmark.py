"""Every saving that is left out for a measurement leaves losses and gradients as they were."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import build

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

SHAPES = ((30, 9, 12), (12, 7, 5), (25, 20, 3))


def gradients(model, batch):
    from palate.train.objectives import pairwise

    model.zero_grad()
    outcome = pairwise("dpo", beta=0.1)(model, batch)
    outcome.loss.total.backward()
    return outcome.loss.total.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("without", [(), ("shared prompt",), ("head on completions",)])
def test_a_batch_without_a_saving_has_the_same_loss_and_gradients(without):
    from sides import batch_of, groups_of, row_length

    from palate.reference import annotate

    draw, model = np.random.default_rng(0), build("llama").double()
    rows = [[draw.integers(3, 90, count).astype(np.int32) for count in shape] for shape in SHAPES]
    groups = groups_of(rows)
    groups = annotate(groups, build("llama", seed=1).double())
    plain, other = batch_of(groups), batch_of(groups, without)
    assert len(other.batch.tokens) == sum(row_length(group, without) for group in groups)
    more = {"shared prompt": (sum(p for p, *_ in SHAPES), 0), "head on completions": (0, 1)}
    tokens, completions = more[without[0]] if without else (0, 0)
    assert len(other.batch.tokens) - len(plain.batch.tokens) == tokens
    assert len(other.batch.length) - len(plain.batch.length) == completions
    if completions:  # every position is read, a prompt's last one twice
        assert len(other.batch.predictors) == len(other.batch.tokens) + len(SHAPES)
    (loss, found), (same, again) = gradients(model, plain), gradients(model, other)
    assert float(same) == pytest.approx(float(loss), rel=1e-12)
    for one, two in zip(found, again, strict=True):  # the norms' float32 islands are as they were
        assert float((one - two).norm()) <= 1e-6 * float(one.norm())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_factors_of_short_rows_have_equal_losses(tmp_path):
    out = tmp_path / "out.json"
    names = ("shared prompt", "packing", "head on completions", "kept reference", "no recompute",
             "none of the first 5", "plain loop")  # fmt: skip
    more = [word for name in names for word in ("--factor", name)]
    command = [sys.executable, BENCHMARKS / "factors.py", "--steps", "1", "--scale", "0.1", "--json", out, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert tuple(row["factors"]) == names
    for found in row["factors"].values():
        assert found["ratio"] > 0
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=2e-5)
    assert done.stdout.count("x (") == 2  # the product beside what was measured
