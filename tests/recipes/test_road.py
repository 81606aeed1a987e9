"""`palate demo --full`: the whole road, short, as a user goes it."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from palate import cli
from palate.builtin import model_folder
from palate.files import read_json
from palate.recipes import road
from palate.recipes.demo import DATA, DemoConfig, Pace, Teller, clear, comparison


class Told(Teller):
    """Keeps what is said, and the config of every command."""

    def __init__(self):
        self.lines, self.configs = [], []
        super().__init__(self.lines.append, minutes=1)

    def run(self, verb, recipe, config_type, options, **more):
        self.configs.append(config_type(**options))
        return super().run(verb, recipe, config_type, options, **more)


def typed(command, monkeypatch):
    """The config that a shell command comes to; nothing is run."""
    found, load = [], cli.Verb.load
    with monkeypatch.context() as patched:
        patched.setattr(cli.Verb, "load", lambda verb, inner: (load(verb, inner)[0], lambda c, **_: found.append(c)))
        assert cli._command(shlex.split(command)[1:], {}) == ({"out": found[0].out}, False)
    return found[0]


@pytest.mark.slow
def test_short_runs_differ_in_seed_or_rate_and_are_compared_with_the_start(tmp_path, monkeypatch):
    """Real runs, very short: their configs are the grid, and their win rates what one comparison by itself says."""
    for name, value in {"SEEDS": 2, "TIMES": (1, 4), "TRIED": 8, "SHORT": {"dpo": (1, 1), "ppo": (1, 1)}}.items():
        monkeypatch.setattr(road, name, value)
    told = Told()
    walker = road.Walker(DemoConfig(out=str(tmp_path), seed=5), told, None)
    shutil.copytree(model_folder("tiny"), tmp_path / "sft")
    common = {"model": walker.at("sft"), "data": DATA, "eval": "none"}
    dpo = common | {"batch": 64, "beta": 0.5, "lr": 2e-4}
    ppo = common | {"reward": "rule", "batch": 128, "passes": 1, "max_tokens": 32, "lr": 3e-4}
    pace = Pace(step=0.01, scored=0.0001, sampled=0.0001, token=1e-6)
    assert road.trials(walker, pace, 1.0, {"dpo": dpo, "ppo": ppo}) == {} and not (tmp_path / "short").exists()
    assert "is tried: that takes --minutes" in told.lines[-1]
    found = road.trials(walker, pace, 60.0, {"dpo": dpo, "ppo": ppo})
    assert [(one["tried"], len(one["trials"])) for one in found.values()] == [("1 steps", 3), ("1 rollouts", 3)]
    for verb, whole in (("dpo", dpo), ("ppo", ppo)):
        grid = [(one.seed, one.times, one.rate) for one in found[verb]["trials"]]
        assert grid == [(5, 1, whole["lr"]), (6, 1, whole["lr"]), (5, 4, 4 * whole["lr"])]
        weights = set()
        for one in found[verb]["trials"]:
            config = yaml.safe_load((tmp_path / one.run / "config.yaml").read_text())
            grid = {"seed": one.seed, "lr": one.rate, "steps": 1, "batch": whole["batch"] // 2}
            assert {key: config[key] for key in grid} == grid
            weights.add((tmp_path / one.run / "model" / "model.safetensors").read_bytes())
        assert len(weights) == 3
    one = found["ppo"]["trials"][2]
    options = comparison(walker.at(one.run), walker.at("sft"), 5) | {"data": "builtin:prompts[:8]"}
    alone = walker.go("compare", options, operands=("contestants",)).found
    assert all(getattr(one, key) == alone[key] for key in ("n", "win_rate", "low", "high", "verdict")) and one.n == 8
    assert [typed(command, monkeypatch) for command in told.commands] == told.configs and len(told.configs) == 8


def test_all_but_the_rounds_is_planned_into_eight_of_fifteen_minutes():
    planned = {"ppo": road.SHARES["dpo"], **road.SHARES}
    rounds = planned.pop("spin") + planned.pop("self-reward")
    assert sum(planned.values()) <= 8 / 15 and rounds <= 7 / 15


@pytest.mark.slow
def test_the_whole_road_in_little_time(tmp_path):
    """A minute teaches little; every stage is there, with its command, its numbers and the page."""
    line = [sys.executable, "-c", "import sys; from palate.cli import main; sys.exit(main(sys.argv[1:]))"]
    words = ["demo", "--full", "--minutes", "1.2", "--json"]
    made = subprocess.run([*line, *words], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=900)
    assert made.returncode in (0, 4), made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    out = tmp_path / "runs" / "demo"
    assert (found["verb"], found["exit_code"], found["better"]) == ("demo", made.returncode, made.returncode == 0)
    dpo, ppo, spin, judged = found["ways"]
    assert (dpo["name"], dpo["models"], dpo["samples"], len(dpo["commands"])) == ("DPO", 1, 0, 1)
    assert (ppo["models"], len(ppo["commands"])) == (4, 2) and ppo["samples"] > 256
    assert all(one["peak_bytes"] > 2**28 and not one["trials"] for one in found["ways"])
    assert "no other seed or learning rate is tried: that takes --minutes" in made.stderr  # and the table says so
    assert found["better"] == (dpo["low"] > 0.5)
    for one, samples in ((spin, 64), (judged, 64 * 8)):  # little time, few prompts
        rows = read_json(out / one["run"] / "rounds.json")["rounds"]
        assert [row["round"] for row in rows] in ([1], [1, 2])  # a round without a gain, or without pairs, is the last
        assert one["samples"] == samples * len(rows)
        assert one is judged or all(row["pairs"] for row in rows)
    verbs = [command.split()[1] for command in found["commands"][1:]]
    assert verbs == ["pretrain", "sft", "dpo", "reward", "ppo", "spin", "self-reward", *["compare"] * 4, "report"]
    base, tuned = (read_json(out / name / "run.json")["result"] for name in ("base", "sft"))
    assert base["after"]["eval/loss"] < base["before"]["eval/loss"] - 2
    assert tuned["after"]["eval/loss"] < tuned["before"]["eval/loss"]
    assert read_json(out / "road.json")["ways"] == found["ways"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("not tried") == 3 * 4  # short runs, their wins, the learning rates: of every way
    assert f"{dpo['low']:.1%}" in page and f"{ppo['high']:.1%}" in page
    clear(out)  # a later demo may take its place
    assert not out.exists()
