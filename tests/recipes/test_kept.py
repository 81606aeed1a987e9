"""Tokens of large files are kept: a run over them is the run over lists, bit for bit, and damage never gets through."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from runs_kit import JUDGES, TEMPLATE, chats, demonstrations, feedbacks, metrics, pairs, write_rows
from safetensors.numpy import load_file

from palate.data import sources, table
from palate.data.tokens import tokenize_text
from palate.errors import DataError
from palate.recipes import kept, rows
from palate.recipes.kept import Recipe, read_kept
from palate.store import cache_root

SMALL = dict(batch=5, steps=6, device="cpu", lr=3e-3, samples=2, save_every=2, eval_every=3)


@pytest.fixture
def palate(palate, monkeypatch):
    """The command line, with tables of several batches."""
    monkeypatch.setattr(table, "BATCH", 7)
    return palate


@pytest.fixture
def all_kept(monkeypatch):
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)


def folders(pattern: str = "tokens-*") -> list[Path]:
    return sorted((cache_root() / "data").glob(f"*/{pattern}"))


def ends(run: str):
    """All that a run leaves and that does not tell the time."""
    run = Path(run)
    weights = sorted([run / "model" / "model.safetensors", *run.glob("checkpoints/*/*.safetensors")])
    column = {}
    if (run / "reference.safetensors").exists():
        column = {name: value.tobytes() for name, value in load_file(run / "reference.safetensors").items()}
    start = json.loads((run / "run.json").read_text())["start"]["tokens"]
    texts = [path.read_text() for name in ("data.json", "samples.jsonl", "rejects.jsonl") for path in run.glob(name)]
    return [path.read_bytes() for path in weights], metrics(run), texts, column, start


def rows_with_faults(make, count: int) -> list[dict]:
    """Rows, some of them doubled or shared prompts, one that is no row, one whose completion the limit leaves out."""
    made = list(make(count))
    prompt = made[3]["prompt"]
    return [*made, made[3], {"prompt": 5}, dict(made[4], prompt=prompt), {**made[5], "id": "a"}, {**made[6], "id": "a"}]


CASES = {
    "dpo": ("dpo", pairs, {}),
    "chats": ("dpo", chats, {}),
    "ranked": ("dpo", pairs, {"loss": "plackett_luce"}),
    "kto": ("kto", feedbacks, {}),
    "sft": ("sft", demonstrations, {"eval": "none", "eval_every": None}),
    "reward": ("reward", pairs, {"truth": "liking:like"}),
}


@pytest.mark.parametrize(
    "case", ["dpo", "kto", "sft", "reward", *(pytest.param(c, marks=pytest.mark.slow) for c in ("chats", "ranked"))]
)
def test_a_run_over_tokens_that_are_kept_is_the_run_over_lists(palate, chatty, tmp_path, monkeypatch, case):
    """Weights, metrics, samples, reference column, data.json and rejects are equal; made, found, and found again."""
    verb, make, options = CASES[case]
    data = write_rows(tmp_path / "d.jsonl", rows_with_faults(make, 44))
    (tmp_path / "liking.py").write_text(JUDGES)
    options = SMALL | dict(model=chatty, data=data, bad_rows="skip") | options
    palate.ok(verb, out="lists", **options)
    assert not folders()
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    palate.ok(verb, out="made", **options)
    (folder,) = folders()
    assert ends("made") == ends("lists")
    before = (folder / kept.TABLE).stat().st_mtime_ns
    monkeypatch.setattr(rows, "_tokenised", lambda *_: pytest.fail("tokenised again"))
    palate.ok(verb, out="found", **options)
    assert ends("found") == ends("lists")
    palate.ok(verb, out="seed", **options | {"seed": 4, "steps": 1})  # another split of the same tokens
    assert folders() == [folder]
    assert (folder / kept.TABLE).stat().st_mtime_ns == before


def test_two_files_are_kept_and_compared_once(palate, chatty, tmp_path, all_kept, monkeypatch):
    made = list(pairs(40))
    files = {
        "data": write_rows(tmp_path / "d.jsonl", made[:30]),
        "eval": write_rows(tmp_path / "e.jsonl", [dict(made[0], chosen=" other"), *made[30:]]),
    }
    palate.ok("dpo", model=chatty, out="one", **files, **SMALL)
    assert len(folders()) == 2
    assert len(folders("apart-*")) == 1
    monkeypatch.setattr(sources, "refuse_shared_rows", lambda *_: pytest.fail("compared again"))
    palate.ok("dpo", model=chatty, out="two", **files, **SMALL)
    assert ends("one") == ends("two")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept, "KEPT_BYTES", 2**40)
    palate.ok("dpo", model=chatty, out="lists", **files, **SMALL)
    assert ends("one") == ends("lists")
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    files["eval"] = write_rows(tmp_path / "e.jsonl", made[28:])  # two of them are trained on
    palate("dpo", model=chatty, out="three", **files, **SMALL)
    assert "E231" in palate.said


def test_a_run_over_kept_tokens_resumes_to_the_same_bits(palate, chatty, tmp_path, all_kept):
    from palate.recipes import preference
    from palate.recipes.training import Paused

    data = write_rows(tmp_path / "d.jsonl", pairs(44))
    palate.ok("dpo", model=chatty, data=data, out="straight", **SMALL)
    config = preference.PreferenceConfig(model=str(chatty), data=str(data), out="cut", report=False, **SMALL)
    with pytest.raises(Paused):
        preference.run(config, stop=3, say=lambda text: None)
    preference.run(config.model_copy(update={"resume": True}), say=lambda text: None)
    assert ends("cut") == ends("straight")


# damage


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "more"])
@pytest.mark.parametrize("file", [kept.TABLE, "manifest.json", "reading"])
def test_what_is_damaged_is_made_again_and_never_trusted(tmp_path, tiny_tokenizer, all_kept, file, how):
    data = write_rows(tmp_path / "d.jsonl", pairs(20))
    good, _ = taken(data, tiny_tokenizer)
    (folder,) = folders()
    path = folder.parent / "reading" / "manifest.json" if file == "reading" else folder / file
    whole = path.read_bytes()
    for at in (0, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        if how == "gone":
            path.unlink()
        else:
            damage = {"flip": flipped(whole, at), "cut": whole[: len(whole) // 2], "empty": b"", "more": whole + b"x"}
            path.write_bytes(damage[how])
        again, said = taken(data, tiny_tokenizer)
        assert again == good
        assert "made again" in said
        assert path.read_bytes() == whole
        assert "made again" not in taken(data, tiny_tokenizer)[1]


def taken(data, tokenizer, read=None, limit=64):
    """The tokens of a file, as plain values, by way of the cache; and what was said."""
    said: list[str] = []
    config = type("Config", (), {"bad_rows": "stop", "format": None})()
    records = read_kept(read or partial(sources.read_pairs, bad_rows="stop"), str(data), said.append)
    groups, marks = rows.Reading().take(records, tokenizer, limit, config, usable=rows.with_signal, say=said.append)
    ids = [[ids.tolist() for ids in (group.prompt, *group.completions)] for group in groups]
    return (ids, marks.tobytes(), [str(group.source) for group in groups]), "\n".join(said)


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path, tiny_tokenizer, all_kept, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", pairs(20))
    good, _ = taken(data, tiny_tokenizer)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "file" / "below"))
    again, said = taken(data, tiny_tokenizer)
    assert again == good
    assert "tokens are not kept" in said


def test_a_writer_that_dies_leaves_nothing_that_is_found(tmp_path, tiny_tokenizer, all_kept, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", pairs(20))

    class Killed(BaseException):
        pass

    def dies(self, group, mark):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(table.TableWriter, "append", dies)
        with pytest.raises(Killed):
            taken(data, tiny_tokenizer)
    assert not folders()
    assert taken(data, tiny_tokenizer)[0] == taken(data, tiny_tokenizer)[0]
    assert len(folders()) == 1


def test_rows_that_cannot_be_used_stop_a_kept_reading_too(tmp_path, tiny_tokenizer, all_kept):
    long = {"prompt": "p" * 300, "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "d.jsonl", [*pairs(20), {"prompt": "p", "chosen": "a"}])
    with pytest.raises(DataError):
        taken(data, tiny_tokenizer)
    assert not folders("*")
    write_rows(data, [*pairs(20), long])
    taken(data, tiny_tokenizer)


# what it is known by


def test_every_ingredient_of_the_tokens_is_in_their_name(tiny_tokenizer):
    import copy

    def changed(change):
        other = copy.deepcopy(tiny_tokenizer)
        change(other)
        return other

    base = Recipe(tiny_tokenizer, 64, rows.with_signal, None)
    assert base.key() == replace(base, tokenizer=copy.deepcopy(tiny_tokenizer)).key()
    others = [
        replace(base, limit=65),
        replace(base, usable=rows.with_order),
        replace(base, usable=rows.anything),
        replace(base, pieces=tokenize_text),
        replace(base, tokenizer=changed(lambda t: setattr(t, "chat_template", TEMPLATE))),
        replace(base, tokenizer=changed(lambda t: setattr(t, "chat_template", TEMPLATE + " "))),
        replace(base, tokenizer=changed(lambda t: t.add_tokens(["quick"]))),
        replace(base, tokenizer=changed(lambda t: setattr(t, "eos_token", t.pad_token))),
        replace(base, tokenizer=changed(lambda t: setattr(t, "bos_token", t.pad_token))),
    ]
    keys = [recipe.key() for recipe in [base, *others]]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert replace(base, usable=lambda group: None).key() is None  # it has no name


def test_every_ingredient_of_the_reading_is_in_its_name(tmp_path, all_kept, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", pairs(20))
    other = write_rows(tmp_path / "other.jsonl", pairs(20))

    def place(path=data, read=sources.read_pairs, slice="", **options):
        records = read_kept(partial(read, **{"columns": None, "bad_rows": "stop"} | options), f"{path}{slice}", print)
        return records.folder

    places = [
        place(),
        place(other),  # its rows say where they stand
        place(read=sources.read_demonstrations),
        place(read=sources.read_demonstrations, turns="last"),
        place(bad_rows="skip"),
        place(columns={"id": ""}),
        place(slice="[:9]"),
        place(slice="[3:9]"),
        place(slice="[3:]"),
    ]
    write_rows(data, pairs(21))
    places.append(place())
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_code", lambda: "another palate")
        places.append(place())
    assert None not in places
    assert len(set(places)) == len(places)
    assert place() == places[9]
    assert place(columns={"id": ""}, format="jsonl") not in places


def test_small_files_and_records_that_are_wanted_are_not_kept(tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pairs(20))
    assert read_kept(partial(sources.read_pairs), str(data), print).folder is None
    assert not (cache_root() / "data").exists()


def test_what_nobody_asks_for_goes_after_a_while(tmp_path, tiny_tokenizer, all_kept, monkeypatch):
    import os

    first, second = (write_rows(tmp_path / f"{n}.jsonl", pairs(n)) for n in (20, 21))
    taken(first, tiny_tokenizer)
    (old,) = {folder.parent for folder in folders()}
    os.utime(old, (0, 0))
    taken(first, tiny_tokenizer)  # asked for: it stays
    taken(second, tiny_tokenizer)
    assert len(folders()) == 2
    os.utime(old, (0, 0))
    taken(write_rows(tmp_path / "3.jsonl", pairs(22)), tiny_tokenizer)
    assert not old.exists()
    assert len(folders()) == 2
