"""`palate demo --full`: the whole road, short, as a user goes it."""

import json
import subprocess
import sys

import pytest

from palate.files import read_json
from palate.recipes.demo import clear


@pytest.mark.slow
def test_the_whole_road_in_little_time(tmp_path):
    """A minute teaches little; every stage is there, with its command, its numbers and the page."""
    line = [sys.executable, "-c", "import sys; from palate.cli import main; sys.exit(main(sys.argv[1:]))"]
    words = ["demo", "--full", "--minutes", "1.2", "--json"]
    made = subprocess.run([*line, *words], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=500)
    assert made.returncode in (0, 4), made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    out = tmp_path / "runs" / "demo"
    assert (found["verb"], found["exit_code"], found["better"]) == ("demo", made.returncode, made.returncode == 0)
    dpo, ppo, spin, judged = found["ways"]
    assert (dpo["name"], dpo["models"], dpo["samples"], len(dpo["commands"])) == ("DPO", 1, 0, 1)
    assert (ppo["models"], len(ppo["commands"])) == (4, 2) and ppo["samples"] > 256
    assert found["better"] == (dpo["low"] > 0.5)
    assert spin["samples"] == 2 * 64 and judged["samples"] in (64 * 8, 2 * 64 * 8)  # little time, few prompts
    tables = [read_json(out / one["run"] / "rounds.json")["rounds"] for one in (spin, judged)]
    assert [row["round"] for row in tables[0]] == [1, 2] and all(row["pairs"] for row in tables[0])
    assert judged["samples"] == 64 * 8 * len(tables[1])  # it stops where its judgements give no pairs
    verbs = [command.split()[1] for command in found["commands"][1:]]
    assert verbs == ["pretrain", "sft", "dpo", "reward", "ppo", "spin", "self-reward", *["compare"] * 4, "report"]
    base, tuned = (read_json(out / name / "run.json")["result"] for name in ("base", "sft"))
    assert base["after"]["eval/loss"] < base["before"]["eval/loss"] - 2
    assert tuned["after"]["eval/loss"] < tuned["before"]["eval/loss"]
    assert read_json(out / "road.json")["ways"] == found["ways"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{dpo['low']:.1%}" in page and f"{ppo['high']:.1%}" in page
    clear(out)  # a later demo may take its place
    assert not out.exists()
