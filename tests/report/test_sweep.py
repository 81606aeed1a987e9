"""The page of a sweep: every cell, the best one first, and what it was chosen on."""

import json

from palate.report import write_report


def cell(name, steps, metric, state="done", **more):
    rest = {
        "options": {"beta": 0.1, "train.warmup_steps": 3},
        "low": metric - 0.05,
        "high": metric + 0.05,
        "margin": 0.5,
    }
    rest |= {"loss": 0.6, "seconds": 12.0, "path": f"cells/{name}", "curve": [[0, 0.0], [3, metric]]}
    return {"name": name, "steps": steps, "metric": metric, "state": state} | rest | more


def test_the_best_cell_stands_first_and_a_failed_one_last(tmp_path):
    cells = [
        cell("a<b", 3, 0.62, "stopped"),
        cell("lost", 1, 0.9, "failed") | {"metric": None, "low": None},
        cell("won", 9, 0.71),
    ]
    record = {"verb": "dpo", "metric": "eval/rewards/accuracies", "lower_is_better": False, "full": False, "eta": 3}
    record |= {"rungs": [3, 9], "cells": cells, "best": "won", "compute_share": 0.31}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    (tmp_path / "cells" / "won").mkdir(parents=True)
    (tmp_path / "cells" / "won" / "report.html").write_text("")
    text = write_report([tmp_path]).read_text(encoding="utf-8")
    assert "--beta 0.1 --train.warmup-steps 3" in text and "71.0% [66.0%, 76.0%]" in text and "31.0%" in text
    assert "Its held-out accuracy is" in text and "halving at 3 and 9 steps" in text
    rows = [text.index(f"<bdi>{name}</bdi>") for name in ("won", "a&lt;b", "lost")]
    assert rows == sorted(rows)
    assert 'href="cells/won/report.html"' in text and 'href="cells/lost' not in text
    assert text.count("<svg") == 1

    (tmp_path / "sweep.json").write_text(json.dumps(record | {"best": None}))
    assert "did not come to its end" in write_report([tmp_path]).read_text(encoding="utf-8")
