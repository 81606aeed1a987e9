import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import KINDS, Crash, disk
from hypothesis import given, settings
from hypothesis import strategies as st

from palate import files
from palate.errors import CheckpointError, MachineError, NotThereError, PalateError, UsageError


def strict(data: bytes):
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return json.loads(data, parse_constant=refuse)


# files


def test_a_file_is_replaced_whole(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")
    files.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_anywhere_leaves_old_or_new(tmp_path, kind):
    path = tmp_path / "a"
    for at in range(1, 100):
        path.write_bytes(b"old")
        raised = None
        with disk(at, kind) as faulty:
            try:
                files.write_bytes(path, b"new content")
            except (Crash, MachineError) as error:
                raised = error
        if isinstance(raised, MachineError):
            assert raised.errno == getattr(errno, kind) and raised.exit_code == 5 and str(path) in str(raised)
            assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        assert path.read_bytes() in (b"old", b"new content")
        if faulty.count < at:
            break
        if kind == "ENOSPC":
            assert path.read_bytes() == b"old" or at == 5  # only the last sync comes after the rename
    else:
        pytest.fail("never ran through")
    assert at == 6  # open, write, fsync, rename, fsync of the folder


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=60, deadline=None)
def test_json_is_strict_and_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("j") / "a.json"
    files.write_json(path, value)
    assert path.read_bytes().endswith(b"\n")
    assert strict(path.read_bytes()) == files.read_json(path) == finite(value)
    assert json.loads(files.json_line(value)) == finite(value)
    assert files.json_line(value).count(b"\n") == 1


def finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [finite(item) for item in value]
    return {key: finite(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_json_takes_numpy_torch_paths_and_keeps_order(tmp_path):
    files.write_json(
        tmp_path / "a", {"z": np.float32(0.5), "a": torch.tensor([1, 2]), "p": Path("x/y"), 3: (np.nan, math.inf)}
    )
    assert list(files.read_json(tmp_path / "a").items()) == [("z", 0.5), ("a", [1, 2]), ("p", "x/y"), ("3", [None] * 2)]
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a", {"x": object()})
    assert files.read_json(tmp_path / "a")["z"] == 0.5


def test_lines_are_added_and_a_failed_one_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_json(path, {"step": 1})
    with disk(2, "ENOSPC"), pytest.raises(MachineError, match="full"):
        files.append_json(path, {"step": 2, "text": "x" * 100})
    files.append_json(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(NotThereError, match="no such file"):
        files.read_json(tmp_path / "a")
    (tmp_path / "a").write_bytes(b'{"a":')
    with pytest.raises(CheckpointError, match="not JSON"):
        files.read_json(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"[" * 100000)
    with pytest.raises(CheckpointError):
        files.read_json(tmp_path / "a")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "/a", "a\0", ".hidden", "-x", " a", "a\n", "a" * 201, "c:"]
)
def test_unsafe_names_are_refused(name):
    with pytest.raises(UsageError, match="E504"):
        files.safe_name(name)


def test_safe_names_are_kept():
    assert [files.safe_name(name) for name in ("model", "step-000140", "größe_1.json")]


@pytest.mark.parametrize("code,words", [("EACCES", "permission"), ("EROFS", "read-only"), ("EDQUOT", "quota")])
def test_the_machines_no_is_said_in_words(tmp_path, code, words):
    with pytest.raises(MachineError, match=words) as caught, files.machine_errors(tmp_path):
        raise OSError(getattr(errno, code), "x")
    assert caught.value.exit_code == 5 and isinstance(caught.value, OSError)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_device_that_is_full():
    with pytest.raises(MachineError, match="full"):
        files.append_json("/dev/full", {"a": 1})


@pytest.mark.skipif(os.name == "nt", reason="no rlimits")
def test_a_file_size_limit_leaves_the_old_file(tmp_path):
    """Python ignores SIGXFSZ, so the limit comes as EFBIG, with a part of the file written."""
    program = f"""
import resource
from palate import files
from palate.errors import MachineError
files.write_bytes({str(tmp_path / "a")!r}, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_bytes({str(tmp_path / "a")!r}, b"x" * 5000)
except MachineError as error:
    print(error.code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "E506", done.stderr
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


# tensors


def test_tensors_of_every_dtype_come_back_bit_equal(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (5 * 8,), generator=generator, dtype=torch.uint8)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
    tensors = {str(dtype): bits.view(dtype) for dtype in dtypes}
    tensors |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3)}
    files.save_tensors(tmp_path / "a.safetensors", tensors, {"tag": "é"})
    back = files.load_tensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_numpy_and_views_and_other_layouts(tmp_path):
    big = torch.arange(1000.0)
    arrays = {
        "view": big[10:14],
        "turned": torch.arange(6.0).view(2, 3).t(),
        "np": np.arange(3, dtype=np.uint64),
        "big-endian": np.arange(3, dtype=">f8"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, arrays)
    back = files.load_tensors(path, framework="np")
    for name, array in arrays.items():
        assert np.array_equal(back[name], np.asarray(array)), name
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 4 * 4 + 6 * 4 + 3 * 8 + 3 * 8 + 6 * 8  # a view drags nothing along


def test_safetensors_itself_agrees(tmp_path):
    from safetensors import safe_open

    files.save_tensors(tmp_path / "a", {"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.zeros(3)}, {"k": "v"})
    with safe_open(tmp_path / "a", "pt") as opened:
        assert opened.metadata() == {"k": "v"}
        assert torch.equal(opened.get_tensor("x"), torch.ones(2, dtype=torch.bfloat16))


def test_saving_over_the_file_a_tensor_is_mapped_from(tmp_path):
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.arange(100_000.0)})
    mapped = files.load_tensors(path)
    files.save_tensors(path, mapped)
    assert torch.equal(files.load_tensors(path)["x"], torch.arange(100_000.0))
    assert torch.equal(mapped["x"], torch.arange(100_000.0))


@pytest.mark.parametrize("size", [0, 4, 8, 60, -1])
def test_a_cut_tensor_file_is_refused(tmp_path, size):
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.arange(10.0)})
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="E501"):
        files.load_tensors(path)


def test_no_safetensors_dtype_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match="complex"):
        files.save_tensors(tmp_path / "a", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []


# folders


def fill(final, text="hello"):
    with files.new_folder(final, {"step": 7}) as folder:
        files.save_tensors(folder / "w.safetensors", {"x": torch.arange(6.0)})
        (folder / "deep").mkdir()
        (folder / "deep" / "note.txt").write_text(text)
        (folder / "empty").write_bytes(b"")
        files.write_json(folder / "s.json", {"a": 1, "f": 0.1})


def test_a_folder_appears_whole(tmp_path):
    fill(tmp_path / "runs" / "a")
    manifest = files.verify_folder(tmp_path / "runs" / "a")
    assert manifest["step"] == 7
    assert list(manifest["files"]) == ["deep/note.txt", "empty", "s.json", "w.safetensors"]
    assert os.listdir(tmp_path / "runs") == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_whoever_may_read_the_manifest_may_read_the_weights(tmp_path):
    """Libraries write weights through a temporary file that its owner alone may read."""
    with files.new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_bytes(b"1")
        (folder / "weights").chmod(0o600)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert modes["weights"] == modes[files.MANIFEST]
    files.verify_folder(tmp_path / "model")


def test_a_folder_is_never_written_over(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="E313"), files.new_folder(tmp_path / "a"):
        pass
    late = files.new_folder(tmp_path / "b")
    (late.__enter__() / "x").write_text("x")
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError):
        late.__exit__(None, None, None)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and os.listdir(tmp_path / "b") == []


def test_an_exception_within_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), files.new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text({}["text"])
    assert os.listdir(tmp_path) == []


def test_a_left_over_of_the_same_pid_does_not_collide(tmp_path):
    (tmp_path / f".a.{os.getpid()}.tmp").mkdir()
    fill(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [f".a.{os.getpid()}.tmp", "a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_whole_or_unseen_wherever_the_disk_fails(tmp_path, kind):
    for at in range(1, 200):
        root = tmp_path / str(at)
        root.mkdir()
        raised = None
        with disk(at, kind) as faulty:
            try:
                fill(root / "a")
            except (Crash, MachineError) as error:
                raised = error
        if (root / "a").exists():
            assert files.verify_folder(root / "a")["step"] == 7
        else:
            assert raised is not None
        if isinstance(raised, MachineError):
            assert not list(root.glob(".a*")), "a failure that is not a crash cleans up"
        shutil.rmtree(root)
        if faulty.count < at:
            assert raised is None
            break
    else:
        pytest.fail("never ran through")
    assert at > 20


def test_every_damage_is_found_and_named(tmp_path):
    fill(tmp_path / "a", text="hello " * 20)
    good = tmp_path / "a"
    chance = random.Random(0)
    names = [p for p in good.rglob("*") if p.is_file()]
    for trial in range(200):
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        path = bad / chance.choice([p for p in names if p.stat().st_size]).relative_to(good)
        if trial < 150:
            data = bytearray(path.read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        elif trial < 175:
            os.truncate(path, chance.randrange(path.stat().st_size))
        else:
            path.unlink()
        with pytest.raises(CheckpointError, match=f"{path.name}.*E501"):
            files.verify_folder(bad)
        shutil.rmtree(bad)


def test_every_bit_of_the_manifest_counts(tmp_path):
    with files.new_folder(tmp_path / "a", {"x": 1.5}) as folder:
        (folder / "f").write_bytes(b"1")
    path = tmp_path / "a" / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                files.verify_folder(tmp_path / "a")
    path.write_bytes(data + b" ")
    with pytest.raises(CheckpointError):
        files.verify_folder(tmp_path / "a")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"format":1}', b'{"format":1,"files":[]}', b"\xff", b"[" * 9999]
)
def test_a_manifest_of_any_shape_is_refused_clearly(tmp_path, content):
    fill(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        files.verify_folder(tmp_path / "a")


def test_a_manifest_of_a_later_palate(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 2)
    fill(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="E311"):
        files.verify_folder(tmp_path / "a")


def test_extra_files_links_and_missing_folders(tmp_path):
    fill(tmp_path / "a")
    (tmp_path / "a" / "deep" / "more").write_text("x")
    with pytest.raises(CheckpointError, match=r"more.*not in the manifest"):
        files.verify_folder(tmp_path / "a")
    (tmp_path / "a" / "deep" / "more").unlink()
    os.utime(tmp_path / "a" / "s.json", (2**33, 2**33))  # times are nobody's business
    files.verify_folder(tmp_path / "a")
    (tmp_path / "a" / "s.json").rename(tmp_path / "s.json")
    (tmp_path / "a" / "s.json").symlink_to(tmp_path / "s.json")
    with pytest.raises(CheckpointError, match="E504"):
        files.verify_folder(tmp_path / "a")
    with pytest.raises(NotThereError):
        files.verify_folder(tmp_path / "b")


def test_swapped_files_of_two_folders_are_found(tmp_path):
    fill(tmp_path / "a", "one")
    fill(tmp_path / "b", "two")
    shutil.copy(tmp_path / "a" / "deep" / "note.txt", tmp_path / "b" / "deep" / "note.txt")
    with pytest.raises(CheckpointError, match=r"note\.txt was changed|note\.txt: was changed"):
        files.verify_folder(tmp_path / "b")


def test_remove_tree_does_not_follow_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("x")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "kept")
    files.remove_tree(tmp_path / "a")
    assert os.listdir(tmp_path / "kept") == ["x"] and not (tmp_path / "a").exists()


def test_moving_aside_never_collides(tmp_path):
    for number in range(3):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "n").write_text(str(number))
        files.move_aside(tmp_path / "a", tmp_path / ".incomplete")
    found = sorted((p.name, (p / "n").read_text()) for p in (tmp_path / ".incomplete").iterdir())
    assert found == [("a", "0"), ("a.1", "1"), ("a.2", "2")]


# locks

HOLD = """
import sys, time
from palate.files import Lock
from palate.errors import MachineError
try:
    lock = Lock(sys.argv[1])
except MachineError as error:
    print(error, flush=True)
    sys.exit(5)
print("mine", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path, seconds):
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_by_name(tmp_path):
    with files.Lock(tmp_path / ".lock"):
        assert files.Lock.held(tmp_path / ".lock")
        second = hold(tmp_path / ".lock", 0)
        said = second.communicate(timeout=60)[0]
        assert second.returncode == 5
        assert f"process {os.getpid()} on {os.uname().nodename} since 2" in said and "E503" in said
        assert hold(tmp_path / ".lock", 0).wait(60) == 5  # the refused one did not free it
    assert not files.Lock.held(tmp_path / ".lock")
    third = hold(tmp_path / ".lock", 0)
    assert third.communicate(timeout=60)[0] == "mine\n"


def test_a_killed_owner_frees_it_at_once(tmp_path):
    first = hold(tmp_path / ".lock", 60)
    assert first.stdout.readline() == "mine\n"
    with pytest.raises(MachineError, match=f"process {first.pid} "):
        files.Lock(tmp_path / ".lock")
    assert files.Lock.held(tmp_path / ".lock")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with files.Lock(tmp_path / ".lock"):
        pass


def test_the_same_process_is_refused_too_and_a_fork_holds_nothing(tmp_path):
    lock = files.Lock(tmp_path / ".lock")
    with pytest.raises(MachineError, match="E503"):
        files.Lock(tmp_path / ".." / tmp_path.name / ".lock")
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    try:
        lock.close()
        other = hold(tmp_path / ".lock", 0)
        assert other.communicate(timeout=60)[0] == "mine\n"
    finally:
        child.kill()
        child.join()


def test_threads_write_one_file_without_meeting(tmp_path):
    def write(letter):
        for _ in range(20):
            files.write_bytes(tmp_path / "a", letter * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "a").read_bytes())) == 1 and os.listdir(tmp_path) == ["a"]


def test_files_asks_no_torch_for_its_import():
    program = "import sys, palate.files, palate.run, palate.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_errors_of_palate_pass_through(tmp_path):
    with pytest.raises(PalateError, match="x"), files.machine_errors(tmp_path):
        raise NotThereError("x")


def test_halves_of_files_and_of_folders_are_taken_away(tmp_path):
    """As SIGKILL leaves them: a file being written, and a folder with one inside."""
    for name in (".a.json.7-0.tmp", "deep/.b.jsonl.7-1.tmp", "deep/.model.7.tmp/.w.7-2.tmp", "deep/.model.7.tmp/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "deep" / "whole.jsonl").write_text("whole")
    files.remove_halves(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["deep", "whole.jsonl"]
