"""Rounds: stages one by one end as the whole does, the chain finds every change, data that changed are refused."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
from faults import died, disk
from runs_kit import JUDGES, conversations, demonstrations, lines, texts, tree, write_rows

from palate.files import sha256_file
from palate.recipes.chain import MADE

SMALL = dict(batch=4, steps=3, rounds=2, max_tokens=12, chunk=5, samples=1, device="cpu", lr=3e-4, lam="0.7,1")


@pytest.fixture
def options(tmp_path, ending) -> dict:
    (tmp_path / "liking.py").write_text(JUDGES)
    rows = list(demonstrations(60))
    data = {"data": write_rows(tmp_path / "d.jsonl", rows[:40]), "prompts": write_rows(tmp_path / "p.jsonl", rows[40:])}
    return SMALL | data | {"model": ending, "eval_judge": "liking:like"}


def made(out) -> dict[str, bytes]:
    """All that must be the same however it came about: of every round what its manifest holds, the table, the model."""
    files = tree(Path(out))
    names = [
        name for name in files if name.split("/")[0] == "rounds" and name.split("/")[2] in (*MADE, "manifest.json")
    ]
    names += [name for name in files if name.startswith("model/")]
    return {name: files[name] for name in (*names, "rounds.json", "prompts.jsonl")}


def test_a_whole_run_and_its_chain(palate, options):
    result = palate.ok("spin", out="run", **options)
    table = json.loads(Path("run/rounds.json").read_text())
    assert [row["round"] for row in table["rounds"]] == [1, 2]
    assert result["rounds"] == table["rounds"]
    ends = [json.loads(Path(f"run/rounds/{n:02d}/run.json").read_text())["result"] for n in (1, 2)]
    assert result["peak_bytes"] >= max(end["peak_bytes"] for end in ends) > 2**26
    keys = "round parent pairs unparsed ties win_rate win_low win_high win_previous judge_accuracy length kl"
    for row in table["rounds"]:
        assert list(row)[:2] == ["round", "parent"] and not set(keys.split()) - set(row)
        assert row["pairs"] + row["held"] + sum(row["left_out"].values()) == row["prompts"] == 40
        assert row["win_low"] < row["win_rate"] < row["win_high"] and row["compared"] == 20
        assert row["pairs"] > 10 and row["kl"] > 0 and 0 < row["ended"] <= 1
    first, second = (Path(f"run/rounds/{n:02d}/manifest.json") for n in (1, 2))
    assert table["rounds"][1]["parent"] == sha256_file(first) != table["rounds"][0]["parent"]
    assert table["manifests"] == [sha256_file(first), sha256_file(second)]
    assert table["rounds"][0]["win_previous"] == table["rounds"][0]["win_rate"]
    assert table["rounds"][1]["trained"] == sum(row["pairs"] for row in table["rounds"])
    assert [row["round"] for row in lines(Path("run/rounds/02/pairs.jsonl"))] == sorted(
        [2] * table["rounds"][1]["pairs"] + [1] * table["rounds"][0]["pairs"], reverse=True
    )
    held = {row["prompt"] for n in (1, 2) for row in lines(Path(f"run/rounds/{n:02d}/held.jsonl"))}
    trained = {row["prompt"] for n in (1, 2) for row in lines(Path(f"run/rounds/{n:02d}/pairs.jsonl"))}
    assert len(held) <= 2 and not held & trained
    palate.ok("spin", out="run", resume=True, **options)
    assert "nothing to do" in palate.said
    best = Path(f"run/rounds/{result['best']:02d}/model") if result["best"] else Path(options["model"])
    assert Path("run/model/model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_a_round_that_is_shown_worse_is_the_last_and_its_model_is_not_handed_back(palate, options):
    result = palate.ok("spin", out="run", **options | {"eval_judge": "liking:dislike", "rounds": 3, "lr": 3e-3})
    assert result["ended"] == "round 1 is shown worse than the model it began from"
    (row,) = result["rounds"]
    assert row["verdict"] == "worse" and row["win_high"] < 0.5
    assert (result["best"], result["better"]) == (0, False)
    start = Path(options["model"]) / "model.safetensors"
    assert Path("run/model/model.safetensors").read_bytes() == start.read_bytes()
    palate("spin", out="other", require_better=True, **options | {"eval_judge": "liking:dislike", "rounds": 1})
    assert palate.code == 4


@pytest.mark.slow
def test_stage_by_stage_and_part_by_part_the_same_bytes(palate, options):
    assert len(palate.ok("spin", out="whole", **options)["rounds"]) == 2
    for _ in range(2):
        for part in ("2/3", "3/3", "1/3"):
            palate("spin", out="parts", stage="pair", **options)
            assert palate.code == 2 and "waits for its stage sample" in palate.said
            palate.ok("spin", out="parts", stage="sample", part=part, **options)
        for stage in ("pair", "score", "train", "compare"):
            palate.ok("spin", out="parts", stage=stage, **options)
            palate.ok("spin", out="parts", stage=stage, **options) if stage in ("pair", "score", "train") else None
    assert palate.result["best"] in (0, 1, 2)
    assert made("parts") == made("whole")
    palate("spin", out="parts", stage="judge", **options)
    assert palate.code == 2 and "has no stage judge" in palate.said


def test_the_chain_finds_what_was_changed(palate, options):
    palate.ok("spin", out="run", **options)
    record = Path("run/run.json")
    record.write_text(record.read_text().replace('"status": "done"', '"status": "interrupted"'))
    for name, what in (
        ("rounds/01/samples/000.jsonl", "was changed"),
        ("rounds/01/model/model.safetensors", "was changed"),
        ("rounds/02/after/000.jsonl", "was changed"),
        ("rounds/01/manifest.json", "was changed"),
        ("rounds/02/manifest.json", "was changed"),
    ):
        path = Path("run") / name
        kept = path.read_bytes()
        path.write_bytes(kept.replace(b"1", b"2", 1))
        for verb, arguments, more in (
            ("spin", (), {"out": "run", "resume": True, **options}),
            ("report", ("run",), {}),
        ):
            palate(verb, *arguments, **more)
            assert palate.code == 3 and f"{path}: {what}" in palate.said, palate.said
        path.write_bytes(kept)
    Path("run/rounds.json").unlink()
    manifest = Path("run/rounds/01/manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    palate("spin", out="run", resume=True, **options)
    assert palate.code == 3 and "goes on from another round 1" in palate.said


def test_data_that_changed_are_refused(palate, options):
    palate.ok("spin", out="run", stage="sample", **options)
    write_rows(options["data"], conversations(40))
    palate("spin", out="run", resume=True, **options)
    assert palate.code == 3 and "has changed since the run began" in palate.said
    write_rows(options["data"], list(demonstrations(60))[:40])
    palate("spin", out="run", resume=True, **options | {"temperature": 0.5})
    assert palate.code == 3 and "temperature was 1.0, now 0.5" in palate.said


def test_a_start_that_changed_between_sampling_and_training_is_refused(palate, options, tmp_path, tiny):
    import shutil

    start = shutil.copytree(options["model"], tmp_path / "start")
    options |= {"model": start}
    for stage in ("sample", "pair"):
        palate.ok("spin", out="run", stage=stage, **options)
    shutil.copy(tiny / "model.safetensors", start / "model.safetensors")
    palate("spin", out="run", stage="train", **options)
    assert palate.code == 3 and "trained from other weights than it sampled from" in palate.said


def test_bad_rows_are_kept_aside_where_that_is_asked_for(palate, options):
    with Path(options["data"]).open("a") as file:
        file.write('{"prompt": "Say it", "completion": ""}\n')
    palate("spin", out="run", **options)
    assert palate.code == 3 and "d.jsonl:41" in palate.said and not Path("run").exists()
    palate.ok("spin", out="run", bad_rows="skip", stage="sample", **options)
    assert lines(Path("run/rejects.jsonl")) == [{"prompt": "Say it", "completion": ""}]
    assert "d.jsonl:41" in json.loads(Path("run/data.json").read_text())["rejected"][0]


def test_with_adapters_and_another_temperature(palate, options):
    """A round's model is merged, so that the next one begins from it; KL is that of what is sampled."""
    result = palate.ok("spin", out="run", **options | {"lora_rank": 2, "temperature": 0.7, "prompts": None})
    assert len(result["rounds"]) == 2 and all(row["kl"] is not None for row in result["rounds"])
    parents = [json.loads(Path(f"run/rounds/{n:02d}/run.json").read_text())["parents"][0]["identity"] for n in (1, 2)]
    assert parents[0] != parents[1]
    assert Path("run/rounds/02/adapter").is_dir()
    palate.ok("generate", model="run", data=options["data"], out="out.jsonl", max_tokens=3)


def test_without_a_judge_the_row_says_so(palate, options):
    result = palate.ok("spin", out="run", **options | {"eval_judge": None, "prompts": None, "rounds": 1})
    (row,) = result["rounds"]
    assert result["judge"] is row["compared_by"] is row["win_rate"] is None and "nobody compared" in result["verdict"]
    assert row["length"] > 0 and row["kl"] is not None and row["compared"] == 2  # what --eval holds out
    assert result["best"] == 1


def test_no_pairs_end_the_rounds_cleanly(palate, options, tiny):
    result = palate.ok("spin", out="run", **options | {"model": tiny, "max_tokens": 2})  # nothing ends by itself
    (row,) = result["rounds"]
    assert (row["pairs"], row["win_rate"], result["best"], result["better"]) == (0, None, 0, False)
    assert result["ended"] == "round 1 made no pairs: of 40 prompts 40 unfinished; raise --max-tokens"
    assert result["verdict"] == f"not shown to be better: {result['ended']}"
    assert Path("run/model/model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"part": "1/2"}, "has no effect without --stage"),
        ({"part": "3/2", "stage": "sample"}, "no part 3 of 2"),
        ({"eval": "held.jsonl"}, "eval"),
        ({"lam": "0,1"}, "lam"),
        ({"rounds": 0}, "rounds"),
        ({"eval": "none", "prompts": None}, "no prompts are held out"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(palate, options, wrong, said):
    palate("spin", out="run", **options | wrong)
    assert palate.code == 2 and said in palate.said and not Path("run").exists()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "nowhere/model"}, "nowhere/model"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"eval_judge": "rule"}, "the rule knows the requests of builtin:prompts alone"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_written(palate, options, wrong, said):
    palate("spin", out="run", **options | wrong)
    assert palate.code == 3 and said in palate.said and not Path("run").exists()


def test_running_text_has_nothing_to_answer(palate, options, tmp_path):
    palate("spin", out="run", **options | {"data": write_rows(tmp_path / "t.jsonl", texts(4))})
    assert palate.code == 3 and "t.jsonl:1: has no prompt" in palate.said and not Path("run").exists()


def test_the_plan_writes_nothing(palate, options):
    result = palate.ok("spin", out="run", dry_run=True, **options)
    assert (result["prompts"], result["held"], result["rounds"]) == (40, 2, 2)
    assert not Path("run").exists()


# kills


def judged(config, **more):
    """Rounds whose samples a function judges: the best of three against the worst."""
    from palate.data.sources import read_prompts
    from palate.recipes.rounds import Way, by, run
    from palate.sampling.judge import open_judge
    from palate.sampling.pairing import best_and_worst, pairing

    way = Way(
        read=lambda: read_prompts(config.data),
        pair=lambda this, cases: pairing(best_and_worst(case.record.prompt, case.candidates) for case in cases),
        beta=lambda number: 0.5,
        candidates=3,
        judge=lambda this: ("liking:like", by(open_judge("liking:like"))),
    )
    return run(config, way, verb="judged", say=lambda text="": None, **more)


def config_of(options, out, **more):
    from palate.recipes.rounds import RoundsConfig

    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    del given["lam"]
    return RoundsConfig(**given | {"out": out, "epochs": 1, "steps": 2, "report": False} | more)


def test_rounds_with_a_judge_prefer_what_it_likes(palate, options):
    result = judged(config_of(options, "run", rounds=1))
    (row,) = result["rounds"]
    assert row["pairs"] > 20 and (row["ties"], row["unparsed"]) == (
        row["left_out"]["ties"],
        row["left_out"]["unparsed"],
    )
    for pair in lines(Path("run/rounds/01/pairs.jsonl")):
        assert len(pair["chosen"]) - len(pair["rejected"]) == pair["margin"] > 0


@pytest.mark.parametrize(
    "shares", [(0.15, 0.75), pytest.param(tuple(n / 10 for n in range(1, 10)), marks=pytest.mark.slow)]
)
def test_dead_at_any_place_the_same_bytes(palate, options, monkeypatch, tmp_path, shares):
    """Operations of the disk spread over sampling, judging, pairs, scoring, training, comparing and the manifests."""
    with disk() as counted:
        judged(config_of(options, "whole", rounds=1))
    chance = random.Random(7)
    for trial, share in enumerate(shares):
        monkeypatch.setenv("PALATE_CACHE", str(tmp_path / f"cache-{trial}"))
        out, at = f"run-{trial}", int(counted.count * share) + chance.randrange(8)
        assert died(partial(judged, config_of(options, out, rounds=1)), at)
        judged(config_of(options, out, rounds=1, resume=Path(out, "run.json").exists()))
        assert made(out) == made("whole")
