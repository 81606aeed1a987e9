"""The page of rounds: a column each, the best one marked, charts from the start on, and what was left out."""

import json

from report_kit import comparison

from palate.report import write_report


def row(number, rate, **more):
    facts = {"round": number, "pairs": 40, "trained": 40 * number, "win_rate": rate, "win_low": rate - 0.05}
    facts |= {"win_high": rate + 0.05, "win_previous": 0.5, "score": -1.0, "start_score": -2.5, "kl": 1.25, "length": 9}
    facts |= {"format_accuracy": 0.52, "format_low": 0.45, "format_high": 0.6, "compared": 200, "beta": 0.1}
    return facts | {"left_out": {"unfinished": 3 * number, "ties": 0}, "unparsed": None} | more


def folder(path, rows, **record):
    """A folder of rounds whose best one is the second."""
    (path / "rounds" / "02" / "compare").mkdir(parents=True)
    (path / "rounds.json").write_text(json.dumps({"rounds": rows, "best": 2, "judge": "rule", "ended": "all is done"}))
    for name in (path, path / "rounds" / "02"):
        run = {"id": "x", "verb": "spin", "status": "done", "argv": ["palate", "spin"]}
        run |= {"verdict": "better: round 2 wins much"} if name == path else {}
        (name / "run.json").write_text(json.dumps(run | record))
    (path / "rounds" / "02" / "report.html").write_text("")
    (path / "rounds" / "02" / "compare" / "comparison.json").write_text(json.dumps(comparison()))
    return path


def test_every_round_has_a_column_and_the_best_is_marked(tmp_path):
    rows = [row(1, 0.55), row(2, 0.61, alarms=["scores <collapse>"]), row(3, 0.5)]
    text = write_report([folder(tmp_path, rows)]).read_text(encoding="utf-8")
    assert "Round 2 wins much." in text and "All is done." in text and "that of round 2" in text
    assert "61.0%<br>" in text and ">[56.0%, 66.0%]<" in text and "on 200 prompts that nobody" in text
    assert 'href="rounds/02/report.html"' in text and 'href="rounds/01' not in text
    assert text.count("tone-better") >= 2 and "round 3" in text
    assert "Round 2: scores &lt;collapse&gt;" in text
    assert "unfinished" in text and "ties" not in text.split("Prompts without a pair")[1].split("</table>")[0]
    assert "unparsed" not in text  # no round has it
    assert text.count("<svg") == 5
    assert "before 8" in text and "after 8" in text  # what the best round writes


def test_rounds_that_are_not_over_and_rounds_nobody_compared(tmp_path):
    nothing = dict.fromkeys(("win_rate", "win_low", "win_high", "win_previous", "score", "start_score"))
    path = folder(tmp_path, [row(1, 0.5) | nothing], status="failed", verdict=None, error="the disk is full")
    (path / "rounds.json").write_text(json.dumps({"rounds": [row(1, 0.5) | nothing], "judge": None}))
    text = write_report([path]).read_text(encoding="utf-8")
    assert "did not come to their end" in text and "the disk is full" in text
    assert "Nobody compared the rounds" in text and "Before and after" not in text
    assert text.count("<svg") == 3
