"""What a run must not say or do: each of these once went wrong."""

import json
from pathlib import Path

import pytest
import torch
from runs_kit import chats, demonstrations, feedbacks, pairs, save_model, texts, write_rows

SMALL = dict(batch=4, steps=4, device="cpu", lr=1e-3, samples=0)


def test_an_untrained_model_is_not_called_better(palate, tiny, tmp_path):
    """Without a reference the start is no tie: what was ordered rightly before training proves nothing."""
    data = write_rows(tmp_path / "d.jsonl", pairs(80))
    options = SMALL | {"lr": 1e-12, "steps": 1}
    palate("dpo", model=tiny, data=data, eval="auto", out="r", loss="simpo", require_better=True, **options)
    assert palate.code == 4
    assert palate.result["better"] is False
    assert palate.result["reference_scored"] == palate.result["reference_reused"] == 0


def test_texts_train_without_a_beginning_token(palate, tmp_path, tiny_llama, tiny_tokenizer):
    """Held-out texts have no prompt to complete; that is no reason to end a run."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    tokenizer.add_bos_token = False
    model = save_model(tmp_path / "nobos", tiny_llama(0), tokenizer)
    data = write_rows(tmp_path / "d.jsonl", texts(40))
    palate.ok("sft", model=model, data=data, out="r", **(SMALL | {"samples": 4}))


def moved(folder: Path) -> None:
    """Another model under the same name."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor + 0.05 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("verb, rows", [("dpo", pairs), ("sft", demonstrations)])
def test_a_changed_model_is_no_start_to_resume_from(
    palate, tmp_path, tiny_llama, tiny_tokenizer, monkeypatch, verb, rows
):
    """Stopped before the first checkpoint, with the reference pinned: other weights are refused, not trained."""
    from palate.train import fit

    model = save_model(tmp_path / "m", tiny_llama(0), tiny_tokenizer)
    data = write_rows(tmp_path / "d.jsonl", rows(40))
    with monkeypatch.context() as patched:
        patched.setattr(fit, "steps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        palate(verb, model=model, data=data, out="r", **SMALL)
    assert palate.code == 6
    assert palate.result["out"] == "r"
    assert f"palate {verb} -c r/config.yaml --resume --out r" in palate.result["error"]
    moved(model)
    palate(verb, model=model, data=data, out="r", resume=True, **SMALL)
    assert palate.code == 3
    assert "E502" in palate.result["error"]


def test_the_printed_way_to_resume_works(palate, tiny, tmp_path, monkeypatch):
    from palate.train import fit

    data = write_rows(tmp_path / "d.jsonl", pairs(40))
    with monkeypatch.context() as patched:
        patched.setattr(fit, "steps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        palate("dpo", model=tiny, data=data, out="r", **SMALL)
    words = palate.result["error"].rpartition("Next: ")[2].rstrip(".").split()
    assert words[:2] == ["palate", "dpo"]
    from palate.cli import main

    assert main([*words[1:]]) == 0


def test_another_template_is_no_way_to_go_on(palate, chatty, tmp_path, monkeypatch):
    from runs_kit import TEMPLATE

    from palate.train import fit

    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    data = write_rows(tmp_path / "d.jsonl", chats(40))
    options = SMALL | {"loss": "simpo", "chat_template": str(template)}
    with monkeypatch.context() as patched:
        patched.setattr(fit, "steps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        palate("dpo", model=chatty, data=data, out="r", **options)
    template.write_text(TEMPLATE.replace("Reply", "Answer"))
    palate("dpo", model=chatty, data=data, out="r", resume=True, **options)
    assert palate.code == 3
    assert "E502" in palate.result["error"]


def test_a_finished_run_needs_neither_data_nor_model(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(40))
    palate.ok("dpo", model=tiny, data=data, out="r", **SMALL)
    data.unlink()
    again = palate.ok("dpo", model=tiny, data=data, out="r", resume=True, **SMALL)
    assert again["reference_scored"] == 0
    assert "nothing to do" in palate.said


def test_the_best_checkpoint_is_kept_whatever_the_cadence(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(80))
    options = SMALL | {"steps": 7, "eval_every": 2, "save_every": 3}
    palate.ok("dpo", model=tiny, data=data, out="r", **options)
    evals = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines() if "eval/loss" in line]
    best = max(evals[1:], key=lambda line: (line["eval/rewards/accuracies"], -line["step"]))
    assert (Path("r/checkpoints") / f"step-{best['step']:06d}").is_dir()


def test_feedback_has_the_metrics_of_pairs(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", feedbacks(40))
    palate.ok("kto", model=tiny, data=data, out="r", **SMALL)
    first, *_ = (json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines() if '"loss"' in line)
    names = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert names | {"logps/chosen", "length/chosen", "length/rejected", "displaced", "kl"} <= first.keys()
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], abs=1e-12)


def test_options_without_effect_are_refused(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(40))
    palate("dpo", model=tiny, data=data, out="r", train__optimizer="rmsprop", train__beta1=0.5, **SMALL)
    assert palate.code == 2
    assert "E316" in palate.result["error"]
    assert not Path("r").exists()


def test_a_config_with_rmsprop_runs_again(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(40))
    palate.ok("dpo", model=tiny, data=data, out="r", train__optimizer="rmsprop", **SMALL)
    palate.ok("dpo", config="r/config.yaml", out="again")


def test_dropout_never_reaches_a_stored_score():
    """A model in training mode is probed and scored with dropout off, and keeps its mode."""
    import numpy as np
    import transformers
    from models import random_group

    from palate.reference import annotate

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, resid_pdrop=0.5, embd_pdrop=0.5,
                                     bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    groups = [random_group(np.random.default_rng(0), 6, 4, 5)]
    truth = annotate(groups, model)[0].reference
    model.train()
    assert annotate(groups, model)[0].reference == truth
    assert model.training


def test_score_counts_what_it_cuts_and_every_pair_of_a_list(palate, tiny, tmp_path):
    rows = [
        {"prompt": "Say:", "responses": [" a b", " c"], "preferences": [2]},
        {"prompt": "Say so:", "responses": [" a b", " c"], "preferences": [1]},
        {"prompt": "Say " * 400, "responses": [" a b", " c"], "preferences": [1]},
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    result = palate.ok("score", model=tiny, data=data, out="o.jsonl", device="cpu")
    found = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert result["pairs"] == 3
    assert all({"chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"} <= row.keys() for row in found)
    assert result["data"]["prompts cut"] == 1
