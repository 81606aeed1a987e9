"""compare through the command line: numbers by hand, models and files, every kind of judge, and what is refused."""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from runs_kit import chats, lines, pairs, save_model, write_rows

from palate.evaluation.statistics import wilson

PROMPTS = [f"Say {n}:" for n in range(12)]


def completions(path: Path, replies, prompts=PROMPTS, **more) -> Path:
    rows = zip(prompts, replies, strict=True)
    return write_rows(
        path, [{"prompt": p, "completion": c, "sample": 0, "logp": -1.0, "tokens": len(c), "finished": True} | more
               for p, c in rows])  # fmt: skip


@pytest.fixture
def length_judge(tmp_path, monkeypatch):
    """A module of the working directory whose `longer` scores and whose `prefer` compares."""
    monkeypatch.chdir(tmp_path)
    name = f"judges_{random.getrandbits(48)}"
    Path(f"{name}.py").write_text(
        "def longer(prompt, completion):\n    return len(completion)\n"
        "def prefer(prompt, first, second):\n    return (len(first) > len(second)) - (len(first) < len(second))\n"
        "def first(prompt, first, second):\n    return 1\n"
        "def broken(prompt, completion):\n    return 1 / 0\n"
    )
    return name


@pytest.fixture
def three(tmp_path, length_judge):
    """a beats b on 7 of 12 prompts, ties 2; c is longest everywhere. And the prompts."""
    a = ["xxx"] * 7 + ["xx"] * 2 + ["x"] * 3
    completions(tmp_path / "a.jsonl", a)
    completions(tmp_path / "b.jsonl", ["xx"] * 12)
    completions(tmp_path / "c.jsonl", ["xxxxx"] * 12)
    write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return length_judge


@pytest.mark.parametrize("judge", ["longer", "prefer"])
def test_two_files_by_hand(palate, three, judge):
    found = palate.ok("compare", "a.jsonl", "b.jsonl", data="p.jsonl", judge=f"{three}:{judge}")
    share = wilson(8, 12)
    expected = {"a": "a.jsonl", "b": "b.jsonl", "n": 12, "wins": 7, "losses": 3, "ties": 2, "win_rate": 8 / 12,
                "judge": f"{three}:{judge}", "verdict": "not shown to be different", "verb": "compare"}  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert (found["low"], found["high"]) == pytest.approx((share.low, share.high))
    assert found["bootstrap_low"] < 8 / 12 < found["bootstrap_high"]
    assert "matches" not in found
    back = palate.ok("compare", "b.jsonl", "a.jsonl", data="p.jsonl", judge=f"{three}:{judge}")
    assert (back["wins"], back["losses"], back["ties"]) == (3, 7, 2)
    assert back["win_rate"] == pytest.approx(1 - found["win_rate"])
    assert (back["low"], back["high"]) == pytest.approx((1 - found["high"], 1 - found["low"]))


def test_three_files_are_three_matches(palate, three):
    found = palate.ok("compare", "c.jsonl", "a.jsonl", "b.jsonl", data="p.jsonl", judge=f"{three}:longer")
    assert [(one["a"], one["b"], one["verdict"]) for one in found["matches"]] == [
        ("c.jsonl", "a.jsonl", "better"), ("c.jsonl", "b.jsonl", "better"),
        ("a.jsonl", "b.jsonl", "not shown to be different")]  # fmt: skip
    assert {key: found[key] for key in found["matches"][0]} == found["matches"][0]
    assert found["length"] == {"before": pytest.approx((7 * 3 + 2 * 2 + 3) / 12), "after": 5}


def test_a_judge_that_prefers_what_comes_first_shows_nothing(palate, three):
    found = palate.ok("compare", "c.jsonl", "b.jsonl", data="p.jsonl", judge=f"{three}:first")
    assert (found["ties"], found["win_rate"]) == (12, 0.5)


def test_every_sample_is_used_and_prompts_are_matched_by_content(palate, three, tmp_path):
    rows = [{"prompt": p, "completion": "x" * (1 + k), "sample": k} for p in PROMPTS[::-1] for k in range(3)]
    write_rows(tmp_path / "samples.jsonl", [*rows, {"prompt": "Something else", "completion": "x"}])
    found = palate.ok("compare", "samples.jsonl", "b.jsonl", data="p.jsonl", judge=f"{three}:longer")
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (36, 12, 12, 12)
    assert found["prompts"] == 12
    assert found["length"] is None  # the file says nothing of tokens
    assert "1 other prompts are left aside" in palate.said


def test_the_table_begins_with_the_verdict(three, tmp_path):
    from palate.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(["compare", "c.jsonl", "a.jsonl", "b.jsonl", "--data", "p.jsonl", "--judge", f"{three}:longer"], {})
    shown = out.getvalue().splitlines()
    assert code == 0
    assert shown[0].startswith("c.jsonl is better than a.jsonl: it wins 100.0% [75.8%, 100.0%] of 12 comparisons")
    assert shown[2].split()[:2] == ["win", "rate"]
    assert [line.split("  ")[0] for line in shown[3:]] == [
        "c.jsonl against a.jsonl", "c.jsonl against b.jsonl", "a.jsonl against b.jsonl"]  # fmt: skip
    assert len({line.find("[") for line in shown[3:]}) == 1


def test_the_folder_holds_the_comparison_and_the_completions(palate, three):
    judge = f"{three}:longer"
    found = palate.ok("compare", "a.jsonl", "b.jsonl", data="p.jsonl", judge=judge, out="made")
    assert found["out"] == "made"
    assert sorted(os.listdir("made")) == ["1-a.jsonl", "2-b.jsonl", "comparison.json"]
    record = json.loads(Path("made/comparison.json").read_text())
    assert {key: record[key] for key in ("a", "b", "n", "wins", "verdict", "kl", "reward")} == {
        "a": "a.jsonl", "b": "b.jsonl", "n": 12, "wins": 7, "verdict": "not shown to be different", "kl": None,
        "reward": {"before": 2.0, "after": pytest.approx(28 / 12)}}  # fmt: skip
    assert record["examples"][0] == {"prompt": "Say 0:", "before": "xx", "after": "xxx", "score_before": 2, "score_after": 3}  # fmt: skip  # noqa: E501
    assert [row["prompt"] for row in record["examples"]] == PROMPTS
    assert [row["score"] for row in lines(Path("made/1-a.jsonl"))] == [len(row["after"]) for row in record["examples"]]
    again = palate.ok("compare", "made/1-a.jsonl", "made/2-b.jsonl", data="p.jsonl", judge=judge)
    assert again["wins"] == 7
    palate("compare", "a.jsonl", "b.jsonl", data="p.jsonl", judge=judge, out="made")
    assert palate.code == 2


def test_require_better(palate, three):
    common = {"data": "p.jsonl", "judge": f"{three}:longer", "require_better": True}
    assert palate.ok("compare", "c.jsonl", "b.jsonl", **common)["status"] == "done"
    for contestants in (("a.jsonl", "b.jsonl"), ("b.jsonl", "c.jsonl")):
        found = palate("compare", *contestants, **common)
        assert (palate.code, found["status"], found["n"]) == (4, "not better", 12)


# --- calibration: completions of a real model, files, the rule, the first sentence of the page ------------------------

KINDS = 6  # completions of each prompt to draw from


@pytest.mark.slow
def test_the_first_sentence_of_the_page_is_calibrated(palate):
    """200 times two samples of one model, and 200 times one whose true win rate over it is 0.60, on 300 prompts each.

    The samples are drawn from a pool of completions, so the true win rate is counted, not assumed: the better one
    takes the better of two draws of the pool in a share of its completions that makes it 0.60.
    """
    from palate.recipes import compare
    from palate.report import write_report
    from palate.report.reading import read_run
    from palate.report.verdict import verdict
    from palate.run import Run
    from palate.worlds.reviews import judge

    sampling = {"samples": KINDS, "max_tokens": 96, "temperature": 0.7, "seed": 100, "device": "cpu"}
    palate.ok("generate", model="builtin:tiny", data="builtin:prompts[:300]", out="pool.jsonl", **sampling)
    rows = lines(Path("pool.jsonl"))
    pool = [rows[at : at + KINDS] for at in range(0, len(rows), KINDS)]
    scores = [[judge(row["prompt"][-1]["content"], row["completion"], row["finished"]) for row in one] for one in pool]
    draws = [(i, j) for i in range(KINDS) for j in range(KINDS) if i != j]
    best = [[max(pair, key=one.__getitem__) for pair in draws] for one in scores]

    def wins(a: float, b: float) -> float:
        return (a > b) + (a == b) / 2

    often = [wins(one[i], other) for one, mine in zip(scores, best, strict=True) for i in mine for other in one]
    share = (0.6 - 0.5) / (sum(often) / len(often) - 0.5)  # of completions that are the better of two
    assert 0 < share < 1
    chance = random.Random(6)
    with Run.create(Path("run"), verb="dpo", config={"model": "builtin:tiny"}, argv=[], parents=[]) as run:
        run.finish({"verdict": "nothing was measured"})

    def said(better: float) -> str:
        """The page's word for one comparison. better: the share of completions that are the better of two draws."""
        chosen = {"a.jsonl": [], "b.jsonl": []}
        for place, one in enumerate(pool):
            i, j = chance.choice(draws)
            if better:
                i = chance.choice(best[place]) if chance.random() < better else i
                j = chance.randrange(KINDS)
            chosen["a.jsonl"].append(one[i])
            chosen["b.jsonl"].append(one[j])
        for name, taken in chosen.items():
            write_rows(Path(name), taken)
        shutil.rmtree("run/compare", ignore_errors=True)
        options = {"contestants": list(chosen), "data": "builtin:prompts[:300]", "judge": "rule", "out": "run/compare"}
        found = compare.run(compare.CompareConfig(**options), say=lambda text="": None)
        shown = verdict(read_run(Path("run")))
        assert shown.word.lower() == found["verdict"] and f"of {found['n']} comparisons" in shown.sentence
        return found["verdict"]

    null = [said(0.0) for _ in range(200)]
    assert null.count("better") <= 10 and null.count("worse") <= 10
    real = [said(share) for _ in range(200)]
    assert real.count("better") >= 180 and "worse" not in real
    words = {"better": "Better", "not shown to be different": "Not shown to be different"}
    assert f">{words[real[-1]]}</h1>" in write_report(["run"]).read_text(encoding="utf-8")


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return save_model(tmp_path_factory.mktemp("model") / "other", tiny_llama(5), tiny_tokenizer)


def test_a_model_is_its_own_file(palate, tiny, other, tmp_path):
    """A model completes as `palate generate` does, and against itself it wins one half."""
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    sampling = {"max_tokens": 8, "seed": 3, "temperature": 0.9, "device": "cpu"}
    palate.ok("generate", model=tiny, data=data, out="t.jsonl", samples=2, **sampling)
    same = palate.ok("compare", tiny, "t.jsonl", data=data, judge="random", samples=2, **sampling)
    assert (same["n"], same["ties"], same["win_rate"], same["verdict"]) == (24, 24, 0.5, "not shown to be different")
    itself = palate.ok("compare", other, other, data=data, judge="random", **sampling)
    assert (itself["ties"], itself["win_rate"]) == (12, 0.5)
    found = palate.ok("compare", tiny, other, data=data, judge="random", out="made", **sampling)
    assert found["wins"] + found["losses"] + found["ties"] == found["n"] == 12
    assert found["ties"] < 12
    made = lines(Path("made/1-tiny.jsonl"))
    assert [row["completion"] for row in made] == [row["completion"] for row in lines(Path("t.jsonl")) if not row["sample"]]  # fmt: skip  # noqa: E501
    assert found["length"]["after"] == pytest.approx(sum(row["tokens"] for row in made) / 12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_kl_of_two_models_is_that_of_their_samples(palate, tiny, other, tmp_path, temperature):
    import torch
    from transformers import AutoModelForCausalLM

    from palate.data.tokens import encode_prompt, end_tokens
    from palate.model.load import load
    from palate.sampling.generate import generate

    data = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    options = {"data": data, "judge": "random", "max_tokens": 8, "seed": 3, "device": "cpu"}
    found = palate.ok("compare", tiny, other, temperature=temperature, **options)
    loaded = load(tiny)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny, other)]
    prompts = [encode_prompt(prompt, loaded.tokenizer) for prompt in PROMPTS]
    sampling = {"max_tokens": 8, "seed": 3, "temperature": temperature, "end_ids": end_tokens(loaded.tokenizer)}
    gaps = []
    for sample in generate(loaded.model, loaded.tokenizer, prompts, **sampling):
        start, ids = len(prompts[sample.prompt]), torch.tensor([[*prompts[sample.prompt], *sample.ids]])
        with torch.no_grad():
            own, its = ((m(ids).logits[0].double() / temperature).log_softmax(-1) for m in models)
        gaps.append(sum(float((own - its)[start + n - 1, token]) for n, token in enumerate(sample.ids)))
    assert found["kl"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert found["kl"] != 0
    assert palate.ok("compare", tiny, tiny, temperature=temperature, **options)["kl"] == 0
    assert palate.ok("compare", tiny, other, **options | {"temperature": 0})["kl"] is None


def test_conversations(palate, chatty, tmp_path):
    data = write_rows(tmp_path / "p.jsonl", chats(4))
    palate.ok("generate", model=chatty, data=data, out="t.jsonl", max_tokens=6, device="cpu")
    same = palate.ok("compare", chatty, "t.jsonl", data=data, judge="random", max_tokens=6, device="cpu")
    assert (same["n"], same["ties"]) == (4, 4)


def test_the_rule_of_the_world(palate, tmp_path):
    from palate.worlds import reviews

    requests = list(reviews.requests())[:8]
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in requests])
    completions(tmp_path / "a.jsonl", ["Nonsense."] * 8, requests)
    completions(tmp_path / "b.jsonl", ["Nonsense."] * 8, requests, finished=False)
    found = palate.ok("compare", "a.jsonl", "b.jsonl", data=data, judge="rule")
    assert (found["wins"], found["verdict"]) == (8, "better")
    expected = reviews.judge(requests[0], "Nonsense.") - reviews.judge(requests[0], "Nonsense.", finished=False)
    assert found["reward"]["after"] - found["reward"]["before"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def preference_run(tmp_path_factory, tiny):
    from palate.cli import main

    folder = tmp_path_factory.mktemp("run")
    data = write_rows(folder / "d.jsonl", pairs(8))
    argv = ["dpo", "--model", str(tiny), "--data", str(data), "--out", str(folder / "run"), "--steps", "2",
            "--batch", "4", "--beta", "0.3", "--samples", "0", "--device", "cpu", "--eval", "none"]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(argv, {}) == 0
    return folder / "run"


def test_an_implicit_reward_is_what_score_says(palate, tiny, preference_run, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(8))
    palate.ok("score", model=preference_run, reference=tiny, data=data, out="s.jsonl", beta=0.3, device="cpu")
    rows = lines(Path("s.jsonl"))
    for side in ("chosen", "rejected"):
        write_rows(tmp_path / f"{side}.jsonl", [{"prompt": r["prompt"], "completion": r[side]} for r in pairs(8)])
    judge = f"implicit:{preference_run}"
    found = palate.ok("compare", "chosen.jsonl", "rejected.jsonl", data=data, judge=judge, out="made")
    assert found["wins"] == sum(row["margin"] > 0 for row in rows)
    for side, name in (("after", "chosen"), ("before", "rejected")):
        assert found["reward"][side] == pytest.approx(sum(row[f"{name}_reward"] for row in rows) / 8, abs=1e-5)
    for row, mine in zip(rows, lines(Path("made/1-chosen.jsonl")), strict=True):
        assert mine["score"] == pytest.approx(row["chosen_reward"], abs=1e-5)


def test_a_run_judges_its_own_model_only_when_asked(palate, tiny, preference_run, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(4))
    common = {"data": data, "judge": f"implicit:{preference_run}", "max_tokens": 4, "device": "cpu"}
    for name in (preference_run, preference_run / "model"):
        palate("compare", name, tiny, **common)
        assert palate.code == 2
        assert "would judge its own model" in palate.said
        assert "--allow-self-judge" in palate.said
    assert palate.ok("compare", preference_run, tiny, allow_self_judge=True, **common)["n"] == 4


def test_a_run_whose_start_has_changed_is_no_judge(palate, tiny, other, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    start = Path(shutil.copytree(tiny, tmp_path / "start"))
    data = write_rows(tmp_path / "d.jsonl", pairs(4))
    palate.ok("dpo", model=start, data=data, out="run", steps=1, batch=4, samples=0, device="cpu", eval="none")
    write_rows(tmp_path / "a.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(4)])
    common = {"data": data, "judge": "implicit:run"}
    assert palate.ok("compare", "a.jsonl", "a.jsonl", **common)["ties"] == 4
    save_file(load_file(other / "model.safetensors"), start / "model.safetensors", metadata={"format": "pt"})
    palate("compare", "a.jsonl", "a.jsonl", **common)
    assert palate.code == 3
    assert "not those that the run began with" in palate.said
    shutil.rmtree(start)
    palate("compare", "a.jsonl", "a.jsonl", **common)
    assert palate.code == 3
    assert "is measured against it" in palate.said


# --- what is refused -------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "Say 0:", "completion": "x"}\n'


@pytest.mark.parametrize(
    "contestants, options, code, words",
    [
        (("a.jsonl",), {}, 2, ("two contestants or more, not 1", "E300")),
        ((), {}, 2, ("two contestants or more, not 0",)),
        (("a.jsonl", "d.jsonl"), {}, 3, ("d.jsonl", "no such file", "E101")),
        (("a.jsonl", "./no-model"), {}, 3, ("no-model", "E401")),
        (("a.jsonl", "b.jsonl"), {"data": "q.jsonl"}, 3, ("q.jsonl", "E101")),
        (("a.jsonl", "b.jsonl"), {"judge": "rul"}, 2, ("did you mean rule", "--judge", "E303")),
        (("a.jsonl", "b.jsonl"), {"judge": None}, 2, ("--judge is needed",)),
        (("a.jsonl", "b.jsonl"), {"data": None}, 2, ("--data is needed",)),
        (("a.jsonl", "b.jsonl"), {"judge": "rule"}, 3, ("p.jsonl:1", "the rule knows", "E235")),
        (("a.jsonl", "b.jsonl"), {"judge": "JUDGE:broken"}, 3, ("ZeroDivisionError", "'Say 0:'", "E601")),
        (("a.jsonl", "b.jsonl"), {"judge": "JUDGE:longr"}, 2, ("did you mean", "longer")),
        (("a.jsonl", "b.jsonl"), {"judge": "implicit:a.jsonl"}, 3, ("no run here",)),
        (("a.jsonl", "b.jsonl"), {"temprature": 1}, 2, ("did you mean --temperature",)),
        (("a.jsonl", "b.jsonl"), {"revision": "main"}, 2, ("no effect on local models",)),
        (("a.jsonl", "few.jsonl"), {}, 3, ("few.jsonl", "11 of 12 prompts", "'Say 1:'", "p.jsonl:2", "E236")),
        (("a.jsonl", "odd.jsonl"), {}, 3, ("odd.jsonl:2", "completion", "E203")),
        (("a.jsonl", "none.jsonl"), {}, 3, ("none.jsonl:1", "completion", "Next: mend the row")),
        (("a.jsonl", "text.jsonl"), {"bad_rows": "skip"}, 3, ("text.jsonl:1", "not JSON", "Next: mend the row")),
        (("a.jsonl", "b.jsonl"), {"out": "full"}, 2, ("full", "E313", "Next: take a new --out.")),
        (("a.jsonl", "cut.jsonl"), {}, 3, ("cut.jsonl:2", "truncated?")),
        (("a.jsonl", "ends.jsonl"), {}, 3, ("ends.jsonl:1", "finished")),
        (("a.jsonl", "empty.jsonl"), {}, 3, ("empty.jsonl", "no rows")),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(palate, three, contestants, options, code, words):
    Path("few.jsonl").write_text(GOOD)
    Path("odd.jsonl").write_text(GOOD + '{"prompt": "Say 1:", "completion": 7}\n')
    Path("none.jsonl").write_text('{"prompt": "Say 0:"}\n')
    Path("cut.jsonl").write_text(GOOD + GOOD[:20])
    Path("ends.jsonl").write_text(GOOD.replace('"x"', '"x", "finished": "yes"'))
    Path("empty.jsonl").write_text("")
    Path("text.jsonl").write_text("A review.\n")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    before = sorted(os.listdir())
    options = {"data": "p.jsonl", "judge": f"{three}:longer", "out": "made"} | options
    options["judge"] = options["judge"] and options["judge"].replace("JUDGE", three)
    palate("compare", *contestants, **options)
    assert palate.code == code, palate.said
    for word in words:
        assert word in palate.said, palate.said
    assert "Traceback" not in palate.said
    assert ". Next: " in palate.said
    assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == before


def test_a_prompt_that_cannot_be_completed_is_left_out_for_all_or_stops(palate, tiny, three, tmp_path):
    long = "word " * 400
    data = write_rows(tmp_path / "long.jsonl", [{"prompt": PROMPTS[0]}, {"prompt": long}])
    completions(tmp_path / "l.jsonl", ["a", "b"], [PROMPTS[0], long])
    common = {"data": data, "judge": "random", "max_tokens": 4, "device": "cpu"}
    palate("compare", tiny, "l.jsonl", **common)
    assert palate.code == 3
    assert "long.jsonl:2" in palate.said
    assert palate.ok("compare", tiny, "l.jsonl", bad_rows="skip", **common)["n"] == 1
    assert "left out for all" in palate.said
