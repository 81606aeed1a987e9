"""SPIN is DPO on its own pairs, to the bit; each trap that others fell into has a test that fails on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from runs_kit import COLOURS, lines, write_rows
from safetensors.numpy import load_file

from palate.data.sources import read_demonstrations, read_pairs
from palate.data.tokens import encode_prompt, end_tokens, tokenize_pair
from palate.model.load import load
from palate.recipes.spin import SpinConfig, lam, warnings
from palate.reference import annotate

SMALL = dict(batch=4, steps=3, rounds=2, max_tokens=12, chunk=16, samples=0, device="cpu", lr=3e-4, lam="0.7,1")


def chats(count: int = 40):
    for n in range(count):
        turns = [
            ("system", "Be brief."),
            ("user", f"Say {COLOURS[n % 8]} {n}."),
            ("assistant", f"Yes, {COLOURS[n % 5]}."),
        ]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def options(tmp_path, ending) -> dict:
    return SMALL | {"model": ending, "data": write_rows(tmp_path / "d.jsonl", chats())}


def test_a_round_is_what_dpo_makes_of_the_same_pairs_from_the_same_start(palate, options, ending):
    palate.ok("spin", out="run", **options)
    for number, start in ((1, ending), (2, "run/rounds/01")):
        folder = Path(f"run/rounds/{number:02d}")
        same = {name: options[name] for name in ("batch", "steps", "samples", "device", "lr")} | {"epochs": 2}
        pairs = {"data": folder / "pairs.jsonl", "eval": folder / "held.jsonl", "retain": "none"}
        palate.ok("dpo", out=f"dpo-{number}", model=start, beta=(0.7, 1)[number - 1], **same, **pairs)
        mine, theirs = ((path / "model/model.safetensors").read_bytes() for path in (folder, Path(f"dpo-{number}")))
        assert mine == theirs
        losses = [[line["loss"] for line in lines(path / "metrics.jsonl") if "loss" in line]
                  for path in (folder, Path(f"dpo-{number}"))]  # fmt: skip
        assert losses[0] == losses[1] and losses[0][0] == pytest.approx(np.log(2), abs=1e-7)


def test_a_rounds_samples_and_its_reference_are_of_its_start_and_of_no_earlier_model(palate, options, ending):
    palate.ok("spin", out="run", **options)
    rows = [*read_pairs("run/rounds/02/pairs.jsonl"), *read_pairs("run/rounds/02/held.jsonl")]
    pinned = load_file("run/rounds/02/reference.safetensors")["logps"]
    values = {}
    for name in ("run/rounds/01", str(ending)):
        found = load(name)
        groups = [tokenize_pair(row, found.tokenizer) for row in rows]
        values[name] = np.array([value for g in annotate(groups, found.model) for value in g.reference])
    assert np.allclose(pinned, values["run/rounds/01"], atol=1e-4)
    assert np.abs(pinned - values[str(ending)]).max() > 0.1
    policies = [json.loads(Path(f"run/rounds/{n:02d}/run.json").read_text())["parents"][0]["model"] for n in (1, 2)]
    assert policies == [str(ending), "run/rounds/01"]
    plans = [json.loads(Path(f"run/rounds/{n:02d}/samples/plan.json").read_text()) for n in (1, 2)]
    assert [plan["model"] for plan in plans] == [load(name).fingerprint for name in policies]
    assert plans[0]["seed"] != plans[1]["seed"] and plans[0]["prompts"] == plans[1]["prompts"]


def test_a_rounds_log_probs_are_of_the_next_tokens_of_its_completions_by_hand(palate, options, ending):
    """Token by token over one stock forward a row. Without the shift, with the mask turned round, without the end
    token or as means, as public code has had it, other numbers come out."""
    import torch

    palate.ok("spin", out="run", **options | {"rounds": 1})
    rows = [*read_pairs("run/rounds/01/pairs.jsonl"), *read_pairs("run/rounds/01/held.jsonl")]
    found = load(ending)
    groups = [tokenize_pair(row, found.tokenizer) for row in rows]
    pinned = iter(load_file("run/rounds/01/reference.safetensors")["logps"].tolist())
    traps = {"unshifted": [], "turned round": [], "no end": [], "mean": []}
    for group in groups:
        for ids in group.completions:
            row = [*group.prompt.tolist(), *ids.tolist()]
            with torch.no_grad():
                law = found.model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
            stop = 1 + max(place for place, token in enumerate(row) if token in end_tokens(found.tokenizer))
            said = range(len(group.prompt), stop)
            by_hand, logged = sum(law[place - 1, row[place]].item() for place in said), next(pinned)
            assert logged == pytest.approx(by_hand, abs=1e-4)
            traps["unshifted"].append(sum(law[place, row[place]].item() for place in said) - logged)
            asked = range(1, len(group.prompt))
            traps["turned round"].append(sum(law[place - 1, row[place]].item() for place in asked) - logged)
            traps["no end"].append(sum(law[place - 1, row[place]].item() for place in said[:-1]) - logged)
            traps["mean"].append(by_hand / len(said) - logged)
    assert len(traps["mean"]) > 40 and all(np.median(np.abs(off)) > 0.05 for off in traps.values())


def test_pairs_that_training_would_cut_are_left_out(palate, options):
    """A side that alone loses its end token is told by that; the prompt, too, is that of generation."""
    tokenizer, kept, rows = load(options["model"]).tokenizer, [], []
    limit = None
    for out in ("free", "bound"):
        for stage in ("sample", "pair"):
            palate.ok("spin", out=out, stage=stage, max_length=limit, **options)
        rows.append(json.loads(Path(f"{out}/rounds/01/pairs.json").read_text()))
        pairs = [*read_pairs(f"{out}/rounds/01/pairs.jsonl"), *read_pairs(f"{out}/rounds/01/held.jsonl")]
        groups = [tokenize_pair(one, tokenizer) for one in pairs]
        kept.append([len(group.prompt) + max(map(len, group.completions)) for group in groups])
        limit = sorted(kept[0])[len(kept[0]) // 2]
    assert kept[1] == [size for size in kept[0] if size <= limit] and 3 < len(kept[1]) < len(kept[0])
    assert rows[1]["left_out"]["too long"] == len(kept[0]) - len(kept[1]) and rows[0]["left_out"]["too long"] == 0


OTHER = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_what_is_sampled_from_is_what_is_trained_on_under_any_template(palate, options, monkeypatch, tmp_path):
    """Prompt for prompt and sample for sample the ids of training are those of generation; another template anywhere
    between the two would show."""
    from palate.recipes import preference
    from palate.sampling import generate

    (tmp_path / "other.jinja").write_text(OTHER)
    drawn, trained, sampler, pinner = [], [], generate.generate, preference.pin_reference

    def sampling(model, tokenizer, prompts, **how):
        made = sampler(model, tokenizer, prompts, **how)
        if how["seed"] < 2**31:  # not to compare
            drawn.extend((prompts[one.prompt].tolist(), one.ids.tolist()) for one in made)
        return made

    def pinning(config, prepared, waiting, say, run, groups, held):
        trained.append([(g.prompt.tolist(), g.completions[1].tolist()) for g in (*groups, *held)])
        return pinner(config, prepared, waiting, say, run, groups, held)

    monkeypatch.setattr(generate, "generate", sampling)
    monkeypatch.setattr(preference, "pin_reference", pinning)
    palate.ok("spin", out="run", chat_template=tmp_path / "other.jinja", **options)
    assert len(trained) == 2 and all(trained)
    assert {tuple(prompt) for group in trained for prompt, _ in group} <= {tuple(prompt) for prompt, _ in drawn}
    tokenizer = load(options["model"]).tokenizer
    first = read_demonstrations(options["data"])[0]
    assert encode_prompt(first.prompt, tokenizer).tolist() not in [prompt for prompt, _ in drawn]  # the model's own
    texts = {(tuple(prompt), tokenizer.decode(ids)) for prompt, ids in drawn}
    for group in trained:
        for prompt, ids in group:
            said = tokenizer.decode(ids).removesuffix("\n")
            assert (tuple(prompt), said) in texts or (tuple(prompt), said.strip()) in texts


def test_both_sides_end_alike_and_format_tells_nothing(palate, options, ending):
    """No sample that was cut stands in a pair, so both sides have the end token once, at their end."""
    result = palate.ok("spin", out="run", **options | {"max_tokens": 3})
    found = load(ending)
    ends = end_tokens(found.tokenizer)
    for number, row in enumerate(result["rounds"], 1):
        cut = [s for s in lines(Path(f"run/rounds/{number:02d}/samples/000.jsonl")) if not s["finished"]]
        assert len(cut) > 0 and row["left_out"]["unfinished"] > len(cut) - 1
        for one in read_pairs(f"run/rounds/{number:02d}/pairs.jsonl"):
            group = tokenize_pair(one, found.tokenizer)
            assert [[int(i) in ends for i in ids].count(True) for ids in group.completions] == [1, 1]
            assert all(int(ids[-1]) in ends for ids in group.completions)
        assert row["format_accuracy"] is not None and row["format_low"] <= row["format_accuracy"] <= row["format_high"]


def test_demonstrations_that_are_the_models_own_samples_are_not_told_apart_by_format(palate, options, tmp_path):
    """The game at its end: both sides come from one law, and a classifier of format is at chance; a cut that one side
    alone suffers, or an end token it lacks, would lift it (tests/evaluation/test_formats.py)."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["messages"][:2]} for row in chats(160)])
    palate.ok("generate", model=options["model"], data=prompts, out="own.jsonl", max_tokens=12, seed=7)
    rows = [row for row in lines(Path("own.jsonl")) if row["finished"] and row["completion"].strip()]
    rows = [row for row in rows if "\0" not in row["completion"]]
    turn = {"role": "assistant"}
    data = write_rows(
        tmp_path / "own-d.jsonl",
        [{"messages": [*row["prompt"], turn | {"content": row["completion"]}]} for row in rows],
    )
    (row,) = palate.ok("spin", out="run", **options | {"data": data, "rounds": 1, "eval": "none"})["rounds"]
    assert row["pairs"] > 80
    assert row["format_low"] < 0.5 < row["format_high"]


def test_lambda_by_round_and_its_warning(palate, options):
    assert warnings(SpinConfig(model="m", data="d")) == []
    config = SpinConfig(model="m", data="d", rounds=5, lam=[0.1, 0.1, 0.1, 5])
    assert [lam(config, number) for number in range(1, 6)] == [0.1, 0.1, 0.1, 5.0, 5.0]
    (warned,) = warnings(config)
    assert "lambda 0.1 is below 1/2" in warned and "by -9" in warned
    assert warnings(config.model_copy(update={"rounds": 1})) == []
    assert "swing" in warnings(SpinConfig(model="m", data="d", lam=[0.5]))[0]
    assert "0.2, 0.4 is below" in warnings(SpinConfig(model="m", data="d", lam=[0.4, 0.2, 2]))[0]
    result = palate.ok("spin", out="run", dry_run=True, **options | {"lam": "0.1,2", "rounds": 3})
    assert "lambda 0.1 is below 1/2" in palate.said
    assert "beta 0.1, 2, 2" in result["plan"][1]
