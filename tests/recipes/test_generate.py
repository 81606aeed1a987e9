"""`palate generate --best-of`: the best of the very draws that --samples writes, by any judge of one completion."""

import math
from pathlib import Path

import pytest
from runs_kit import chats, lines, write_rows

HOW = dict(max_tokens=6, device="cpu", seed=3)
JUDGES = """
def late(prompt, completion, finished):
    return (len(completion) + len(prompt)) * (1 if finished else -1)

def even(prompt, completion):
    return 0

def longer(prompt, first, second):
    return 0.5
"""


@pytest.fixture
def judges(palate, tmp_path):
    """The name of a module of judges in the working directory, and a file of two prompts."""
    name = f"judges_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(JUDGES)
    write_rows(tmp_path / "p.jsonl", [{"prompt": "Say 1:"}, {"prompt": "Say blue:"}])
    return name


def test_the_best_of_the_draws_that_samples_would_write(palate, tiny, judges):
    how = dict(model=tiny, data="p.jsonl") | HOW | {"max_tokens": 120}
    plain = palate.ok("generate", out="plain", samples=8, **how)
    assert {"judge", "best_of", "score"}.isdisjoint(plain)
    drawn = lines(Path("plain"))
    scored = palate.ok("generate", out="scored", samples=8, judge=f"{judges}:late", **how)
    assert [{k: v for k, v in row.items() if k != "score"} for row in lines(Path("scored"))] == drawn
    told = [(len(r["completion"]) + len(r["prompt"])) * (1 if r["finished"] else -1) for r in drawn]
    assert [row["score"] for row in lines(Path("scored"))] == told
    assert {row["finished"] for row in drawn} == {True, False}  # which the judge is told
    assert (scored["best_of"], scored["kl_bound"]) == (1, 0) and scored["score"] == sum(told) / 16
    for n in (2, 4, 8):
        found = palate.ok("generate", out=f"best{n}", samples=8 // n, best_of=n, judge=f"{judges}:late", **how)
        kept = lines(Path(f"best{n}"))
        places = [at + max(range(n), key=lambda k: told[at + k]) for at in range(0, 16, n)]
        assert kept == [drawn[place] | {"score": told[place]} for place in places]
        assert found["completions"] == 16 // n
        assert found["score"] == pytest.approx(sum(told[place] for place in places) * n / 16)
        assert found["score_drawn"] == pytest.approx(scored["score"])
        assert found["kl_bound"] == pytest.approx(math.log(n) - (n - 1) / n)
    palate.ok("generate", out="even", best_of=4, judge=f"{judges}:even", **how)
    assert [row["sample"] for row in lines(Path("even"))] == [0, 0]


def test_by_a_reward_model_and_by_an_implicit_reward(palate, chatty, tmp_path):
    from palate.sampling.judge import Completion, open_judge

    data = write_rows(tmp_path / "data.jsonl", chats(16))
    small = dict(model=chatty, data=data, steps=2, batch=8, device="cpu", lr=1e-2, eval="none")
    palate.ok("reward", out="reward", normalise=8, **small)
    palate.ok("dpo", out="dpo", **small)
    how = dict(model=chatty, data=data, **HOW)
    palate.ok("generate", out="drawn", samples=3, **how)
    drawn = lines(Path("drawn"))
    from palate.data.sources import read_prompts

    prompts = [record.prompt for record in read_prompts(data) for _ in range(3)]
    for judge in ("reward", "reward/model", "implicit:dpo"):
        out = judge.replace("/", "-").replace(":", "-") + ".jsonl"
        palate.ok("generate", out=out, best_of=3, judge=judge, **how)
        seen = [Completion(row["completion"], row["finished"]) for row in drawn]
        scores = open_judge(judge, device="cpu").scores(prompts, seen)
        places = [at + max(range(3), key=lambda k: scores[at + k]) for at in range(0, len(drawn), 3)]
        kept = lines(Path(out))
        assert [row["score"] for row in kept] == pytest.approx([scores[place] for place in places], abs=1e-5)
        assert [row["completion"] for row in kept] == [drawn[place]["completion"] for place in places]
        assert len({row["sample"] for row in kept}) > 1


@pytest.mark.parametrize(
    "options, code, said",
    [
        ({"best_of": 2}, 2, "--judge"),
        ({"best_of": 2, "judge": "rule", "temperature": 0}, 2, "--temperature 0"),
        ({"best_of": 0, "judge": "rule"}, 2, "--best-of"),
        ({"best_of": 2, "judge": "JUDGES:longer"}, 2, "compares two completions"),
        ({"best_of": 2, "judge": "JUDGES:none"}, 2, "has no function"),
        ({"best_of": 2, "judge": "rules"}, 2, "did you mean rule"),
        ({"best_of": 2, "judge": "rule"}, 3, "p.jsonl:1"),  # prompts that are none of its world
    ],
)
def test_what_cannot_score_is_refused_before_a_model_is_loaded(palate, judges, options, code, said):
    options = {key: value.replace("JUDGES", judges) if key == "judge" else value for key, value in options.items()}
    palate("generate", model="no-model", data="p.jsonl", out="out", **HOW, **options)
    assert palate.code == code and said in palate.said, palate.said
    assert "Next:" in palate.said and not Path("out").exists()


def test_the_rule_raises_the_true_reward(palate):
    """The built-in world: the mean of the best of four lies above that of all draws, and both are in the summary."""
    found = palate.ok(
        *("generate",), model="builtin:tiny", data="builtin:prompts[:6]", best_of=4, judge="rule", out="o.jsonl",
        device="cpu",
    )  # fmt: skip
    rows = lines(Path("o.jsonl"))
    assert len(rows) == 6 and found["score"] == pytest.approx(sum(row["score"] for row in rows) / 6)
    assert found["score"] > found["score_drawn"]
