"""The page of a whole road: what is in its file is on the page, and nothing else is."""

import json

from palate.report import write_report

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
    facts |= {"verdict": "better", "kl": 1.25, "reward": {"before": -1.5, "after": -0.25}}
    return {"name": name, "run": run, "commands": commands} | facts | numbers


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
