"""A preference file out of prompts: what the judge or the models say, why prompts have none, the same after a kill."""

import json
from functools import partial
from pathlib import Path

import pytest
from faults import died, disk
from runs_kit import JUDGES, TEMPLATE, lines, save_model, tree, write_rows

from palate.data.sources import read_pairs
from palate.recipes.pairs import PairsConfig, run

SMALL = dict(max_tokens=12, chunk=5, device="cpu")


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "liking.py").write_text(JUDGES)
    return write_rows(tmp_path / "p.jsonl", [{"prompt": f"Say {n}:"} for n in range(12)])


def test_a_judges_best_against_its_worst(palate, prompts, ending):
    found = palate.ok("pairs", model=ending, judge="liking:like", data=prompts, out="made/pairs.jsonl", **SMALL)
    pairs = read_pairs("made/pairs.jsonl")
    assert found["pairs"] == len(pairs) > 3
    assert found["pairs"] + sum(found["left_out"].values()) == found["prompts"] == 12
    assert found["format_accuracy"] > 0.5  # a judge of length is seen by its lengths
    drawn = [row for n in range(3) for row in lines(Path(f"made/pairs.run/samples/{n:03d}.jsonl"))]
    assert len(drawn) == 48
    for pair in pairs:
        number = int(pair.prompt.split()[1][:-1])
        mine = [row["completion"] for row in drawn if row["prompt"] == number and row["finished"]]
        mine = [text for text in mine if text.strip() and "\0" not in text]
        assert len(pair.chosen) == max(map(len, mine)) and len(pair.rejected) == min(map(len, mine))
        assert pair.margin == len(pair.chosen) - len(pair.rejected)
    palate.ok("dpo", model=ending, data="made/pairs.jsonl", eval="none", steps=1, batch=2, samples=0, out="run")
    palate("pairs", model=ending, judge="liking:like", data=prompts, out="made/pairs.jsonl", **SMALL)
    assert palate.code == 2 and "exists already" in palate.said
    palate.ok("pairs", model=ending, judge="liking:like", data=prompts, out="made/pairs.jsonl", resume=True, **SMALL)
    assert "nothing to do" in palate.said and palate.result["pairs"] == found["pairs"]


def test_the_strong_models_sample_against_the_weak_ones(palate, prompts, ending, tmp_path, tiny_llama, tiny_tokenizer):
    import torch

    model = tiny_llama(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_output_embeddings().weight[tiny_tokenizer.eos_token_id, 0] = 0.6
    other = save_model(tmp_path / "other", model, tiny_tokenizer, TEMPLATE)
    found = palate.ok("pairs", strong=ending, weak=other, data=prompts, out="pairs.jsonl", **SMALL)
    assert found["pairs"] > 3 and found["pairs"] + sum(found["left_out"].values()) == 12
    sides = {}
    for side in ("strong", "weak"):
        rows = [row for n in range(3) for row in lines(Path(f"pairs.run/{side}/samples/{n:03d}.jsonl"))]
        sides[side] = {f"Say {row['prompt']}:": row["completion"] for row in rows}
    for pair in read_pairs("pairs.jsonl"):
        assert (pair.chosen, pair.rejected) == (sides["strong"][pair.prompt], sides["weak"][pair.prompt])
    same = palate.ok("pairs", strong=ending, weak=ending, data=prompts, out="same.jsonl", **SMALL)
    assert same["left_out"]["same text"] < 12  # each side draws by its own seed


def test_no_opinion_no_pairs(palate, prompts, ending):
    found = palate.ok("pairs", model=ending, judge="liking:same", data=prompts, out="pairs.jsonl", **SMALL)
    assert found["pairs"] == 0 and found["left_out"]["ties"] > 6 and Path("pairs.jsonl").read_bytes() == b""
    assert found["alarms"] and "alarm: " in palate.said


def test_parts_end_as_one_process_does(palate, prompts, ending):
    options = dict(model=ending, judge="liking:longer", data=prompts, candidates=3, **SMALL)
    palate.ok("pairs", out="whole.jsonl", **options)
    for part, done in (("2/2", False), ("1/2", False), ("2/2", True)):  # the first samples, and judges later
        assert palate.ok("pairs", out="parts.jsonl", part=part, **options)["done"] is done
    assert not Path("parts.jsonl").exists()
    palate.ok("pairs", out="parts.jsonl", resume=True, **options)
    assert Path("parts.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_what_cannot_be_is_refused(palate, prompts, ending):
    options = SMALL | {"data": prompts, "out": "pairs.jsonl"}
    for wrong, said, code in (
        ({"model": ending}, "either --model and --judge", 2),
        ({"model": ending, "judge": "random", "strong": ending, "weak": ending}, "either --model and --judge", 2),
        ({"strong": ending, "weak": ending, "candidates": 2}, "no effect without --judge", 2),
        ({"model": ending, "judge": "random", "part": "3/2"}, "no part 3/2", 2),
        ({"model": ending, "judge": "rule"}, "builtin:prompts alone", 3),
        ({"model": "nowhere/model", "judge": "random"}, "nowhere/model", 3),
    ):
        palate("pairs", **options | wrong)
        assert palate.code == code and said in palate.said and not Path("pairs.jsonl").exists()


def test_dead_at_any_place_the_same_bytes(palate, prompts, ending):
    def make(out, **more):
        given = {"model": str(ending), "judge": "liking:like", "data": str(prompts), "out": out, **SMALL}
        return run(PairsConfig(**given | more), say=lambda text="": None)

    with disk() as counted:
        make("whole.jsonl")
    whole = tree(Path("whole.run"))
    for trial, share in enumerate((0.1, 0.35, 0.6, 0.8, 0.97)):
        out, work = f"killed-{trial}.jsonl", Path(f"killed-{trial}.run")
        assert died(partial(make, out), int(counted.count * share))
        (work / "samples").mkdir(parents=True, exist_ok=True)
        (work / "samples" / ".plan.json.7-0.tmp").write_text("half")  # as SIGKILL leaves it
        make(out, resume=(work / "run.json").exists())
        assert Path(out).read_bytes() == Path("whole.jsonl").read_bytes()
        made = tree(work)
        assert not [name for name in made if name.endswith(".tmp")]
        assert {n: d for n, d in made.items() if n.endswith("l") and "/" in n} == {
            n: d for n, d in whole.items() if n.endswith("l") and "/" in n
        }
        assert json.loads(made["run.json"])["status"] == "done"
