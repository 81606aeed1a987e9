"""The page of a frontier: the picture as it was drawn, a row a method, and what failed."""

import json

from palate.report import write_report


def test_the_picture_and_a_row_a_method(tmp_path):
    spread = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rows = [
        {"method": "exact", "seeds": 2, "runs": 0, "reward": {"0.5": spread}, "hull": spread, "seconds": None,
         "samples": None},
        {"method": "dpo", "seeds": 2, "runs": 4, "reward": {"0.5": spread | {"mean": 0.25}}, "hull": spread,
         "seconds": 61.0, "samples": 12288},
    ]  # fmt: skip
    points = [{"method": "sft", "setting": "", "seed": seed, "kl": 0.0, "reward": 0.1} for seed in (0, 1)]
    (tmp_path / "frontier.json").write_text(json.dumps({"world": "enumerable", "seeds": [0, 1], "points": points}))
    (tmp_path / "frontier.svg").write_text('<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg id="drawn"></svg>')
    result = {"verdict": "the most reward: dpo", "table": rows, "failed": {"ppo,kl=1": "no <memory>"}}
    (tmp_path / "run.json").write_text(json.dumps({"result": result}))
    text = write_report([tmp_path]).read_text(encoding="utf-8")
    assert '<svg id="drawn"></svg>' in text and "<!DOCTYPE svg>" not in text and "<?xml" not in text
    assert "The most reward: dpo." in text and "2 points, 2 seeds" in text and "KL 0.5" in text
    assert "0.250 [0.400, 0.600]" in text and "12,288" in text and "1 min 01 s" in text
    assert "ppo,kl=1: no &lt;memory&gt;" in text

    (tmp_path / "run.json").unlink()
    (tmp_path / "frontier.svg").unlink()
    assert "did not come to its end" in write_report([tmp_path]).read_text(encoding="utf-8")
