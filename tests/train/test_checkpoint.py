import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from faults import KINDS, Crash, disk
from torch import nn

from palate import files
from palate.errors import CheckpointError, MachineError
from palate.train import checkpoint


@dataclass
class State:
    """What `checkpoint` sees of a TrainState."""

    models: dict
    optimizers: dict
    total_steps: int | None = 10
    step: int = 0
    cursor: dict = field(default_factory=dict)
    best: dict | None = None

    @property
    def model(self):
        return self.models["policy"]


class Net(nn.Module):
    def __init__(self, layers=2, width=4, tied=True):
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, width, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(self.norm(x))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=0.01)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def fresh(optimizer=adamw, seed=0, dtype=torch.float32, **shape):
    torch.manual_seed(seed)
    net = Net(**shape).to(dtype)
    return State({"policy": net}, {"policy": optimizer([p for p in net.parameters() if p.requires_grad])})


def advance(state, steps=1):
    for _ in range(steps):
        state.step += 1
        generator = torch.Generator().manual_seed(state.step)
        state.optimizers["policy"].param_groups[0]["lr"] = 0.01 / state.step
        batch = torch.randn(8, 4, generator=generator).to(state.model.embed.weight.dtype)
        state.model(batch).square().mean().backward()
        state.optimizers["policy"].step()
        state.optimizers["policy"].zero_grad()
        state.cursor = {"epoch": 0, "index": state.step * 8}
    return state


def bits(state):
    """All of a state, comparable with ==."""
    weights = {name: tensor.tolist() for name, tensor in state.model.state_dict().items()}
    names = {p: name for name, p in state.model.named_parameters()}
    moments = {
        names[p]: {k: (v.tolist(), str(v.dtype)) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for p, values in state.optimizers["policy"].state.items()
    }
    return weights, moments, state.optimizers["policy"].param_groups[0]["lr"], state.step, state.cursor, state.best


@pytest.fixture
def ram(tmp_path):
    """A folder in memory where there is one: thousands of small files, which a disk would take a minute for."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=shm) as path:
        yield Path(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(autouse=True)
def without_sync():
    """A test cannot cut the power, so it need not wait for the disk."""
    with disk():
        yield


# exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [adamw, rmsprop, sgd])
def test_stopped_and_resumed_at_every_step_equals_straight_through(folder, optimizer, dtype):
    straight = bits(advance(fresh(optimizer, dtype=dtype), 6))
    for stop in range(7):
        saved = advance(fresh(optimizer, dtype=dtype), stop)
        path = checkpoint.save(saved, folder / str(stop))
        again = fresh(optimizer, seed=1, dtype=dtype)
        assert checkpoint.load(path, again) == []
        assert bits(again) == bits(saved)
        assert bits(advance(again, 6 - stop)) == straight


def test_what_is_loaded_is_a_copy(folder):
    state = advance(fresh(), 2)
    path = checkpoint.save(state, folder)
    before = files.verify_folder(path)
    again = fresh()
    checkpoint.load(path, again)
    advance(again, 3)
    assert files.verify_folder(path) == before
    assert not any(t.untyped_storage().data_ptr() == 0 for t in again.model.parameters())


def test_tied_weights_and_frozen_ones(folder):
    state = fresh()
    state.model.layers[0].weight.requires_grad_(False)
    state.optimizers["policy"] = adamw([p for p in state.model.parameters() if p.requires_grad])
    stored = files.load_tensors(checkpoint.save(advance(state), folder) / "model.safetensors")
    assert "policy.embed.weight" in stored and "policy.head.weight" not in stored
    assert "policy.layers.0.weight" not in stored and "policy.layers.0.bias" in stored
    assert "policy.norm.running_mean" in stored


def test_one_save_of_one_state_is_one_set_of_bytes(folder):
    first = files.verify_folder(checkpoint.save(advance(fresh(), 3), folder / "a"))
    second = files.verify_folder(checkpoint.save(advance(fresh(), 3), folder / "b"))
    assert first == second


def test_fifty_cycles_leave_the_same_bytes_and_no_file_behind(folder):
    state = advance(fresh())
    sizes = set()
    for _ in range(50):
        path = checkpoint.save(advance(state), folder)
        state = fresh(seed=1)
        found, damaged = checkpoint.latest(folder)
        assert (found, damaged) == (path, [])
        checkpoint.load(found, state)
        if state.step >= 10:  # numbers in the JSON have their length by then
            sizes.add((path / "model.safetensors").stat().st_size + (path / "optimizer.safetensors").stat().st_size)
    assert len(sizes) == 1
    assert sorted(os.listdir(folder)) == ["step-000050", "step-000051"]
    assert bits(state) == bits(advance(fresh(), 51))


# what is refused


def raises(code, *words):
    return pytest.raises(CheckpointError, match=".*".join([*words, code]))


def test_other_shapes_names_layers_are_refused_before_anything_changes(folder):
    path = checkpoint.save(advance(fresh()), folder)
    cases = [
        (fresh(layers=3), "holds 2 layers, the model has 3"),
        (fresh(width=5), r"\(4, 4\) float32.*\(5, 5\)"),
        (fresh(tied=False), "lacks policy.head.weight"),
        (fresh(dtype=torch.float64), "float64"),
        (fresh(rmsprop), "AdamW.*RMSprop"),
        (fresh(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True)), "weight_decay"),
        (fresh(lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9), fused=True)), "betas"),
    ]
    for state, words in cases:
        before = bits(state)
        with raises("E502", words) as caught:
            checkpoint.load(path, state)
        assert caught.value.exit_code == 3 and "config.yaml" in str(caught.value)
        assert bits(state) == before


def test_another_runs_checkpoint_is_refused(folder):
    path = checkpoint.save(advance(fresh()), folder, meta={"run": "a", "data": "1"})
    checkpoint.load(path, fresh(), meta={"run": "a", "data": "1"})
    with raises("E502", "data: '1' there, '2' here"):
        checkpoint.load(path, fresh(), meta={"run": "a", "data": "2"})
    with raises("E502", "another run"):
        checkpoint.save(advance(fresh()), folder, meta={"run": "b"})


def test_what_is_not_bit_exact_is_said(folder):
    path = checkpoint.save(advance(fresh()), folder)
    other = fresh(lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False))
    other.total_steps = 20
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        notes = checkpoint.load(path, other)
    finally:
        torch.set_num_threads(threads)
    assert [note.split(" was")[0] for note in notes] == [
        "optimizer option foreach",
        "optimizer option fused",
        "threads",
        "the run",
    ]


def test_no_pickle_is_written_or_read(folder, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("pickle")

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, never)
    path = checkpoint.save(advance(fresh()), folder)
    checkpoint.load(path, fresh())
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


# which is taken


def saved(folder, steps=(1, 2, 3), keep=3):
    state = fresh()
    for step in steps:
        checkpoint.save(advance(state, step - state.step), folder, keep=keep)
    return state


def test_nothing_there(folder):
    assert checkpoint.latest(folder) == (None, [])
    folder.mkdir(parents=True)
    assert checkpoint.latest(folder) == (None, [])


def test_the_highest_number_counts_not_the_clock(folder):
    saved(folder, (9, 10, 11))
    os.rename(folder / "step-000011", folder / "step-1000000")
    for path, when in (("step-1000000", 1), ("step-000009", 2**33)):
        os.utime(folder / path, (when, when))
    assert checkpoint.latest(folder)[0].name == "step-1000000"


def test_a_damaged_one_moves_aside_and_the_one_before_is_taken(folder):
    saved(folder)
    os.truncate(folder / "step-000003" / "model.safetensors", 50)
    for _ in range(2):
        (folder / ".step-000004.99.tmp").mkdir()
        found, damaged = checkpoint.latest(folder)
        assert found == folder / "step-000002"
    assert damaged == []
    assert sorted(os.listdir(folder / ".incomplete")) == ["step-000003", "step-000004.99.tmp", "step-000004.99.tmp.1"]
    state = fresh()
    checkpoint.load(found, state)
    assert checkpoint.save(advance(state), folder).name == "step-000003"


def test_all_damaged_is_an_error_and_stays_one(folder):
    saved(folder)
    for path in folder.iterdir():
        (path / "state.json").unlink()
    for _ in range(2):
        with raises("E501", "all 3 checkpoints are damaged", r"step-000003/state\.json is missing") as caught:
            checkpoint.latest(folder)
        assert caught.value.exit_code == 3
    assert len(os.listdir(folder)) == 3


def test_a_checkpoint_of_a_later_palate_is_not_passed_over(folder, monkeypatch):
    state = saved(folder, (1,))
    monkeypatch.setattr(files, "FORMAT", 2)
    checkpoint.save(advance(state), folder)
    monkeypatch.undo()
    with raises("E311"):
        checkpoint.latest(folder)


def test_the_last_and_the_best_are_kept(folder):
    state = fresh()
    for step in range(1, 9):
        advance(state)
        if step == 2:
            state.best = {"step": 2, "value": 0.9}
        checkpoint.save(state, folder, keep=2)
    assert sorted(os.listdir(folder)) == ["step-000002", "step-000007", "step-000008"]
    state.best = {"step": 8, "value": 1.0}
    checkpoint.save(advance(state), folder, keep=1)
    assert sorted(os.listdir(folder)) == ["step-000008", "step-000009"]


def test_the_same_step_again_is_left_as_it_is_unless_damaged(folder):
    state = saved(folder, (1, 2))
    before = files.verify_folder(folder / "step-000002")
    assert checkpoint.save(state, folder) == folder / "step-000002"
    (folder / "step-000002" / "state.json").write_text("{}")
    assert checkpoint.save(state, folder) == folder / "step-000002"
    assert files.verify_folder(folder / "step-000002") == before
    assert os.listdir(folder / ".incomplete") == ["step-000002"]


# faults


def test_no_failing_operation_loses_a_checkpoint(ram):
    """Every operation of a save x six ways to fail: afterwards the old or the new state loads, and training goes on."""
    base = ram / "base" / "checkpoints"
    with disk():
        old = saved(base, (1, 2), keep=2)
    states = {2: bits(old), 3: bits(advance(old, 1))}
    trials, seen = 0, set()
    for kind in KINDS:
        for at in range(1, 1000):
            run = ram / "run"
            shutil.copytree(base, run)
            state = fresh()
            checkpoint.load(run / "step-000002", state)
            advance(state)
            raised = None
            with disk(at, kind) as faulty:
                try:
                    checkpoint.save(state, run, keep=1)
                except (Crash, MachineError) as error:
                    raised = error
            found, _ = checkpoint.latest(run)
            again = fresh(seed=1)
            checkpoint.load(found, again)
            assert bits(again) == states[again.step], (kind, at)
            seen.add((kind, again.step))
            if isinstance(raised, MachineError):
                assert raised.exit_code == 5
                assert not list(run.glob(".step-*.tmp")), "a failure that is no crash cleans up"
            advance(again, 4 - again.step)
            with disk():
                checkpoint.save(again, run, keep=1)
            assert [p.name for p in sorted(run.glob("step-*"))] == ["step-000004"]
            assert not list(run.glob(".step-*"))
            shutil.rmtree(run)
            if faulty.count < at:
                assert raised is None
                break
            trials += 1
        else:
            pytest.fail("never ran through")
    assert trials >= 300
    assert seen == {(kind, step) for kind in KINDS for step in (2, 3)}


def test_a_disk_that_stays_full_keeps_what_verified(tmp_path):
    class Full(files.Operations):
        def write(self, fd, data):
            raise OSError(28, "No space left on device")

    state = saved(tmp_path / "c", (1, 2), keep=2)
    before = {p: files.verify_folder(p) for p in (tmp_path / "c").iterdir()}
    files.operations, kept = Full(), files.operations
    try:
        for _ in range(3):
            with pytest.raises(MachineError, match=r"the disk is full.*E505"):
                checkpoint.save(advance(state), tmp_path / "c", keep=1)
    finally:
        files.operations = kept
    assert {p: files.verify_folder(p) for p in (tmp_path / "c").iterdir()} == before
    checkpoint.save(advance(state), tmp_path / "c", keep=1)


def test_rot_is_always_found(folder, ram):
    """200 flipped bits over every file, 20 cuts, 20 swaps between steps, 10 missing, 10 foreign: all refused."""
    saved(folder)
    good, chance, found = folder / "step-000003", random.Random(0), 0
    names = sorted(p.name for p in good.iterdir())
    for trial in range(260):
        bad = ram / "bad"
        shutil.copytree(good, bad)
        path = bad / names[trial % len(names)]
        data = bytearray(path.read_bytes())
        if trial < 200:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        elif trial < 220:
            path.write_bytes(data[: chance.randrange(len(data))])
        elif trial < 240:
            path.write_bytes((folder / "step-000002" / path.name).read_bytes())
        elif trial < 250:
            path.unlink()
        else:
            path = bad / f"foreign-{trial}"
            path.write_bytes(b"x")
        state = fresh()
        before = bits(state)
        with pytest.raises(CheckpointError, match="E501") as caught:
            checkpoint.load(bad, state)
        # another step's manifest is a whole one, so there the first file that does not fit it is named
        assert path.name in str(caught.value) or (220 <= trial < 240 and path.name == "manifest.json")
        assert bits(state) == before
        found += 1
        shutil.rmtree(bad)
    assert found == 260


KILLED = """
import sys
sys.path[:0] = sys.argv[2:4]
import torch
torch.set_num_threads(1)
from train_checkpoint import advance, fresh
from palate.train import checkpoint
state = fresh()
found, _ = checkpoint.latest(sys.argv[1])
if found:
    checkpoint.load(found, state)
print(state.step, flush=True)
while state.step < 150:
    checkpoint.save(advance(state), sys.argv[1], keep=2)
"""


@pytest.mark.slow
def test_killed_at_random_and_resumed_ends_bit_equal(folder, tmp_path):
    """kill -9 with no say for the process, until it comes to its end by itself."""
    (tmp_path / "train_checkpoint.py").symlink_to(__file__)
    tests = os.path.dirname(os.path.dirname(__file__))
    chance, kills = random.Random(0), 0
    while True:
        command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path), tests]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip().isdigit(), process.communicate()[1]
        try:
            process.wait(chance.uniform(0.02, 0.4) if kills < 12 else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, process.communicate()[1]
        process.communicate()
        break
    again = fresh(seed=1)
    found, _ = checkpoint.latest(folder)
    checkpoint.load(found, again)
    assert kills >= 5 and bits(again) == bits(advance(fresh(), 150))


def test_state_is_strict_json(folder):
    state = advance(fresh(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)))
    state.best = {"step": 1, "value": float("nan")}
    path = checkpoint.save(state, folder)
    facts = json.loads((path / "state.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert facts["best"] == {"step": 1, "value": None}
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["optimizers"]["policy"]["groups"][0]["params"][0] == "policy.embed.weight"
