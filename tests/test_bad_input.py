# ruff: noqa: E501, one case a line
"""Whatever a verb is given, it ends with one message that names the place and the next step, and writes nothing.

The cases bear the ids of the project's table of bad inputs (F files, D rows, C configs, M models), and go through the
command line in this process. Not in the table, because no verb meets it yet:
F23, one file twice: a verb takes one --data, and the same file as --eval is D32;
D22, no token left: needs a tokenizer that drops text, see data/test_tokens.py;
D33, fewer rows than a batch: no error, every step then sees all rows and the plan says so;
C12, a newer format: configs bear no version; checkpoints do, see M11;
C15, a folder that may not be written: root may write everywhere, so the refusal is played by the system call;
J, a judge that says nothing usable: see sampling/test_judge.py and recipes/test_compare.py;
W: there is no page that takes input.
D20, D21 and D24 are counted and kept, not refused: see data/test_tokens.py and recipes/test_training.py.
"""

import contextlib
import gzip
import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_kit import TEMPLATE, chats, pairs, save_model, write_rows

from palate.cli import main

PAIR = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}
ASK, REPLY = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]


def row(**changes) -> bytes:
    return json.dumps(PAIR | changes).encode()


def chat(*roles, **changes) -> list:
    return [{"role": role, "content": f"{role} {i}"} | changes for i, role in enumerate(roles)]


@dataclass(frozen=True)
class Case:
    """id, the command line (TINY, CHATTY stand for model folders), its exit code, E-code and words of the message.

    make: builds the input in the current, empty folder, which also gets good.jsonl.
    """

    id: str
    line: str
    exit: int
    code: str
    words: tuple[str, ...]
    make: Callable[["Kit"], object] = lambda kit: None


class Kit:
    """What cases build with: the folder they run in, the tiny models and pytest's own tools."""

    def __init__(self, folder: Path, models: dict[str, Path], monkeypatch, make_model, tokenizer):
        self.folder, self.models, self.patch, self.make_model, self.tokenizer = (
            folder,
            models,
            monkeypatch,
            make_model,
            tokenizer,
        )

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self, name: str = "m", of: str = "TINY") -> Path:
        return Path(shutil.copytree(self.models[of], self.folder / name))

    def json(self, name: str, **changes) -> None:
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """Model folders by the word that stands for them on a command line."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "TINY": save_model(folder / "tiny", tiny_llama(0), tiny_tokenizer),
        "CHATTY": save_model(folder / "chatty", tiny_llama(0), tiny_tokenizer, TEMPLATE),
    }


@pytest.fixture
def kit(tmp_path, models, monkeypatch, tiny_llama, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "good.jsonl", pairs())
    return Kit(tmp_path, models, monkeypatch, tiny_llama, tiny_tokenizer)


def tree(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes | str | None]:
    """Every path below a folder, hidden ones too: a file's bytes, where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name not in but:
            plain = path.is_file() and not path.is_symlink()
            found[name] = path.read_bytes() if plain else os.readlink(path) if path.is_symlink() else None
    return found


def command(line: str, models: dict[str, Path], environ=None) -> tuple[int, dict, str, str]:
    """(exit code, the object of --json, its message, all of stderr) of a command line called in this process."""
    argv = shlex.split(line)
    for word, folder in models.items():
        argv = [part.replace(word, str(folder)) for part in argv]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv, "--json"], environ or {})
    said = err.getvalue()
    result = json.loads(out.getvalue().splitlines()[-1])
    assert result["exit_code"] == code
    assert "Traceback" not in said + out.getvalue(), said
    messages = [part for part in said.split("\n") if part.startswith("palate:")]
    assert len(messages) == ("error" in result), said
    return code, result, said[said.index("palate:") :] if messages else "", said


def refused(case: Case, kit: Kit, cache: Path, but: tuple[str, ...] = (), environ=None) -> str:
    """The message of a case, which has left everything as it was."""
    before = tree(kit.folder, but), tree(cache)
    code, result, message, said = command(case.line, kit.models, environ)
    assert code == case.exit, said
    assert case.code in message, message
    assert ". Next: " in message, message
    for word in case.words:
        assert word in message, message
    assert result["status"] == {2: "usage", 3: "refused", 5: "machine"}[case.exit]
    assert f"palate: {result['error']}" == message.rstrip("\n") or "\x1b" in result["error"]
    after = tree(kit.folder, but), tree(cache)
    assert [name for a, b in zip(before, after, strict=True) for name in a.keys() ^ b.keys()] == []
    assert before == after
    return message


def table(*parts) -> list:
    cases = [case for part in parts for case in part]
    return [pytest.param(case, id=case.id) for case in cases]


# --- files -----------------------------------------------------------------------------------------------------------


def file(id: str, name: str, content: bytes, code: str, *words: str, verb: str = "dpo", exit: int = 3) -> Case:
    line = f"{verb} --model TINY --data {shlex.quote(name)} --out run"
    return Case(id, line, exit, code, (name, *words), lambda kit: kit.write(name, content))


def changing(kit: Kit) -> None:
    from palate.data import rows

    original = rows._Json.value

    def grow(self, text):
        with open("good.jsonl", "ab") as handle:
            handle.write(b"\n")
        return original(self, text)

    kit.patch.setattr(rows._Json, "value", grow)


def unreadable(kit: Kit) -> None:
    from palate.data import rows

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    kit.patch.setattr(rows, "open", refuse, raising=False)


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


def bomb_file(kit: Kit) -> None:
    from palate.data import rows

    kit.patch.setattr(rows, "FREE_BYTES", 2**20)
    kit.write("a.jsonl.gz", gzip.compress((row() + b"\n") * 40_000))


def short_lines(kit: Kit) -> None:
    from palate.data import rows

    kit.patch.setattr(rows, "MAX_LINE_BYTES", 1000)
    kit.write("long.jsonl", row() + b"\n" + row(chosen="x" * 2000) + b"\n")


def on(line: str) -> str:
    return f"dpo --model TINY --out run {line}"


FILES = [
    Case("F1 missing", on("--data goof.jsonl"), 3, "E101", ("goof.jsonl", "good.jsonl")),
    Case("F1 no folder", on("--data no/such.jsonl"), 3, "E101", ("no/such.jsonl",)),
    Case("F1 eval missing", on("--data good.jsonl --eval goof.jsonl"), 3, "E101", ("goof.jsonl", "good.jsonl")),
    Case("F1 builtin", on("--data builtin:review"), 3, "E101", ("builtin:review", "did you mean builtin:reviews")),
    Case("F1 Hub id offline", on("--data nobody/nothing"), 3, "E101", ("nobody/nothing",)),
    Case("F2 folder", on("--data d"), 3, "E102", ("d/a.jsonl",), lambda kit: (kit.folder / "d").mkdir() or kit.write("d/a.jsonl", row())),
    Case("F3 unreadable", on("--data good.jsonl"), 5, "E103", ("good.jsonl", "mode", "chmod"), unreadable),
    file("F4 empty", "a.jsonl", b"", "E104", "no rows"),
    file("F5 blank", "a.jsonl", b"\n \r\n\n", "E104", "no rows"),
    Case("F5 empty eval", on("--data good.jsonl --eval e.jsonl"), 3, "E104", ("e.jsonl", "no rows"), lambda kit: kit.write("e.jsonl", b"")),
    Case("F5 empty slice", on("--data 'good.jsonl[90:]'"), 3, "E104", ("good.jsonl", "slice", "24 rows")),
    Case("F5 no slice", on("--data 'good.jsonl[-5:]'"), 2, "E303", ("good.jsonl", "[-5:]")),
    file("F7 UTF-16", "a.jsonl", row().decode().encode("utf-16"), "E105", "UTF-16", "iconv"),
    file("F7 UTF-32", "a.jsonl", row().decode().encode("utf-32-be"), "E105", "UTF-32BE", "iconv"),
    file("F8 byte", "a.jsonl", row() + b"\n" + b'{"prompt": "a\xff"}', "E106", "a.jsonl:2", "offset"),
    file("F9 surrogate", "a.jsonl", row(chosen="x\ud800"), "E107", 'a.jsonl:1: field "chosen"', "U+D800"),
    file("F10 NUL", "a.jsonl", row(prompt="a\0"), "E108", 'a.jsonl:1: field "prompt"', "U+0000"),
    file("F11 lone CR", "a.jsonl", row() + b"\r" + row(), "E109", "a.jsonl:1", "line ends"),
    file("F13 cut", "a.jsonl", row() + b"\n" + row()[:-9], "E110", "a.jsonl:2", "truncated?"),
    file("F13 cut array", "a.json", b"[" + row() + b",\n" + row()[:-9], "E110", "a.json:2", "truncated?"),
    file("F13 cut CSV", "a.csv", b'prompt,chosen,rejected\na,b,"c\nd', "E110", "a.csv:2", "truncated?"),
    file("F14 cut gzip", "a.jsonl.gz", gzip.compress(row())[:-9], "E111", "gzip", "unpacked bytes", "copy the file again"),
    file("F14 cut zstd", "a.json.zst", zstd(b"[" + row() + b"]")[:-9], "E111", "zstd", "unpacked bytes", "copy the file again"),
    file("F14 damaged gzip", "a.csv.gz", gzip.compress(b"prompt,chosen,rejected\na,b,c\n")[:-8] + bytes(8), "E111", "data check"),
    Case("F15 bomb", on("--data a.jsonl.gz"), 3, "E112", ("a.jsonl.gz", "more than", "200 times", "unpack"), bomb_file),
    file("F16 packed", "a.jsonl", gzip.compress(row()), "E113", "gzip", "rename", ".jsonl.gz"),
    file("F16 not packed", "a.jsonl.gz", row(), "E113", ".gz", "not gzip"),
    file("F16 packed twice", "a.jsonl.gz", gzip.compress(gzip.compress(row())), "E113", "unpack"),
    file("F16 packed Parquet", "a.parquet.gz", gzip.compress(b"PAR1"), "E113", "Parquet inside gzip"),
    file("F16 archive", "a.jsonl", b"PK\x03\x04", "E113", "zip", "unpack"),
    file("F16 Parquet", "a.jsonl", b"PAR1xxxx", "E113", "Parquet", "--format"),
    file("F16 array", "a.jsonl", b"[" + row() + b"]\n", "E113", "array", "--format"),
    file("F16 no Parquet", "a.parquet", row(), "E113", "not Parquet"),
    file("F16 LFS", "a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "E113", "Git LFS pointer", "git lfs pull"),
    file("F16 HTML", "a.jsonl", b"<!DOCTYPE html>\n", "E113", "HTML", "download"),
    file("F16 ending", "a.txt", row(), "E113", ".txt", "--format"),
    Case("F16 format", on("--data good.jsonl --format xml"), 2, "E303", ("--format", "xml", "parquet")),
    Case("F17 long line", on("--data long.jsonl"), 3, "E114", ("long.jsonl:2", "split"), short_lines),
    file("F18 depth", "a.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "E115", "a.jsonl:1", "64"),
    file("F19 integer", "a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "E116", 'a.jsonl:1: field "n"', "5000", "quote"),
    Case("F20 changing", on("--data good.jsonl"), 3, "E117", ("good.jsonl", "stop what writes"), changing),
    Case("F21 dangling", on("--data l.jsonl"), 3, "E118", ("l.jsonl", "link"), lambda kit: os.symlink("nothing", "l.jsonl")),
    Case("F21 loop", on("--data l.jsonl"), 3, "E118", ("l.jsonl", "link"), lambda kit: os.symlink("l.jsonl", "l.jsonl")),
    Case("F21 FIFO", on("--data f.jsonl"), 3, "E118", ("f.jsonl", "FIFO"), lambda kit: os.mkfifo("f.jsonl")),
    Case("F21 device", on("--data /dev/null"), 3, "E118", ("/dev/null", "device")),
    Case("F22 newline", on("--data $'a\\nb.jsonl'".replace("$'a\\nb.jsonl'", "'a\nb.jsonl'")), 3, "E119", ("a\\nb.jsonl",)),
    Case("F22 escape", on("--data 'a\x1b[31m.jsonl'"), 3, "E119", ("a\\x1b[31m.jsonl",)),
    Case("F22 no UTF-8", on("--data a\udcff.jsonl"), 3, "E119", ("a\\udcff.jsonl",)),
    Case("F22 long", on("--data " + "a" * 5000), 3, "E119", ("characters", "rename")),
    file("F24 Parquet", "a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "E121", "damaged"),
]  # fmt: skip

# --- rows ------------------------------------------------------------------------------------------------------------


def bad_row(id: str, line: bytes, code: str, field: str | None, *words: str) -> Case:
    """A bad row in line 2 of a file of pairs."""
    place = "a.jsonl:2: " + (f'field "{field}": ' if field else "")
    return file(id, "a.jsonl", row() + b"\n" + line + b"\n", code, place, *words)


def bad_chat(id: str, prompt, chosen, rejected, code: str, field: str | None, *words: str) -> Case:
    """A bad conversation in line 2 of a file of conversations."""
    good = row(prompt=ASK, chosen=REPLY, rejected=chat("assistant"))
    line = row(prompt=prompt, chosen=chosen, rejected=rejected)
    place = "a.jsonl:2: " + (f'field "{field}": ' if field else "")
    return file(id, "a.jsonl", good + b"\n" + line + b"\n", code, place, *words)


def kto(id: str, rows: list[dict], code: str, *words: str) -> Case:
    return file(id, "a.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in rows), code, *words, verb="kto")


def marked(label, prompt="b") -> dict:
    return {"prompt": prompt, "completion": "c", "label": label}


ROWS = [
    bad_row("D0 no JSON", b'{"prompt": "a" "chosen"}', "E200", None, "column 16"),
    bad_row("D1 list", b"[]", "E201", None, "a list", "object"),
    bad_row("D1 number", b"3", "E201", None, "a number"),
    bad_row("D1 null", b"null", "E201", None, "null"),
    bad_row("D2 absent", b'{"prompt": "a", "chosen": "b", "rejectd": "c"}', "E202", "rejected", "--columns rejected=rejectd"),
    file("D2 none", "a.jsonl", b'{"foo": 1, "bar": 2}\n', "E202", "a.jsonl:1", "foo, bar", "--columns"),
    file("D2 other kind", "a.jsonl", b'{"text": "x"}\n', "E202", "a.jsonl:1", "text"),
    file("D2 prompts alone", "a.jsonl", b'{"prompt": "x"}\n', "E202", "a.jsonl:1", "no preference pairs", "prompts", "give prompt, chosen, rejected"),
    file("D2 nothing to score", "a.jsonl", b'{"prompt": "x"}\n', "E202", "no completion to score", "palate generate", verb="score"),
    Case("D2 columns, score", "score --model TINY --data good.jsonl --out s --columns chosen=best", 3, "E202", ("good.jsonl:1", '"best"')),
    file("D2 score", "a.jsonl", b'{"foo": 1}\n', "E202", "a.jsonl:1", "foo", verb="score"),
    file("D2 generate", "a.jsonl", b'{"foo": 1}\n', "E202", "a.jsonl:1", "foo", verb="generate"),
    file("D2 sft", "a.jsonl", b'{"foo": 1}\n', "E202", "a.jsonl:1", "foo", verb="sft"),
    Case("D2 columns", on("--data good.jsonl --columns chosen=best"), 3, "E202", ("good.jsonl:1", '"best"')),
    Case("D2 no column", on("--data good.jsonl --columns choosen=best"), 2, "E303", ("--columns", "choosen", '"chosen"')),
    bad_row("D3 number", row(chosen=3), "E203", "chosen", "a number"),
    bad_row("D3 list", row(chosen=["a"]), "E203", "chosen[0]", "text"),
    bad_row("D3 object", row(prompt={"a": 1}), "E202", "prompt.role", "not there"),
    bad_row("D4 null", row(rejected=None), "E204", "rejected", "null"),
    bad_row("D5 NaN", b'{"prompt": "a", "chosen": "b", "rejected": "c", "s": NaN}', "E205", "s", "NaN"),
    bad_row("D5 Infinity", b'{"prompt": "a", "chosen": "b", "rejected": "c", "s": -Infinity}', "E205", "s", "Infinity"),
    bad_row("D6 key twice", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "E206", "chosen", "17 and 49"),
    bad_row("D7 prompt", row(prompt=" \n"), "E207", "prompt", "empty"),
    bad_row("D8 empty", row(rejected=""), "E208", "rejected", "empty"),
    bad_row("D8 blank", row(chosen=" \t"), "E208", "chosen", "empty"),
    bad_row("D9 equal", row(rejected=" Because."), "E209", "rejected", "equal"),
    bad_row("D13 whole", row(chosen="Why? Because.", rejected="Why? No."), "E213", "chosen", "--columns prompt="),
    bad_chat("D14 role", chat("moderator"), REPLY, chat("assistant"), "E214", "prompt[0].role", "moderator", "assistant"),
    bad_chat("D15 end", ASK, chat("assistant", "user"), REPLY, "E215", "chosen", "user"),
    bad_chat("D17 prompts", ASK, [*chat("user"), *REPLY], [*ASK, *REPLY], "E217", "chosen", "turn 1"),
    bad_chat("D18 null", ASK, chat("assistant", content=None), REPLY, "E218", "chosen[0].content", "null"),
    bad_chat("D18 parts", ASK, chat("assistant", content=[{}]), REPLY, "E218", "chosen[0].content", "parts"),
    bad_chat("D19 forms", ASK, "yes", REPLY, "E219", "chosen", "one form"),
    kto("D25 text", [marked(True, "a"), marked("true")], "E225", 'a.jsonl:2: field "label"', "true", "false"),
    kto("D25 number", [marked(True, "a"), marked(1)], "E225", 'a.jsonl:2: field "label"'),
    kto("D25 two", [marked(True, "a"), marked(2)], "E225", 'a.jsonl:2: field "label"'),
    kto("D26 one class", [marked(True, "a"), marked(True)], "E226", "all 2 labels are true", "other class"),
    kto("D26 one prompt", [marked(True), marked(False)], "E233", "one prompt"),
    file("D28 id", "a.jsonl", row(id=7, prompt="x") + b"\n" + row(id=7), "E228", 'a.jsonl:2: field "id"', "a.jsonl:1"),
    bad_row("D29 keys", json.dumps(PAIR | {f"k{i}": 0 for i in range(10_000)}).encode(), "E229", None, "1000"),
    bad_chat("D29 turns", chat("user", "assistant") * 5000, REPLY, chat("assistant"), "E229", "prompt", "10000"),
    bad_row("D31 forms", row(prompt=ASK, chosen=REPLY, rejected=chat("assistant")), "E230", None, "a.jsonl:1"),
    Case("D32 shared", on("--data good.jsonl --eval 'good.jsonl[:7]'"), 3, "E231", ("--eval", "7 of 7", "good.jsonl:1")),
    file("above 5 %", "a.jsonl", b"\n".join([row(prompt=f"{i}") for i in range(20)] + [row(chosen="")] * 9), "E234", "31.0 %", verb="dpo --bad-rows skip"),
]  # fmt: skip


@pytest.mark.parametrize("case", table(FILES, ROWS))
def test_a_bad_file_or_row_is_named_before_a_model_is_loaded(case, kit, cache_dir):
    case.make(kit)
    refused(case, kit, cache_dir, but=("good.jsonl",) if case.make is changing else ())


KEPT = [
    ("F6 BOM", "a.jsonl", b"\xef\xbb\xbf" + row(), 1, "byte order mark"),
    ("F11 CRLF", "a.jsonl", row() + b"\r\n" + row(prompt="b") + b"\r\n", 2, ""),
    ("F12 separators", "a.jsonl", row(chosen="a\u2028b\u0085c").replace(rb"\u2028", b"\xe2\x80\xa8"), 1, ""),
    ("F13 no line end", "a.jsonl", row() + b"\n" + row(prompt="b"), 2, ""),
    ("D10 blanks", "a.jsonl", row(rejected=" Because. "), 1, "W210"),
    ("D11 both orders", "a.jsonl", row() + b"\n" + row(chosen=" No.", rejected=" Because."), 2, "W211"),
    ("D12 twice", "a.jsonl", row() + b"\n" + row(), 2, "W212"),
    ("D27 scores", "a.jsonl", row(score_chosen=1, score_rejected=2), 1, "W227"),
    ("D30 bidi", "a.jsonl", row(chosen="a\u202eb\u200b"), 1, ""),
]


@pytest.mark.parametrize(("name", "content", "rows", "says"), [k[1:] for k in KEPT], ids=[k[0] for k in KEPT])
def test_odd_rows_are_kept_and_said(name, content, rows, says, kit):
    kit.write(name, content)
    code, result, _, _ = command(f"doctor {name}", kit.models)
    assert code == 0
    assert result["rows"] == rows
    assert says in json.dumps(result)


# --- configs ---------------------------------------------------------------------------------------------------------


def config(id: str, text: str | bytes, code: str, *words: str) -> Case:
    line = "dpo --model TINY --data good.jsonl --out run -c c.yaml"
    return Case(id, line, 2, code, ("c.yaml", *words), lambda kit: kit.write("c.yaml", text))


def flags(id: str, text: str, code: str, *words: str, verb: str = "dpo", exit: int = 2) -> Case:
    return Case(id, f"{verb} --model TINY --data good.jsonl --out run {text}", exit, code, words)


def full(name: str):
    """An --out that holds something already."""
    return lambda kit: (kit.folder / name).mkdir() or kit.write(f"{name}/x", b"x")


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines)


CONFIGS = [
    Case("C0 no file", on("--data good.jsonl -c cc.yaml"), 2, "E101", ("cc.yaml",)),
    config("C1 key", "lr: 1e-4\nlearning_rte: 3\n", "E301", "c.yaml:2", "learning_rte"),
    config("C1 inner key", "train:\n  warmup_step: 3\n", "E301", "c.yaml:2", "warmup_steps"),
    flags("C1 flag", "--max-lenght 3", "E301", "--max-lenght", "did you mean --max-length"),
    flags("C1 inner flag", "--train.warmup-step 3", "E301", "did you mean --train.warmup-steps"),
    Case("C1 verb", "dop", 2, "E301", ("dop", "did you mean palate dpo")),
    config("C2 twice", "lr: 1\nbeta: 2\nlr: 3\n", "E302", "c.yaml:3", "line 1", "keep one"),
    config("C4 off", "lora_rank: off\n", "E303", "c.yaml:1", '"lora_rank"', "whole number"),
    config("C4 octal", "steps: 012\n", "E303", "c.yaml:1", '"steps"', "whole number"),
    config("C4 clock", "steps: 12:30:45\n", "E303", "c.yaml:1", '"steps"', "whole number"),
    config("C4 yes", "dry_run: 1\n", "E303", "c.yaml:1", '"dry_run"', "true or false"),
    flags("C4 flag", "--steps three", "E303", "--steps", "three"),
    flags("C4 fraction", "--steps 2.5", "E303", "--steps", "2.5"),
    flags("C4 columns", "--columns good", "E303", "--columns", "NAME=VALUE"),
    config("C5 tab", "train:\n\ttokens: 3\n", "E304", "c.yaml:2:1", "tab"),
    config("C5 bracket", "lr: [1, 2\nbeta: 3\n", "E304", "c.yaml:1:5", "bracket"),
    config("C5 list", "- a\n- b\n", "E304", "c.yaml:1", "mapping"),
    config("C5 no UTF-8", b"lr: 1\nout: \xff\n", "E304", "c.yaml:2", "UTF-8"),
    config("C6 tag", "out: !!python/object/apply:os.system ['true']\n", "E305", "c.yaml:1", "os.system"),
    config("C7 aliases", bomb(), "E306", "c.yaml:", "aliases"),
    *(
        flags(f"C8 {flag} {value}", f"--{flag} {value}", "E307", f"--{flag}", *words)
        for flag, values, *words in (
            ("lr", ("0", "-1", "nan", "inf")),
            ("beta", ("-1", "nan", "inf")),
            ("batch", ("0", "-3"), "> 0"),
            ("epochs", ("0",), "> 0"),
            ("steps", ("0", "-1"), "> 0"),
            ("max-length", ("1",), "> 1"),
            ("lora-rank", ("0",), "> 0"),
            ("train.tokens", ("0",), "> 0"),
            ("train.clip-norm", ("nan", "0")),
            ("train.beta1", ("1",), "< 1"),
            ("seed", ("-1",), ">= 0"),
            ("precision", ("float8",), "bfloat16"),
        )
        for value in values
    ),
    config("C8 NaN", "lr: .nan\n", "E307", "c.yaml:1", '"lr"'),
    flags("C8 large seed", "--seed 99999999999999999999", "E307", "--seed"),
    flags("C8 loss", "--loss dpoo", "E303", "--loss", "dpoo"),
    flags("C8 hyphen", "--loss-options.label-smoothing 2", "E307", "--loss-options.label-smoothing", "[0, 0.5)"),
    flags("C1 loss option", "--loss-options.label-smooting 0", "E307", "takes: beta, label_smoothing"),
    flags("C18 two files", "more.jsonl", "E300", "'more.jsonl'", "every option one value"),
    flags("C8 score beta", "--beta 0", "E307", "--beta", verb="score"),
    flags("C8 temperature", "--temperature -1", "E307", "--temperature", verb="generate"),
    flags("C8 samples", "--samples 0", "E307", "--samples", verb="generate"),
    flags("C9 no reference", "--loss simpo --reference TINY", "E308", "--reference", "simpo"),
    flags("C9 no beta", "--loss ipo --beta 0.1", "E301", "--beta", "ipo", "loss-options.tau"),
    flags("C9 feedback loss", "--loss kto", "E308", "--loss", "palate kto"),
    flags("C9 pairwise loss", "--loss ipo", "E308", "--loss", "palate dpo", verb="kto"),
    flags("C9 both betas", "--beta 0.1 --loss-options.beta 0.2", "E308", "--beta", "--loss-options.beta"),
    flags("C9 context", "--max-length 999", "E308", "--max-length", "999", "256"),
    flags("C9 context, score", "--max-length 999", "E308", "--max-length", "256", verb="score"),
    flags("C9 code without commit", "--trust-remote-code", "E308", "--trust-remote-code", "--revision"),
    flags("C9 device", "--device gpu", "E303", "--device", "gpu", "cuda"),
    flags("C9 no such device", "--device cuda", "E318", "--device", exit=5),
    flags("C9 one column", "--columns rejected=chosen", "E308", "--columns", '"chosen"'),
    config("C10 None", "lora_rank: None\n", "E309", "c.yaml:1", '"lora_rank"', "leave"),
    flags("C10 flag", "--steps null", "E309", "--steps", "leave"),
    flags("C10 empty", "--eval ''", "E309", "--eval", "leave"),
    config("C10 empty key", 'reference: ""\n', "E309", "c.yaml:1", '"reference"'),
    config("C10 NUL", 'reference: "a\\0b"\n', "E303", "c.yaml:1", "U+0000"),
    config("C11 variable", "out: ${NOWHERE}/run\n", "E310", "c.yaml:1", "NOWHERE"),
    config("C13 large", "# " + "x" * 2**20 + "\n", "E312", "1 MiB"),
    Case("C14 out is full", on("--data good.jsonl"), 2, "E313", ("run", "--resume"), full("run")),
    Case("C14 out is a file", on("--data good.jsonl"), 2, "E313", ("run", "--out"), lambda kit: kit.write("run", b"x")),
    Case("C14 out below a file", "dpo --model TINY --data good.jsonl --out good.jsonl/run", 2, "E313", ("good.jsonl", "--out")),
    Case("C14 no run to resume", on("--data good.jsonl --resume"), 2, "E313", ("run", "no run"), full("run")),
    Case("C14 out is the model", "sft --model m --data good.jsonl --out m", 2, "E313", ("m", "--out"), lambda kit: kit.copy()),
    Case("C14 resume what", "dpo --model TINY --data good.jsonl --resume", 2, "E313", ("--out",)),
    Case("C14 long name", "dpo --model TINY --data good.jsonl --out " + "a" * 300, 2, "E119", ("aaa", "shorter")),
    Case("C14 long name of a model", "dpo --data good.jsonl --out run --model ./" + "a" * 300, 2, "E119", ("aaa", "shorter")),
    Case("C14 score over data", "score --model TINY --data good.jsonl --out good.jsonl", 2, "E313", ("good.jsonl", "--out")),
    Case("C14 generate over data", "generate --model TINY --data good.jsonl --out good.jsonl", 2, "E313", ("good.jsonl", "--out")),
    Case("C14 score below a file", "score --model TINY --data good.jsonl --out good.jsonl/s.jsonl", 2, "E313", ("good.jsonl", "--out")),
    flags("C17 alpha", "--lora-alpha 8", "E316", "--lora-alpha", "--lora-rank"),
    flags("C17 revision", "--revision main", "E316", "--revision", "local"),
    flags("C17 revision, score", "--revision main", "E316", "--revision", "local", verb="score"),
    flags("C17 no eval", "--eval none --eval-every 3", "E316", "--eval-every", "--eval"),
    flags("C17 better than none", "--eval none --require-better", "E316", "--require-better", "--eval"),
    Case("C18 no model", "dpo --data good.jsonl", 2, "E317", ("--model",)),
    Case("C18 no data", "doctor", 2, "E317", ("--data",)),
    Case("C18 no run", "runs show", 2, "E300", ("run folder",)),
    Case("C18 no such run", "runs show nowhere", 3, "E101", ("nowhere",)),
    Case("C18 broken run", "runs show run", 3, "E501", ("run.json",), lambda kit: (kit.folder / "run").mkdir() or kit.write("run/run.json", b"{")),
    *(
        Case(f"C18 broken {name}", "runs diff run run", 3, "E501", (f"run/{name}",), lambda kit, name=name, text=text: (kit.folder / "run").mkdir() or (kit.write("run/run.json", "{}") and kit.write(f"run/{name}", text)))
        for name, text in (("config.yaml", "a: [1"), ("config.yaml", "- a"), ("run.json", "[]"))
    ),
    Case("C18 action", "runs delete x", 2, "E307", ("delete", "show")),
]  # fmt: skip


@pytest.mark.parametrize("case", table(CONFIGS))
def test_a_bad_config_is_named_where_it_was_written(case, kit, cache_dir):
    case.make(kit)
    refused(case, kit, cache_dir)


def test_a_bad_environment_variable_is_named(kit, cache_dir):
    case = flags("C8 environment", "", "E307", "PALATE_STEPS")
    refused(case, kit, cache_dir, environ={"PALATE_STEPS": "-3"})


def test_numbers_are_numbers_in_yaml(kit):
    """C3: PyYAML alone reads 5e-7 as text."""
    kit.write("c.yaml", "lr: 5e-7\ntrain:\n  eps: 1e-5\n")
    code, result, _, said = command(on("--data good.jsonl -c c.yaml --dry-run"), kit.models)
    assert code == 0, said
    assert result["lr"] == 5e-7


# --- models ----------------------------------------------------------------------------------------------------------


def model(id: str, make: Callable[[Kit], object], code: str, *words: str, verb: str = "dpo", more: str = "") -> Case:
    return Case(id, f"{verb} --model m --data good.jsonl --out run {more}", 3, code, words, make)


def without(*names: str):
    def make(kit: Kit) -> None:
        folder = kit.copy()
        for name in names:
            (folder / name).unlink()

    return make


def pickled(kit: Kit) -> None:
    folder = kit.copy()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def coded(name: str, key: str):
    def make(kit: Kit) -> None:
        folder = kit.copy()
        (folder / "evil.py").write_text("raise SystemExit('ran')\n")
        kit.json(f"m/{name}", auto_map={key: "evil.Model"})

    return make


def header(change: Callable[[dict], object], length: int | None = None):
    """A model whose safetensors header was changed, or claims another length."""

    def make(kit: Kit) -> None:
        path = kit.copy() / "model.safetensors"
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + size])
        change(table)
        new = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", length if length is not None else len(new)) + new + data[8 + size :])

    return make


NORM = "model.norm.weight"


def shift(by: int):
    def change(table: dict) -> None:
        table[NORM]["data_offsets"] = [at + by for at in table[NORM]["data_offsets"]]

    return change


def indexed(entry: str | None, extra: bool = False):
    """A model in one shard with an index, of which one entry leads elsewhere."""

    def make(kit: Kit) -> None:
        from palate.model.checks import check_safetensors

        folder = kit.copy()
        shard = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / shard)
        entries = dict.fromkeys(check_safetensors(folder / shard), shard)
        entries[NORM] = entry or shard
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
        if extra:
            shutil.copy(folder / shard, folder / "model-00002-of-00002.safetensors")

    return make


def poisoned(value: float):
    def make(kit: Kit) -> None:
        broken = kit.make_model(0)
        broken.model.norm.weight.data[3] = value
        save_model(kit.folder / "m", broken, kit.tokenizer)

    return make


def conversations(kit: Kit) -> None:
    kit.copy()
    write_rows(kit.folder / "good.jsonl", chats())


def template(text: str):
    def make(kit: Kit) -> None:
        kit.copy()
        write_rows(kit.folder / "good.jsonl", chats())
        kit.write("t.jinja", text)

    return make


def refusing(kit: Kit) -> None:
    """A template that wants turns to alternate, and a row in which they do not."""
    kit.copy()
    rows = [*chats()]
    rows[4]["prompt"] = [*rows[4]["prompt"], rows[4]["prompt"][-1]]
    write_rows(kit.folder / "good.jsonl", rows)
    rule = "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    kit.write("t.jinja", rule + TEMPLATE)


def wide(kit: Kit) -> None:
    save_model(kit.folder / "m", kit.make_model(0, vocab_size=280), kit.tokenizer)


def adapted(break_it: Callable[[Kit], object]):
    """An adapter in `m`, trained on `base`."""

    def make(kit: Kit) -> None:
        from palate.model.adapters import add_lora
        from palate.model.load import load, save

        kit.copy("base")
        loaded = load("base")
        save(add_lora(loaded.model, 4, 8, seed=0), loaded.tokenizer, kit.folder / "x" / "model", verify=False)
        (kit.folder / "x" / "adapter").rename(kit.folder / "m")
        break_it(kit)

    return make


def another_base(**shape):
    def make(kit: Kit) -> None:
        shutil.rmtree(kit.folder / "base")
        save_model(kit.folder / "base", kit.make_model(1, **shape), kit.tokenizer)

    return make


def other_tokenizer(kit: Kit) -> None:
    from palate.model.tokenizer import train_tokenizer

    kit.copy()
    save_model(kit.folder / "other", kit.make_model(1), train_tokenizer(["zebra quagga okapi"] * 9, 300))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def new(id: str, text: str, code: str, *words: str, exit: int = 3) -> Case:
    line = "sft --model new:n.json --data good.jsonl --out run"
    return Case(id, line, exit, code, ("n.json", *words), lambda kit: kit.write("n.json", text))


MODELS = [
    model("M1 no such folder", lambda kit: None, "E401", "'./m'", more="--model ./m"),
    model("M1 Hub id offline", lambda kit: None, "E401", "nobody/nothing", more="--model nobody/nothing"),
    model("M1 builtin", lambda kit: None, "E401", "builtin:tny", "builtin:tiny", more="--model builtin:tny"),
    model("M1 no GGUF", lambda kit: kit.write("x.gguf", b"GGML"), "E404", "x.gguf", more="--model x.gguf"),
    model("M1 no config", without("config.json"), "E401", "config.json", "tokenizer.json"),
    model("M1 no tokenizer", without("tokenizer.json"), "E401", "tokenizer.json", "config.json"),
    model("M1 no weights", without("model.safetensors"), "E401", "model.safetensors"),
    model("M1 broken config", lambda kit: kit.copy() and kit.write("m/config.json", b"{"), "E401", "config.json", "not JSON"),
    model("M1 broken tokenizer", lambda kit: kit.copy() and kit.write("m/tokenizer.json", b"{"), "E401", "tokenizer"),
    model("M1 unknown kind", lambda kit: kit.copy() and kit.json("m/config.json", model_type="nosuch"), "E404", "nosuch"),
    model("M2 pickles", pickled, "E402", "pytorch_model.bin", "convert"),
    model("M2 pickles, score", pickled, "E402", "pytorch_model.bin", verb="score"),
    model("M2 pickles, generate", pickled, "E402", "pytorch_model.bin", verb="generate"),
    model("M3 model code", coded("config.json", "AutoModelForCausalLM"), "E403", "auto_map", "evil.Model", "--trust-remote-code"),
    model("M3 tokenizer code", coded("tokenizer_config.json", "AutoTokenizer"), "E403", "tokenizer_config.json", "auto_map"),
    model("M4 header > file", header(lambda t: None, length=50_000_000), "E404", "model.safetensors", "header"),
    model("M4 header > 100 MB", header(lambda t: None, length=2**40), "E404", "model.safetensors", "limit"),
    model("M4 overlap", header(shift(-64)), "E404", NORM, "download"),
    model("M4 hole", header(shift(64)), "E404", "hole", "download"),
    model("M4 shape", header(lambda t: t[NORM].update(shape=[65])), "E404", NORM, "65"),
    model("M4 dtype", header(lambda t: t[NORM].update(dtype="PICKLE")), "E404", NORM, "PICKLE"),
    model("M4 missing weight", lambda kit: kit.copy() and kit.json("m/config.json", num_hidden_layers=3), "E404", "layers.2", "missing"),
    model("M5 outside", indexed("../x.safetensors"), "E405", NORM, "../x.safetensors", "do not trust"),
    model("M5 absolute", indexed("/etc/x.safetensors"), "E405", NORM, "/etc/x.safetensors", "do not trust"),
    model("M5 missing", indexed("model-00007-of-00007.safetensors"), "E405", NORM, "missing"),
    model("M5 extra", indexed(None, extra=True), "E405", "model-00002-of-00002.safetensors", "index"),
    model("M6 NaN", poisoned(float("nan")), "E406", NORM, "1 values"),
    model("M6 inf", poisoned(float("inf")), "E406", NORM, "another checkpoint"),
    model("M7 vocabulary", wide, "E407", "300", "280"),
    model("M8 none", conversations, "E408", "good.jsonl:1", "--chat-template"),
    model("M8 none, score", conversations, "E408", "good.jsonl:1", "--chat-template", verb="score"),
    model("M8 none, generate", conversations, "E408", "good.jsonl:1", "--chat-template", verb="generate"),
    model("M8 no file", conversations, "E408", "t.jinja", more="--chat-template t.jinja"),
    model("M8 syntax", template("{% for m in messages %}\n{% if %}"), "E408", "t.jinja", "line 2", more="--chat-template t.jinja"),
    model("M8 escape", template("{{ messages.__class__.__mro__[1].__subclasses__() }}"), "E408", "t.jinja", more="--chat-template t.jinja"),
    model("D16 refused", refusing, "E216", "good.jsonl:5", "roles must alternate", more="--chat-template t.jinja"),
    model("D23 no room", lambda kit: kit.copy(), "E223", "good.jsonl:1", "--max-length", more="--max-length 2"),
    model("M9 other weights", adapted(another_base()), "E409", "base", "trained on"),
    model("M9 other shape", adapted(another_base(hidden_size=32)), "E409", "base"),
    model("M9 base gone", adapted(lambda kit: shutil.rmtree(kit.folder / "base")), "E401", "base"),
    model("M9 no LoRA", adapted(lambda kit: kit.json("m/adapter_config.json", peft_type="IA3")), "E409", "IA3"),
    model("M10 reference's tokenizer", other_tokenizer, "E410", "reference", more="--reference other"),
    model("M10 reference's tokenizer, score", other_tokenizer, "E410", "reference", verb="score", more="--reference other"),
    model("M10 no reference", lambda kit: kit.copy(), "E401", "./other", more="--reference ./other"),
    model("M10 no reference, score", lambda kit: kit.copy(), "E401", "./other", verb="score", more="--reference ./other"),
    new("M1 new: broken JSON", "{", "E401", "not JSON"),
    new("M1 new: no kind", "{}", "E401", "model_type"),
    new("M1 new: wrong size", json.dumps(LLAMA | {"hidden_size": "x"}), "E401"),
    new("M3 new: code", json.dumps(LLAMA | {"auto_map": {"AutoConfig": "evil.C"}}), "E403", "auto_map"),
    new("M7 new: few tokens", json.dumps(LLAMA | {"vocab_size": 20}), "E407", "20", "vocab_size"),
    Case("M1 new: no file", "sft --model new:n.json --data good.jsonl --out run", 3, "E401", ("n.json",)),
    Case("M1 new: score", "score --model new:n.json --data good.jsonl --out s", 3, "E401", ("n.json", "tokenizer"), lambda kit: kit.write("n.json", json.dumps(LLAMA | {"vocab_size": 300}))),
]  # fmt: skip


@pytest.mark.parametrize("case", table(MODELS))
def test_a_bad_model_is_refused_before_a_run_begins(case, kit, cache_dir):
    case.make(kit)
    # the last of two --model counts
    head, _, last = case.line.rpartition("--model ")
    if head.count("--model"):
        case = Case(case.id, head.replace("--model m", f"--model {last}"), case.exit, case.code, case.words)
    refused(case, kit, cache_dir)


# --- any row at all --------------------------------------------------------------------------------------------------

NAMES = [
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "completion",
    "completions",
    "label",
    "text",
    "role",
    "content",
    "id",
]
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant"])
)
VALUE = st.recursive(
    LEAF,
    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), of, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("tight", [True, False])
def test_the_doctor_answers_any_rows(tight, tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "a.jsonl"
    values = st.fixed_dictionaries({}, optional={name: VALUE for name in NAMES}) if tight else VALUE

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(st.lists(values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=12), max_size=4))
    def answered(rows):
        path.write_bytes(b"\n".join(rows))
        code, result, _, said = command(f"doctor {path}", {})
        assert code in (0, 3), said
        assert code == 3 * (result.get("errors", 1) > 0)

    answered()


@pytest.mark.parametrize("verb", ["dpo", "kto", "sft", "score", "generate"])
def test_every_reader_answers_any_rows(verb, kit):
    """Whatever text stands in rows of the right shape, and whatever shape they have: used, or refused by line."""
    keys = {"prompt": st.text(max_size=6), "chosen": st.text(max_size=6), "rejected": st.text(max_size=6)}
    rows = st.fixed_dictionaries(keys, optional={name: VALUE for name in ("id", "messages", "label")})
    turns = st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=4)}
        ),
        max_size=3,
    )
    rows |= st.fixed_dictionaries({"prompt": turns, "chosen": turns, "rejected": turns})
    end = {"score": "--out s", "generate": "--out s --max-tokens 1"}.get(verb, "--eval none --dry-run --batch 2")

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(rows, min_size=1, max_size=3))
    def answered(found):
        write_rows(kit.folder / "a.jsonl", found)
        (kit.folder / "s").unlink(missing_ok=True)
        code, _, message, said = command(f"{verb} --model CHATTY --data a.jsonl {end}", kit.models)
        assert code in (0, 3), said
        assert code == 0 or ("a.jsonl" in message and "Next: " in message), said

    answered()


def test_weights_that_exploded_are_not_saved(kit):
    """M6 of our own making."""
    line = "sft --model TINY --data good.jsonl --out run --steps 2 --batch 4 --samples 0 --eval none --device cpu"
    code, _, message, said = command(f"{line} --lr 1e38", kit.models)
    assert code == 3, said
    assert "finite" in message and "lower" in message and "Next: " in message
    assert not (kit.folder / "run/model").exists()


# --- runs to go on with ----------------------------------------------------------------------------------------------

STEPS = "dpo --model TINY --data good.jsonl --eval none --out run --batch 8 --samples 0 --save-every 1 --device cpu"


@pytest.fixture(scope="session")
def stopped(models, tmp_path_factory):
    """A run with two checkpoints that ended before its model was saved."""
    folder, before = tmp_path_factory.mktemp("stopped"), os.getcwd()
    write_rows(folder / "good.jsonl", pairs())
    os.chdir(folder)
    try:
        assert command(f"{STEPS} --steps 2", models)[0] == 0
    finally:
        os.chdir(before)
    record = json.loads((folder / "run/run.json").read_text())
    (folder / "run/run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    shutil.rmtree(folder / "run/model")
    return folder / "run"


def each(change: Callable[[Path], object]):
    """Does something to every checkpoint."""

    def make(kit: Kit) -> None:
        for path in sorted((kit.folder / "run/checkpoints").glob("step-*")):
            change(path)

    return make


def flip(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


def newer(path: Path) -> None:
    from palate.files import _manifest_bytes

    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_bytes(_manifest_bytes(manifest | {"format": 99}))  # sealed as a later one would be


def linked(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent.parent / f"{path.name}.safetensors")
    (path / "model.safetensors").symlink_to(path.parent.parent / f"{path.name}.safetensors")


def another_run(kit: Kit) -> None:
    kit.json("run/run.json", id="0" * 32)


def more_data(kit: Kit) -> None:
    with (kit.folder / "good.jsonl").open("ab") as handle:
        handle.write(row() + b"\n")


def resumed(id: str, make, code: str, *words: str, more: str = "--steps 2") -> Case:
    return Case(id, f"{STEPS} --resume {more}", 3, code, words, make)


RESUMED = [
    resumed("M11 missing", each(lambda p: (p / "model.safetensors").unlink()), "E501", "step-000002", "model.safetensors"),
    resumed("M11 flipped", each(flip), "E501", "step-000002", "optimizer.safetensors"),
    resumed("M11 cut", each(lambda p: os.truncate(p / "model.safetensors", 99)), "E501", "step-000002", "model.safetensors"),
    resumed("M11 extra", each(lambda p: (p / "x.bin").write_bytes(b"x")), "E501", "step-000002", "x.bin"),
    resumed("M11 another run's", another_run, "E502", "step-000002", "another run"),
    resumed("M11 newer", each(newer), "E311", "step-000002"),
    resumed("M11 no JSON", lambda kit: kit.write("run/run.json", b"{"), "E501", "run.json"),
    resumed("M11 column", lambda kit: os.truncate("run/reference.safetensors", 40), "E501", "reference.safetensors"),
    resumed("M12 data", more_data, "E502", "good.jsonl", "changed"),
    resumed("M12 config", lambda kit: None, "E502", "steps was 2, now 3", "beta was None, now 0.5", more="--steps 3 --beta 0.5"),
    resumed("M14 link", each(linked), "E50", "step-000002", "link"),
]  # fmt: skip


@pytest.mark.parametrize("case", table(RESUMED))
def test_a_run_that_cannot_go_on_stays_as_it_is(case, kit, cache_dir, stopped):
    shutil.copytree(stopped, kit.folder / "run")
    case.make(kit)
    refused(case, kit, cache_dir, but=("run/run.json", "run/.lock"))  # which say that it was tried


def test_an_earlier_checkpoint_is_taken_and_the_damaged_one_named(kit, stopped):
    shutil.copytree(stopped, kit.folder / "run")
    flip(kit.folder / "run/checkpoints/step-000002")
    code, _, _, said = command(f"{STEPS} --steps 2 --resume", kit.models)
    assert code == 0, said
    assert "step-000002" in said and "damaged" in said and "from run/checkpoints/step-000001" in said
    code, _, _, said = command(f"{STEPS} --steps 2 --resume", kit.models)
    assert code == 0 and "nothing to do" in said, said


def test_a_second_owner_is_named(kit, cache_dir, stopped):
    """M13."""
    shutil.copytree(stopped, kit.folder / "run")
    hold = "import sys\nfrom palate.files import Lock\nlock = Lock('run/.lock')\nprint(flush=True)\nsys.stdin.read()"
    pipes = dict(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as owner:
        owner.stdout.readline()
        case = Case("M13", f"{STEPS} --resume --steps 2", 5, "E503", ("run", str(owner.pid), "since"))
        refused(case, kit, cache_dir)
        owner.stdin.close()


# --- what the machine refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["dpo", "score", "generate"])
def test_a_folder_that_may_not_be_written_is_said_before_the_work(verb, kit, cache_dir, monkeypatch):
    """C15."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: not mode & os.W_OK and may(path, mode, **more))
    line = f"{verb} --model TINY --data good.jsonl --out deep/run"
    refused(Case("C15", line, 5, "E314", (str(kit.folder), "permission")), kit, cache_dir)


def test_too_small_a_disk_is_said_before_the_work(kit, cache_dir, monkeypatch):
    """C16."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6))
    case = Case("C16", on("--data good.jsonl"), 5, "E315", ("run", "free", "checkpoint", "--train.keep"))
    refused(case, kit, cache_dir)


# --- rows kept aside -------------------------------------------------------------------------------------------------

BAD = [
    b'{"prompt": "a",  "chosen": "b" , "rejected": ""}',
    b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}\r',
    b"[3]",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}',
]


def spread(good: list[bytes], bad: list[bytes]) -> bytes:
    lines = list(good)
    for n, line in enumerate(bad):
        lines.insert(3 * n + 1, line)
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("verb", ["dpo", "kto", "sft"])
def test_skipped_rows_are_kept_byte_for_byte_and_counted(verb, kit):
    good = (kit.folder / "good.jsonl").read_bytes().splitlines()
    bad = [line.replace(b'"rejected": ""', b'"rejected": 5') if verb == "sft" else line for line in BAD]
    bad = [line for line in bad if verb != "sft" or b"5}" not in line]  # sft reads the chosen side alone
    kit.write("a.jsonl", spread(good[:20], bad))
    kit.write("e.jsonl", spread(good[20:], bad[-1:]))
    line = f"{verb} --model TINY --data a.jsonl --eval e.jsonl --out run --batch 8 --steps 1 --samples 0 --device cpu"
    code, result, _, said = command(f"{line} --bad-rows skip", kit.models)
    assert code == 0, said
    assert (kit.folder / "run/rejects.jsonl").read_bytes() == b"".join(line + b"\n" for line in [*bad, bad[-1]])
    data = json.loads((kit.folder / "run/data.json").read_text())
    assert data["counts"]["refused"] == result["data"]["refused"] == len(bad) + 1
    assert [f"a.jsonl:{3 * n + 2}" in text for n, text in enumerate(data["rejected"][:-1])] == [True] * len(bad)
    assert "e.jsonl:2" in data["rejected"][-1]


def test_rows_that_the_template_refuses_are_kept_as_they_stood(kit):
    """The reader lets them in, the tokenizer does not: the bytes of the file are kept all the same."""
    refusing(kit)
    lines = (kit.folder / "good.jsonl").read_bytes().splitlines()
    lines[4] = lines[4].replace(b'{"prompt":', b'{ "prompt" :')
    kit.write("good.jsonl", b"\n".join(lines))
    line = (
        "dpo --model m --data good.jsonl --eval none --out run --batch 8 --steps 1 --chat-template t.jinja --device cpu"
    )
    code, result, _, said = command(f"{line} --bad-rows skip", kit.models)
    assert code == 0, said
    assert (kit.folder / "run/rejects.jsonl").read_bytes() == lines[4] + b"\n"
    assert result["data"]["refused"] == 1
    assert "good.jsonl:5" in json.loads((kit.folder / "run/data.json").read_text())["rejected"][0]


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_skipped_rows_are_counted_where_no_run_is_made(verb, kit):
    good = (kit.folder / "good.jsonl").read_bytes().splitlines()[:4]
    kit.write("a.jsonl", spread(good, BAD[:2]))
    more = "--max-tokens 2" if verb == "generate" else ""
    code, result, _, said = command(
        f"{verb} --model TINY --data a.jsonl --out deep/o.jsonl --bad-rows skip {more}", kit.models
    )
    assert code == 0, said
    assert result["refused"] == {"score": 2, "generate": 1}[verb]  # a prompt alone needs no other column
    assert len((kit.folder / "deep/o.jsonl").read_bytes().splitlines()) == {"score": 4, "generate": 5}[verb]
