"""The page of a frontier: the picture as it was drawn, a row a method, and what failed."""

import json
import re

from palate.report import write_report


def test_the_picture_and_a_row_a_method(tmp_path):
    spread = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rows = [
        {"method": "exact", "seeds": 2, "runs": 0, "reward": {"0.5": spread}, "hull": spread, "seconds": None,
         "samples": None},
        {"method": "dpo", "seeds": 2, "runs": 4, "reward": {"0.5": spread | {"mean": 0.25}}, "hull": spread,
         "seconds": 61.0, "samples": 12288},
    ]  # fmt: skip
    points = [{"method": "sft", "setting": "", "seed": seed, "kl": 0.0, "reward": 0.1, "seconds": 0, "samples": 0}
              for seed in (0, 1)]  # fmt: skip
    for seed in (0, 1):
        for step in (1, 2):
            points.append(points[seed] | {"method": "ppo_true", "setting": "target_kl=2", "kl": seed + step / 4,
                                          "reward": step, "seconds": 30.0 * step, "samples": 64 * step})  # fmt: skip
    found = {"world": "enumerable", "seeds": [0, 1], "points": points, "exact": [{"seed": 0, "curve": []}]}
    (tmp_path / "frontier.json").write_text(json.dumps(found))
    (tmp_path / "frontier.svg").write_text('<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg id="drawn"></svg>')
    record = {"id": "x", "verb": "frontier", "argv": ["palate", "frontier", "--world", "enumerable"], "status": "done"}
    result = {
        "verdict": "the most reward within KL 0.5: DPO (0.250)",
        "table": rows,
        "failed": {"ppo,kl=1": "no <memory>"},
    }
    (tmp_path / "run.json").write_text(json.dumps(record | {"result": result}))
    (tmp_path / "config.yaml").write_text("world: enumerable\nbetas: [0.1, 0.5]\n")
    text = write_report([tmp_path]).read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]*>", "|", text)
    assert '<svg id="drawn"></svg>' in text and "<!DOCTYPE svg>" not in text and "<?xml" not in text
    assert "The most reward within KL 0.5: DPO (0.250)." in text and "6 points, 2 seeds" in text and "KL 0.5" in text
    assert "0.250||0.400 to 0.600" in plain.replace("||||", "||") and "12,288" in text and "1 min 01 s" in text
    assert "|exact frontier|" in plain and "|DPO|" in plain and "Dashed: the most" in text
    row = plain[plain.index("PPO, true reward, aiming at KL 2") :]
    for said in ("1.000", "0.500 to 1.500", "2.000", "1 min 00 s", "|128|"):  # the last points alone
        assert said in row, said
    assert "ppo,kl=1: no &lt;memory&gt;" in text
    assert "palate frontier --world enumerable" in text and "[0.1, 0.5]" in text

    (tmp_path / "run.json").unlink()
    (tmp_path / "frontier.svg").unlink()
    assert "did not come to its end" in write_report([tmp_path]).read_text(encoding="utf-8")
