"""Online DPO: samples of the policy as it stands, held to the start; killed anywhere it ends in the same bytes."""

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import died, disk
from runs_kit import JUDGES, lines, metrics, pairs, tree, write_rows
from safetensors.numpy import load_file

from palate.data.tokens import TokenGroup
from palate.files import sha256_file
from palate.model.load import load
from palate.recipes.online import OnlineConfig, run
from palate.reference import annotate
from palate.sampling.judge import Completion, open_judge
from palate.sampling.pairing import unfit

SMALL = dict(batch=6, steps=3, max_tokens=12, samples=1, device="cpu", lr=3e-4, chunk=4, judge="liking:like")
SMALL |= {"eval_judge": "liking:like", "eval_every": 1}


@pytest.fixture
def options(tmp_path, ending) -> dict:
    (tmp_path / "liking.py").write_text(JUDGES)
    rows = [{"prompt": f"Say {n}:"} for n in range(40)]
    data = {"data": write_rows(tmp_path / "d.jsonl", rows[:20]), "eval": write_rows(tmp_path / "e.jsonl", rows[20:])}
    return SMALL | data | {"model": ending}


def logps_of(model, prompts, ids) -> np.ndarray:
    groups = [TokenGroup(p, (i,), (((0, len(i)),),)) for p, i in zip(prompts, ids, strict=True)]
    return np.array([group.reference[0] for group in annotate(groups, model)])


def drawn(out: str, number: int) -> list[dict]:
    return [row for n in range(2) for row in lines(Path(f"{out}/rounds/{number:02d}/samples/{n:03d}.jsonl"))]


def test_a_whole_run_its_rounds_and_their_chain(palate, options):
    result = palate.ok("online-dpo", out="run", **options)
    steps = [line for line in lines(Path("run/metrics.jsonl")) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-7) and "start: loss 0.693147" in palate.said
    table = json.loads(Path("run/rounds.json").read_text())
    assert [row["round"] for row in table["rounds"]] == [1, 2, 3] == [line["round"] for line in steps]
    keys = "parent pairs unparsed ties win_rate win_low win_high win_previous judge_accuracy length kl"
    for row, line in zip(table["rounds"], steps, strict=True):
        assert not set(keys.split()) - set(row)
        assert row["pairs"] == line["pairs"] == len(lines(Path(f"run/rounds/{row['round']:02d}/pairs.jsonl"))) > 0
        assert row["prompts"] == 6 == row["pairs"] + sum(row["left_out"].values())
        assert row["win_low"] < row["win_rate"] < row["win_high"] and row["kl"] is not None
    for number in (1, 2):
        manifest = sha256_file(Path(f"run/rounds/{number:02d}/manifest.json"))
        assert table["manifests"][number - 1] == manifest == table["rounds"][number]["parent"]
    for pair in lines(Path("run/rounds/02/pairs.jsonl")):
        assert len(pair["chosen"]) - len(pair["rejected"]) == pair["margin"] > 0
    assert result["rounds"] == 3 and result["pairs"] == sum(row["pairs"] for row in table["rounds"])
    assert "judged by liking:like, the judge that trained it" in result["verdict"]
    match = json.loads(Path("run/compare/comparison.json").read_text())
    assert match["win_rate"] == table["rounds"][-1]["win_rate"] and len(match["examples"]) == 20
    palate.ok("generate", model="run", data=options["data"], out="out.jsonl", max_tokens=3)
    palate.ok("report", "run")
    page = Path("run/report.html").read_text()
    assert "the policy wins" in page and "<svg" in page
    palate.ok("online-dpo", out="run", resume=True, **options)
    assert "nothing to do" in palate.said


def test_a_round_samples_the_policy_as_it_stands_and_holds_it_to_the_start(palate, options, ending):
    """By stock scoring of what was drawn: under the weights of the checkpoint before, and under those of the start."""
    palate.ok("online-dpo", out="run", **options | {"save_every": 1, "train__keep": 3, "beta": 0.3, "lr": 2e-3})
    start, rows = load(ending), drawn("run", 2)
    from palate.data.sources import read_prompts
    from palate.data.stream import order
    from palate.data.tokens import encode_prompt

    records = read_prompts(str(options["data"]))
    asked = [encode_prompt(records[int(i)].prompt, start.tokenizer) for i in order(20, 0, 0)[6:12]]
    prompts, ids = [asked[row["prompt"]] for row in rows], [np.array(row["ids"], np.int32) for row in rows]
    before = logps_of(start.model, prompts, ids)
    weights = load_file("run/checkpoints/step-000001/model.safetensors")
    import torch

    start.model.load_state_dict({k.removeprefix("policy."): torch.tensor(v) for k, v in weights.items()})
    own, said = logps_of(start.model, prompts, ids), np.array([row["logp"] for row in rows])
    assert np.allclose(said, own, atol=1e-4) and np.abs(said - before).max() > 0.1

    chosen, worse = [], []  # the rewards of step 2 are beta times the log-ratio of these very ids to the start
    for place in range(6):
        texts = [row for row in rows if row["prompt"] == place]
        ends = [row for row in texts if row["finished"] and row["completion"].strip()]
        if len(ends) == 2 and len(ends[0]["completion"]) != len(ends[1]["completion"]):
            one, two = sorted(ends, key=lambda row: -len(row["completion"]))
            chosen.append(rows.index(one))
            worse.append(rows.index(two))
    step = [line for line in lines(Path("run/metrics.jsonl")) if "loss" in line][1]
    assert step["pairs"] == len(chosen) > 1
    for side, name in ((chosen, "chosen"), (worse, "rejected")):
        assert step[f"logps/{name}"] == pytest.approx(own[side].mean(), abs=1e-4)
        assert step[f"rewards/{name}"] == pytest.approx(0.3 * (own - before)[side].mean(), abs=1e-4)
    optimizer = load_file("run/checkpoints/step-000003/optimizer.safetensors")
    assert {float(value) for name, value in optimizer.items() if name.endswith("/step")} == {3.0}  # one for all rounds


def test_a_judge_who_knows_no_difference_ends_it_cleanly(palate, options, ending):
    result = palate.ok("online-dpo", out="run", **options | {"judge": "liking:same"})
    assert (result["steps"], result["pairs"], result["rounds"], result["better"]) == (0, 0, 4, False)
    assert result["verdict"] == "not shown to be better: the last 24 prompts gave no pair" and result["ended"]
    table = json.loads(Path("run/rounds.json").read_text())
    assert all(row["ties"] + row["left_out"]["unfinished"] + row["left_out"]["empty"] > 0 for row in table["rounds"])
    same = ((Path(folder) / "model.safetensors").read_bytes() for folder in (ending, "run/model"))
    assert len(set(same)) == 1


def test_shown_worse_it_stops(palate, options):
    more = {"judge": "liking:dislike", "steps": 60, "eval_every": 2, "lr": 1e-2, "beta": 0.01, "batch": 20}
    result = palate.ok("online-dpo", out="run", **options | more)
    assert result["steps"] < 60 and f"shown worse than its start after step {result['steps']}" in result["ended"]
    assert result["verdict"].startswith("worse: ") and result["ended"] in result["verdict"]


def test_a_judge_that_only_compares_and_adapters(palate, options):
    more = {"judge": "liking:longer", "candidates": 3, "lora_rank": 2, "steps": 2, "temperature": 0.8}
    result = palate.ok("online-dpo", out="run", **options | more)
    samples, judged = (lines(Path(f"run/rounds/01/{stage}/000.jsonl")) for stage in ("samples", "judged"))
    scores = [row["score"] for row in judged]
    fit = [unfit(row["completion"], row["finished"]) is None for row in samples]
    assert {0.0, 0.25, 0.5, 0.75, 1.0} >= {one for one, mine in zip(scores, fit, strict=True) if mine}
    assert not any(one is not None for one, mine in zip(scores, fit, strict=True) if not mine)
    thirds = [slice(at, at + 3) for at in range(0, len(fit), 3)]
    beaten = [sum(one or 0 for one in scores[mine]) for mine in thirds]
    assert beaten == [sum(fit[mine]) / 2 for mine in thirds] and max(beaten) > 0.5
    assert result["pairs"] > 0 and Path("run/adapter").is_dir()


@pytest.mark.parametrize("kind", ["a reward model", "implicit", "policy"])
def test_models_judge(palate, options, kind, tmp_path):
    """What stands in the rounds is what that judge says of the samples, and pairs follow it."""
    from palate.data.sources import read_prompts
    from palate.data.stream import order

    given = options | {"steps": 2, "eval": "none", "eval_judge": None, "eval_every": None}
    learnt = dict(model=options["model"], data=write_rows(tmp_path / "pairs.jsonl", pairs(8)), eval="none", steps=2,
                  batch=4, samples=0, lr=1e-2, device="cpu", out="judge")  # fmt: skip
    if kind == "policy":  # a small model of the built-in world, whose judgements can be read
        name = "policy:builtin:tiny"
        given |= {"model": "builtin:tiny", "data": "builtin:prompts[:6]", "batch": 3, "max_tokens": 64, "steps": 1}
    else:
        palate.ok("dpo" if kind == "implicit" else "reward", **learnt)
        name = "implicit:judge" if kind == "implicit" else "judge"
    result = palate.ok("online-dpo", out="run", **given | {"judge": name})
    records, judge = read_prompts(str(given["data"])), open_judge(name)
    rows, scores, paired = order(len(records), 0, 0), [], 0
    for number in range(1, given["steps"] + 1):
        folder = Path(f"run/rounds/{number:02d}")
        for chunk in sorted((folder / "samples").glob("0*.jsonl")):
            made, said = lines(chunk), lines(folder / "judged" / chunk.name)
            asked = [records[int(rows[(number - 1) * given["batch"] + row["prompt"]])].prompt for row in made]
            found = judge.ratings(asked, [Completion(row["completion"], row["finished"]) for row in made])
            assert [row["score"] for row in said] == pytest.approx(found, abs=1e-4)
            scores += found
        for pair in lines(folder / "pairs.jsonl"):
            assert pair["margin"] > 0
            paired += 1
    assert result["pairs"] == paired > 0 and len(set(scores)) > 2


def test_the_plan_writes_nothing_and_what_cannot_be_is_refused(palate, options):
    found = palate.ok("online-dpo", out="run", dry_run=True, **options | {"steps": None})
    assert found["steps"] == 4 and found["held"] == 20 and not Path("run").exists()
    for wrong, said in (
        ({"loss": "kto"}, "not one of pairs"),
        ({"candidates": 1}, "candidates"),
        ({"judge": "nobody"}, "no judge"),
        ({"eval": "none", "eval_every": None}, "no prompts are held out"),
        ({"max_tokens": 300}, "exceed the limit of 256"),
    ):
        palate("online-dpo", out="run", **options | wrong)
        assert palate.code == 2 and said in palate.said and not Path("run").exists()


def files(out: str) -> dict[str, bytes]:
    """All that must be the same however it came about."""
    found = tree(Path(out))
    own = ("rounds.json", "samples.jsonl")
    return {name: data for name, data in found.items() if name.split("/")[0] in ("model", "rounds", "compare")} | {
        name: found[name] for name in own
    }


def go(options, out, **more):
    config = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return run(OnlineConfig(**config | {"out": out, "report": False} | more), say=lambda text="": None)


@pytest.mark.parametrize(
    "shares", [(0.3, 0.8), pytest.param(tuple(n / 21 for n in range(1, 21)), marks=pytest.mark.slow)]
)
def test_dead_at_any_place_the_same_bytes(palate, options, shares):
    """The disk, and the process with it, gone while it samples, judges, pairs, trains, evaluates or saves."""
    with disk() as counted:
        go(options, "whole")
    chance = random.Random(11)
    for trial, share in enumerate(shares):
        out, at = f"run-{trial}", int(counted.count * share) + chance.randrange(8)
        assert died(partial(go, options, out), at)
        go(options, out, resume=Path(out, "run.json").exists())
        assert files(out) == files("whole")
        assert metrics(out) == metrics("whole")
