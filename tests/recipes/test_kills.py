"""SIGKILL in the middle of whatever a verb of own samples does: resumed it ends in the same bytes.

examples/self_play.py kills twenty times.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs_kit import JUDGES, demonstrations, flags, tree, write_rows

from palate.recipes.chain import MADE

ROOT = Path(__file__).parents[2]
COMMON = dict(max_tokens=12, chunk=3, device="cpu")
TRAINED = COMMON | dict(batch=4, steps=3, samples=1, lr=3e-4, save_every=1, eval_judge="liking:like")
VERBS = {
    "spin": TRAINED | dict(data="d.jsonl", prompts="p.jsonl", rounds=2, lam="0.7,1"),
    "self-reward": TRAINED
    | {"data": "d.jsonl", "prompts": "p.jsonl", "new_prompts": "d.jsonl", "prompts_per_round": 12, "rounds": 2}
    | {"judge": "liking:longer", "candidates": 3, "temperature": 1, "start.steps": 3, "start.batch": 4},
    "online-dpo": TRAINED | dict(data="d.jsonl", eval="p.jsonl", steps=6, eval_every=2, judge="liking:like"),
    "pairs": COMMON | dict(data="d.jsonl", judge="liking:longer", candidates=3),
}


def made(folder: Path) -> dict[str, bytes]:
    """All that must be the same however it came about: what rounds made, their chain, the models, tables and pairs."""
    tops = ("model", "compare", "samples", "judged", "rounds.json", "samples.jsonl", "prompts.jsonl", "seed.jsonl")

    def kept(name: str) -> bool:
        top, *rest = name.split("/")
        if top == "rounds":
            return rest[1] in (*MADE, "manifest.json")
        return rest[:1] == ["model"] if top == "start" else top in tops

    return {name: data for name, data in tree(folder).items() if kept(name)}


def progress(folder: Path) -> int:
    """Files that are there, and lines of what is logged."""
    count = 0
    for parent, _, names in os.walk(folder):  # `rglob` raises where a folder goes under its feet
        count += len(names)
        if "metrics.jsonl" in names:
            count += Path(parent, "metrics.jsonl").read_bytes().count(b"\n")
    return count


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_random_moments_the_same_bytes(tmp_path, ending, verb):
    (tmp_path / "liking.py").write_text(JUDGES)
    rows = list(demonstrations(60))
    write_rows(tmp_path / "d.jsonl", rows[:40])
    write_rows(tmp_path / "p.jsonl", rows[40:])
    chance, file = random.Random(verb), ".jsonl" if verb == "pairs" else ""

    def start(out: str):
        folder = tmp_path / (f"{out}.run" if file else out)
        argv = flags(model=ending, out=out + file, resume=(folder / "run.json").exists(), **VERBS[verb])
        command = [sys.executable, "-c", "from palate.cli import entry; entry()", verb, *argv]
        environment = os.environ | {"PALATE_CACHE": str(tmp_path / f"cache-{out}"), "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return folder, subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    def finish(out: str) -> Path:
        folder, process = start(out)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
        return folder

    whole, met = finish("whole"), 0
    for share in (0.1, 0.35, 0.6):
        folder, process = start("killed")
        until = progress(whole) * (share + chance.uniform(0, 0.1))
        while progress(folder) < until and process.poll() is None:
            time.sleep(0.01)
        met += process.poll() is None
        process.kill()
        process.communicate()
    assert met >= 2
    assert made(finish("killed")) == made(whole) and len(made(whole)) > 10
    if file:
        assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
