import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from faults import KINDS, Crash, disk
from hypothesis import given, settings
from hypothesis import strategies as st

from palate import files
from palate.errors import CheckpointError, Interrupted, MachineError, UsageError
from palate.run import Run, next_folder, read_lines, scrub, status_of

CONFIG = {"model": "m", "lr": 5e-7, "seed": 3, "out": None, "train": {"clip_norm": float("inf"), "keep": 2}}


def create(path, config=CONFIG, verb="dpo", **options):
    return Run.create(path, verb=verb, config=config, argv=["dpo", "--model", "m"], **options)


def record(path):
    return json.loads((path / "run.json").read_text(), parse_constant=lambda text: pytest.fail(text))


@pytest.fixture(autouse=True)
def without_sync():
    """A test cannot cut the power, so it need not wait for the disk."""
    with disk():
        yield


def test_a_run_from_begin_to_end(tmp_path):
    with create(tmp_path / "runs" / "a", parents=["base"], hardware="a CPU") as run:
        assert status_of(run.path) == "running" and not run.finished
        run.write_data({"sources": [{"path": "x", "sha256": "0"}], "counts": {"rows": 2}})
        run.write_rejects(['{"a":'])
        run.log({"step": 1, "loss": float("nan"), "rewards/margins": 0.5})
        run.samples([{"prompt": "p", "before": "b", "step": 0}])
        assert run.metrics() == [{"step": 1, "loss": None, "rewards/margins": 0.5}]
        assert run.checkpoints == run.path / "checkpoints" and run.reference_path.name == "reference.safetensors"
        run.finish({"verdict": "better", "win_rate": 0.7})
    found = record(run.path)
    assert found["status"] == "done" == status_of(run.path)
    assert found["verdict"] == "better" and found["result"]["win_rate"] == 0.7 and found["seed"] == 3
    assert found["argv"] == ["dpo", "--model", "m"] and found["parents"] == ["base"] and found["hardware"] == "a CPU"
    assert {"python", "palate", "torch", "transformers"} <= found["versions"].keys()
    assert found["times"]["started"] <= found["times"]["ended"] and len(found["id"]) == 32
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    assert list(yaml.safe_load((run.path / "config.yaml").read_text())) == list(CONFIG)
    assert (run.path / "rejects.jsonl").read_bytes() == b'{"a":\n'


def test_a_folder_that_is_not_empty_is_refused_untouched(tmp_path):
    (tmp_path / "a").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for resume in (False, True):
        with pytest.raises(UsageError, match="E313") as caught:
            create(tmp_path, resume=resume)
        assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="not a folder"):
        create(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == before


def test_an_empty_folder_and_a_new_one_can_be_resumed(tmp_path):
    """--resume where nothing is yet starts at step 0."""
    with create(tmp_path, resume=True) as run:
        assert not run.finished
    with create(tmp_path / "b", resume=True) as run:
        assert run.metrics() == []


def test_how_it_ends_is_recorded(tmp_path):
    for number, (error, status) in enumerate(
        [(KeyboardInterrupt(), "interrupted"), (Interrupted("stopped"), "interrupted"), (KeyError("x"), "failed")]
    ):
        with pytest.raises(type(error)), create(tmp_path / str(number)):
            raise error
        assert record(tmp_path / str(number))["status"] == status
    with create(tmp_path / "3"):
        pass
    assert status_of(tmp_path / "3") == "done"


def test_resuming_goes_on_and_a_finished_run_is_left_alone(tmp_path):
    path = tmp_path / "a"
    first = create(path)
    first.log({"step": 1})
    first.close()
    with create(path, resume=True) as run:
        assert run.id == first.id and run.metrics() == [{"step": 1}]
        assert record(path)["status"] == "running" and "ended" not in record(path)["times"]
        run.finish({"verdict": "v"})
    before = {name: (path / name).read_bytes() for name in os.listdir(path) if name != ".lock"}
    with create(path, resume=True) as run:
        assert run.finished and run.result == {"verdict": "v"}
    assert {name: (path / name).read_bytes() for name in os.listdir(path) if name != ".lock"} == before


def test_another_config_is_refused_naming_each_difference(tmp_path):
    create(tmp_path).close()
    other = CONFIG | {"lr": 1e-6, "train": {"clip_norm": 1.0, "keep": 3}, "new": 1, "resume": True, "out": "elsewhere"}
    with pytest.raises(CheckpointError, match="E502") as caught:
        create(tmp_path, other, resume=True)
    words = str(caught.value)
    for part in ("lr was 5e-07, now 1e-06", "train.clip_norm was inf, now 1.0", "train.keep was 2", "new was not set"):
        assert part in words
    assert "resume was" not in words and "out was" not in words and caught.value.exit_code == 3
    with pytest.raises(CheckpointError, match="verb was 'dpo', now 'kto'"):
        create(tmp_path, verb="kto", resume=True)
    create(tmp_path, other, resume=True, may_change={"lr", "train", "new"}).close()


def test_a_damaged_record_is_refused(tmp_path):
    create(tmp_path).close()
    for content in (b"", b"[]", b"{}", b"\xff"):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"run\.json"):
            create(tmp_path, resume=True)


def test_a_second_owner_is_refused(tmp_path):
    run = create(tmp_path)
    before = record(tmp_path)
    program = f"""
from palate.run import Run
Run.create({str(tmp_path)!r}, verb="dpo", config={{}}, resume=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert f"process {os.getpid()} on" in done.stderr and "E503" in done.stderr
    assert record(tmp_path) == before
    with pytest.raises(MachineError, match="E503"):
        create(tmp_path, resume=True)
    run.close()
    create(tmp_path, resume=True).close()


def test_a_killed_run_is_interrupted_and_resumable(tmp_path):
    program = f"""
import time
from palate.run import Run
run = Run.create({str(tmp_path / "a")!r}, verb="dpo", config={{"x": 1}})
run.log({{"step": 1}})
print("on", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    assert status_of(tmp_path / "a") == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert record(tmp_path / "a")["status"] == "running" and status_of(tmp_path / "a") == "interrupted"
    with create(tmp_path / "a", {"x": 1}, resume=True) as run:
        assert run.metrics() == [{"step": 1}]


# rewinding

LINE = st.fixed_dictionaries({"step": st.integers(0, 9), "text": st.text(max_size=5)})


@given(st.lists(LINE, max_size=12), st.integers(0, 9), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_rewinding_keeps_the_bytes_up_to_a_step(tmp_path_factory, lines, step, cut):
    path = tmp_path_factory.mktemp("run")
    with create(path) as run:
        for line in lines:
            run.log(line)
        log = path / "metrics.jsonl"
        whole = log.read_bytes() if lines else b""
        if lines and cut:  # killed within a line: its beginning is there, its end is not
            last = whole.rstrip(b"\n").rfind(b"\n") + 1
            whole = whole[: max(len(whole) - cut, last)]
            log.write_bytes(whole)
        run.rewind(step)
        kept = [line for line in whole.splitlines(keepends=True) if line.endswith(b"\n")]
        kept = [line for line in kept if 0 < step >= json.loads(line)["step"]]
        assert (log.read_bytes() if lines else b"") == b"".join(kept)
        run.log({"step": step})
        assert run.metrics()[-1] == {"step": step} and len(run.metrics()) == len(kept) + 1


def test_rewinding_takes_samples_along_and_brings_each_once(tmp_path):
    with create(tmp_path) as run:
        run.samples([{"prompt": "p", "before": "b", "step": 1}])
        run.samples([{"prompt": "p", "after": "a", "step": 5}])
        run.rewind(1)
        run.samples([{"prompt": "p", "before": "b", "step": 1}])
    assert read_lines(tmp_path / "samples.jsonl") == [{"prompt": "p", "before": "b", "step": 1}]


def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path):
    with create(tmp_path) as run:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
            run.rewind(2)


@pytest.mark.parametrize("kind", KINDS)
def test_rewinding_and_recording_fail_without_loss(tmp_path, kind):
    for at in range(1, 50):
        path = tmp_path / str(at)
        run = create(path)
        for step in range(1, 5):
            run.log({"step": step})
        raised = None
        with disk(at, kind) as faulty:
            try:
                run.rewind(2)
                run.status("running", note=1)
            except (Crash, MachineError) as error:
                raised = error
        run.close()
        assert len(read_lines(path / "metrics.jsonl")) in (2, 4)
        assert record(path)["verb"] == "dpo"
        with create(path, resume=True) as again:
            again.rewind(2)
            assert [line["step"] for line in again.metrics()] == [1, 2]
        if faulty.count < at:
            assert raised is None
            break
    else:
        pytest.fail("never ran through")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_fails_to_begin_can_begin_again(tmp_path, kind):
    for at in range(1, 50):
        path = tmp_path / str(at)
        raised = None
        with disk(at, kind) as faulty:
            try:
                create(path).close()
            except (Crash, MachineError) as error:
                raised = error
        create(path, resume=True).close()
        assert record(path)["status"] == "running"
        if faulty.count < at:
            assert raised is None
            break
    else:
        pytest.fail("never ran through")


def test_the_first_error_is_heard_when_the_disk_is_full(tmp_path):
    run = create(tmp_path)

    class Full(files.Operations):
        def write(self, fd, data):
            raise OSError(28, "full")

    before, files.operations = files.operations, Full()
    try:
        with pytest.raises(MachineError, match="E505"), run:
            run.log({"step": 1})
    finally:
        files.operations = before
    assert status_of(tmp_path) == "interrupted"  # it could not say so, but its process is gone


# the rest


def test_work_folders_are_forgotten(tmp_path):
    with create(tmp_path / "a") as run:
        (run.path / "scoring").mkdir()
        (run.path / "scoring" / "plan.json").write_text("{}")
        run.forget("scoring")
        run.forget("scoring")
        assert not (run.path / "scoring").exists()
        with pytest.raises(UsageError):
            run.forget("../a")


def test_the_next_folder(tmp_path):
    assert next_folder(tmp_path / "none", "dpo") == tmp_path / "none" / "dpo-1"
    for name in ("dpo-1", "dpo-9", "dpo-10", "dpo-x", "sft-30", "my-dpo-50", "dpo-7-old"):
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path, "dpo") == tmp_path / "dpo-11"
    assert next_folder(tmp_path, "self-reward") == tmp_path / "self-reward-1"


SECRETS = [
    "hf_" + "a1B2" * 8,
    "sk-proj-" + "x9" * 20,
    "ghp_" + "Z" * 36,
    "github_pat_" + "a" * 30,
    "AKIA" + "A1B2C3D4" * 2,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc",
]


def test_no_secret_reaches_a_file(tmp_path):
    argv = ["dpo", "--hub-token", "plain-secret", "--api-key=plain-secret", "--password", "plain-secret", "--model"]
    argv += ["https://me:plain-secret@host/x", "--max-tokens", "5", *SECRETS]
    config = {"model": SECRETS[0], "track": {"api_key": "plain-secret"}, "data": "s3://me:plain-secret@b/c"}
    os.environ["PALATE_TEST_SECRET"] = "plain-secret"
    try:
        with pytest.raises(ValueError), Run.create(tmp_path, verb="dpo", config=config, argv=argv):
            raise ValueError(f"no access with {SECRETS[1]}")
    finally:
        del os.environ["PALATE_TEST_SECRET"]
    text = b"".join((tmp_path / name).read_bytes() for name in os.listdir(tmp_path)).decode()
    assert not [secret for secret in ["plain-secret", *SECRETS] if secret in text]
    assert record(tmp_path)["argv"][-8:-6] == ["--max-tokens", "5"]
    Run.create(tmp_path, verb="dpo", config=config, argv=argv, resume=True).close()


def test_scrubbing_leaves_the_rest_and_is_idempotent():
    kept = ["--revision", "a" * 40, "--max-tokens", "64", "--data", "tokens.jsonl", "https://host/path", 3, None]
    assert scrub(kept) == kept
    dirty = ["--token", "x", f"u=https://a:b@c and {SECRETS[0]}"]
    assert scrub(scrub(dirty)) == scrub(dirty) == ["--token", "***", "u=https://***@c and ***"]


def test_logging_a_thousand_lines_is_quick(tmp_path):
    with create(tmp_path) as run:
        began = time.perf_counter()
        for step in range(1000):
            run.log({"step": step, "loss": 0.5, "rewards/margins": 0.25})
        assert time.perf_counter() - began < 5
        assert len(run.metrics()) == 1000


@pytest.mark.parametrize("line", [b"[1]", b"{", b"[" * 100_000])
def test_a_log_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match="not a JSON object") as caught:
        read_lines(path)
    assert caught.value.where == f"{path}:2"
