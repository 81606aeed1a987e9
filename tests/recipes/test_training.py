"""Whole training runs through the command line: what they leave behind, what they refuse, what they say."""

import json
import math
from pathlib import Path

import pytest
import torch
from runs_kit import (
    chats,
    conversations,
    demonstrations,
    feedbacks,
    lines,
    metrics,
    pairs,
    rankings,
    texts,
    tree,
    write_rows,
)  # fmt: skip

SMALL = dict(batch=4, steps=4, device="cpu", lr=1e-3, samples=2)


def reload_logits(folder: Path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


CASES = {
    "dpo": ("dpo", pairs, {}),
    "chat": ("dpo", chats, {"model": "chatty"}),
    "rankings as pairs": ("dpo", rankings, {}),
    "plackett_luce": ("dpo", rankings, {"loss": "plackett_luce"}),
    "ipo": ("dpo", pairs, {"loss": "ipo", "loss_options__tau": 0.2}),
    "simpo": ("dpo", pairs, {"loss": "simpo", "beta": 1.0}),
    "lora": ("dpo", pairs, {"lora_rank": 4}),
    "bfloat16": ("dpo", pairs, {"precision": "bfloat16"}),
    "checkpointing": ("dpo", pairs, {"train__checkpointing": True}),
    "kto": ("kto", feedbacks, {}),
    "kto lora": ("kto", feedbacks, {"lora_rank": 4}),
    "sft": ("sft", demonstrations, {}),
    "sft messages": ("sft", conversations, {"model": "chatty"}),
    "sft last turn": ("sft", conversations, {"model": "chatty", "turns": "last"}),
    "sft text": ("sft", texts, {}),
    "sft lora": ("sft", demonstrations, {"lora_rank": 4}),
}


QUICK = ("dpo", "chat", "plackett_luce", "lora", "bfloat16", "kto", "sft messages")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_run_from_end_to_end(case, palate, tiny, chatty, tmp_path):
    verb, rows, options = CASES[case]
    options = dict(options)
    model = {"tiny": tiny, "chatty": chatty}[options.pop("model", "tiny")]
    data = write_rows(tmp_path / "data.jsonl", rows(24))
    result = palate.ok(verb, model=model, data=data, out="run", **SMALL, **options)
    run = Path("run")
    assert result["status"] == "done"
    assert result["verb"] == verb
    assert result["out"] == "run"
    assert result["steps"] == 4
    if verb != "sft" and options.get("loss") != "simpo":
        assert result["reference_scored"] > 0
        assert result["reference_reused"] == 0
        assert (run / "reference.safetensors").is_file()
    # PRODUCT section 3
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "done"
    assert record["verb"] == verb
    assert record["argv"][:2] == ["palate", verb]
    assert {"versions", "hardware", "seed", "parents", "times", "verdict"} <= record.keys()
    assert (run / "config.yaml").is_file()
    facts = json.loads((run / "data.json").read_text())
    assert facts["sources"][0]["sha256"]
    assert facts["counts"]["rows"] == 24 if rows is not rankings else 24
    table = metrics(run)
    trained = [line for line in table if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    evals = [line for line in table if "loss" not in line]
    assert evals[0]["step"] == 0
    assert evals[-1]["step"] == 4
    assert all(any(key.startswith("eval/") for key in line) for line in evals)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in trained)
    shown = lines(run / "samples.jsonl")
    assert {line["step"] for line in shown} == {0, 4}
    assert [p.name for p in sorted((run / "checkpoints").iterdir())][-1] == "step-000004"
    assert len(list((run / "checkpoints").glob("step-*"))) <= 3
    assert not (run / "scoring").exists()
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pkl", ".bin") or p.name.endswith(".tmp")]
    # weights moved, and plain transformers reads them
    before, after = reload_logits(model), reload_logits(run / "model")
    assert not torch.equal(before, after)
    assert ((run / "adapter").is_dir()) == ("lora_rank" in options)
    if "lora_rank" in options:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
        with torch.no_grad():
            assert torch.allclose(adapted(torch.arange(3, 40)[None]).logits, after, atol=1e-4)
    if case == "dpo":  # step 0 of DPO is log 2
        assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert trained[0]["rewards/margins"] == 0


def test_the_saved_model_has_the_trained_policys_logits(palate, tiny, tmp_path):
    from safetensors.torch import load_file

    data = write_rows(tmp_path / "d.jsonl", pairs())
    palate.ok("dpo", model=tiny, data=data, out="run", **SMALL)
    saved = load_file("run/model/model.safetensors")
    kept = load_file("run/checkpoints/step-000004/model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(value, kept[f"policy.{name}"]), name
    again = palate.ok("score", model="run", data=data, out="scores.jsonl", device="cpu")
    assert again["rows"] == 24


def test_a_config_runs_again_to_the_same_numbers(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    palate.ok("dpo", model=tiny, data=data, out="one", **SMALL)
    palate.ok("dpo", config="one/config.yaml", out="two")
    assert metrics(Path("one")) == metrics(Path("two"))
    assert tree(Path("one/model")) == tree(Path("two/model"))


SHARED = {
    "loss": {"loss": "ipo"},
    "lora": {"lora_rank": 2},
    "slice": {"data": "d.jsonl[:10]", "seed": 3, "batch": 3},
    "beta": {"beta": 0.5},
    "rate": {"lr": 1e-4},
    "epochs": {"epochs": 2},
}
SHARED_QUICK = ("lora", "slice")


@pytest.mark.parametrize("name", [n if n in SHARED_QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHARED])
def test_runs_share_scores(palate, tiny, tmp_path, name):
    write_rows(tmp_path / "d.jsonl", pairs())
    options = dict(model=tiny, data="d.jsonl") | SMALL
    first = palate.ok("dpo", out="first", **options | {"steps": 1})
    assert first["reference_scored"] == 48
    result = palate.ok("dpo", out="second", **options | SHARED[name])
    assert result["reference_scored"] == 0
    assert result["reference_reused"] > 0
    line = next(line for line in metrics(Path("second")) if "loss" in line)
    assert line["rewards/margins"] == 0


def test_another_precision_shares_no_scores(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(8))
    for precision in ("float32", "bfloat16"):
        result = palate.ok("dpo", model=tiny, data=data, out=precision, precision=precision, **SMALL | {"steps": 1})
        assert result["reference_scored"] == 16


def test_another_reference_is_used_and_said(palate, tiny, tmp_path, tiny_llama, tiny_tokenizer):
    from runs_kit import save_model

    other = save_model(tmp_path / "other", tiny_llama(9), tiny_tokenizer)
    data = write_rows(tmp_path / "d.jsonl", pairs())
    palate.ok("dpo", model=tiny, data=data, reference=other, out="run", **SMALL)
    assert "the reference is not the start" in palate.said
    first = next(line for line in metrics(Path("run")) if "loss" in line)
    assert first["rewards/margins"] != 0


def test_finished_means_nothing_to_do(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    options = dict(model=tiny, data=data, out="run", **SMALL)
    first = palate.ok("dpo", **options)
    before = tree(Path("run"))
    again = palate.ok("dpo", **options, resume=True)
    assert "nothing to do" in palate.said
    assert {**tree(Path("run")), ".lock": b""} == {**before, ".lock": b""}
    assert again["reference_scored"] == 0
    assert again["model"] == first["model"]


def test_a_folder_that_is_not_empty_is_refused(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    before = tree(Path("run"))
    result = palate("dpo", model=tiny, data=data, out="run", **SMALL)
    assert palate.code == 2
    assert result["error_code"] == "E313"
    assert "--out" in palate.said
    assert tree(Path("run")) == before


def test_another_config_is_not_resumed(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    palate.ok("dpo", model=tiny, data=data, out="run", **SMALL)
    palate("dpo", model=tiny, data=data, out="run", resume=True, **SMALL | {"lr": 5e-4})
    assert palate.code == 3
    assert "lr was 0.001, now 0.0005" in palate.said


def test_a_free_folder_is_taken_where_none_is_named(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", demonstrations(8))
    for number in (1, 2):
        assert palate.ok("sft", model=tiny, data=data, **SMALL | {"steps": 1})["out"] == f"runs/sft-{number}"


def test_dry_run_writes_nothing_and_shows_the_rows(palate, tiny, tmp_path, cache_dir):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    before = tree(tmp_path)
    for verb, source in (("dpo", pairs), ("kto", feedbacks), ("sft", demonstrations)):
        write_rows(data, source())
        before = tree(tmp_path)
        result = palate.ok(verb, model=tiny, data=data, out="run", dry_run=True, **SMALL)
        assert tree(tmp_path) == before
        assert not list(cache_dir.rglob("*"))
        assert result["steps"] == 4
        plan = "\n".join(result["plan"])
        assert "Say " in plan
        assert "[</s>]" in plan  # the end token is scored, and shown


def test_a_plan_says_memory_by_part_and_time_from_three_timed_micro_batches(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(48))
    options = SMALL | {"batch": 16, "train__tokens": 256}
    found = palate.ok("dpo", model=tiny, data=data, dry_run=True, **options)
    memory, plan = found["memory"], "\n".join(found["plan"])
    assert memory["optimizer"] == 2 * memory["gradients"] > 0
    assert found["peak_bytes"] == memory["peak"] > memory["rest"] + memory["weights"] + memory["optimizer"]
    assert found["seconds_per_step"] > 0
    assert "3 timed micro-batches" in plan
    lora = palate.ok("dpo", model=tiny, data=data, dry_run=True, lora_rank=2, **options)["memory"]
    assert lora["gradients"] < memory["gradients"] / 3
    run = palate.ok("dpo", model=tiny, data=data, out="run", report=True, **options)
    assert json.loads(Path("run/run.json").read_text())["plan"]["peak_bytes"] > memory["activations"]
    assert run["steps"] == SMALL["steps"]


def test_a_plan_for_many_processes_loads_no_weight(palate, tmp_path):
    """A model of 13 B parameters would not fit here: what is planned is its config."""
    config = dict(model_type="llama", vocab_size=300, hidden_size=8192, intermediate_size=28672, num_hidden_layers=16)
    config |= dict(num_attention_heads=64, num_key_value_heads=8, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "d.jsonl", pairs(48))
    ahead = {"plan__processes": 64, "plan__device_memory": 80, "plan__tflops": 400}
    found = palate.ok(
        "dpo", model=f"new:{tmp_path}", data=data, dry_run=True, eval="none", lr=1e-6, loss="dpo", **ahead
    )
    memory, plan = found["memory"], "\n".join(found["plan"])
    weights = 16 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 2 * 300 * 8192
    assert memory["weights"] == pytest.approx(4 * weights, rel=1e-3)
    assert memory["optimizer"] == 2 * memory["gradients"] == pytest.approx(8 * weights, rel=1e-3)
    assert 16 * weights / 64 < memory["sharded"] < memory["peak"] / 8
    assert "does not fit in 80 GB" in plan
    assert "(fits in 80 GB)" in plan
    assert "TFLOP a step at 400 TFLOP/s on each of 64" in plan
    assert "bfloat16" in plan


def test_a_plan_for_elsewhere_is_refused_where_it_has_no_effect(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(8))
    palate("dpo", model=tiny, data=data, **SMALL | {"plan__processes": 8})
    assert palate.code == 2
    assert "plan.processes: has no effect without --dry-run" in palate.said
    palate("dpo", model=tmp_path / "nowhere", data=data, dry_run=True, **SMALL | {"plan__processes": 8})
    assert palate.code == 3
    assert "no config" in palate.said


def test_the_evaluation_split_is_by_prompt_and_not_by_order(palate, tiny, tmp_path):
    """No prompt on both sides; the same prompts are held out however the file is ordered."""
    from functools import partial

    from palate.data.sources import read_pairs
    from palate.model.load import load
    from palate.recipes.preference import PreferenceConfig
    from palate.recipes.rows import read_rows

    rows = [dict(row, prompt=f"Say {n % 45}:") for n, row in enumerate(pairs(180))]
    tokenizer, seen = load(str(tiny)).tokenizer, []
    for order in (1, -1):
        data = write_rows(tmp_path / f"d{order}.jsonl", rows[::order])
        config = PreferenceConfig(model=str(tiny), data=str(data))
        read = partial(read_rows, other=None, tokenizer=tokenizer, limit=256, usable=lambda g: None, say=lambda t: None)
        found = read(config, read_pairs(config.data))
        held, train = ({tokenizer.decode(g.prompt) for g in groups} for groups in (found.held, found.train))
        assert len(held) == 2  # 5 % of 45
        assert not held & train
        assert len(found.held) == 8
        seen.append(held)
    assert seen[0] == seen[1]
    other = read(config.model_copy(update={"seed": 1}), read_pairs(config.data))
    assert {tokenizer.decode(g.prompt) for g in other.held} != seen[0]


@pytest.mark.parametrize("flipped, code", [(True, 4), (False, 0)])
def test_require_better(palate, tiny, tmp_path, flipped, code):
    """Four where the held-out rows say the contrary; the run is finished all the same, and says where it lies."""
    rows = list(pairs(48))
    train = write_rows(tmp_path / "train.jsonl", rows[:32])
    names = ("prompt", "rejected", "chosen") if flipped else ("prompt", "chosen", "rejected")
    held = write_rows(tmp_path / "held.jsonl", [dict(zip(names, row.values(), strict=True)) for row in rows[32:]])
    result = palate("dpo", model=tiny, data=train, eval=held, out="run", require_better=True, **SMALL)
    assert palate.code == code, palate.said
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    assert Path("run/model/model.safetensors").is_file()
    assert result["out"] == "run"
    assert result["better"] == (code == 0)
    assert result["reference_scored"] == 96


def test_without_held_out_rows_nothing_is_shown_better(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(8))
    result = palate.ok("dpo", model=tiny, data=data, eval="none", out="run", **SMALL)
    assert result["better"] is False
    assert "nothing is shown" in result["verdict"]
    assert not [line for line in metrics(Path("run")) if "loss" not in line]


BAD = {"prompt": "p", "chosen": "", "rejected": "b"}
EQUAL = {"prompt": "p", "chosen": "b", "rejected": "b"}


@pytest.mark.parametrize(
    "bad", [BAD, EQUAL, {"prompt": "p", "chosen": "x"}, {"prompt": 3, "chosen": "x", "rejected": "y"}]
)
def test_bad_rows_stop_by_line_or_are_kept_aside(palate, tiny, tmp_path, bad):
    rows = [*pairs(24)]
    rows[3], rows[11] = bad, bad
    data = write_rows(tmp_path / "d.jsonl", rows)
    palate("dpo", model=tiny, data=data, out="run", **SMALL)
    assert palate.code == 3
    assert f"{data}:4" in palate.said
    assert f"{data}:12" in palate.said
    assert not Path("run").exists()
    assert "Traceback" not in palate.said
    result = palate("dpo", model=tiny, data=data, out="run", bad_rows="skip", **SMALL)
    assert palate.code == 0, palate.said
    assert Path("run/rejects.jsonl").read_bytes() == (json.dumps(bad) + "\n").encode() * 2  # as they stood
    said = json.loads(Path("run/data.json").read_text())["rejected"]
    assert [f"{data}:{n}" in message for n, message in zip((4, 12), said, strict=True)] == [True, True]
    assert result["data"]["rows"] == 22


def test_rows_without_room_are_named_or_kept_aside(palate, tiny, tmp_path):
    """Refused in tokenising, not in reading: the same answers."""
    rows = [*pairs(24)]
    rows[5] = {"prompt": "p", "chosen": "yes", "rejected": "no" * 40}
    rows[7] = {"messages": "x"}
    rows[7] = {"prompt": "a " * 200, "chosen": "yes", "rejected": "no"}
    data = write_rows(tmp_path / "d.jsonl", rows)
    result = palate.ok("dpo", model=tiny, data=data, out="run", max_length=24, **SMALL)
    assert result["data"]["prompts cut"] >= 1
    assert result["data"]["rows with a cut completion"] >= 1
    assert "cut" in palate.said


def test_unknown_options_losses_and_betas_are_refused(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    for options, says in (
        ({"loss": "dpoo"}, "dpo"),
        ({"loss": "ipo", "beta": 0.1}, "tau"),
        ({"loss": "kto"}, "palate kto"),
        ({"loss_options__gamma": 1}, "beta"),
        ({"beta": -1}, "beta"),
        ({"max_length": 10**6}, "256"),
        ({"lr": 0}, "lr"),
    ):
        palate("dpo", model=tiny, data=data, out="run", **SMALL | options)
        assert palate.code == 2, (options, palate.said)
        assert says in palate.said
        assert not Path("run").exists()
        assert "Traceback" not in palate.said


def test_rankings_with_ties_are_counted_out_under_a_ranked_loss(palate, tiny, tmp_path):
    rows = [
        {"prompt": f"Say {n}:", "responses": [" a b", " c", " d"], "preferences": [1, 1, 0 if n % 4 == 0 else 1]}
        for n in range(12)
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    result = palate.ok("dpo", model=tiny, data=data, out="ranked", loss="plackett_luce", **SMALL)
    assert result["data"]["rankings with ties"] == 3
    result = palate.ok("dpo", model=tiny, data=data, out="pairs", **SMALL)
    assert "rankings with ties" not in result["data"]


def test_pairs_that_a_cut_made_equal_are_counted_out(palate, tiny, tmp_path):
    rows = [*pairs(12)]
    same = "abcdefghijklmnopqrstuvwxyz" * 3
    rows[2] = {"prompt": "p", "chosen": same + "1", "rejected": same + "2"}
    data = write_rows(tmp_path / "d.jsonl", rows)
    result = palate.ok("dpo", model=tiny, data=data, out="run", max_length=30, **SMALL)
    assert result["data"]["pairs without signal"] == 1


def test_new_models_get_a_tokenizer_and_train(palate, tmp_path, tiny_llama):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_llama(0).config.to_dict()))
    data = write_rows(tmp_path / "d.jsonl", demonstrations())
    palate.ok("sft", model=f"new:{config}", data=data, out="run", **SMALL)
    assert reload_logits(Path("run/model")).isfinite().all()
    data = write_rows(tmp_path / "p.jsonl", pairs())
    palate.ok("dpo", model="run", data=data, out="dpo", **SMALL)  # a run's folder is a model
    first = next(line for line in metrics(Path("dpo")) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("verb, rows, key", [
    ("dpo", pairs, "eval/rewards/accuracies"), ("kto", feedbacks, None), ("sft", demonstrations, None),
])  # fmt: skip
def test_the_best_checkpoint_is_kept(palate, tiny, tmp_path, verb, rows, key):
    data = write_rows(tmp_path / "d.jsonl", rows(60))
    options = SMALL | dict(steps=8, lr=3e-2, train__keep=1, save_every=1, eval_every=1)
    palate.ok(verb, model=tiny, data=data, out="run", **options)
    state = json.loads(Path("run/checkpoints/step-000008/state.json").read_text())
    assert state["best"] is not None, "no evaluation was taken as the best"
    kept = {int(p.name[5:]) for p in Path("run/checkpoints").glob("step-*")}
    assert kept == {8, state["best"]["step"]}
    if key:
        values = {line["step"]: line[key] for line in metrics(Path("run")) if key in line and line["step"]}
        assert values[state["best"]["step"]] == max(values.values())


def test_json_keys(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs())
    result = palate.ok("dpo", model=tiny, data=data, out="run", **SMALL)
    assert {
        "verb",
        "status",
        "exit_code",
        "out",
        "reference_scored",
        "reference_reused",
        "model",
        "verdict",
        "better",
    } <= {*result}
    result = palate("dpo", model=tiny, data=tmp_path / "none.jsonl", out="run2", **SMALL)
    assert {"verb", "status", "exit_code", "out", "error"} <= {*result}
    assert palate.code == 3


def test_the_numbers_go_to_a_tracker_besides(palate, tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = write_rows(tmp_path / "data.jsonl", pairs(24))
    palate.ok("dpo", model=tiny, data=data, out="run", track="tensorboard", **SMALL)
    events = EventAccumulator("run/tensorboard").Reload()
    for name in ("rewards/margins", "eval/loss"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name])) for line in metrics(Path("run")) if name in line]
        assert len(told) > 1


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(palate, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("palate.track.find_spec", lambda name: None)
    palate("dpo", model=tiny, data=write_rows(tmp_path / "data.jsonl", pairs(24)), out="run", track="wandb", **SMALL)
    assert (palate.code, palate.result["error_code"], Path("run").exists()) == (2, "E319", False)
    assert "pip install accelerate wandb" in palate.said
