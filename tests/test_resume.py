"""Killed anywhere, resumed: the weights, the optimizer and the metrics of the uninterrupted run, bit for bit.

Fast: the process dies in-process at a chosen file operation or call (nothing written after that), and one real kill.
Slow: SIGKILL at random moments, several in one run, for dpo, kto and sft.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import Crash, disk
from runs_kit import Command, demonstrations, feedbacks, metrics, pairs, save_model, write_rows
from safetensors.numpy import load_file

VERBS = {"dpo": pairs, "kto": feedbacks, "sft": demonstrations, "reward": pairs}
OPTIONS = dict(batch=3, steps=9, device="cpu", lr=3e-3, samples=2, save_every=2, eval_every=3, seed=1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_llama(0), tiny_tokenizer)


@pytest.fixture
def palate(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


@pytest.fixture
def small_parts(monkeypatch):
    from palate import reference

    monkeypatch.setattr(reference, "MICRO_BATCHES_PER_PART", 1)


def data_of(folder: Path, verb: str = "dpo", count: int = 24) -> dict[str, Path]:
    """Rows to train on, and a quarter as many others held out."""
    rows = list(VERBS[verb](count + count // 4))
    return {
        "data": write_rows(folder / "rows.jsonl", rows[:count]),
        "eval": write_rows(folder / "held.jsonl", rows[count:]),
    }


def ends(run: Path):
    """What must be equal: every weight, every moment, every metric but times, samples, the saved model."""
    run, last = Path(run), sorted(Path(run, "checkpoints").glob("step-*"))[-1]
    files = [last / "model.safetensors", last / "optimizer.safetensors", run / "model" / "model.safetensors"]
    if (run / "adapter").is_dir():
        files.append(run / "adapter" / "adapter_model.safetensors")
    state = json.loads((last / "state.json").read_text())
    kept = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    samples = [(run / name).read_text() for name in ("samples.jsonl", "normalise.json") if (run / name).is_file()]
    facts = [state[key] for key in ("step", "cursor", "best", "total_steps")]
    contents = [f.read_bytes() for f in files]
    if (run / "reference.safetensors").is_file():  # its values; whether they were scored or found may differ
        contents += [value.tobytes() for _, value in sorted(load_file(run / "reference.safetensors").items())]
    return contents, metrics(run), samples, facts, kept


def equal(one, two):
    assert one[1] == two[1]
    assert one[2] == two[2]
    assert one[3:] == two[3:]
    assert one[0] == two[0]


def die_at(palate, verb, at, **options):
    """The command on a disk that is gone at operation `at`, and the process with it; False where it got through."""
    with disk(at) as found:
        try:
            palate(verb, **options)
        except Crash:
            return True
        return found.dead  # the command ended as if Crash were an error of ours: nothing reached the disk after it


DEATHS = [
    ("dpo", {}, (0.05, 0.6)),
    ("kto", {}, (0.4,)),
    ("sft", {}, (0.97,)),
    ("reward", {"normalise": 8}, (0.3, 0.97)),
    pytest.param("dpo", {}, (0.15, 0.3, 0.45, 0.75, 0.9, 0.97), marks=pytest.mark.slow),
    pytest.param("dpo", {"lora_rank": 2}, (0.1, 0.6, 0.95), marks=pytest.mark.slow),
    pytest.param("kto", {}, (0.1, 0.7, 0.95), marks=pytest.mark.slow),
    pytest.param("sft", {}, (0.1, 0.5), marks=pytest.mark.slow),
    pytest.param("reward", {"normalise": 8, "lora_rank": 2}, (0.1, 0.5, 0.9, 0.97), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("verb, extra, shares", DEATHS)
def test_dead_at_any_place_and_resumed(palate, tiny, tmp_path, monkeypatch, small_parts, verb, extra, shares):
    """Died at operations spread over the whole run (scoring, logging, saving, export): the same end."""
    options = dict(model=tiny, train__tokens=64) | data_of(tmp_path, verb) | OPTIONS | extra
    with disk() as counted:
        palate.ok(verb, out="straight", **options)
    expected = ends("straight")
    chance = random.Random(len(verb) + len(extra))
    for trial, share in enumerate(shares):
        # each with a store of its own, or the second would find what the first had scored
        monkeypatch.setenv("PALATE_CACHE", str(tmp_path / f"cache-{trial}"))
        run, deaths = f"killed-{trial}", 0
        at = int(counted.count * share) + chance.randrange(10) + 1
        for _ in range(2):
            resume = {} if not Path(run, "run.json").exists() else {"resume": True}
            deaths += die_at(palate, verb, at, out=run, **options, **resume)
            at = chance.randrange(5, max(6, counted.count // 4))
        palate.ok(verb, out=run, **options, **({"resume": True} if Path(run, "run.json").exists() else {}))
        assert deaths
        equal(ends(run), expected)


@pytest.mark.parametrize("step", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 7, 8))])
def test_resumed_after_any_step(palate, tiny, tmp_path, monkeypatch, step):
    from palate.train import loop

    options = dict(model=tiny) | data_of(tmp_path) | OPTIONS
    palate.ok("dpo", out="straight", **options)
    original, seen = loop.learning_rate, []

    def dying(config, number, total):
        if number == step + 1 and not seen:
            seen.append(1)
            raise Crash
        return original(config, number, total)

    monkeypatch.setattr(loop, "learning_rate", dying)
    with contextlib.suppress(Crash):
        palate("dpo", out="run", **options)
    assert seen
    palate.ok("dpo", out="run", resume=True, **options)
    assert "resume: from" in palate.said or step < 2
    equal(ends("run"), ends("straight"))


def test_a_torn_checkpoint_is_left_aside(palate, tiny, tmp_path):
    options = dict(model=tiny) | data_of(tmp_path) | OPTIONS
    palate.ok("dpo", out="straight", **options)
    palate.ok("dpo", out="run", **options)
    run = Path("run")
    # back to a run that was killed while its last checkpoint was torn
    import shutil

    shutil.rmtree(run / "model")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    torn = run / "checkpoints" / "step-000009" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (run / "checkpoints" / ".step-000010.77.tmp").mkdir()
    (run / "checkpoints" / ".step-000010.77.tmp" / "model.safetensors").write_bytes(b"half")
    palate.ok("dpo", out="run", resume=True, **options)
    assert "damaged" in palate.said
    assert len(list((run / "checkpoints" / ".incomplete").iterdir())) == 2
    equal(ends("run"), ends("straight"))


def test_all_checkpoints_damaged_is_refused(palate, tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pairs(24))
    options = dict(model=tiny, data=rows) | OPTIONS
    palate.ok("dpo", out="run", **options)
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(record | {"status": "running"}))
    for path in Path("run/checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    palate("dpo", out="run", resume=True, **options)
    assert palate.code == 3
    assert "damaged" in palate.said


@pytest.mark.parametrize("verb", ["dpo", "sft"])
def test_other_data_is_not_trained_on_with_the_old_place(palate, tiny, tmp_path, monkeypatch, verb):
    from palate.train import loop

    rows = write_rows(tmp_path / "rows.jsonl", VERBS[verb](24))
    options = dict(model=tiny, data=rows) | OPTIONS
    original = loop.learning_rate

    def dying(config, number, total):
        if number == 5:
            raise Crash
        return original(config, number, total)

    monkeypatch.setattr(loop, "learning_rate", dying)
    with contextlib.suppress(Crash):
        palate(verb, out="run", **options)
    monkeypatch.setattr(loop, "learning_rate", original)
    write_rows(rows, list(VERBS[verb](24))[::-1])
    palate(verb, out="run", resume=True, **options)
    assert palate.code == 3, palate.said
    assert "Traceback" not in palate.said


# processes


def start(verb, cwd, cache, **options):
    from runs_kit import flags

    environment = dict(os.environ, OMP_NUM_THREADS="1", PALATE_CACHE=str(cache))
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    code = "import sys; from palate.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, verb, *flags(**options)], cwd=cwd, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, seconds=120):
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def wait_for(path: Path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_that_it_can_be_resumed(tiny, tmp_path, sign):
    rows = write_rows(tmp_path / "rows.jsonl", pairs(24))
    options = dict(model=tiny, data=rows, out="run") | OPTIONS | dict(steps=400, save_every=400, eval_every=400)
    process = start("dpo", tmp_path, tmp_path / "cache", **options)
    run = tmp_path / "run"
    assert wait_for(run / "metrics.jsonl", process)
    while lines_of(run / "metrics.jsonl") < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    code, said = finish(process, 30)
    assert code == 6, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    (saved,) = (run / "checkpoints").glob("step-*")
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert saved.name == f"step-{steps[-1]:06d}"
    assert steps == list(range(1, len(steps) + 1))


def killed_until_done(verb, cwd, cache, kills, chance, span, **options):
    """The run, SIGKILLed `kills` times at random moments after it began writing; how many kills met it alive."""
    run, met = cwd / options["out"], 0
    for _ in range(kills):
        process = start(verb, cwd, cache, **options, resume=run.exists() and (run / "run.json").exists())
        wait_for(run / "run.json", process)
        time.sleep(chance.uniform(0, span))
        met += process.poll() is None
        process.kill()
        process.communicate()
    process = start(verb, cwd, cache, **options, resume=(run / "run.json").exists())
    code, said = finish(process)
    assert code == 0, said
    return met


@pytest.mark.slow
def test_a_real_kill(tiny, tmp_path):
    options = dict(model=tiny) | data_of(tmp_path) | OPTIONS
    code, said = finish(start("dpo", tmp_path, tmp_path / "cache-1", out="straight", **options))
    assert code == 0, said
    process = start("dpo", tmp_path, tmp_path / "cache-2", out="run", **options)
    while lines_of(tmp_path / "run" / "metrics.jsonl") < 5 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    code, said = finish(start("dpo", tmp_path, tmp_path / "cache-2", out="run", resume=True, **options))
    assert code == 0, said
    equal(ends(tmp_path / "run"), ends(tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize("verb, extra", [("dpo", {}), ("dpo", {"lora_rank": 2}), ("kto", {}), ("sft", {})])
def test_killed_at_random_moments(tiny, tmp_path, verb, extra):
    """Four kills a run, sixteen in all."""
    options = (
        dict(model=tiny, train__tokens=64)
        | data_of(tmp_path, verb, 60)
        | OPTIONS
        | dict(steps=40, save_every=3)
        | extra
    )
    began = time.monotonic()
    code, said = finish(start(verb, tmp_path, tmp_path / "cache-1", out="straight", **options))
    assert code == 0, said
    span = min(5.0, (time.monotonic() - began) / 2)
    chance = random.Random(f"{verb} {extra}")
    met = killed_until_done(verb, tmp_path, tmp_path / "cache-2", 4, chance, span / 2, out="run", **options)
    assert met >= 2
    equal(ends(tmp_path / "run"), ends(tmp_path / "straight"))
