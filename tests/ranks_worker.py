"""One of several gloo processes: trains on its share, and writes down what it saw. Called by test_two_processes.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from models import lifted
from training_cases import pair_of_models, ready, rows_for

from palate.data.stream import stream
from palate.distributed import Ranks
from palate.errors import NotFiniteError
from palate.train.loop import TrainState, steps
from palate.train.objectives import objective
from palate.train.optim import OptimConfig


def train(case, ranks):
    """(losses, norms, metrics, weights, cursor) of a run, every rank's own view."""
    policy, reference = pair_of_models()
    groups = ready(case["loss"], rows_for(case["loss"], case["rows"]), reference)
    if case.get("poison") is not None:
        bad = case["poison"]
        groups[bad] = replace(groups[bad], reference=tuple(float("nan") for _ in groups[bad].reference))
    config = OptimConfig(lr=1e-2, warmup_steps=1, clip_norm=case["clip"])
    state = TrainState.fresh(policy, config, case["steps"])
    made = objective(case["loss"])
    batches = stream(
        groups, made.collate, batch=case["batch"], tokens=30, steps=case["steps"],
        rank=ranks.data_rank, size=ranks.data_size,
    )  # fmt: skip
    seen = []
    try:
        for step in steps(state, batches, made, ranks):
            seen.append([step.loss, step.grad_norm, step.tokens, step.metrics])
    except NotFiniteError as error:
        seen.append(["stopped", state.step, str(error)])
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    return {"seen": seen, "weights": weights.tolist(), "cursor": state.cursor}


def main(folder: Path, rank: int, size: int):
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    ranks = Ranks.current()
    assert (ranks.data_rank, ranks.data_size) == (rank, size)
    with lifted():
        found = [train(case, ranks) for case in cases]
    (folder / f"rank-{rank}-of-{size}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
