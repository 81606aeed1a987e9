"""Sweeps: the grid and what it refuses, what halving costs, cells that end as runs that never paused, kills."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs_kit import demonstrations, feedbacks, flags, metrics, pairs, tree, write_rows

from palate.recipes.grid import cells_of
from palate.recipes.standings import Cell, ranking
from palate.recipes.sweep import DpoSweep, cost, rungs, survivors

SMALL = dict(batch=4, steps=9, device="cpu", samples=1, retain_samples=2)
GRID = ["--grid", "lr=1e-5,1e-3,3e-3,1e12"]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    rows = list(pairs(32))
    return {"data": write_rows(tmp_path / "d.jsonl", rows[:24]), "eval": write_rows(tmp_path / "e.jsonl", rows[24:])}


def table(run: str = "s") -> dict:
    """sweep.json without times."""
    found = json.loads(Path(run, "sweep.json").read_text())
    for cell in found["cells"]:
        del cell["seconds"]
    return found


# what halving costs


@pytest.mark.parametrize("eta", [2, 3, 4])
@pytest.mark.parametrize("cells", [4, 5, 6, 9, 12, 27, 100])
@pytest.mark.parametrize("steps", [60, 90, 177, 1000])
def test_four_cells_and_more_cost_at_most_a_third(steps, cells, eta):
    found = rungs(steps, cells, eta)
    assert found[-1] == steps
    assert [found[0] * eta**i for i in range(len(found) - 1)] == found[:-1]
    assert found == sorted(set(found))
    assert cost(found, cells, eta) <= cells * steps / 3
    for count in range(1, len(found) + 2):  # no plan begins later
        first = found[0] + 1
        later = [first * eta**i for i in range(count)] + [steps]
        assert later[-2] >= steps or cost(later, cells, eta) > cells * steps / 3


def test_rungs_by_hand():
    assert rungs(90, 12, 3) == [15, 45, 90]  # 17 * 15 + 90 <= 360, and 17 * 16 + 90 is more
    assert cost([15, 45, 90], 12, 3) == 12 * 15 + 4 * 30 + 1 * 45
    assert rungs(90, 5, 3) == [15, 90]
    assert rungs(1, 12, 3) == [1]
    assert cost([10, 30, 90], 12, 3) == 12 * 10 + 4 * 20 + 1 * 60
    assert [survivors(12, 3, rung) for rung in range(3)] == [12, 4, 1]
    assert rungs(90, 1, 3) == [90]
    assert rungs(2, 5, 3) == [2]  # nothing to halve
    assert rungs(90, 2, 3) == [30, 90]  # no halving of two cells costs a third


def standing(name, accuracy, margin, loss, count=10_000, **options):
    line = {"eval/rewards/accuracies": accuracy, "eval/rewards/margins": margin, "eval/loss": loss, "eval/count": count}
    return Cell(name, options, None, line=line)


def names(cells, key="eval/rewards/accuracies"):
    return "".join(cell.name for cell in ranking(cells, key))


def test_ties_are_broken_by_margin_then_loss_then_order():
    cells = [standing("a", 0.5, 9, 0), standing("b", 0.9, 9, 5), standing("c", 0.7, 1, 2), standing("d", 0.7, 2, 2),
             standing("e", 0.7, 2, 1), standing("f", 0.7, 2, 1), standing("g", None, 9, 0)]  # fmt: skip
    assert names(cells) == "befdcag"
    assert names(cells, "eval/loss")[:2] == "ag"
    assert ranking([], "eval/loss") == []


def test_cells_within_a_standard_error_are_in_the_order_of_their_loss():
    error = (0.7 * 0.3 / 300) ** 0.5  # 2.6 points
    cells = [standing("a", 0.7, 1, 0.66, 300), standing("b", 0.7 - error + 1e-9, 1, 0.60, 300),
             standing("c", 0.69, 1, 0.64, 300), standing("d", 0.7 - error - 1e-9, 9, 0.10, 300)]  # fmt: skip
    assert names(cells) == "bcad"
    for cell in cells:  # other losses are no common measure
        cell.options = {"loss": "ipo"}
    assert names(cells) == "acbd"


# the grid


def grid(**options):
    return DpoSweep(model="m", data="d", **options)


def test_cells_are_all_combinations_in_order():
    found = cells_of(grid(grid={"beta": [0.1, 0.3], "train.warmup-steps": [2, 5]}, train={"clip_norm": 1.0}, batch=8))
    assert [cell.name for cell in found] == [
        f"beta={beta},warmup_steps={steps}" for beta in (0.1, 0.3) for steps in (2, 5)
    ]
    for cell in found:
        assert (cell.config.batch, cell.config.train.clip_norm) == (8, 1.0)
    assert [(cell.config.beta, cell.config.train.warmup_steps) for cell in found] == [
        (0.1, 2), (0.1, 5), (0.3, 2), (0.3, 5),
    ]  # fmt: skip
    assert found[1].options == {"beta": 0.1, "train.warmup_steps": 5}


def test_names_are_folders_whatever_the_values_are():
    found = cells_of(grid(grid={"reference": ["a/b c", "a:b c", "../x"], "lr": ["auto", 1e-5]}))
    folders = [cell.name for cell in found]
    assert len(set(folders)) == 6
    assert not [name for name in folders if set(name) & set('/\\:*?"<>| ')]


REFUSED = [
    ("--grid betta=0.1", "E301", "did you mean beta"),
    ("--grid warmup_steps=1", "E301", "did you mean train.warmup_steps"),
    ("--grid out=a,b", "E301", "no such option"),
    ("--grid eval=a,b", "E301", "no such option"),
    ("--grid model=a,b", "E301", "no such option"),
    ("--grid resume=true", "E301", "no such option"),
    ("--grid beta=", "E317", "has no values"),
    ("--grid beta", "E303", "NAME=VALUE"),
    ("", "E317", "--grid is needed"),
    ("--grid beta=0.1,0.10", "E302", "twice"),
    ("--grid beta=0.1 --grid beta=0.2", "E302", "twice"),
    ("--grid train.warmup-steps=1 --grid train.warmup_steps=2", "E302", "twice"),
    ("--grid lr=0.1,-1", "E307", "greater than 0"),
    ("--grid lr=fast", "E307", "fast"),
    ("--grid batch=1.5", "E307", "integer"),
    ("--grid beta=0.1,-1", "E307", "cell beta=-1"),
    ("--grid loss=dpo,dppo", "E303", 'no loss "dppo"'),
    ("--grid loss=dpo,kto", "E308", "palate kto"),
    ("--grid loss=dpo,ipo --beta 0.1", "E301", "cell loss=ipo"),
    ("--grid beta=0.1 --beta 0.1", "E308", "beside the grid"),
    ("--grid train.clip-norm=1 --train.clip-norm 2", "E308", "beside the grid"),
    ("--grid lora-alpha=1,2", "E316", "--lora-rank"),
    ("--grid beta=0.1 --metric eval/los", "E307", "did you mean eval/loss"),
    ("--grid beta=0.1 --metric=-eval/rewards/margins", "E307", "ranks no cells"),
    ("--grid beta=0.1 --eval none", "E316", "held-out"),
    ("--grid beta=0.1 --eta 1", "E307", "eta"),
    ("--grid beta=0.1,0.2,0.3,0.4 --eval-every 2 --steps 9", "E308", "leave it out"),
    ("--grid max_length=100,1000000", "E308", "beyond the model's context"),
    ("--grid beta=" + ",".join(str(n / 2000) for n in range(1, 1500)), "E307", "1,499 cells"),
]


@pytest.mark.parametrize("words, code, says", REFUSED, ids=[words[:50] for words, _, _ in REFUSED])
def test_bad_grids_are_refused_before_anything_is_written(palate, tiny, files, tmp_path, words, code, says):
    before = tree(tmp_path)
    given = {name: path for name, path in files.items() if f"--{name} " not in words}
    palate("sweep", "dpo", *words.split(), model=tiny, out="s", **given, **{} if "--steps" in words else {"steps": 9})
    assert palate.code == 2, palate.said
    assert palate.result["error_code"] == code, palate.said
    assert says in palate.said
    assert "Traceback" not in palate.said
    assert tree(tmp_path) == before


def test_other_refusals(palate, tiny, files, tmp_path):
    palate("sweep", "dop", "--grid", "beta=1")
    assert (palate.code, "did you mean palate sweep dpo" in palate.said) == (2, True)
    palate("sweep", "dpo", "--grid", "beta=0.1", model=tiny, data="nowhere.jsonl", out="s")
    assert (palate.code, Path("s").exists()) == (3, False)
    palate("sweep", "dpo", "--grid", "beta=0.1", model=tiny, data=write_rows(tmp_path / "f.jsonl", pairs(8)), out="s")
    assert (palate.code, "no row is held out" in palate.said) == (2, True)
    Path("s").mkdir()
    Path("s/mine").write_text("mine")
    palate("sweep", "dpo", "--grid", "beta=0.1,0.2", model=tiny, out="s", **files, **SMALL)
    assert (palate.code, palate.result["error_code"]) == (2, "E313")


# sweeps


def ends(run: Path):
    """Weights, moments, metrics but times, samples."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [last / "model.safetensors", last / "optimizer.safetensors", run / "model" / "model.safetensors"]
    samples = (run / "samples.jsonl").read_bytes(), (run / "retention.json").read_bytes()
    return last.name, [file.read_bytes() for file in files], metrics(run), samples


def test_a_sweep_from_end_to_end(palate, tiny, files):
    result = palate.ok("sweep", "dpo", *GRID, model=tiny, out="s", **files, **SMALL)
    found = table()
    assert found["rungs"] == [1, 9]
    assert [cell["name"] for cell in found["cells"]] == ["lr=1e-05", "lr=0.001", "lr=0.003", "lr=1e+12"]
    states = {cell["name"]: (cell["state"], cell["steps"]) for cell in found["cells"]}
    assert found["best"] == result["best"]
    assert states.pop(result["best"]) == ("done", 9)
    assert states.pop("lr=1e+12") == ("failed", 1)
    assert set(states.values()) == {("stopped", 1)}
    assert found["compute_share"] == result["compute_share"] == 12 / 36
    # the reference was scored once
    scored = [cell["reference_scored"] for cell in found["cells"]]
    assert scored[0] == 64 and not any(scored[1:])
    assert result["reference_scored"] == 64
    # the best cell ends as if it had never paused
    palate.ok("dpo", config=f"s/cells/{result['best']}/config.yaml", out="straight")
    assert ends(Path("s/cells") / result["best"]) == ends(Path("straight"))
    drawn = Path("s/sweep.svg").read_text()
    assert drawn.startswith("<?xml") and result["best"] in drawn and "step" in drawn
    assert json.loads(Path("s/run.json").read_text())["verb"] == "sweep dpo"
    assert Path(result["model"], "config.json").is_file()
    # finished means nothing to do, and its config runs again
    before = tree(Path("s"))
    again = palate.ok("sweep", "dpo", *GRID, model=tiny, out="s", resume=True, **files, **SMALL)
    assert "nothing to do" in palate.said
    assert again["best"] == result["best"]
    assert {**tree(Path("s")), ".lock": b""} == {**before, ".lock": b""}
    palate.ok("sweep", "dpo", config="s/config.yaml", out="t")
    scored = {"reference_scored": 0}
    assert [cell | scored for cell in table("t")["cells"]] == [cell | scored for cell in found["cells"]]
    assert Path("t/sweep.svg").read_bytes() == Path("s/sweep.svg").read_bytes()


@pytest.mark.parametrize("verb, rows, metric", [("kto", feedbacks, None), ("sft", demonstrations, "eval/loss")])
def test_other_verbs(palate, tiny, tmp_path, verb, rows, metric):
    whole = list(rows(32))
    data, held = write_rows(tmp_path / "d.jsonl", whole[:24]), write_rows(tmp_path / "e.jsonl", whole[24:])
    options = {key: value for key, value in SMALL.items() if key != "retain_samples" or verb == "kto"}
    result = palate.ok("sweep", verb, "--grid", "lr=1e-5,3e-3", "--full", model=tiny, data=data, eval=held, **options)
    assert result["out"] == f"runs/sweep-{verb}-1"
    assert result["metric"] == (metric or "eval/rewards/accuracies")
    found = table(result["out"])
    assert found["compute_share"] == 1.0
    assert [cell["state"] for cell in found["cells"]] == ["done", "done"]
    if metric:
        assert found["lower_is_better"]
        assert found["best"] == min(found["cells"], key=lambda cell: cell["metric"])["name"] == "lr=0.003"


def test_a_cell_that_is_not_finite_is_a_row(palate, tiny, files, monkeypatch):
    from palate.train import loop

    original = loop.learning_rate
    monkeypatch.setattr(
        loop, "learning_rate", lambda config, n, total: 1e30 if config.lr == 1e12 else original(config, n, total)
    )
    result = palate.ok("sweep", "dpo", *GRID, model=tiny, out="s", full=True, **files, **SMALL)
    rows = {cell["name"]: cell for cell in result["cells"]}
    assert rows["lr=1e+12"]["state"] == "failed"
    assert "not finite" in rows["lr=1e+12"]["error"] or "nan" in rows["lr=1e+12"]["error"]
    assert rows["lr=1e+12"]["metric"] is None
    assert sorted(row["state"] for row in rows.values()) == ["done", "done", "done", "failed"]
    assert result["best"] != "lr=1e+12"
    monkeypatch.setattr(loop, "learning_rate", lambda config, n, total: 1e30)
    palate("sweep", "dpo", *GRID, model=tiny, out="t", **files, **SMALL)
    assert palate.code == 3
    assert "none of the 4 cells came through" in palate.said
    assert "Traceback" not in palate.said
    assert [cell["state"] for cell in table("t")["cells"]] == ["failed"] * 4


def test_cells_of_unequal_length(palate, tiny, files):
    result = palate.ok("sweep", "dpo", "--grid", "steps=9,18", "--grid", "lr=1e-5,3e-3", model=tiny, out="s",
                       **files, **SMALL | {"steps": None})  # fmt: skip
    done = [cell for cell in result["cells"] if cell["state"] == "done"]
    assert [cell["steps"] for cell in done] == [cell["options"]["steps"] for cell in done]
    assert result["compute_share"] == sum(cell["steps"] for cell in result["cells"]) / 54


def test_a_dry_run_writes_nothing(palate, tiny, files, tmp_path):
    before = tree(tmp_path)
    result = palate.ok("sweep", "dpo", *GRID, model=tiny, out="s", dry_run=True, **files, **SMALL)
    assert result["rungs"] == [1, 9]
    assert result["compute_share"] == pytest.approx(1 / 3)
    assert tree(tmp_path) == before


def test_require_better(palate, tiny, files, tmp_path):
    rows = [dict(row, chosen=row["rejected"], rejected=row["chosen"]) for row in list(pairs(32))[24:]]
    swapped = files | {"eval": write_rows(tmp_path / "swapped.jsonl", rows)}
    grid = ("--grid", "lr=3e-3,1e-3")
    palate("sweep", "dpo", *grid, model=tiny, out="s", require_better=True, **swapped, **SMALL)
    assert palate.code == 4, palate.said
    assert palate.result["best"] in table()["best"]
    palate.ok("sweep", "dpo", *grid, model=tiny, out="s", resume=True, **swapped, **SMALL)


# stopped in the middle


def test_an_interrupted_sweep_goes_on(palate, tiny, files, monkeypatch):
    from palate.train import loop

    palate.ok("sweep", "dpo", *GRID, model=tiny, out="s", **files, **SMALL)
    original = loop.learning_rate
    for number, (rate, step) in enumerate([(1e-3, 1), (3e-3, 2), (3e-3, 7)]):

        def dying(config, at, total, rate=rate, step=step):
            if (config.lr, at) == (rate, step):
                raise KeyboardInterrupt
            return original(config, at, total)

        monkeypatch.setattr(loop, "learning_rate", dying)
        palate("sweep", "dpo", *GRID, model=tiny, out="t", resume=number > 0, **files, **SMALL)
        if palate.code == 0:
            break
        assert palate.code == 6
        assert "palate sweep dpo -c t/config.yaml --resume --out t" in palate.said
        assert json.loads(Path("t/run.json").read_text())["status"] == "interrupted"
    assert number > 0
    monkeypatch.setattr(loop, "learning_rate", original)
    palate.ok("sweep", "dpo", *GRID, model=tiny, out="t", resume=True, **files, **SMALL)
    scored = {"reference_scored": 0}
    assert [cell | scored for cell in table("t")["cells"]] == [cell | scored for cell in table("s")["cells"]]
    best = table("s")["best"]
    assert ends(Path("t/cells") / best) == ends(Path("s/cells") / best)
    palate("sweep", "dpo", "--grid", "lr=1e-5,1e-3", model=tiny, out="t", resume=True, **files, **SMALL)
    assert palate.code == 3
    assert "belongs to another run: grid.lr was" in palate.said


def start(tiny, files, cwd: Path, *words: str):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PALATE_CACHE=str(cwd / "cache"))
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    code = "import sys; from palate.cli import main; sys.exit(main())"
    options = flags(model=tiny, **files, **SMALL | {"steps": 18})
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", "dpo", *GRID, *options, *words],
        cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_several_moments(tiny, files, tmp_path):
    straight = start(tiny, files, tmp_path, "--out", "s")
    assert straight.wait(300) == 0, straight.stderr.read()
    began, kills = time.monotonic(), 0
    for share in (0.2, 0.5, 0.5, 0.5):
        resume = ["--resume"] if (tmp_path / "t" / "run.json").exists() else []
        process = start(tiny, files, tmp_path, "--out", "t", *resume)
        deadline = time.monotonic() + 60
        while not (tmp_path / "t" / "cells").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(4 * share)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills >= 2, time.monotonic() - began
    process = start(tiny, files, tmp_path, "--out", "t", "--resume")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one, two = table(str(tmp_path / "s")), table(str(tmp_path / "t"))
    for found in (one, two):
        for cell in found["cells"]:
            del cell["reference_scored"]  # a killed pass may have left its scores in the store
    assert one == two
    assert ends(tmp_path / "s/cells" / one["best"]) == ends(tmp_path / "t/cells" / one["best"])
