"""The demo: from nothing to a better model and its evidence, anywhere, within its minutes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palate import builtin
from palate.errors import MachineError, UsageError
from palate.evaluation.statistics import wilson
from palate.files import Lock
from palate.recipes.demo import FEWEST, MADE, MOST, DemoConfig, Pace, clear, command_of, examples

HAS_MODELS = builtin.model_folder("tiny").is_dir()


ALONE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise PermissionError(f"{event} {args}: there is no network")

sys.addaudithook(refuse)
from palate.cli import main
sys.exit(main(sys.argv[1:]))
"""


def demo(folder: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess:
    """`palate demo --json ...` in a process of its own, in a folder, under an environment of its own.

    It has 4 GB of addresses, no network and no terminal.
    """
    return subprocess.run(
        [sys.executable, "-c", ALONE, "demo", "--json", *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=500,
    )


@pytest.mark.slow
def test_the_demo_ends_better_anywhere(tmp_path):
    """A path with spaces and umlauts, a home where nothing can be written, no terminal, no network, 4 GB."""
    folder, home = tmp_path / "Über uns hier", tmp_path / "home"
    folder.mkdir()
    home.write_text("no folder, so that not even root can write below it")
    made = demo(folder, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), PALATE_CACHE="", HF_HUB_OFFLINE="1")
    assert made.returncode == 0, made.stderr
    assert "Traceback" not in made.stderr and "Warning" not in made.stderr
    assert re.search(r" 2 plan .* steps of 64 pairs · peak about \d\S* [MG]B · .* in all · ", made.stderr)
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["verdict"] == "better" and found["better"]
    assert found["seconds"] < 400  # under 180 where no other tests share the cores
    share = wilson(found["wins"] + found["ties"] / 2, found["n"])
    assert (found["n"], found["low"], found["high"]) == (300, pytest.approx(share.low), pytest.approx(share.high))
    assert found["low"] > 0.5 and found["kl"] > 0 and found["reward"]["after"] > found["reward"]["before"]
    out = folder / "runs" / "demo"
    assert f"{found['win_rate']:.1%}" in (out / "report.html").read_text(encoding="utf-8")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "How was the hotel in Alden?"}], tokenize=True,
                                        add_generation_prompt=True, return_tensors="pt", return_dict=True)  # fmt: skip
    assert model.generate(**ids, max_new_tokens=4).shape[1] == ids["input_ids"].shape[1] + 4
    assert {path.name for path in out.iterdir()} <= MADE


@pytest.mark.slow
def test_too_little_time_is_no_better_model_and_says_so(tmp_path):
    """One step at almost no rate is what a demo without time comes to: exit 4, with everything in place."""
    code = "from palate.recipes import demo; demo.FEWEST = 1; demo.RATE = 1e-9; from palate.cli import main; "
    line = [sys.executable, "-c", code + "import sys; sys.exit(main(sys.argv[1:]))"]
    made = subprocess.run([*line, "demo", "--minutes", "0.01", "--json"], cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(made.stdout.splitlines()[-1])
    assert (made.returncode, found["exit_code"], found["status"], found["steps"]) == (4, 4, "not better", 1)
    assert found["low"] <= 0.5 and (tmp_path / "runs" / "demo" / "report.html").exists()


def test_the_clock_decides_the_steps():
    pace = Pace(step=1.8, scored=0.001, sampled=0.01, token=0.0004)
    taken = [pace.steps(seconds) for seconds in (1, 60, 100, 150, 100_000)]
    assert taken == sorted(taken) and taken[0] == FEWEST and taken[-1] == MOST
    assert FEWEST < taken[3] < MOST
    assert 150 * 0.75 - 1.8 < pace.taken(taken[3]) <= 150 * 0.75  # what is planned fits, a step more would not


def test_a_command_is_what_a_shell_would_run():
    options = {"model": "a b", "train": {"tokens": 5}, "max_tokens": 3, "runs": ["x", "y"]}
    line = command_of("report", options, ("runs",))
    assert line == "palate report x y --model 'a b' --train.tokens 5 --max-tokens 3"
    assert command_of("dpo", {"report": False, "dry_run": True}) == "palate dpo --no-report --dry-run"


def test_only_what_a_demo_made_is_replaced(tmp_path):
    clear(tmp_path / "nothing there")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"id": "x", "verb": "dpo", "argv": ["palate", "dpo"]}))
    for folder in (mine, other, mine / "thesis.txt"):
        with pytest.raises(UsageError, match=r"no demo made.*E313"):
            clear(folder)
        assert folder.exists()
    made = tmp_path / "made"
    made.mkdir()
    (made / "run.json").write_text(json.dumps({"id": "x", "verb": "dpo", "argv": ["palate", "demo", "--seed", "1"]}))
    clear(made)
    assert not made.exists()


def test_nothing_of_the_users_goes_with_an_earlier_demo(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text("mine: 1")  # no demo began here: there is no lock
    made = tmp_path / "made"
    (made / "model").mkdir(parents=True)
    (made / "run.json").write_text(json.dumps({"id": "x", "verb": "dpo", "argv": ["palate", "demo"]}))
    (made / "notes.txt").write_text("which of the completions I liked")
    for folder in (project, made):
        with pytest.raises(UsageError, match=r"no demo made.*E313"):
            clear(folder)
    assert (project / "config.yaml").exists() and (made / "notes.txt").exists() and (made / "model").exists()
    (project / "config.yaml").unlink()
    monkeypatch.chdir(project)
    clear(Path("."))  # an empty folder is what a run may begin in
    assert project.is_dir()


def test_a_demo_that_is_still_at_work_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"id": "x", "verb": "dpo", "argv": ["palate", "demo"]}))
    with Lock(tmp_path / ".lock"), pytest.raises(MachineError, match="in use"):
        clear(tmp_path)
    assert (tmp_path / "run.json").exists()
    clear(tmp_path)
    assert not tmp_path.exists()


def test_examples_are_a_quarter_half_and_three_quarters_up(tmp_path):
    (tmp_path / "compare").mkdir()
    rows = [{"before": f"b{i}", "after": f"a{i}", "score_before": 0, "score_after": gain}
            for i, gain in enumerate((3, -1, 0, 2, 1, 4, -2, 5))]  # fmt: skip
    (tmp_path / "compare" / "comparison.json").write_text(json.dumps({"examples": rows}))
    assert examples(tmp_path) == [("b2", "a2"), ("b3", "a3"), ("b5", "a5")]


def test_minutes_are_positive():
    with pytest.raises(ValueError, match="minutes"):
        DemoConfig(minutes=0)
