import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from faults import KINDS, Crash, disk
from hypothesis import given, settings
from hypothesis import strategies as st

from palate import files
from palate.store import BLOCK, MAX_SEGMENTS, ScoreStore, cache_root, reference_store, row_key


def keys_of(numbers):
    """Keys that share their upper or lower half with others."""
    numbers = np.asarray(numbers, dtype=np.uint64).reshape(-1)
    return np.stack([numbers // np.uint64(5), numbers % np.uint64(5)], axis=1)


def put(store, numbers, tag="t", scale=1.0):
    numbers = np.asarray(numbers)
    return store.put(keys_of(numbers), -scale * (numbers + 0.5), numbers, tag)


def segments(folder):
    return sorted(Path(folder).glob("seg-*.safetensors"))


@pytest.fixture(autouse=True)
def without_sync():
    """A test cannot cut the power, so it need not wait for the disk."""
    with disk():
        yield


# keys


def test_a_key_stands_for_its_ids_and_spans_alone():
    base = row_key(np.array([1, 2], np.int32), np.array([3, 4], np.int32), ((0, 2),))
    assert len(base) == 16
    assert base == row_key([1, 2], np.array([3, 4], np.int64), [(0, 2)])
    others = [
        row_key([1], [2, 3, 4], ((0, 2),)),
        row_key([1, 2, 3], [4], ((0, 2),)),
        row_key([1, 2], [3, 4], ((0, 1),)),
        row_key([1, 2], [3, 4], ((0, 1), (1, 2))),
        row_key([1, 2], [3, 4], ()),
        row_key([1, 2], [3, 5], ((0, 2),)),
        row_key([2, 1], [3, 4], ((0, 2),)),
        row_key([], [1, 2, 3, 4], ((0, 2),)),
    ]
    assert len({base, *others}) == 9


def test_a_key_is_the_same_for_ever():
    """Stored scores are found by it: another encoding would silently score everything again."""
    assert row_key([1, 2], [3, 4], ((0, 2),)).hex() == "e51b393a026bc5f79915e39b1978cb13"


rows = st.lists(st.integers(0, 2**31 - 1), max_size=4)
spans = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3)


@given(rows, rows, spans, rows, rows, spans)
@settings(max_examples=100, deadline=None)
def test_equal_keys_mean_equal_rows(a, b, c, d, e, f):
    assert (row_key(a, b, c) == row_key(d, e, f)) == ((a, b, c) == (d, e, f))


# a store is a dict


operation = st.tuples(
    st.sampled_from(["put", "put", "put", "reopen"]), st.lists(st.integers(0, 60), max_size=20), st.sampled_from("ab")
)


@given(st.lists(operation, max_size=12), st.lists(st.integers(0, 80), max_size=30), st.sampled_from("ab"))
@settings(max_examples=60, deadline=None)
def test_it_finds_what_a_dict_would(operations, asked, tag):
    with tempfile.TemporaryDirectory() as folder:
        store, model = ScoreStore(f"{folder}/i"), {}
        for number, (name, numbers, made) in enumerate(operations):
            if name == "reopen":
                store = ScoreStore(f"{folder}/i")
                continue
            new = {(made, n) for n in numbers} - model.keys()
            values = np.array([number + n / 7 for n in numbers])
            assert store.put(keys_of(numbers), values, np.array(numbers), made) == len(new)
            for n, value in zip(numbers, values, strict=True):
                model.setdefault((made, n), value)
        found, logp, length, tags = store.lookup(keys_of(asked), tag)
        other = "b" if tag == "a" else "a"
        expected = [(tag, n) if (tag, n) in model else (other, n) for n in asked]
        assert found.tolist() == [key in model for key in expected]
        assert logp[found].tolist() == [model[key] for key in expected if key in model]
        assert np.isnan(logp[~found]).all()
        assert length.tolist() == [n if key in model else 0 for n, key in zip(asked, expected, strict=True)]
        assert tags == {key[0] for key in expected if key in model}
        assert store.notes == []


def test_its_own_tag_comes_first_and_others_are_named(tmp_path):
    store = ScoreStore(tmp_path / "i")
    put(store, [1, 2, 3], "cpu")
    put(store, [3, 4], "gpu", scale=2.0)
    found, logp, _, tags = store.lookup(keys_of([1, 3, 4, 5]), "gpu")
    assert found.tolist() == [True, True, True, False]
    assert logp[:3].tolist() == [-1.5, -7.0, -9.0] and tags == {"cpu", "gpu"}
    assert store.lookup(keys_of([3, 4]), "gpu")[3] == {"gpu"}
    assert store.lookup(keys_of([]), "gpu")[3] == set()


def test_what_is_not_finite_is_not_kept(tmp_path):
    store = ScoreStore(tmp_path / "i")
    assert store.put(keys_of([1, 2, 3]), np.array([np.nan, -np.inf, -1.0]), np.ones(3), "t") == 1
    assert store.lookup(keys_of([1, 2, 3]), "t")[0].tolist() == [False, False, True]


def test_shapes_are_checked(tmp_path):
    store = ScoreStore(tmp_path / "i")
    with pytest.raises(ValueError, match="uint64"):
        store.lookup(np.zeros((3, 2)), "t")
    with pytest.raises(ValueError, match="2 keys"):
        store.put(keys_of([1, 2]), np.zeros(3), np.zeros(3), "t")


def test_the_same_again_writes_nothing(tmp_path):
    store = ScoreStore(tmp_path / "i")
    put(store, range(100))
    before = segments(store.folder)
    assert put(ScoreStore(store.folder), range(100)) == 0 and segments(store.folder) == before


def test_many_segments_become_few(tmp_path):
    store = ScoreStore(tmp_path / "i")
    reader = ScoreStore(tmp_path / "i")
    for number in range(3 * MAX_SEGMENTS):
        put(store, range(number * 10, number * 10 + 10), "ab"[number % 2])
        if number % 20 == 0:
            wanted = np.arange(number * 10 + 10)
            found, logp, _, _ = reader.lookup(keys_of(wanted), "a")
            assert found.all() and (logp == -(wanted + 0.5)).all()
    assert len(segments(store.folder)) <= MAX_SEGMENTS
    assert len(store) == 30 * MAX_SEGMENTS
    listed = files.read_json(store.folder / "manifest.json")["segments"]
    assert sorted(listed) == [path.name for path in segments(store.folder)]
    assert sum(facts["rows"] for facts in listed.values()) == len(store)
    assert store.notes == reader.notes == []


def test_big_segments_are_not_rewritten(tmp_path):
    store = ScoreStore(tmp_path / "i")
    put(store, range(1_000_000, 1_020_000))
    (big,) = segments(store.folder)
    before = big.stat()
    for number in range(MAX_SEGMENTS + 1):
        put(store, [number])
    assert big.stat().st_mtime_ns == before.st_mtime_ns and len(segments(store.folder)) < 10


def test_a_reader_survives_a_merge_between_listing_and_opening(tmp_path, monkeypatch):
    store = ScoreStore(tmp_path / "i")
    for number in range(5):
        put(store, [number])
    reader, listing = ScoreStore(tmp_path / "i"), os.listdir
    seen = []

    def merged_meanwhile(folder):
        names = listing(folder)
        if not seen:
            seen.append(1)
            store._compact()
        return names

    monkeypatch.setattr(os, "listdir", merged_meanwhile)
    assert reader.lookup(keys_of(range(5)), "t")[0].all()
    assert len(segments(store.folder)) == 1 and reader.notes == []


def test_the_manifest_is_for_people(tmp_path):
    store = ScoreStore(tmp_path / "i")
    put(store, range(10))
    for content in (b"", b"[]", b'{"segments":{"seg-gone.safetensors":{}}}'):
        (store.folder / "manifest.json").write_bytes(content)
        again = ScoreStore(store.folder)
        assert again.lookup(keys_of(range(10)), "t")[0].all() and again.notes == []
    (store.folder / "manifest.json").unlink()
    assert len(ScoreStore(store.folder)) == 10


def test_left_overs_are_swept_when_old(tmp_path):
    store = ScoreStore(tmp_path / "i")
    put(store, [1])
    for name, when in ((".seg-old.1-1.tmp", 0), (".seg-new.1-2.tmp", 2**33)):
        (store.folder / name).write_bytes(b"x")
        os.utime(store.folder / name, (when, when))
    store._compact()
    assert [p.name for p in store.folder.glob(".seg*")] == [".seg-new.1-2.tmp"]


# rot


def values_or_nothing(folder, numbers):
    """Looks up; asserts that what is served is right."""
    store = ScoreStore(folder)
    found, logp, length, _ = store.lookup(keys_of(numbers), "t")
    assert (logp[found] == -(numbers[found] + 0.5)).all() and (length[found] == numbers[found]).all()
    return found, store


def test_no_flipped_bit_is_ever_served(tmp_path):
    numbers = np.arange(3 * BLOCK)
    put(ScoreStore(tmp_path / "i"), numbers)
    (path,) = segments(tmp_path / "i")
    data, chance = path.read_bytes(), np.random.default_rng(0)
    noticed = 0
    for trial in range(200):
        flipped = bytearray(data)
        place = int(chance.integers(len(data))) if trial else 0
        flipped[place] ^= 1 << int(chance.integers(8))
        path.write_bytes(flipped)
        found, store = values_or_nothing(tmp_path / "i", numbers)
        if not found.all():
            noticed += 1
            assert not found.any() and path.name in store.notes[0] and "E501" in store.notes[0]
            assert put(store, numbers) == len(numbers)  # computed again, and good from then on
            assert values_or_nothing(tmp_path / "i", numbers)[0].all()
    assert noticed >= 195  # the rest fell where the header has room


@pytest.mark.parametrize("size", [0, 5, 8, 100, 300, -1])
def test_a_cut_segment_is_refused(tmp_path, size):
    store = ScoreStore(tmp_path / "i")
    put(store, range(10))
    put(store, range(20, 30))
    path = segments(store.folder)[0]
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    found, store = values_or_nothing(tmp_path / "i", np.r_[0:10, 20:30])
    assert found.sum() == 10 and len(store.notes) == 1


def test_foreign_segments_are_refused(tmp_path):
    """Of other weights, under another name, or no segment at all."""
    put(ScoreStore(tmp_path / "a"), range(10))
    put(ScoreStore(tmp_path / "a"), range(10, 20))
    (tmp_path / "b").mkdir()
    one, two = segments(tmp_path / "a")
    shutil.copy(one, tmp_path / "b")
    (tmp_path / "b" / "seg-x.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    found, store = values_or_nothing(tmp_path / "b", np.arange(20))
    assert not found.any() and len(store.notes) == 2 and "other weights" in "".join(store.notes)
    shutil.copy(one, two)
    found, store = values_or_nothing(tmp_path / "a", np.arange(20))
    assert found.sum() == 10 and "other content" in store.notes[0]


def test_a_rotten_segment_is_not_merged(tmp_path):
    store = ScoreStore(tmp_path / "i")
    for number in range(4):
        put(store, range(number * 10, number * 10 + 10))
    path = segments(store.folder)[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = ScoreStore(store.folder)
    again._refresh()
    again._compact()
    found, _ = values_or_nothing(tmp_path / "i", np.arange(40))
    assert found.sum() == 30 and path.exists()


# what the machine refuses


@pytest.mark.parametrize("kind", KINDS)
def test_wherever_the_disk_fails_what_is_found_is_right(tmp_path, kind):
    """A put with a merge in it: whole, unseen, or noted; earlier rows are always there."""
    base = tmp_path / "base" / "i"
    for number in range(3):
        put(ScoreStore(base), range(number * 10, number * 10 + 10))
    for at in range(1, 200):
        folder = tmp_path / "run" / "i"
        shutil.copytree(base, folder)
        store = ScoreStore(folder)
        with disk(at, kind) as faulty:
            try:
                stored = put(store, range(30, 40))
                store._compact()
            except Crash:
                stored = None
            except (files.MachineError, OSError):
                stored = 10  # the merge failed, not the put
        numbers = np.arange(40)
        found, after = values_or_nothing(folder, numbers)
        assert found[:30].all() and found[30:].all() == found[30:].any()
        assert not after.notes
        if stored == 0:
            assert len(store.notes) == 1 and put(store, range(50, 60)) == 0
        elif stored:
            assert found.all()
        shutil.rmtree(folder.parent)
        if faulty.count < at:
            break
    else:
        pytest.fail("never ran through")
    assert at > 15


def test_a_place_that_cannot_be_written_is_noted_once(tmp_path):
    (tmp_path / "file").write_text("x")
    store = ScoreStore(tmp_path / "file" / "i")
    assert put(store, [1]) == 0 and put(store, [2]) == 0
    assert not store.lookup(keys_of([1]), "t")[0].any()
    assert any("not stored from here on" in note for note in store.notes) and len(store.notes) <= 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become nobody")
def test_a_read_only_store_is_read(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        put(ScoreStore(f"{folder}/i"), range(10))
        program = f"""
import os, numpy as np
from palate.store import ScoreStore
import mmap  # before the user changes, who may not read this environment
os.setuid(65534)
store = ScoreStore({folder + "/i"!r})
keys = np.stack([np.arange(10) // 5, np.arange(10) % 5], 1).astype(np.uint64)
print(store.lookup(keys, "t")[0].sum(), store.put(keys + np.uint64(9), np.zeros(10), np.zeros(10), "t"), store.notes)
"""
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("10 0 ['scores are not stored") and "E314" in done.stdout, done.stderr


# others


def _writer(folder, which):
    store = ScoreStore(folder)
    for number in range(40):
        start = (which * 40 + number) * 5
        put(store, range(start, start + 10))  # half of it is the neighbour's too
    os._exit(len(store.notes))


def test_four_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(tmp_path / "i", which)) for which in range(4)]
    for writer in writers:
        writer.start()
    numbers = np.arange(805)
    while any(writer.is_alive() for writer in writers):
        _, store = values_or_nothing(tmp_path / "i", numbers)
        assert store.notes == []
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found, store = values_or_nothing(tmp_path / "i", numbers)
    assert found.all() and store.notes == []
    put(store, [10**6])
    assert len(segments(tmp_path / "i")) <= MAX_SEGMENTS + 1
    assert not list((tmp_path / "i").glob("*.tmp"))


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert reference_store("abc").folder == tmp_path / "reference" / "abc"
    monkeypatch.delenv("PALATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x" / "palate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    if sys.platform == "linux":
        assert cache_root() == tmp_path / "h" / ".cache" / "palate"


def test_opening_reads_next_to_nothing(tmp_path):
    """Two million rows: open and a search touch a few pages, not 64 MB."""
    store = ScoreStore(tmp_path / "i")
    count = 2_000_000
    keys = np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.uint64)
    store.put(keys, np.arange(count) * -1.0, np.ones(count), "t")
    program = f"""
import sys, resource, numpy as np
from palate.store import ScoreStore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = ScoreStore({str(tmp_path / "i")!r})
found, logp, _, _ = store.lookup(np.array([[7, 0], [1_999_999, 0], [3, 1]], np.uint64), "t")
assert found.tolist() == [True, True, False] and logp[1] == -1_999_999
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert int(done.stdout) < 20_000, done.stderr
