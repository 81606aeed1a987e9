"""score, generate, doctor and runs through the command line."""

import json
from pathlib import Path

import pytest
import torch
from runs_kit import chats, demonstrations, feedbacks, lines, pairs, rankings, tree, write_rows


@pytest.fixture
def reference(tmp_path_factory, tiny_llama, tiny_tokenizer):
    from runs_kit import save_model

    return save_model(tmp_path_factory.mktemp("model") / "other", tiny_llama(5), tiny_tokenizer)


def by_hand(folder, prompt: str, completion: str, bos: bool = True):
    """(log-prob, tokens) through plain transformers: the prompt's ids, the completion's, the end token."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    head = tokenizer(prompt, add_special_tokens=bos)["input_ids"]
    tail = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    return float(sum(logps[len(head) + i - 1, t] for i, t in enumerate(tail))), len(tail)


def test_score_gives_every_column(palate, tiny, reference, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(9))
    result = palate.ok("score", model=tiny, reference=reference, data=data, out="s.jsonl", beta=0.2, device="cpu")
    rows = lines(Path("s.jsonl"))
    assert [row["line"] for row in rows] == list(range(1, 10))
    for row, source in zip(rows, pairs(9), strict=True):
        for side in ("chosen", "rejected"):
            logp, tokens = by_hand(tiny, source["prompt"], source[side])
            base, _ = by_hand(reference, source["prompt"], source[side])
            assert row[f"{side}_logp"] == pytest.approx(logp, abs=1e-4)
            assert row[f"{side}_tokens"] == tokens
            assert row[f"{side}_reference"] == pytest.approx(base, abs=1e-4)
            assert row[f"{side}_reward"] == pytest.approx(0.2 * (logp - base), abs=1e-4)
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-12)
    assert result["accuracy"] == sum(row["margin"] > 0 for row in rows) / 9
    assert result["margin"] == pytest.approx(sum(row["margin"] for row in rows) / 9)
    assert (result["scored"], result["reused"]) == (18, 0)
    again = palate.ok("score", model=tiny, reference=reference, data=data, out="t.jsonl", beta=0.9, device="cpu")
    assert (again["scored"], again["reference_scored"]) == (0, 0)


@pytest.mark.parametrize("rows, count", [(rankings, None), (feedbacks, 1), (demonstrations, 1)])
def test_score_of_other_records(palate, tiny, tmp_path, rows, count):
    data = write_rows(tmp_path / "d.jsonl", rows(6))
    palate.ok("score", model=tiny, data=data, out="s.jsonl", device="cpu")
    found = lines(Path("s.jsonl"))
    assert len(found) == 6
    for row in found:
        if "logps" in row:
            assert len(row["logps"]) == len(row["tokens"]) == (count or len(row["logps"]))


def test_score_shares_with_training(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(8))
    palate.ok("score", model=tiny, data=data, out="s.jsonl", device="cpu")
    result = palate.ok("dpo", model=tiny, data=data, out="run", steps=1, batch=4, device="cpu", samples=0)
    assert result["reference_scored"] == 0


def test_score_of_chats(palate, chatty, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", chats(3))
    palate.ok("score", model=chatty, data=data, out="s.jsonl", device="cpu")
    for row, source in zip(lines(Path("s.jsonl")), chats(3), strict=True):
        prompt = "system: Be brief.\nuser: " + source["prompt"][1]["content"] + "\nReply: "
        logp, tokens = by_hand(chatty, prompt, source["chosen"][0]["content"], bos=False)
        assert row["chosen_tokens"] == tokens
        assert row["chosen_logp"] == pytest.approx(logp, abs=1e-4)


def test_generate_greedily_is_transformers(palate, tiny, tmp_path):
    import transformers

    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"Say {n}:"} for n in (1, 22, 333)])
    result = palate.ok("generate", model=tiny, data=data, out="g.jsonl", temperature=0, max_tokens=8, device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    rows = lines(Path("g.jsonl"))
    assert result["completions"] == 3
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        made = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
        assert row["tokens"] == len(made)
        assert row["finished"] == (made[-1] == 1)
        assert row["completion"] == tokenizer.decode([t for t in made if t != 1])
        assert {"prompt", "completion", "sample", "logp", "tokens", "finished"} == {*row}


def test_generate_draws_by_seed(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "Say 1:"}, {"prompt": "Say 2:"}])
    made = []
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        palate.ok("generate", model=tiny, data=data, out=out, samples=3, seed=seed, max_tokens=6, device="cpu")
        made.append([row["completion"] for row in lines(Path(out))])
    assert made[0] == made[1] != made[2]
    assert len(made[0]) == 6
    assert [row["sample"] for row in lines(Path("a"))] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_a_file_that_is_there_is_not_overwritten(palate, tiny, tmp_path, verb):
    data = write_rows(tmp_path / "d.jsonl", pairs(2))
    Path("out.jsonl").write_text("mine")
    palate(verb, model=tiny, data=data, out="out.jsonl", device="cpu")
    assert palate.code == 2
    assert Path("out.jsonl").read_text() == "mine"


@pytest.mark.parametrize("verb", ["score", "generate", "dpo", "sft", "kto"])
def test_missing_and_empty_things_are_refused_with_three(palate, tiny, tmp_path, verb):
    empty, data = tmp_path / "empty.jsonl", write_rows(tmp_path / "d.jsonl", pairs(4))
    empty.write_text("")
    for options in ({"data": tmp_path / "none.jsonl", "model": tiny}, {"data": empty, "model": tiny},
                    {"data": data, "model": tmp_path / "no-model"}):  # fmt: skip
        palate(verb, out="made", device="cpu", **options)
        assert palate.code == 3, (options, palate.said)
        assert "Traceback" not in palate.said
        assert "Next:" in palate.said
        assert not Path("made").exists()


def test_doctor_says_what_is_wrong_and_exits_with_three(palate, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(20))
    palate.ok("doctor", data)
    rows = [*pairs(20)]
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["chosen"] = ""
    write_rows(data, [*rows, rows[7]])
    before = tree(tmp_path)
    palate("doctor", data)
    assert palate.code == 3
    assert "Traceback" not in palate.said
    text = json.dumps(palate.result)
    assert ":3" in text
    assert ":5" in text
    assert tree(tmp_path) == before


def test_runs_list_show_and_diff(palate, tiny, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(8))
    for number, beta in ((1, 0.1), (2, 0.4)):
        palate.ok("dpo", model=tiny, data=data, beta=beta, steps=1, batch=4, device="cpu", samples=0)
        assert palate.result["out"] == f"runs/dpo-{number}"
    found = palate.ok("runs")["runs"]
    assert [(row["run"], row["status"], row["step"]) for row in found] == [
        ("runs/dpo-1", "done", 1), ("runs/dpo-2", "done", 1)]  # fmt: skip
    shown = palate.ok("runs", "show", "runs/dpo-1")
    assert shown["config"]["beta"] == 0.1
    differing = palate.ok("runs", "diff", "runs/dpo-1", "runs/dpo-2")["differences"]
    assert differing == {"beta": [0.1, 0.4]}
    palate("runs", "show", "runs/dpo-9")
    assert palate.code == 3
    palate("runs", "show")
    assert palate.code == 2


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_skipped_rows_are_kept_aside_as_they_stood(palate, tiny, tmp_path, verb):
    good = [json.dumps(row) for row in pairs(8)]
    empty = '{"prompt": "Why?",  "chosen": "", "rejected": ""}'  # two spaces: byte for byte
    long = json.dumps({"prompt": "word " * 400, "chosen": " a" * 300, "rejected": " b" * 300})
    bad = {"score": [empty, '{"prompt": 7}'], "generate": ['{"prompt": 7}', long]}[verb]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join([*good[:3], bad[0], *good[3:], bad[1]]) + "\n")
    result = palate.ok(verb, model=tiny, data=data, out="made/out.jsonl", bad_rows="skip", device="cpu")
    assert (result["refused"], result["rejects"]) == (2, "made/out.rejects.jsonl")
    assert Path("made/out.rejects.jsonl").read_text() == "\n".join(bad) + "\n"
    assert len(lines(Path("made/out.jsonl"))) == 8
    palate(verb, model=tiny, data=data, out="made/out.json", bad_rows="skip", device="cpu")
    assert palate.code == 2  # the rejects of before are in the way
    assert not Path("made/out.json").exists()
    data.write_text("\n".join(good) + "\n")
    assert "rejects" not in palate.ok(verb, model=tiny, data=data, out="whole.jsonl", bad_rows="skip", device="cpu")
    assert not Path("whole.rejects.jsonl").exists()
