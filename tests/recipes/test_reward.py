"""Reward models from end to end: what a run leaves, what plain transformers and a judge read from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_kit import chats, metrics, pairs, rankings, write_rows

SMALL = dict(batch=4, steps=4, device="cpu", lr=1e-3, normalise=16)


def reload(folder: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


CASES = {
    "pairs": (pairs, {}),
    "chat": (chats, {"model": "chatty"}),
    "rankings": (rankings, {}),
    "lora": (pairs, {"lora_rank": 4}),
    "bfloat16": (pairs, {"precision": "bfloat16"}),
    "checkpointing": (pairs, {"train__checkpointing": True, "centring": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_end_to_end(case, palate, tiny, chatty, tmp_path):
    from palate.sampling.judge import Completion, open_judge

    rows, options = CASES[case]
    options = dict(options)
    model = {"tiny": tiny, "chatty": chatty}[options.pop("model", "tiny")]
    data, held = write_rows(tmp_path / "data.jsonl", list(rows(24))[:18]), list(rows(24))[18:]
    held = write_rows(tmp_path / "held.jsonl", held)
    result = palate.ok("reward", model=model, data=data, eval=held, out="run", **SMALL, **options)
    run = Path("run")
    assert (result["verb"], result["steps"], result["normalised_on"]) == ("reward", 4, 16)
    assert not (run / "samples.jsonl").exists() and (run / "adapter").exists() == (case == "lora")
    table = metrics(run)
    assert [line["step"] for line in table if "loss" in line] == [1, 2, 3, 4]
    evals = [line for line in table if "eval/loss" in line]
    assert evals[0]["step"] == 0 and evals[-1]["step"] == 4
    assert sum(part["count"] for part in evals[-1]["eval/calibration"]) == (12 if case == "rankings" else 6)
    # plain transformers gives what the judge says
    loaded, tokenizer = reload(run / "model")
    config = loaded.config
    assert config.num_labels == 1 and config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert config.reward_bias == result["reward_bias"] and config.reward_scale == pytest.approx(result["reward_scale"])
    judge = open_judge("run")
    if case != "chat":
        prompts, texts = ["Say red 3:", "Say blue:"], [" yes red", " no"]
        plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        end = [tokenizer.eos_token_id]
        ids = [tokenizer(p)["input_ids"] + plain(t) + end for p, t in zip(prompts, texts, strict=True)]
        with torch.no_grad():
            alone = [float(loaded(torch.tensor([row])).logits[0, 0]) + config.reward_bias for row in ids]
            width = max(map(len, ids))
            padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
            together = loaded(padded, attention_mask=mask).logits[:, 0] + config.reward_bias
        assert judge.scores(prompts, [Completion(text) for text in texts]) == pytest.approx(alone, abs=1e-6)
        assert together.tolist() == pytest.approx(alone, abs=1e-5)
    # samples of the starting model have mean 0 and deviation 1
    rows = json.loads((run / "normalise.json").read_text())
    with torch.no_grad():
        values = [float(loaded(torch.tensor([r["prompt"] + r["ids"]])).logits[0, 0]) + config.reward_bias for r in rows]
    slack = 0.05 if case == "bfloat16" else 1e-4
    assert np.mean(values) == pytest.approx(0, abs=slack)
    assert np.std(values) == pytest.approx(1, abs=slack)
    # what it gets most wrong, with the rewards of the saved model
    worst = result["examples"]
    assert len(worst) == 4
    gaps = [row["rewards"][0] - row["rewards"][1] for row in worst]
    assert gaps == sorted(gaps)


def test_the_adapter_on_its_base_is_the_saved_model(palate, tiny, tmp_path):
    """By peft alone: the base that the adapter names, its head and its layers, and the bias of palate.json."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    data = write_rows(tmp_path / "data.jsonl", pairs(24))
    palate.ok("reward", model=tiny, data=data, out="run", lora_rank=4, **SMALL)
    whole, tokenizer = reload(Path("run/model"))
    named = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert Path(named["base_model_name_or_path"]) == tiny and named["task_type"] == "SEQ_CLS"
    facts = json.loads(Path("run/adapter/palate.json").read_text())
    assert facts == {"reward_bias": whole.config.reward_bias, "reward_scale": whole.config.reward_scale}
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    adapted = PeftModel.from_pretrained(base, "run/adapter").eval()
    ids = torch.tensor([tokenizer("Say red 3: yes red")["input_ids"]])
    with torch.no_grad():
        assert float(adapted(ids).logits) == pytest.approx(float(whole(ids).logits), abs=1e-5)
    palate("generate", model="run/adapter", data=data, out="out.jsonl")
    assert palate.code == 3 and "E409" in palate.said
    before = Path("run/adapter/adapter_model.safetensors").read_bytes()
    palate.ok("reward", model=tiny, data=data, out="run", lora_rank=4, resume=True, **SMALL)
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == before


def test_a_true_reward_says_what_is_lost(palate, tmp_path):
    options = dict(model="builtin:tiny", data="builtin:reviews[:24]", eval="builtin:reviews/heldout[:12]") | SMALL
    result = palate.ok("reward", truth="rule", out="run", **options | {"steps": 2})
    after, before = result["after"], result["before"]
    assert 0.5 < after["eval/truth/accuracy"] == before["eval/truth/accuracy"] < 1
    assert after["eval/truth/loss"] < after["eval/loss"] and after["eval/truth/excess"] > 0
    assert after["eval/truth/lost_low"] <= after["eval/truth/lost"] <= after["eval/truth/lost_high"]
    assert f"{after['eval/truth/accuracy']:.1%} that the truth itself reaches" in result["verdict"]
    (tmp_path / "taste.py").write_text("def two(prompt, first, second):\n    return 0.5\n")
    for changes, said in (({"truth": "taste:two"}, "compares two"), ({"truth": "rule", "eval": "none"}, "--eval")):
        palate("reward", out="other", **options | changes)
        assert palate.code == 2 and said in palate.said and not Path("other").exists()


def test_the_truth_is_of_the_rows_that_were_read(palate, tmp_path, monkeypatch):
    """Rows of an array on one line are told apart; a file that changed after it was read stops the run."""
    from palate.data.sources import read_pairs
    from palate.recipes import reward

    rows = [{"prompt": r.prompt[0].content, "chosen": r.chosen[0].content, "rejected": r.rejected[0].content}
            for r in read_pairs("builtin:reviews/heldout[:12]")]  # fmt: skip
    (tmp_path / "array.json").write_text(json.dumps(rows))
    lines = write_rows(tmp_path / "lines.jsonl", rows)
    options = dict(model="builtin:tiny", data="builtin:reviews[:24]", truth="rule") | SMALL | {"steps": 2}
    found = [palate.ok("reward", eval=data, out=f"run{n}", **options) for n, data in enumerate(("array.json", lines))]
    assert found[0]["after"]["eval/truth/lost"] == found[1]["after"]["eval/truth/lost"]
    prepare = reward.prepare

    def meanwhile(*args, **given):
        made = prepare(*args, **given)
        write_rows(tmp_path / "lines.jsonl", rows[::-1])
        return made

    monkeypatch.setattr(reward, "prepare", meanwhile)
    palate("reward", eval=lines, out="changed", **options)
    assert palate.code == 3 and "E117" in palate.said


@pytest.mark.slow
def test_in_a_world_that_can_be_listed_it_is_within_a_point_of_bayes(palate, tmp_path):
    """Oracle 22: 6,000 pairs labelled by a drawn reward; accuracy and loss over all pairs there are, none left out."""
    from palate.model.reward import load_reward, rewards
    from palate.worlds import enumerable

    world, seed = enumerable.World(3, 3, 2), 0
    table, truth = world.language(seed), world.reward(seed)
    drawn = world.pairs(table, truth, 6000, seed)
    data = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in drawn]
    palate.ok(
        "reward",
        model=f"new:{world.write_start(tmp_path / 'start', spread=0.15)}",
        data=write_rows(tmp_path / "pairs.jsonl", data),
        eval="none",
        out="run",
        seed=seed,
        epochs=4,
        lr=1e-2,
        train__schedule="cosine",
        train__tokens=4096,
        device="cpu",
    )
    model = load_reward("run").model
    rows = [[*prompt, *ids] for prompt in world.prompt_ids.tolist() for ids in world.completion_ids.tolist()]
    learnt = np.reshape(rewards(model, rows), (world.prompts, world.size)) * model.config.reward_scale
    found = enumerable.ordered(table, truth, learnt)
    assert (found["best_accuracy"] - found["accuracy"]).mean() < 0.01
    assert 0 < (found["loss"] - found["floor"]).mean() < 0.02


def test_margins_of_the_data(palate, tiny, tmp_path):
    rows = [row | {"margin": n % 4} for n, row in enumerate(pairs(24))]
    data = write_rows(tmp_path / "data.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", [row | {"prompt": "Now " + row["prompt"]} for row in rows[:8]])
    options = dict(model=tiny, eval=held) | SMALL | {"steps": 2}
    plain = palate.ok("reward", data=data, out="plain", **options)
    with_margin = palate.ok("reward", data=data, out="margin", margin=0.5, **options)
    assert [part["said"] for part in plain["after"]["eval/by_margin"]] == [0, 1, 2, 3]
    assert sum(part["count"] for part in plain["after"]["eval/by_margin"]) == 8
    assert metrics("plain")[1]["loss"] != metrics("margin")[1]["loss"]
    assert with_margin["after"]["eval/loss"] != plain["after"]["eval/loss"]
    renamed = [{"gap" if key == "margin" else key: value for key, value in row.items()} for row in rows]
    other = write_rows(tmp_path / "gap.jsonl", renamed)
    palate.ok("reward", data=other, out="gap", margin=0.5, columns="margin=gap", **(options | {"eval": "none"}))
    palate("reward", data=other, out="none", margin=0.5, **options)
    assert palate.code == 2 and "margin" in palate.said and not Path("none").exists()


def test_a_dry_run_writes_nothing(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", pairs(24))
    result = palate.ok("reward", model=tiny, data=data, out="run", dry_run=True, **SMALL)
    assert any("bradley_terry" in line for line in result["plan"])
    assert not Path("run").exists()


def test_other_verbs_refuse_its_loss_and_it_refuses_their_data(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", pairs(24))
    palate("dpo", model=tiny, data=data, loss="bradley_terry", out="run")
    assert palate.code == 2 and "palate reward" in palate.said
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    palate("reward", model=tiny, data=rows, out="run")
    assert palate.code == 3 and not Path("run").exists()


def test_a_finished_run_is_left_alone_and_its_page_can_be_written(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", pairs(24))
    palate.ok("reward", model=tiny, data=data, out="run", **SMALL)
    before = (Path("run") / "model" / "model.safetensors").read_bytes()
    result = palate.ok("reward", model=tiny, data=data, out="run", resume=True, **SMALL)
    assert result["normalised_on"] == 16
    assert (Path("run") / "model" / "model.safetensors").read_bytes() == before
    palate.ok("report", "run")
    palate("generate", model="run", data=data, out="out.jsonl")
    assert palate.code == 3


def test_small_models_learn_at_a_higher_rate():
    from palate.recipes.reward import RewardConfig, learning_rate

    config = RewardConfig(model="m", data="d")
    rate, reason = learning_rate(config, 857_000)
    assert rate == 1e-3 and "reward model" in reason
    assert learning_rate(config, 135_000_000)[0] == 5e-6
    assert learning_rate(config.model_copy(update={"lr": 0.5}), 857_000) == (0.5, "as given")
    assert learning_rate(config.model_copy(update={"lora_rank": 4}), 857_000)[0] == pytest.approx(2e-3)
