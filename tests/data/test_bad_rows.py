# ruff: noqa: E501, one row of a table a line
"""Every bad row and file of the table ends in one message with file, line, field, code and what to do, and no other."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from palate.data import rows as rows_module
from palate.data.doctor import doctor
from palate.data.sources import read_demonstrations, read_feedback, read_pairs, refuse_shared_rows
from palate.errors import DataError, MachineError, NotThereError, PalateError, UsageError

GOOD = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}


def row(**changes) -> bytes:
    return json.dumps(GOOD | changes).encode()


def raw(text: str) -> bytes:
    return text.encode()


def chat(*roles, **changes) -> list:
    return [{"role": role, "content": f"{role} {i}"} | changes for i, role in enumerate(roles)]


A = chat("assistant")
P = chat("user")

# id, the bytes of line 2 (a good row stands in line 1), field or None, code, words of the message
ROWS = [
    ("F8 bad byte", b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}', None, "E106", f"0xff at offset {len(row()) + 14}"),
    ("F9 lone surrogate", rb'{"prompt": "a", "chosen": "x\ud800", "rejected": "c"}', "chosen", "E107", "U+D800"),
    ("F10 NUL", rb'{"prompt": "a\u0000", "chosen": "b", "rejected": "c"}', "prompt", "E108", "U+0000"),
    ("F11 lone CR", row() + b"\r" + row(), None, "E109", "carriage return"),
    ("F18 depth", raw('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"), None, "E115", "64"),
    ("F18 depth 65", raw('{"prompt": ' + "[" * 64 + "]" * 64 + "}"), None, "E115", "64"),
    ("F19 integer", raw('{"prompt": "a", "chosen": "b", "rejected": "c", "n": ' + "9" * 5000 + "}"), "n", "E116", "5000"),
    ("not JSON", b'{"prompt": "a" "chosen"}', None, "E200", "column 16"),
    ("text after", row() + b" x", None, "E200", "after the end"),
    ("D1 list", b"[]", None, "E201", "a list"),
    ("D1 number", b"3", None, "E201", "a number"),
    ("D1 null", b"null", None, "E201", "null"),
    ("D1 text", b'"x"', None, "E201", "text"),
    ("D2 absent", b'{"prompt": "a", "chosen": "b", "rejectd": "c"}', "rejected", "E202", "rejectd"),
    ("D2 absent, empty row", b"{}", "prompt", "E202", "no fields"),
    ("D3 number", row(chosen=3), "chosen", "E203", "a number"),
    ("D3 bool", row(chosen=True), "chosen", "E203", "true or false"),
    ("D3 object", row(prompt=5.5), "prompt", "E203", "a number"),
    ("D3 list of texts", row(chosen=["a"]), "chosen[0]", "E203", "text where a message"),
    ("D4 null", row(rejected=None), "rejected", "E204", "null"),
    ("D4 null message", row(rejected=[None]), "rejected[0]", "E204", "null"),
    ("D5 NaN", b'{"prompt": "a", "chosen": "b", "rejected": "c", "s": [1, NaN]}', "s[1]", "E205", "NaN"),
    ("D5 Infinity", b'{"prompt": "a", "chosen": "b", "rejected": "c", "s": -Infinity}', "s", "E205", "-Infinity"),
    ("D6 twice", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "chosen", "E206", "17 and 49"),
    ("D6 twice, nested", b'{"prompt": "a", "chosen": "b", "rejected": "c", "m": {"x": 1, "x": 2}}', "m.x", "E206", "55 and 63"),
    ("D7 empty prompt", row(prompt=""), "prompt", "E207", "empty"),
    ("D7 blank prompt", row(prompt=" \n"), "prompt", "E207", "empty"),
    ("D8 empty", row(rejected=""), "rejected", "E208", "empty"),
    ("D8 blank", row(chosen=" \t"), "chosen", "E208", "empty"),
    ("D9 equal", row(rejected=" Because."), "rejected", "E209", "equal"),
    ("D13 whole", row(chosen="Why? Because.", rejected="Why? No."), "chosen", "E213", "repeats the prompt"),
    ("D17 object", row(chosen={"a": 1}), "chosen.role", "E202", "not there"),
    ("D19 forms", row(chosen=A), "rejected", "E219", "messages"),
    ("D29 keys", json.dumps(GOOD | {f"k{i}": 0 for i in range(10_000)}).encode(), None, "E229", "1000"),
    ("D31 form", row(prompt=P, chosen=A, rejected=chat("assistant", content="x")), None, "E230", "plain text"),
]  # fmt: skip

CHATS = [
    ("D7 no message", [], A, A, "prompt", "E207", "empty"),
    ("D7 blank", chat("user", content=" "), A, A, "prompt", "E207", "empty"),
    ("D8 none", P, [], A, "chosen", "E208", "no message"),
    ("D8 blank", P, chat("assistant", content=" "), A, "chosen", "E208", "empty"),
    ("D9 equal", P, A, A, "rejected", "E209", "equal"),
    ("D14 role", chat("moderator"), A, A, "prompt[0].role", "E214", '"moderator"'),
    ("D14 role type", [{"role": 3, "content": "a"}], A, A, "prompt[0].role", "E203", "number"),
    ("D15 end", P, chat("assistant", "user"), A, "chosen", "E215", "user"),
    ("D17 differ", P, [{"role": "user", "content": "z"}, *A], [*P, *A], "chosen", "E217", "turn 1"),
    ("D18 null", P, [{"role": "assistant", "content": None}], A, "chosen[0].content", "E218", "null"),
    ("D18 parts", P, [{"role": "assistant", "content": [{"type": "text"}]}], A, "chosen[0].content", "E218", "parts"),
    (
        "D18 tools",
        P,
        [{"role": "assistant", "content": "", "tool_calls": [1]}],
        A,
        "chosen[0].tool_calls",
        "E218",
        "tool",
    ),
    ("D19 forms", P, "yes", A, "chosen", "E219", "messages"),
    ("D29 turns", chat("user", "assistant") * 5000, A, A, "prompt", "E229", "10000"),
    ("content absent", P, [{"role": "assistant"}], A, "chosen[0].content", "E202", "not there"),
]


def refused(read, data, code, **options) -> DataError:
    with pytest.raises(PalateError) as caught:
        read(data, **options)
    error = caught.value
    assert code in str(error), str(error)
    assert "Next: " in str(error)
    assert error.exit_code == (5 if isinstance(error, MachineError) else 3)
    return error


def names(error: PalateError, path, line: int, field: str | None) -> None:
    where = f"{path}:{line}: " + (f'field "{field}": ' if field else "")
    assert where in str(error), str(error)


@pytest.mark.parametrize(("line", "field", "code", "words"), [c[1:] for c in ROWS], ids=[c[0] for c in ROWS])
def test_bad_row_is_named(tmp_path, line, field, code, words):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(row() + b"\n" + line + b"\n\n" + row(prompt="And?") + b"\n")
    error = refused(read_pairs, path, code)
    names(error, path, 2, field)
    assert words in str(error)
    assert "1 of 3 rows" in str(error)
    assert error.code == code
    assert sorted(os.listdir(tmp_path)) == ["pairs.jsonl"]
    skipped = read_pairs(path, bad_rows="skip")
    assert len(skipped) == 2
    assert skipped.rejects() == line + b"\n"
    assert [(str(s), c) for s, _, c, _ in skipped.rejected] == [(f"{path}:2", code)]
    assert doctor(path).exit_code == 3


@pytest.mark.parametrize(("prompt", "chosen", "rejected", "field", "code", "words"), [c[1:] for c in CHATS], ids=[c[0] for c in CHATS])  # fmt: skip
def test_bad_conversation_is_named(tmp_path, prompt, chosen, rejected, field, code, words):
    path = tmp_path / "pairs.jsonl"
    good = row(prompt=P, chosen=A, rejected=chat("assistant", content="other"))
    bad = row(prompt=prompt, chosen=chosen, rejected=rejected)
    path.write_bytes(good + b"\n" + bad + b"\n")
    error = refused(read_pairs, path, code)
    names(error, path, 2, field)
    assert words in str(error)


LABELS = ['"true"', "1", "2", "0.0", "[]"]


@pytest.mark.parametrize("label", LABELS)
def test_labels_are_booleans(tmp_path, label):
    path = tmp_path / "kto.jsonl"
    path.write_text(
        f'{{"prompt": "a", "completion": "b", "label": true}}\n{{"prompt": "b", "completion": "b", "label": {label}}}\n'
    )
    names(refused(read_feedback, path, "E225"), path, 2, "label")


def test_one_class_and_one_prompt_are_refused(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "b", "label": True}]
    assert "all 2 labels are true" in str(refused(read_feedback, rows, "E226"))
    rows[1] |= {"label": False, "prompt": "a"}
    assert "one prompt" in str(refused(read_feedback, rows, "E233"))
    assert doctor(rows).exit_code == 3


def test_repeated_id(tmp_path):
    error = refused(read_pairs, [GOOD | {"id": 7}, GOOD | {"prompt": "b", "id": 7}], "E228")
    names(error, "memory", 2, "id")
    assert "memory:1" in str(error)
    assert len(read_pairs([GOOD | {"id": 7}, GOOD | {"prompt": "b", "id": 7}], columns={"id": ""})) == 2


def test_train_and_eval_share_rows():
    train = read_pairs([GOOD | {"prompt": f"p{i}"} for i in range(9)])
    refuse_shared_rows(train, read_pairs([GOOD, GOOD | {"prompt": "p1", "chosen": "other"}]))
    held_out = read_pairs([GOOD | {"prompt": f"p{i}"} for i in range(2, 12)])
    error = refused(lambda both: refuse_shared_rows(*both), (train, held_out), "E231")
    assert "7 of 10 held-out rows" in str(error)
    assert "memory:3 and memory:1, memory:4 and memory:2" in str(error)


def test_first_twenty_and_the_total(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([row()] * 30 + [row(chosen="")] * 25 + [row()] + [row(rejected=None)]))
    error = refused(read_pairs, path, "E208")
    lines = str(error).split("\n")
    assert len(lines) == 22
    assert all(
        line.startswith(f'{path}:{31 + i}: field "chosen": empty [E208]. Next: ') for i, line in enumerate(lines[:20])
    )
    assert "6 more" in lines[20]
    assert "26 of 57 rows" in lines[21]


def test_skip_stops_above_five_percent(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([row(prompt=f"p{i}") for i in range(190)] + [row(chosen="")] * 10))
    assert len(read_pairs(path, bad_rows="skip")) == 190
    path.write_bytes(b"\n".join([row(prompt=f"p{i}") for i in range(189)] + [row(chosen="")] * 11))
    error = refused(read_pairs, path, "E234", bad_rows="skip")
    assert "5.5 %" in str(error)
    path.write_bytes(row(chosen=""))
    assert "none is left" in str(refused(read_pairs, path, "E234", bad_rows="skip"))


FILES = [
    ("F4 empty", "a.jsonl", b"", "E104"),
    ("F5 blank", "a.jsonl", b"\n  \r\n\n", "E104"),
    ("blank JSON", "a.json", b" \n", "E104"),
    ("empty array", "a.json", b"[]", "E104"),
    ("header only", "a.csv", b"prompt,chosen,rejected\n", "E104"),
    ("F7 UTF-16 BOM", "a.jsonl", row().decode().encode("utf-16"), "E105"),
    ("F7 UTF-16LE", "a.jsonl", row().decode().encode("utf-16-le"), "E105"),
    ("F7 UTF-16BE", "a.jsonl", row().decode().encode("utf-16-be"), "E105"),
    ("F7 UTF-32", "a.jsonl", row().decode().encode("utf-32"), "E105"),
    ("F7 UTF-32BE", "a.json", row().decode().encode("utf-32-be"), "E105"),
    ("F13 cut", "a.jsonl", row() + b"\n" + row()[:-9], "E110"),
    ("F13 cut array", "a.json", b"[" + row() + b"," + row()[:-9], "E110"),
    ("F13 cut array, row whole", "a.json", b"[" + row() + b",\n" + row(), "E110"),
    ("cut quote", "a.csv", b'prompt,chosen,rejected\na,b,"c\nd', "E110"),
    ("F14 gzip", "a.jsonl", b"\x1f\x8b\x08\x00", "E113"),
    ("F16 Parquet as JSONL", "a.jsonl", b"PAR1xxxx", "E113"),
    ("F16 array as JSONL", "a.jsonl", b"[\n" + row() + b"\n]\n", "E113"),
    ("F16 array on one line", "a.jsonl", b"[" + row() + b"]\n", "E113"),
    ("F16 array, comma", "a.jsonl", b"[" + row() + b",\n" + row() + b"]\n", "E113"),
    ("F16 text as Parquet", "a.parquet", row(), "E113"),
    ("F16 object as array", "a.json", b'{\n"data": [' + row() + b"]}", "E113"),
    ("F16 text as array", "a.json", b"prompt,chosen\n", "E113"),
    ("F16 unknown ending", "a.txt", row(), "E113"),
    ("text after array", "a.json", b"[" + row() + b"]]", "E200"),
    ("F24 Parquet", "a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "E121"),
    ("CSV header twice", "a.csv", b"prompt,chosen,chosen\na,b,c\n", "E206"),
    ("CSV lone CR", "a.csv", b"prompt,chosen,rejected\ra,b,c\r", "E109"),
    ("CSV cells", "a.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", "E200"),
    ("CSV bad byte", "a.csv", b"prompt,chosen,rejected\na,b,c\na,b,\xff\n", "E106"),
    ("not preference data", "a.jsonl", b'{"text": "x"}\n', "E202"),
    ("odd columns", "a.jsonl", b'{"foo": 1, "bar": 2}\n', "E202"),
]


@pytest.mark.parametrize(("name", "content", "code"), [c[1:] for c in FILES], ids=[c[0] for c in FILES])
def test_bad_file(tmp_path, name, content, code):
    path = tmp_path / name
    path.write_bytes(content)
    error = refused(read_pairs, str(path), code)
    assert str(path) in str(error)
    found = doctor(path)
    assert found.exit_code in (0, 3)
    if code != "E202":
        assert found.exit_code == 3


def test_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(row() + b"\n" + row(chosen="x" * 2000) + b"\n")
    names(refused(read_pairs, path, "E114"), path, 2, None)
    path.with_suffix(".json").write_bytes(b"[" + row() + b",\n" + row(chosen="x" * 2000) + b"]")
    names(refused(read_pairs, path.with_suffix(".json"), "E114"), path.with_suffix(".json"), 2, None)


def test_missing_file_names_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(row())
    with pytest.raises(NotThereError) as caught:
        read_pairs(tmp_path / "trian.jsonl")
    assert "E101" in str(caught.value)
    assert "train.jsonl" in str(caught.value)
    with pytest.raises(NotThereError):
        read_pairs(tmp_path / "no" / "such" / "folder.jsonl")
    with pytest.raises(NotThereError):
        read_pairs(tmp_path / "train.jsonl" / "x.jsonl")


def test_kinds_of_paths(tmp_path, monkeypatch):
    error = refused(read_pairs, tmp_path, "E102")
    assert "folder" in str(error)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    refused(read_pairs, tmp_path / "gone.jsonl", "E118")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    refused(read_pairs, tmp_path / "loop.jsonl", "E118")
    os.mkfifo(tmp_path / "fifo.jsonl")
    refused(read_pairs, tmp_path / "fifo.jsonl", "E118")
    refused(read_pairs, "/dev/null", "E118")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("s.jsonl")
        refused(read_pairs, tmp_path / "s.jsonl", "E118")


@pytest.mark.parametrize(
    "name", ["a\nb.jsonl", "a\0b.jsonl", "a\udcff.jsonl", "a" * 5000 + ".jsonl", "a\x1b[31m.jsonl"]
)
def test_odd_names(tmp_path, name):
    error = refused(read_pairs, f"{tmp_path}/{name}", "E119")
    assert str(error).isprintable()


def test_unreadable(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(row())

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rows_module, "open", refuse, raising=False)
    assert "mode" in str(refused(read_pairs, tmp_path / "a.jsonl", "E103"))


def test_changed_while_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(row() + b"\n")
    original = rows_module._Json.value

    def grow(self, text):
        with path.open("ab") as handle:
            handle.write(b"\n")
        return original(self, text)

    monkeypatch.setattr(rows_module._Json, "value", grow)
    refused(read_pairs, path, "E117")


def test_same_file_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(row() + b"\n")
    (tmp_path / "b.jsonl").symlink_to(path)
    error = refused(read_pairs, [path, tmp_path / "b.jsonl"], "E120")
    assert "a.jsonl" in str(error)
    assert "b.jsonl" in str(error)


def test_damaged_parquet_names_the_column(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [GOOD | {"prompt": f"p{i}", "chosen": f"{i} " + "x" * 50} for i in range(200)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="gzip", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    error = refused(read_pairs, path, "E121")
    assert "row group 0" in str(error)
    assert "chosen" in str(error)


def test_options_are_checked(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(row())
    path = str(tmp_path / "a.jsonl")
    for wrong in (
        lambda: read_pairs(path, bad_rows="ignore"),
        lambda: read_pairs(path, columns={"choosen": "x"}),
        lambda: read_pairs(path, columns={"chosen": 3}),
        lambda: read_pairs(path + "[a:b]"),
        lambda: read_pairs(path + "[::2]"),
        lambda: read_pairs(path + "[-5:]"),
        lambda: read_pairs(5),
        lambda: read_pairs(None),
        lambda: read_pairs({"prompt": "a"}),
        lambda: read_pairs(path, format="xml"),
        lambda: read_demonstrations(path, turns="first"),
    ):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(NotThereError):
        read_pairs("builtin:nothing")


def test_hub_offline_is_a_clear_refusal(tmp_path):
    """In a process of its own: the client reads the switch when it is imported."""
    code = (
        "from palate.data.sources import read_pairs\nfrom palate.errors import NotThereError\n"
        "try:\n    read_pairs('nobody/nothing')\nexcept NotThereError as e:\n    print(e.exit_code, e)\n"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("3 nobody/nothing: "), done.stdout + done.stderr
    assert "[E101]. Next: " in done.stdout


def test_gigabyte_line_is_refused_soon(tmp_path):
    """A sparse file of 200 MiB without a line end."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as handle:
        handle.write(b'{"prompt": "')
        handle.truncate(200 * 2**20)
    timer = threading.Timer(20, lambda: os._exit(1))
    timer.start()
    try:
        refused(read_pairs, path, "E114")
    finally:
        timer.cancel()
