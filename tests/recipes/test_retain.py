"""What a preference run says about what it broke: numbers in its files, flags, resume, and --retain."""

import json
from pathlib import Path

import numpy as np
import pytest
from runs_kit import demonstrations, feedbacks, metrics, pairs, rankings, write_rows

from palate.recipes.retain import FILE, PREFIX, from_builtin, spread

SMALL = dict(batch=4, steps=4, device="cpu", lr=1e-3, samples=0, eval_every=2)
COUNTED = {"distinct-1", "distinct-2", "distinct-3", "repetition", "length", "finished"}
ALL = COUNTED | {"loss", "chosen", "displaced", "drift"}


def held_out(folder: Path, rows=pairs) -> dict[str, Path]:
    whole = list(rows(32))
    return {
        "data": write_rows(folder / "d.jsonl", whole[:24]),
        "eval": write_rows(folder / "e.jsonl", whole[24:]),
        "retain": write_rows(folder / "r.jsonl", demonstrations(10)),
    }


def retained(line: dict) -> dict:
    return {key.removeprefix(PREFIX): value for key, value in line.items() if key.startswith(PREFIX)}


@pytest.mark.parametrize("verb, rows", [("dpo", pairs), ("kto", feedbacks), ("dpo", rankings)])
def test_every_number_before_and_after(palate, tiny, tmp_path, verb, rows):
    result = palate.ok(verb, model=tiny, out="r", **held_out(tmp_path, rows), **SMALL)
    evals = [line for line in metrics(Path("r")) if "loss" not in line]
    assert [line["step"] for line in evals] == [0, 2, 4]
    first, between, last = map(retained, evals)
    assert first.keys() == last.keys() == ALL
    assert between.keys() == {"loss"}
    assert first["displaced"] == first["drift"] == 0.0
    assert last["drift"] != 0.0
    found = result["retention"]
    assert found["before"] == first
    assert found["after"] == last
    assert found["flags"] == []
    assert json.loads(Path("r/run.json").read_text())["result"]["retention"] == found
    if verb == "dpo" and rows is pairs:  # the same share, counted by the objective against its reference
        assert last["displaced"] == evals[-1]["eval/displaced"]
        assert last["chosen"] == pytest.approx(-evals[-1]["eval/logps/chosen"] / evals[-1]["eval/length/chosen"])
    sources = json.loads(Path("r/data.json").read_text())["sources"]
    assert [source["role"] for source in sources] == ["train", "eval", "retain"]


def test_the_loss_is_what_sft_would_say(palate, tiny, tmp_path):
    files = held_out(tmp_path)
    palate.ok("dpo", model=tiny, out="r", **files, **SMALL)
    options = SMALL | {"steps": 1}
    palate.ok("sft", model=tiny, data=write_rows(tmp_path / "s.jsonl", list(demonstrations(20))[10:]),
              eval=files["retain"], out="s", **options)  # fmt: skip
    expected = next(line for line in metrics(Path("s")) if line["step"] == 0)["eval/loss"]
    assert metrics(Path("r"))[0][PREFIX + "loss"] == pytest.approx(expected, abs=1e-9)


def test_an_overtrained_run_is_flagged(palate, tiny, tmp_path):
    result = palate.ok("dpo", model=tiny, out="r", **held_out(tmp_path), **SMALL | {"lr": 0.3, "steps": 12})
    flagged = result["retention"]["flags"]
    assert any("demonstrations" in sentence for sentence in flagged)
    assert palate.code == 0  # a warning, no error


def test_without_demonstrations_the_rest_is_measured(palate, tiny, tmp_path):
    files = held_out(tmp_path)
    del files["retain"]
    palate.ok("dpo", model=tiny, out="r", **files, **SMALL)
    assert "--retain FILE" in palate.said
    evals = [line for line in metrics(Path("r")) if "loss" not in line]
    assert retained(evals[0]).keys() == ALL - {"loss"}
    result = palate.ok("dpo", model=tiny, out="n", retain="none", retain_samples=0, **files, **SMALL)
    assert "--retain FILE" not in palate.said
    assert result["retention"]["after"].keys() == {"chosen", "displaced"}


def test_without_held_out_rows_demonstrations_are_still_watched(palate, tiny, tmp_path):
    files = held_out(tmp_path) | {"eval": "none"}
    options = {key: value for key, value in SMALL.items() if key != "eval_every"}
    result = palate.ok("dpo", model=tiny, out="r", **files, **options)
    assert result["retention"]["after"].keys() == {"loss"}
    assert result["better"] is False


@pytest.mark.parametrize("text, code, says", [(None, 3, "nowhere"), ("{}\n", 3, "r.jsonl:1"), ("not json\n", 3, ":1")])
def test_bad_demonstrations_are_refused_before_anything_is_written(palate, tiny, tmp_path, text, code, says):
    files = held_out(tmp_path)
    if text is None:
        files["retain"] = "nowhere.jsonl"
    else:
        files["retain"].write_text(text)
    palate("dpo", model=tiny, out="r", **files, **SMALL)
    assert palate.code == code
    assert says in palate.said
    assert "Traceback" not in palate.said
    assert not Path("r").exists()


def test_changed_demonstrations_are_not_resumed(palate, tiny, tmp_path):
    files = held_out(tmp_path)
    palate.ok("dpo", model=tiny, out="r", **files, **SMALL)
    record = json.loads(Path("r/run.json").read_text())
    Path("r/run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    write_rows(files["retain"], demonstrations(9))
    palate("dpo", model=tiny, out="r", resume=True, **files, **SMALL)
    assert palate.code == 3
    assert "r.jsonl: has changed since the run began" in palate.said


def test_a_resumed_run_measures_against_its_own_start(palate, tiny, tmp_path, monkeypatch):
    from palate.recipes import retain
    from palate.train import loop

    files = held_out(tmp_path)
    palate.ok("dpo", model=tiny, out="straight", **files, **SMALL | {"save_every": 1})
    original = loop.learning_rate

    def dying(config, number, total):
        if number == 4:
            raise KeyboardInterrupt
        return original(config, number, total)

    monkeypatch.setattr(loop, "learning_rate", dying)
    palate("dpo", model=tiny, out="r", **files, **SMALL | {"save_every": 1})
    assert palate.code == 6
    monkeypatch.setattr(loop, "learning_rate", original)
    drawn, sample = [], retain.Retention._completions
    monkeypatch.setattr(retain.Retention, "_completions", lambda self, model: drawn.append(1) or sample(self, model))
    palate.ok("dpo", model=tiny, out="r", resume=True, **files, **SMALL | {"save_every": 1})
    assert len(drawn) == 1  # the end's; the start's are read
    assert metrics(Path("r")) == metrics(Path("straight"))
    assert Path("r", FILE).read_bytes() == Path("straight", FILE).read_bytes()


HEALTHY = {"dpo": {"beta": 0.3}, "ipo": {"loss": "ipo", "loss_options__tau": 0.3}}
OVERTRAINED = {"rate": {"beta": 0.1, "lr": 1e-2}, "beta": {"beta": 0.003, "lr": 2e-3}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flagged, name", [*((False, name) for name in HEALTHY), *((True, name) for name in OVERTRAINED)]
)
def test_flags_on_the_built_in_world(palate, flagged, name):
    """A short form of examples/overtrained.py, which has twenty runs of each kind."""
    options = dict(model="builtin:tiny", data="builtin:reviews[:640]", eval="builtin:reviews/heldout[:100]",
                   batch=16, steps=40, eval_every=40, device="cpu", samples=0, seed=5)  # fmt: skip
    result = palate.ok("dpo", out="r", **options | (OVERTRAINED if flagged else HEALTHY)[name])
    found = result["retention"]
    assert found["demonstrations"] == 200  # of builtin:demonstrations, without being asked
    assert found["completions"] == 24
    assert bool(found["flags"]) == flagged, found


def test_which_models_come_from_ours(tmp_path):
    def run(name, parent):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"parents": [{"model": str(parent)}]}))
        return tmp_path / name

    one = run("one", "builtin:tiny")
    two = run("two", one / "model")
    assert from_builtin("builtin:base")
    assert from_builtin(str(one))
    assert from_builtin(str(two / "model"))
    assert not from_builtin(str(run("three", "HuggingFaceTB/SmolLM2-135M")))
    assert not from_builtin(str(run("four", tmp_path / "four")))  # its own parent
    assert not from_builtin("owner/name")


def test_rows_at_even_distances():
    assert spread(list(range(5)), 8) == [0, 1, 2, 3, 4]
    assert np.diff(spread(list(range(1000)), 200)).tolist() == [5] * 199
