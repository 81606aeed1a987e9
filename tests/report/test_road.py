"""The page of a whole road: what is in its file is on the page, and nothing else is."""

import json

from palate.report import write_report
from palate.report.road import claims

COMMANDS = ["palate dpo --model 'a b'", "palate reward", "palate ppo"]


def way(name, run, commands, **numbers):
    facts = {
        "models": 1,
        "samples": 0,
        "seconds": 61.0,
        "peak_bytes": 2**30,
        "win_rate": 0.66,
        "low": 0.6,
        "high": 0.71,
    }
    facts |= {"verdict": "better", "kl": 1.25, "reward": {"before": -1.5, "after": -0.25}, "trials": [], "tried": ""}
    return {"name": name, "run": run, "commands": commands} | facts | numbers


def trials(rates, *, worse):
    """Three seeds, then two other learning rates; worse: the last of these, shown so."""
    grid = [(0, 1, "better"), (1, 1, "better"), (2, 1, "better"), (0, 0.25, "better"), (0, 4, worse)]
    return [
        {"run": f"short/{i}", "seed": seed, "rate": 2e-4 * times, "times": times, "n": 150, "win_rate": rate}
        | {"low": rate - 0.08, "high": rate + 0.08, "verdict": verdict}
        for i, ((seed, times, verdict), rate) in enumerate(zip(grid, rates, strict=True))
    ]


def road_folder(path):
    """Two ways that wrote different words for the same five prompts."""
    numbers = {"models": 4, "samples": 1536, "low": 0.45, "verdict": "not shown to be different"}
    ways = [way("DPO", "dpo", COMMANDS[:1]), way("reward model + PPO", "ppo", COMMANDS[1:], **numbers)]
    path.mkdir()
    (path / "road.json").write_text(
        json.dumps({"argv": ["palate", "demo"], "commands": COMMANDS, "ways": ways, "seconds": 400})
    )
    for run in ("dpo", "ppo"):
        (path / run / "compare").mkdir(parents=True)
        rows = [
            {
                "prompt": f"ask {i}",
                "before": f"old {i}",
                "after": f"{run} <{i}>",
                "score_before": 0.0,
                "score_after": float(i),
            }
            for i in (range(5) if run == "dpo" else reversed(range(5)))
        ]
        (path / run / "compare" / "comparison.json").write_text(json.dumps({"examples": rows}))
    return path


def test_both_ways_stand_side_by_side(tmp_path):
    out = write_report([road_folder(tmp_path / "r")])
    text = out.read_text(encoding="utf-8")
    assert out == tmp_path / "r" / "report.html"
    for said in (
        "66.0% [60.0%, 71.0%]",
        "66.0% [45.0%, 71.0%]",
        "-1.50 → -0.25",
        "1,536",
        "1.0 GB",
        "1 min 01 s",
        "6 min 40 s",
    ):
        assert said in text, said
    for command in COMMANDS:
        assert command.replace("'", "&#39;") in text
    shown = [i for i in range(5) if f"ask {i}" in text]
    assert shown == [1, 2, 3, 4]
    for i in shown:  # the same prompt's texts, though the files are in another order
        card = text[text.index(f"ask {i}") :].split("</article>")[0]
        assert f"old {i}" in card and f"dpo &lt;{i}&gt;" in card and f"ppo &lt;{i}&gt;" in card


def test_a_road_that_was_not_gone_to_its_end_says_so(tmp_path):
    (tmp_path / "road.json").write_text(json.dumps({"argv": [], "ways": []}))
    assert "not gone to its end" in write_report([tmp_path]).read_text(encoding="utf-8")


def test_short_runs_say_how_far_seeds_spread_and_how_many_learning_rates_improve(tmp_path):
    """Over seeds at the way's own rate, sample deviation; over rates on the first seed, which stands in both."""
    one = way("DPO", "dpo", COMMANDS[:1], trials=trials([0.6, 0.7, 0.62, 0.58, 0.2], worse="worse"), tried="16 steps")
    said = dict(claims(one))
    assert said["Wins of short runs"] == "64.0% (sd 5.3 points), 3 seeds"  # 0.6, 0.7, 0.62
    assert said["Learning rates shown to improve"] == "2 of 3, 1 worse"  # 1, 1/4 and not 4 times
    assert dict(claims(way("SPIN", "spin", [])))["Learning rates shown to improve"] == "not tried"
    path = road_folder(tmp_path / "r")
    record = json.loads((path / "road.json").read_text())
    record["ways"][0] |= {"trials": one["trials"], "tried": "16 steps"}
    (path / "road.json").write_text(json.dumps(record))
    text = write_report([path]).read_text(encoding="utf-8")
    for said in ("64.0% (sd 5.3 points)", "2 of 3, 1 worse", "not tried", "0.0008", "20.0% [12.0%, 28.0%]", "on 150"):
        assert said in text, said
    assert "16 steps for DPO, with" in text and "5, 16 steps each" in text
