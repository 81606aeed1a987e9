"""Frontiers: which runs there are, what their points say and cost, kills, the exact curve that nothing lies above."""

import json
import math
from pathlib import Path

import pytest
from runs_kit import pairs, tree, write_rows

from palate.errors import PalateError
from palate.recipes import frontier, hulls
from palate.recipes.cells import Cell, cells_of, points_of, refuse_above
from palate.recipes.frontier import FrontierConfig
from palate.recipes.grounds import Drawn
from palate.run import Run
from palate.worlds import enumerable
from palate.worlds.enumerable import World

SMALL = dict(world="enumerable", betas="0.5", alphas="0.1", target_kls="1", best_of="2,16", pairs=256, steps=4,
             points=2, rollouts=2)  # fmt: skip
OPTIONS = ["--options", "reference.steps=4,ppo.batch=16,dpo.batch=64,reward.batch=64"]
KEYS = {"method", "setting", "seed", "step", "reward", "kl", "seconds", "samples", "exact_reward"}


def read(run: str = "f") -> dict:
    return json.loads(Path(run, "frontier.json").read_text())


def point(method="dpo", kl=1.0, reward=1.0, *, setting="beta=1", seed=0, seconds=2.0, samples=8, exact=None, step=3):
    return {"method": method, "setting": setting, "seed": seed, "step": step, "kl": kl, "reward": reward,
            "seconds": seconds, "samples": samples, "exact_reward": exact,
            "cell": f"{method},{setting},seed={seed}"}  # fmt: skip


# which runs there are


def test_the_cells_are_those_of_the_paper():
    found = list(cells_of(FrontierConfig(seed=7), 7, Path("f")))
    assert [cell.name for cell in found] == [
        "sft,seed=7",
        "reward,seed=7",
        *(f"dpo,beta={beta},seed=7" for beta in ("0.05", "0.1", "0.5", "2")),
        *(f"unlikelihood,alpha={alpha},seed=7" for alpha in ("0.05", "0.1", "0.5", "1")),
        "preferred_ft,seed=7",
        *(f"best_of_n,n={n},seed=7" for n in (2, 4, 16)),
        *(f"{method},target_kl={kl},seed=7" for method in ("ppo", "ppo_true", "rloo") for kl in (1, 2, 4, 8)),
    ]
    by_name = {cell.name.removesuffix(",seed=7"): cell.config for cell in found}
    assert {cell.config.seed for cell in found if cell.verb} == {7}
    assert by_name["dpo,beta=0.1"].beta == 0.1 and by_name["dpo,beta=0.1"].data == "f/seed-7/pairs.jsonl"
    assert by_name["unlikelihood,alpha=0.5"].loss_options == {"alpha": 0.5}
    assert (by_name["ppo,target_kl=4"].reward, by_name["ppo_true,target_kl=4"].reward) == (
        "f/cells/reward,seed=7",
        "rule",
    )
    assert (by_name["rloo,target_kl=2"].critic, by_name["rloo,target_kl=2"].group) == ("none", 4)
    # where a reward of deviation 1 has its KL: 1 / (2 beta**2) nats
    assert by_name["ppo,target_kl=2"].kl_coef == pytest.approx(0.5) and by_name["ppo,target_kl=2"].target_kl == 2


def test_a_world_of_its_own_and_options_of_the_runs():
    config = FrontierConfig(world="enumerable", methods=["dpo", "rloo"], options={"ppo.lr": 1e-3, "rloo.passes": 2})
    found = {cell.name: cell.config for cell in cells_of(config, 0, Path("f"))}
    assert found["reference,seed=0"].model == "new:f/seed-0/start"
    assert found["dpo,beta=0.25,seed=0"].model == "f/cells/reference,seed=0"
    assert found["rloo,target_kl=1,seed=0"].lr == 1e-3 and found["rloo,target_kl=1,seed=0"].passes == 2
    assert "reward,seed=0" in found and not any(name.startswith(("ppo", "best")) for name in found)
    config = FrontierConfig(world="enumerable", methods=["ppo_true"], true_kls=[1.0])
    found = {cell.name: cell.config for cell in cells_of(config, 3, Path("f"))}
    assert found["ppo_true,target_kl=1,seed=3"].reward == "enumerable:3" and len(found) == 3  # reference, sft and it


@pytest.mark.parametrize(
    "given, words",
    [
        (["--world", "enumerable", "--model", "m"], "has its own"),
        (["--betas", "0.1,0.1"], "one value twice"),
        (["--betas", "-1"], "--betas"),
        (["--best-of", "1"], "--best-of"),
        (["--methods", "dpo,pop"], "--methods"),
        (["--options", "pop.lr=1"], "names no option of a run"),
        (["--options", "lr=1"], "names no option of a run"),
        (["--options", "dpo.lr=-1"], "--options.dpo.lr"),
        (["--options", "dpo.bach=1"], "did you mean batch"),
        (["--options", "ppo.batch=7,rloo.group=2"], "rloo"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(palate, given, words):
    palate("frontier", *given, out="f")
    assert palate.code == 2 and words in palate.said, palate.said
    assert not Path("f").exists()


def test_what_is_left_to_the_world_is_written_down(tmp_path):
    import yaml

    from palate.config import fill

    for world in ("reviews", "enumerable"):
        config = FrontierConfig(world=world, betas=[3.0]).filled()
        assert config.betas == [3.0] and config.steps is not None and len(config.target_kls) == 4
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert fill(FrontierConfig, {}, tmp_path / "config.yaml")[0] == config
    assert FrontierConfig().filled().sharpness == math.inf and FrontierConfig().filled().model == "builtin:tiny"


def test_the_plan_is_said_and_nothing_written(palate):
    found = palate.ok("frontier", **SMALL, seed=4, seeds=2, dry_run=True, out="f")
    assert found["cells"][:3] == ["reference,seed=4", "sft,seed=4", "reward,seed=4"] and len(found["cells"]) == 2 * 11
    assert not Path("f").exists()


# what the points say and cost


def test_seconds_and_samples_are_those_of_the_whole_way(tmp_path):
    (tmp_path / "cells").mkdir()
    config = FrontierConfig(options={"ppo.batch": 16, "ppo.passes": 2})
    cells = {cell.name: cell for cell in cells_of(config, 0, tmp_path)}
    picked = ["sft,seed=0", "reward,seed=0", "dpo,beta=0.1,seed=0", "dpo,beta=2,seed=0", "best_of_n,n=4,seed=0"]
    picked += ["ppo,target_kl=1,seed=0", "ppo_true,target_kl=1,seed=0"]
    numbers = {"eval/reward": 1.0, "eval/kl": 0.5}
    numbers |= {f"eval/{name}_{end}": 0.0 for name in ("reward", "kl") for end in ("low", "high")}
    for name in picked:
        with Run.create(tmp_path / "cells" / name, verb="x", config={}) as run:
            run.log({"step": 0} | numbers)
            for step in range(1, 5 if cells[name].verb else 1):
                run.log({"step": step, "loss": 1.0, "seconds": 10.0})
                if step % 2 == 0:
                    run.log({"step": step} | numbers)
            run.finish({"reference_seconds": 3.0 if "beta=2" in name else 0.25})
    found = points_of(tmp_path, [cells[name] for name in picked], Drawn(5, 100, 7.0))
    spent = {(p["cell"].removesuffix(",seed=0"), p["step"]): (p["seconds"], p["samples"]) for p in found}
    assert spent == {
        ("sft", 0): (0, 0),
        ("dpo,beta=0.1", 2): (7 + 3 + 20, 100),
        ("dpo,beta=0.1", 4): (7 + 3 + 40, 100),
        ("dpo,beta=2", 2): (7 + 3 + 20, 100),
        ("dpo,beta=2", 4): (7 + 3 + 40, 100),
        ("best_of_n,n=4", 0): (7 + 40, 104),
        ("ppo,target_kl=1", 2): (7 + 40 + 20, 100 + 16),
        ("ppo,target_kl=1", 4): (7 + 40 + 40, 100 + 32),
        ("ppo_true,target_kl=1", 2): (20, 16),
        ("ppo_true,target_kl=1", 4): (40, 32),
    }


def test_the_table_by_hand():
    points = [point("sft", 0, s, setting="", seed=s, seconds=0, samples=0, step=0) for s in (0, 1)]
    points += [point(kl=2, reward=2 + 2 * s, seed=s, seconds=10 * s, samples=4, step=9) for s in (0, 1)]
    points += [point("ppo", 1, -5, seed=s, step=9) for s in (0, 1)]
    exact = {0: [(0, 0), (1, 3), (2, 4)], 1: [(0, 1), (1, 4), (2, 5)]}
    rows = {row["method"]: row for row in hulls.standings(points, [1, 2], exact)}
    assert list(rows) == ["exact", "dpo", "ppo", "sft"]
    assert rows["exact"]["reward"]["1"] == {"mean": 3.5, "low": 3, "high": 4}
    assert rows["dpo"]["reward"] == {
        "1": {"mean": 1.75, "low": 1, "high": 2.5},
        "2": {"mean": 3, "low": 2, "high": 4},
    }
    assert rows["dpo"]["hull"] == {"mean": 1.75, "low": 1, "high": 2.5}
    assert (rows["dpo"]["runs"], rows["dpo"]["seconds"], rows["dpo"]["samples"]) == (2, 5, 4)
    assert rows["ppo"]["reward"]["2"] == rows["sft"]["reward"]["2"]  # a method that only loses stays where it began
    lines = hulls.table_lines(list(rows.values()))
    assert len(lines) == 5 and "3.000 [2.000, 4.000]" in lines[2]


def test_the_plot_is_always_the_same(tmp_path):
    points = [point("sft", 0, 0, setting=""), point(), point("ppo", 9, 1), point("unlikelihood", 99, -3)]
    for name in ("a.svg", "b.svg"):
        hulls.draw(tmp_path / name, points, {0: [(0, 0), (1, 1.5), (4, 2)]}, 4)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "2 of 4 points lie further right" in text and ">DPO<" in text


def test_a_point_above_the_exact_frontier_is_a_bug():
    refuse_above([point(reward=1.0, exact=1.0)])
    with pytest.raises(PalateError, match="no policy has more") as raised:
        refuse_above([point(reward=1.0, exact=0.999)])
    assert raised.value.exit_code == 1 and raised.value.where == "dpo,beta=1,seed=0"


# from end to end


@pytest.mark.slow
def test_the_world_that_can_be_listed_killed_and_resumed(palate, monkeypatch):
    original, killed = frontier._train, []

    def dying(cell: Cell, *arguments, **watched):
        if cell.method == "ppo" and not killed:
            killed.append(cell.name)
            raise KeyboardInterrupt
        return original(cell, *arguments, **watched)

    monkeypatch.setattr(frontier, "_train", dying)
    palate("frontier", *OPTIONS, **SMALL, seed=5, out="f")
    assert palate.code == 6 and "--resume --out f" in palate.said and killed
    before = {name: data for name, data in tree(Path("f/cells")).items() if not name.endswith(".lock")}
    half = read()
    assert {p["method"] for p in half["points"]} == {"sft", "dpo", "unlikelihood", "preferred_ft", "best_of_n"}
    result = palate.ok("frontier", *OPTIONS, **SMALL, seed=5, out="f", resume=True)
    after = tree(Path("f/cells"))
    assert {name: after[name] for name in before} == before  # finished cells are not touched
    found = read()
    assert found["points"][: len(half["points"])] == half["points"]
    assert {p["method"] for p in found["points"]} == set(hulls.METHODS)
    assert (
        all(p.keys() >= KEYS and p["seed"] == 5 for p in found["points"]) and len(found["points"]) == result["points"]
    )
    steps = {p["cell"]: [q["step"] for q in found["points"] if q["cell"] == p["cell"]] for p in found["points"]}
    assert steps["dpo,beta=0.5,seed=5"] == [2, 4] and steps["rloo,target_kl=1,seed=5"] == [4, 8]
    world = World()
    for p in found["points"]:
        assert p["reward"] <= p["exact_reward"] + 1e-6 and p["kl"] >= -1e-9
        assert p["reward_low"] == p["reward"] == p["reward_high"]
    curve = found["exact"][0]["curve"]
    assert curve[0][0] == 0 and [kl for kl, _ in curve] == sorted(kl for kl, _ in curve)
    start = next(p for p in found["points"] if p["method"] == "sft")
    assert start["kl"] == 0 and start["reward"] == pytest.approx(curve[0][1], abs=1e-9)
    # the saved model of a cell is where its last point says
    import palate as library
    from palate.evaluation.exact import table_of

    reference, model = (
        table_of(library.load(f"f/cells/{name}").model, world) for name in ("reference,seed=5", "dpo,beta=0.5,seed=5")
    )
    last = [p for p in found["points"] if p["cell"] == "dpo,beta=0.5,seed=5"][-1]
    assert enumerable.sequence_kl(model, reference).mean() == pytest.approx(last["kl"], abs=1e-6)
    assert enumerable.expected_reward(model, world.reward(5)).mean() == pytest.approx(last["reward"], abs=1e-6)
    assert "<svg" in Path("f/report.html").read_text() and result["table"][0]["method"] == "exact"
    assert palate.ok("frontier", *OPTIONS, **SMALL, seed=5, out="f", resume=True)["points"] == result["points"]
    assert len(palate.ok("frontier", config="f/config.yaml", dry_run=True, out="g")["cells"]) == 11
    palate("frontier", *OPTIONS, **SMALL, seed=6, out="f", resume=True)
    assert palate.code == 3 and "seed was 5, now 6" in palate.said


@pytest.mark.slow
def test_anyones_model_and_reward(palate, tiny, tmp_path):
    name = "reward_" + "".join(letter for letter in tmp_path.name if letter.isalnum())
    (tmp_path / f"{name}.py").write_text("def vowels(prompt, text):\n    return sum(text.count(c) for c in 'aeiou')\n")
    data = write_rows(tmp_path / "d.jsonl", pairs(12))
    options = dict(reward=f"{name}:vowels", betas="0.1", best_of="2,4", steps=4, points=1, target_kls="1", rollouts=2)
    options |= {"device": "cpu"}
    more = ["--methods", "dpo,best_of_n,ppo_true,sft", "--options", "ppo.batch=4,dpo.batch=4,reward.batch=4"]
    palate("frontier", *more, **options, prompts="builtin:prompts[:10]", data=data, model=tiny, out="f")
    assert palate.code == 3 and "template" in palate.said and not Path("f").exists()
    palate("frontier", *more, **options | {"reward": "rule"}, prompts=data, data=data, model=tiny, out="f")
    assert palate.code == 3 and "E235" in palate.said and not Path("f").exists()
    palate("frontier", *more, **options, prompts=data, data=data, model=tiny, max_tokens=4, out="f")
    assert palate.code == 2 and "none of 48 samples ended within 4 tokens" in palate.said
    options |= {"data": "builtin:reviews[:10]", "prompts": "builtin:prompts[:10]"}
    palate.ok("frontier", *more, **options, out="g")
    found = read("g")
    by_cell = {p["cell"].removesuffix(",seed=0"): p for p in found["points"]}
    start, dpo = by_cell["sft"], by_cell["dpo,beta=0.1"]
    assert start["kl"] == 0 and start["exact_reward"] is None and start["reward_low"] < start["reward"]
    assert dpo["kl"] != 0 and dpo["samples"] == 40 and dpo["kl_low"] < dpo["kl"] < dpo["kl_high"]
    assert by_cell["best_of_n,n=4"]["kl"] == pytest.approx(math.log(4) - 0.75)
    assert by_cell["ppo_true,target_kl=1"]["samples"] == 8

    def vowels(message):
        return sum(message[0]["content"].count(letter) for letter in "aeiou")

    rows = [json.loads(line) for line in Path("g/seed-0/pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 30 and all(vowels(row["chosen"]) > vowels(row["rejected"]) for row in rows)
    palate.ok("frontier", "--methods", "dpo", "--options", "dpo.batch=4", **options, samples=0, out="h")
    assert not Path("h/seed-0/pairs.jsonl").exists() and read("h")["points"][-1]["samples"] == 0
