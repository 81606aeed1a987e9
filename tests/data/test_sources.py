"""Every way in gives the same records; the shared files give the rows that their README states."""

import contextlib
import csv
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palate.data.records import Message, PreferencePair, Ranking
from palate.data.sources import read_demonstrations, read_feedback, read_pairs, read_prompts
from palate.errors import DataError, RefusedError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [{"prompt": f"p{i}", "chosen": f" a{i}\n\u2028é", "rejected": f' b"{i},'} for i in range(10)]


def shared(name: str) -> Path:
    folder = os.environ.get("PALATE_TEST_DATA")
    if not folder:
        pytest.skip("PALATE_TEST_DATA is not set: the shared data files are not read")
    return Path(folder) / f"{name}.jsonl"


def meaning(records):
    return [(r.prompt, r.chosen, r.rejected) for r in records]


def write(path: Path, rows) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix in (".gz", ".zst"):
        import pyarrow

        inside = write(path.with_suffix(""), rows).read_bytes()
        half = len(inside) // 2  # packed in two parts, as appending to such a file does
        kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
        path.write_bytes(
            b"".join(pyarrow.compress(p, codec=kind, asbytes=True) for p in (inside[:half], inside[half:]))
        )
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return path


SHARED = [
    (read_pairs, "hh_harmless_implicit", 728, {}),
    (read_pairs, "mixed_dpo_en_conversational", 165, {}),
    (read_pairs, "mixed_dpo_zh_conversational", 60, {}),
    (read_pairs, "pandalm_judged", 624, {"tie": 80}),
    (read_pairs, "mtbench_human_pairs", 143, {}),
    (read_pairs, "llmbar_pairs", 226, {}),
    (read_pairs, "qa_feedback_ranked", 329, {"tie": 8}),
    (read_pairs, "gsm8k_solution_pairs", 450, {}),
    (read_pairs, "yes_no_pairs", 636, {}),
    (read_pairs, "sentiment_pairs", 766, {}),
    (read_feedback, "kto_en_unpaired", 209, {}),
    (read_demonstrations, "gsm8k_sft_prompt_completion", 300, {}),
    (read_demonstrations, "sft_self_instruct_messages", 289, {}),
    (read_demonstrations, "sft_dolly_messages", 97, {}),
    (read_demonstrations, "sentiment_sentences", 3000, {}),
    (read_demonstrations, "sentiment_reviews", 60, {}),
    (read_demonstrations, "tinyshakespeare_speeches", 3279, {}),
    (read_demonstrations, "tinystories", 1300, {}),
    (read_prompts, "vicuna_bench_judged", 349, {}),
]


@pytest.mark.parametrize(("read", "name", "rows", "dropped"), SHARED, ids=[c[1] for c in SHARED])
def test_shared_files(read, name, rows, dropped):
    path = shared(name)
    records = read(path)
    assert len(records) == rows - sum(dropped.values())
    assert records.dropped == dropped
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert records.sources == [{"path": str(path), "sha256": digest, "rows": rows}]
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    for record in records:
        row = lines[record.source.line - 1]
        if isinstance(row.get("prompt"), str):
            assert record.prompt == row["prompt"]
        if isinstance(record, PreferencePair) and isinstance(row.get("chosen"), str) and "prompt" in row:
            assert (record.chosen, record.rejected) == (row["chosen"], row["rejected"])


def test_transcripts_against_the_literal_text():
    path = shared("hh_harmless_implicit")
    for line, record in zip(path.read_text(encoding="utf-8").split("\n"), read_pairs(path), strict=False):
        row = json.loads(line)
        prompt, marker, reply = row["chosen"].rpartition("\n\nAssistant:")
        assert record.prompt == prompt + marker
        assert record.prompt.endswith("\n\nAssistant:")
        assert record.chosen == reply
        assert record.prompt + record.rejected == row["rejected"]
        assert record.chosen.startswith(" ")


def test_rankings_hold_every_strict_verdict():
    records = read_pairs(shared("qa_feedback_ranked"))
    assert all(isinstance(r, Ranking) and len(r.completions) == 4 for r in records)
    assert sum(len(r.preferences) for r in records) == 1731


def test_an_empty_reply_of_a_judged_file():
    """One of the two replies in line 319 is empty: refused by its line, left out on request."""
    path = shared("vicuna_bench_judged")
    with pytest.raises(DataError, match=r'vicuna_bench_judged.jsonl:319: field "response_a": empty \[E208\]'):
        read_pairs(path)
    records = read_pairs(path, bad_rows="skip")
    assert len(records) == 349 - 47 - 1
    assert records.dropped == {"tie": 47}


def test_conversations_keep_systems_and_turns():
    records = read_pairs(shared("mixed_dpo_en_conversational"))
    assert sum(r.prompt[0].role == "system" for r in records) == 55
    feedback = read_feedback(shared("kto_en_unpaired"))
    assert sum(r.label for r in feedback) == 109
    assert sum(len(r.prompt) > 2 for r in feedback) == 52
    for row in feedback:
        assert row.mismatched is not None


@pytest.mark.parametrize(
    "ending", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".csv.zst"]
)
def test_formats_agree(tmp_path, ending):
    path = write(tmp_path / f"pairs{ending}", ROWS)
    records = read_pairs(path)
    assert meaning(records) == meaning(read_pairs(ROWS))
    assert records.sources[0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert meaning(read_pairs(f"{path}[3:5]")) == meaning(records)[3:5]
    assert read_pairs(f"{path}[:2]").sources == [records.sources[0] | {"rows": 2, "slice": "[:2]"}]
    assert len(read_pairs(f"{path}[8:99]")) == 2
    with pytest.raises(DataError, match="E104"):
        read_pairs(f"{path}[10:]")
    with pytest.raises(DataError, match="E104"):
        read_pairs(f"{path}[5:5]")


def test_physical_lines(tmp_path):
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(b"\n \n" + json.dumps(ROWS[0]).encode() + b"\r\n\r\n" + json.dumps(ROWS[1]).encode())
    assert [r.source.line for r in read_pairs(jsonl)] == [3, 5]
    array = tmp_path / "a.json"
    first, second = (
        '{"prompt": "p",\n "chosen": "a", "rejected": "b"}',
        '{"prompt": "q", "chosen": "]", "rejected": "\\""}',
    )
    array.write_text(f"\n[\n {first},\n\n{second}]\n")
    assert [r.source.line for r in read_pairs(array)] == [3, 6]
    table = tmp_path / "a.csv"
    table.write_text('prompt,chosen,rejected\n"p\n\nq",a,b\n\nr,a,b\n')
    assert [r.source.line for r in read_pairs(table)] == [2, 6]
    parquet = write(tmp_path / "a.parquet", ROWS)
    assert [r.source.line for r in read_pairs(parquet)] == list(range(1, 11))


def test_array_goes_on_after_a_bad_row(tmp_path):
    path = tmp_path / "a.json"
    good = json.dumps(ROWS[0])
    deep = '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}"
    path.write_text(f'[{good},\n{{"prompt": nope, "x": "],{{"}},\n{good} {{}},\n{deep},\n{good}]')
    records = read_pairs(path, bad_rows="skip")
    assert [r.source.line for r in records] == [1, 5]
    assert [(s.line, code) for s, _, code, _ in records.rejected] == [(2, "E200"), (3, "E200"), (4, "E115")]
    assert records.rejected[0][1] == '{"prompt": nope, "x": "],{"}'


def test_byte_order_mark_and_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    body = json.dumps({"prompt": "a\u2028b\x85c", "chosen": "x", "rejected": "y"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + body.encode() + b"\n")
    records = read_pairs(path)
    assert records[0].prompt == "a\u2028b\x85c"
    assert any("byte order mark" in note for note in records.notes)
    for ending, text in ((".json", f"[{body}]"), (".csv", "prompt,chosen,rejected\na,x,y\n")):
        other = path.with_suffix(ending)
        other.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(read_pairs(other)) == 1
        assert "byte order mark" in " ".join(read_pairs(other).notes)


def test_lines_named_json_are_read_and_said(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    records = read_pairs(path)
    assert meaning(records) == meaning(read_pairs(ROWS))
    assert any("JSONL" in note for note in records.notes)
    other = tmp_path / "rows.txt"
    other.write_bytes(path.read_bytes())
    assert len(read_pairs(other, format="jsonl")) == 10


def test_several_files_and_lists(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS[:3]), write(tmp_path / "b.csv", ROWS[3:])
    records = read_pairs([first, str(second)])
    assert meaning(records) == meaning(read_pairs(ROWS))
    assert [s["rows"] for s in records.sources] == [3, 7]
    assert meaning(read_pairs(tuple(ROWS))) == meaning(read_pairs(iter(ROWS)))
    assert records[:2] == list(records)[:2]
    from datasets import Dataset

    assert meaning(read_pairs(Dataset.from_list(ROWS))) == meaning(records)


def test_a_name_with_brackets(tmp_path):
    path = tmp_path / "a[:2]"
    path.write_text(json.dumps(ROWS[0]))
    assert len(read_pairs(path, format="jsonl")) == 1


def test_rejects_are_the_very_bytes(tmp_path):
    bad = b'{"prompt": "a\xff", "chosen": "b"}\r'
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + bad + b"\n[3]\n")
    records = read_pairs(path, bad_rows="skip")
    assert records.rejects() == bad + b"\n[3]\n"
    read_pairs(path, bad_rows="skip", rejects=tmp_path / "rejects.jsonl")
    assert (tmp_path / "rejects.jsonl").read_bytes() == bad + b"\n[3]\n"


def test_warnings_are_counted_and_kept():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a b", "rejected": "a  b"},
        {"prompt": "r", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2.5},
    ]
    records = read_pairs(rows)
    assert len(records) == 5
    found = {w.code: (w.count, [tuple(s.line for s in case) for case in w.rows]) for w in records.warnings}
    assert found == {
        "W210": (1, [(4,)]),
        "W211": (2, [(1, 2), (2, 3)]),
        "W212": (1, [(1, 3)]),
        "W227": (1, [(5,)]),
    }
    assert "memory:1 and memory:3" in str(records.warnings[2])


def test_csv_truth_and_lists(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\na,b,true\nc,d,False\n")
    assert [r.label for r in read_feedback(path)] == [True, False]
    path.write_text("prompt,completion,label\na,b,1\nc,d,False\n")
    with pytest.raises(DataError, match="E225"):
        read_feedback(path)
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows(
            [["messages"], [json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])]]
        )
    assert read_demonstrations(path)[0].completion == (Message("assistant", "a"),)


def test_parquet_conversations(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": [{"role": "assistant", "content": "y"}],
         "rejected": [{"role": "assistant", "content": "n"}]} for i in range(6)
    ]  # fmt: skip
    assert meaning(read_pairs(write(tmp_path / "a.parquet", rows))) == meaning(read_pairs(rows))


def test_memory_stays_small(tmp_path):
    """Five thousand rows of 4 kB, of which nothing is kept but the records."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("w") as handle:
        for i in range(5000):
            handle.write(json.dumps({"prompt": f"p{i}", "chosen": f"a{i}", "rejected": "b", "junk": "x" * 4000}) + "\n")
    tracemalloc.start()
    read_pairs(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@QUICK
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=8), st.booleans())
def test_text_comes_through_unchanged(tmp_path, rows, ascii_only):
    path = tmp_path / "a.jsonl"
    whole = [{"prompt": f"?{p}", "chosen": f"+{c}", "rejected": f"-{r}"} for p, c, r in rows]
    path.write_text("".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in whole), encoding="utf-8")
    wanted = [tuple(r.values()) for r in whole]
    assert meaning(read_pairs(path)) == wanted
    path.with_suffix(".json").write_text(json.dumps(whole, ensure_ascii=ascii_only, indent=2), encoding="utf-8")
    assert meaning(read_pairs(path.with_suffix(".json"))) == wanted


@QUICK
@given(words, words, words)
def test_implicit_text_comes_back_whole(prompt, chosen, rejected):
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    try:
        (pair,) = read_pairs([row])
    except DataError:
        return
    assert pair.prompt + pair.chosen == row["chosen"]
    assert pair.prompt + pair.rejected == row["rejected"]
    assert pair.prompt.strip()
    assert pair.chosen.strip()
    assert pair.rejected.strip()


turns = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), st.sampled_from(["a", "b", ""])), max_size=5
)


@QUICK
@given(turns, turns, turns)
def test_implicit_messages_come_back_whole(prompt, chosen, rejected):
    sides = [[{"role": r, "content": c} for r, c in (*prompt, *side)] for side in (chosen, rejected)]
    try:
        (pair,) = read_pairs([{"chosen": sides[0], "rejected": sides[1]}])
    except DataError:
        return
    for side, given_side in ((pair.chosen, sides[0]), (pair.rejected, sides[1])):
        assert [{"role": m.role, "content": m.content} for m in (*pair.prompt, *side)] == given_side
        assert side[0].role == "assistant"
        assert side[-1].role == "assistant"


@QUICK
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes_end_in_our_errors(tmp_path, content, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    for read in (read_pairs, read_demonstrations, read_feedback, read_prompts):
        with contextlib.suppress(RefusedError):
            read(path)


# without holding


@pytest.mark.parametrize("read", [read_pairs, read_demonstrations])
def test_records_that_are_not_held_are_the_same(tmp_path, read):
    """Same rows, same story, however often they are asked for; a row that was refused stays out."""
    swapped = dict(prompt="p1", chosen=ROWS[1]["rejected"], rejected=ROWS[1]["chosen"])
    rows = [
        *ROWS,
        ROWS[3],
        swapped,
        {"prompt": "p", "chosen": "a"},
        dict(ROWS[3], id="x"),
        dict(ROWS[5], id="x"),
        *ROWS[:2],
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    held, loose = (read(path, bad_rows="skip", hold=hold) for hold in (True, False))
    for _ in range(2):
        assert list(loose) == list(held)
    assert [loose[i] for i in (0, 5, -1)] == [held[i] for i in (0, 5, -1)]
    assert loose[2:9:3] == held[2:9:3]
    assert loose[::-4] == held[::-4]
    for name in ("sources", "dropped", "rejected", "notes", "warnings"):
        assert getattr(loose, name) == getattr(held, name)
    assert len(loose) == len(held) == len(rows) - 2
    known = read(path, bad_rows="skip", known=loose)
    assert list(known) == list(held)
    write(path, rows[::-1])
    with pytest.raises(DataError, match="changed"):
        list(loose)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.booleans()), max_size=12))
def test_repeated_rows_are_those_that_a_dictionary_finds(rows):
    from palate.data.sources import _Hashes

    hashes, seen, twice, turned = _Hashes(), {}, [], []
    for line, (one, two, pair) in enumerate(rows, start=1):
        key, other = hash((one, two, pair)), hash((two, one, pair)) if pair else None
        hashes.add(key, other, line % 2, line)
        place = (line % 2, line)
        if key in seen:
            twice.append((seen[key], place))
        seen.setdefault(key, place)
        if other is not None and other in seen:
            turned.append((seen[other], place))
    assert hashes.repeated() == [(len(twice), twice[:3]), (len(turned), turned[:3])]
