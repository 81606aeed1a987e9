"""Self-Rewarding: what the start learns, who judges what in which words, and the ends of rounds that teach nothing."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faults import died, disk
from runs_kit import COLOURS, lines, tree, write_rows
from safetensors.numpy import load_file

from palate.data.records import Message
from palate.data.sources import read_demonstrations, read_pairs, read_prompts
from palate.data.template import load_template
from palate.data.tokens import tokenize, tokenize_pair
from palate.model.load import load
from palate.recipes import new_prompts
from palate.recipes.chain import MADE
from palate.recipes.rounds import Round, Way
from palate.recipes.self_rewarding import SelfRewardConfig, read, run
from palate.reference import annotate
from palate.sampling.requests import unfit

RUBRIC = "Request: {prompt}\nReply: {completion}\nPoints?"
SYSTEM = {"role": "system", "content": "Be brief."}
JUDGES = """
def length(prompt, completion):
    return len(completion)

def constant(prompt, completion):
    return 1

def two(prompt, first, second):
    return len(first) > len(second)
"""
SMALL = dict(batch=4, steps=2, rounds=1, max_tokens=12, chunk=5, samples=0, device="cpu", lr=3e-4, candidates=3,
             judgements=2, judge_tokens=12, temperature=1, prompts_per_round=12)  # fmt: skip


def chat(asked: str, said: str) -> dict:
    return {"messages": [SYSTEM, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def seed():
    """Answers, and judgements of two replies to every request, under a system message."""
    for n in range(40):
        yield chat(f"Say {COLOURS[n % 8]} {n}.", f"Yes, {COLOURS[n % 5]}.")
    for n in range(80):
        asked, reply = f"Name {COLOURS[n // 2 % 8]} {n // 2}.", f"No {COLOURS[n % 7]} {n % 2}"
        yield chat(RUBRIC.replace("{prompt}", asked).replace("{completion}", reply), f"It is so.\nScore: {n % 6}")


@pytest.fixture
def options(tmp_path, ending) -> dict:
    (tmp_path / "liking.py").write_text(JUDGES)
    (tmp_path / "rubric.txt").write_text(RUBRIC + "\n")
    prompts = [{"prompt": [SYSTEM, {"role": "user", "content": f"Tell {COLOURS[n % 8]} {n}."}]} for n in range(40)]
    files = {
        "data": write_rows(tmp_path / "seed.jsonl", seed()),
        "new_prompts": write_rows(tmp_path / "new.jsonl", prompts[:30]),
        "prompts": write_rows(tmp_path / "compared.jsonl", prompts[24:]),
    }
    start = {"start.steps": 2, "start.batch": 4, "judge_template": "rubric.txt", "eval_judge": "liking:length"}
    return SMALL | files | start | {"model": ending, "judge": "liking:length"}


def made(out) -> dict[str, bytes]:
    """All that must be the same however it came about."""
    files = tree(Path(out))
    names = [n for n in files if n.split("/")[0] == "rounds" and n.split("/")[2] in (*MADE, "manifest.json")]
    names += [n for n in files if n.startswith(("model/", "start/model/"))]
    return {n: files[n] for n in (*names, "rounds.json", "prompts.jsonl", "seed.jsonl", "seed-held.jsonl")}


def test_a_whole_run_that_judges_itself(palate):
    """On the built-in world, whose small model writes judgements that can be read."""
    given = SMALL | {"model": "builtin:tiny", "data": "builtin:seed[360:480]", "prompts": "builtin:prompts[:4]"}
    given |= {"start.steps": 2, "judge_tokens": 40, "max_tokens": 40, "prompts_per_round": 10, "seed": 1}
    result = palate.ok("self-reward", out="run", **given)
    (row,) = result["rounds"]
    assert result["judge"] == "rule" and row["judge"] == "policy" and row["judge_truth"] == "rule"
    assert row["prompts"] == 10 and row["pair_yield"] == row["pairs"] / 10 and row["pairs"] > 3
    assert row["judge_low"] <= row["judge_accuracy"] <= row["judge_high"] and 0 <= row["seed_accuracy"] <= 1
    judged = [json.loads(line) for f in sorted(Path("run/rounds/01/judged").glob("0*.jsonl")) for line in f.open()]
    drawn = [json.loads(line) for f in sorted(Path("run/rounds/01/samples").glob("0*.jsonl")) for line in f.open()]
    assert len(judged) == 30 > (ended := sum(one["finished"] for one in drawn)) > 10
    assert sum(row["histogram"]) == round((1 - row["unparsed_share"]) * ended * 2)
    for one, sample in zip(judged, drawn, strict=True):
        read = [int(text[-1]) if "\nScore: " in text else None for text in one["said"]]
        assert read == one["points"] and len(read) == 2 * sample["finished"]  # what was cut makes no pair: not asked
        points = [point for point in read if point is not None]
        assert one["score"] == (sum(points) / len(points) if points else None)
    asked = [pair.prompt for pair in read_pairs("builtin:reviews[:10]")]
    score = {(asked[s["prompt"]], s["completion"]): j["score"] for s, j in zip(drawn, judged, strict=True)}
    for pair in read_pairs("run/rounds/01/pairs.jsonl"):
        best, worst = (score[pair.prompt, side[0].content] for side in (pair.chosen, pair.rejected))
        there = [value for (prompt, _), value in score.items() if prompt == pair.prompt]
        assert best == max(v for v in there if v is not None) > worst and best - worst == pytest.approx(pair.margin)
    assert {source["path"] for source in json.loads(Path("run/data.json").read_text())["sources"]} == {
        "builtin:seed", "builtin:reviews", "builtin:prompts"}  # fmt: skip


def test_the_start_learns_from_what_is_not_held_out_and_is_the_reference_of_round_1(palate, options, ending):
    palate.ok("self-reward", out="run", **options | {"rounds": 2})
    train, held = (read_demonstrations(f"run/seed{name}.jsonl") for name in ("", "-held"))
    assert (len(train), len(held)) == (114, 6)  # 2 answers, and both judgements of 2 requests
    about = [{r.prompt[-1].content.split("\n")[0] for r in rows if "Points?" in r.prompt[-1].content}
             for rows in (train, held)]  # fmt: skip
    assert len(about[1]) == 2 and not about[0] & about[1]
    config = json.loads(Path("run/start/run.json").read_text())
    assert config["verb"] == "sft" and config["parents"][0]["model"] == str(ending)
    for number, start, other in ((1, "run/start", str(ending)), (2, "run/rounds/01", "run/start")):
        rows = read_pairs(f"run/rounds/{number:02d}/pairs.jsonl")
        pinned = load_file(f"run/rounds/{number:02d}/reference.safetensors")["logps"]
        values = {}
        for name in (start, other):
            found = load(name)
            groups = annotate([tokenize_pair(row, found.tokenizer) for row in rows], found.model)
            values[name] = np.array([value for group in groups for value in group.reference])
        assert np.allclose(pinned, values[start], atol=1e-4) and np.abs(pinned - values[other]).max() > 1e-3
    plans = [json.loads(Path(f"run/rounds/{n:02d}/samples/plan.json").read_text()) for n in (1, 2)]
    assert [plan["model"] for plan in plans] == [load(name).fingerprint for name in ("run/start", "run/rounds/01")]
    assert plans[0]["prompts"] != plans[1]["prompts"]
    first, second = ({r["prompt"][1]["content"] for n in ("pairs", "held")
                      for r in lines(Path(f"run/rounds/{k:02d}/{n}.jsonl"))} for k in (1, 2))  # fmt: skip
    assert not first & second
    compared = {row["prompt"][1]["content"] for row in lines(Path("run/prompts.jsonl"))}
    assert not (first | second) & compared  # 6 of them stand in both files


OTHER = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_writing_judging_and_training_see_the_same_tokens_under_any_template(palate, options, monkeypatch, tmp_path):
    """What is asked of the judge is, token for token, what the seed taught: system message and template included."""
    from palate.sampling import generate

    (tmp_path / "other.jinja").write_text(OTHER)
    asked, sampler = [], generate.generate

    def sampling(model, tokenizer, prompts, **how):
        asked.extend(tuple(prompt.tolist()) for prompt in prompts)
        return sampler(model, tokenizer, prompts, **how)

    monkeypatch.setattr(generate, "generate", sampling)
    palate.ok("self-reward", out="run", chat_template=tmp_path / "other.jinja", **options | {"judge": "policy"})
    tokenizer = load(options["model"]).tokenizer
    own = [tuple(tokenize(r, tokenizer).prompt.tolist()) for r in read_demonstrations("run/seed-held.jsonl")]
    load_template(str(tmp_path / "other.jinja"), tokenizer)
    taught = [tuple(tokenize(r, tokenizer).prompt.tolist()) for r in read_demonstrations("run/seed-held.jsonl")]
    assert len(taught) == 6 and set(taught[2:]) <= set(asked) and not set(own) & set(asked)
    assert "<system> Be brief.<user> Request: Name" in tokenizer.decode(taught[-1])
    written = {tuple(tokenize(r, tokenizer).prompt.tolist()) for r in read_prompts(str(options["new_prompts"]))[:12]}
    assert len(written) == 12 and written <= set(asked)
    samples = {f"Tell {COLOURS[n % 8]} {n}." for n in range(12)}
    judged = [text for text in map(tokenizer.decode, set(asked)) if "Request: " in text and "Tell" in text]
    assert all("<system> Be brief.<user> Request: " in text for text in judged)
    assert any(request in text for text in judged for request in samples)


def test_with_adapters_start_and_rounds_and_after_a_kill(palate, options, monkeypatch, tmp_path):
    """Every model is merged, so that the next round begins from it and is held to it."""
    given = options | {"lora_rank": 2, "lr": 3e-3, "rounds": 2, "steps": 1, "start.steps": 1, "eval_judge": None}
    with disk() as counted:
        quiet(given, "whole")
    folders = ["whole/start", "whole/rounds/01", "whole/rounds/02"]
    assert all(Path(folder, "adapter").is_dir() for folder in folders)
    for start, folder in pairwise(folders):
        began, found = json.loads(Path(folder, "run.json").read_text())["parents"][0], load(start)
        assert began["model"] == start and found.fingerprint != load(folder).fingerprint
        rows = read_pairs(f"{folder}/pairs.jsonl")
        groups = annotate([tokenize_pair(row, found.tokenizer) for row in rows], found.model)
        pinned = load_file(f"{folder}/reference.safetensors")["logps"].ravel()
        assert np.allclose(pinned, [value for group in groups for value in group.reference], atol=1e-4)
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "cache"))
    assert died(partial(quiet, given, "killed"), counted.count * 3 // 5)
    quiet(given, "killed", resume=True)
    assert made("killed") == made("whole")


def test_a_judge_that_nobody_can_read_rejects_nothing(palate, options):
    """A model that learnt nothing writes no score: no pair, no score by default, and a clean end."""
    result = palate.ok("self-reward", out="run", **options | {"judge": "policy"})
    (row,) = result["rounds"]
    assert (row["pairs"], row["unparsed_share"], row["ties"]) == (0, 1.0, 0)
    assert row["unparsed"] == 12 - row["left_out"]["unfinished"]
    assert row["histogram"] == [0] * 6 and row["judge_accuracy"] is None
    assert "100% of the judgements have no score that can be read." in row["alarms"]
    assert "alarm: 100% of the judgements" in palate.said and "made no pairs" in result["ended"]
    start = Path("run/start/model/model.safetensors").read_bytes()
    assert Path("run/model/model.safetensors").read_bytes() == start and not list(Path("run/rounds/01").glob("model"))


def test_a_judge_that_only_compares_orders_the_samples_too(palate, options):
    (row,) = palate.ok("self-reward", out="run", **options | {"judge": "liking:two"})["rounds"]
    assert row["pairs"] > 3 and row["judge_accuracy"] is None
    for pair in lines(Path("run/rounds/01/pairs.jsonl")):
        assert len(pair["chosen"][0]["content"]) > len(pair["rejected"][0]["content"])


def test_a_constant_judge_ends_the_rounds_cleanly(palate, options):
    result = palate.ok("self-reward", out="run", **options | {"judge": "liking:constant", "rounds": 3})
    (row,) = result["rounds"]
    assert row["pairs"] == 0 and row["tie_share"] == row["ties"] / 12 > 0.5 and row["unparsed"] == 0
    assert any("judged alike" in alarm for alarm in row["alarms"])
    assert row["judge_accuracy"] == 0.5 and row["judge_truth"] == "held-out judgements"


def test_length_control_takes_the_shortest_of_the_best(palate, options):
    """The judge likes length: within half a range of the best the shorter one is chosen."""
    options |= {"candidates": 8, "start.steps": 1, "steps": 1}
    palate.ok("self-reward", out="plain", **options)
    palate.ok("self-reward", out="band", length_control=0.49, **options)
    chosen, rejected = ([[len(row[side][0]["content"]) for row in lines(Path(f"{out}/rounds/01/pairs.jsonl"))]
                         for out in ("plain", "band")] for side in ("chosen", "rejected"))  # fmt: skip
    assert np.mean(chosen[1]) < np.mean(chosen[0]) and np.mean(rejected[1]) > np.mean(rejected[0])


def test_a_trained_model_needs_no_start(palate, options, ending):
    result = palate.ok("self-reward", out="run", **options | {"start.epochs": 0, "start.steps": None})
    assert not Path("run/start").exists() and result["rounds"][0]["pairs"] > 3
    plan = json.loads(Path("run/rounds/01/samples/plan.json").read_text())
    assert plan["model"] == load(ending).fingerprint


def test_requests_that_the_model_writes(palate, options, ending):
    """A model of noise writes none that can be used; what was left out is counted."""
    palate("self-reward", out="run", **options | {"new_prompts": "written"})
    found = json.loads(Path("run/rounds/01/asked.json").read_text())
    assert palate.code == 3 and "wrote no new request" in palate.said
    assert found["kept"] == 0 and sum(found["left_out"].values()) == 24


def test_a_trained_model_writes_its_requests_in_the_first_round(palate, options):
    given = {"model": "builtin:tiny", "new_prompts": "written", "start.epochs": 0, "start.steps": None, "chunk": 20}
    palate.ok("self-reward", out="run", stage="sample", **options | given)
    asked, drawn = lines(Path("run/rounds/01/asked.jsonl")), lines(Path("run/rounds/01/samples/000.jsonl"))
    assert asked and len({row["prompt"] for row in drawn}) == len(asked) == len(drawn) / 3
    assert {row["prompt"][1]["content"] for row in asked}.isdisjoint(f"Say {COLOURS[n % 8]} {n}." for n in range(40))


def test_requests_come_in_the_form_of_the_seed_and_are_new(palate, options):
    """The small built-in model writes few that can be used, among them some."""
    out = Path("run")
    config = config_of(options, out, model="builtin:tiny", new_prompts="written", chunk=20)
    data = read(config)
    assert len(data.requests) == 40
    found = []
    for number in (1, 2):
        this = Round(config, Way(None, None, None), out, number, config.model, config.model, data, lambda text: None)
        this.folder.mkdir(parents=True)
        found.append(new_prompts.by_model(this, data.requests, 20))
        assert list(found[-1]) == list(new_prompts.by_model(this, data.requests, 20))  # as it stands in asked.jsonl
    texts = [record.prompt[1].content for records in found for record in records]
    assert all(record.prompt[0] == Message(**SYSTEM) and len(record.prompt) == 2 for one in found for record in one)
    assert found[0] and len(set(texts)) == len(texts) and all(unfit(text) is None for text in texts)
    written = [line for chunk in sorted(Path("run/rounds/01/written").glob("0*.jsonl")) for line in lines(chunk)]
    assert len(written) == 40 and {row["request"] for row in written} >= set(texts[: len(found[0])])


@pytest.mark.parametrize(
    "wrong, code, said",
    [
        ({"judge": "liking:nobody"}, 2, 'has no function "nobody"'),
        ({"judge": "nowhere/judge"}, 3, "nowhere/judge"),
        ({"judge_template": "nowhere.txt"}, 3, "no such judge's template"),
        ({"new_prompts": "nowhere.jsonl"}, 3, "nowhere.jsonl"),
        ({"length_control": 0.5}, 2, "--length-control"),
        ({"candidates": 1}, 2, "candidates"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(palate, options, wrong, code, said):
    palate("self-reward", out="run", **options | wrong)
    assert palate.code == code and said in palate.said and not Path("run").exists()


def test_judgements_without_a_score_and_of_several_forms_are_refused_by_line(palate, options):
    rows = list(seed())
    rows[50]["messages"][2]["content"] = "It is so.\nScore: 7"
    write_rows(options["data"], rows)
    palate("self-reward", out="run", **options)
    assert palate.code == 3 and "seed.jsonl:51: is a judgement that does not end in" in palate.said
    rows[50] = {"messages": list(seed())[50]["messages"][1:]}
    write_rows(options["data"], rows)
    palate("self-reward", out="run", **options)
    assert palate.code == 3 and "seed.jsonl:51: asks the judge in another form" in palate.said
    assert not Path("run").exists()
    palate.ok("self-reward", out="run", bad_rows="skip", stage="start", **options)
    palate.ok("self-reward", out="run", bad_rows="skip", stage="sample", **options)
    assert lines(Path("run/rejects.jsonl")) == [rows[50]] and len(read_demonstrations("run/seed.jsonl")) == 113


def test_without_judgements_and_with_other_system_messages_there_are_warnings(palate, options):
    write_rows(options["data"], list(seed())[:40])
    prompts = [{"prompt": [{"role": "user", "content": f"Tell {n} to me."}]} for n in range(12)]
    given = options | {"judge": "policy", "new_prompts": write_rows(Path("bare.jsonl"), prompts)}
    palate.ok("self-reward", out="run", **given)
    assert "no row of the seed shows how to judge" in palate.said
    assert "the answers stand under a system message, the new prompts do not" in palate.said


def test_a_template_that_changed_is_refused(palate, options):
    palate.ok("self-reward", out="run", stage="start", **options)
    palate.ok("self-reward", out="run", stage="sample", **options)
    Path("rubric.txt").write_text(RUBRIC + " Please.\n")
    palate("self-reward", out="run", resume=True, **options)
    assert palate.code == 3 and "rubric.txt: has changed since the run began" in palate.said


@pytest.mark.slow
def test_stage_by_stage_and_part_by_part_the_same_bytes(palate, options):
    palate.ok("self-reward", out="whole", **options)
    palate("self-reward", out="parts", stage="sample", part="1/2", **options)
    assert palate.code == 2 and "waits for its stage start" in palate.said
    palate.ok("self-reward", out="parts", stage="start", **options)
    for stage in ("sample", "judge"):
        for part in ("2/2", "1/2"):
            palate.ok("self-reward", out="parts", stage=stage, part=part, **options)
    for stage in ("pair", "score", "train", "compare"):
        palate.ok("self-reward", out="parts", stage=stage, **options)
    assert made("parts") == made("whole")


def config_of(options, out, **more):
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    given["start"] = {"steps": given.pop("start.steps"), "batch": given.pop("start.batch")}
    return SelfRewardConfig(**given | {"out": str(out), "report": False} | more)


def quiet(options, out, **more):
    return run(config_of(options, out, **more), say=lambda text="": None)


@pytest.mark.parametrize(
    "shares", [(0.3,), pytest.param((0.02, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95), marks=pytest.mark.slow)]
)
def test_dead_at_any_place_the_same_bytes(palate, options, monkeypatch, tmp_path, shares):
    """Operations of the disk spread over the start, sampling, judging and all that follows."""
    options |= {"judge": "liking:length", "steps": 1, "start.steps": 1}
    with disk() as counted:
        quiet(options, "whole")
    for trial, share in enumerate(shares):
        monkeypatch.setenv("PALATE_CACHE", str(tmp_path / f"cache-{trial}"))
        out = f"run-{trial}"
        assert died(partial(quiet, options, out), int(counted.count * share))
        quiet(options, out, resume=Path(out, "run.json").exists())
        assert made(out) == made("whole")
