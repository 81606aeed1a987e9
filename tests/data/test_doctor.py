"""The doctor answers for every file, and finds what is wrong where something is."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palate.data.columns import NAMES
from palate.data.doctor import doctor
from palate.data.sources import read_demonstrations, read_feedback, read_pairs, read_prompts
from palate.errors import NotThereError, RefusedError, UsageError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pairs(count=30, **changes):
    return [{"prompt": f"p{i}?", "chosen": f"yes {i}", "rejected": f"no! {i}"} | changes for i in range(count)]


def found(data, check):
    findings = [f for f in doctor(data) if f.check == check]
    assert len(findings) == 1, [f.check for f in doctor(data)]
    return findings[0]


def test_sound_data_have_notes_alone():
    findings = doctor(pairs())
    assert findings.exit_code == 0
    assert findings.kind == "pair"
    assert findings.rows == 30
    assert [f.check for f in findings] == ["lengths"]
    assert "columns prompt, chosen, rejected" in findings.notes[0]


def test_unreadable_rows_are_grouped_with_three_examples(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(r) for r in pairs(20)] + ["{", "[]", "{}"] + [json.dumps(r) for r in pairs(5, chosen="")]
    rows += [json.dumps(r) for r in pairs(2, chosen="same", rejected="same")] + ["{"]
    path.write_text("\n".join(rows) + "\n")
    findings = doctor(path)
    assert findings.exit_code == 3
    by_code = {f.code: f for f in findings if f.severity == "error"}
    assert {code: f.count for code, f in by_code.items()} == {"E200": 2, "E201": 1, "E202": 1, "E208": 5, "E209": 2}
    empty = by_code["E208"]
    assert empty.check == "empty completions"
    assert empty.rows == tuple(f'{path}:{line}: field "chosen": empty' for line in (24, 25, 26))
    assert by_code["E209"].check == "equal completions"
    assert all(f.fix for f in by_code.values())
    assert findings[0].severity == "error"


def test_duplicates_and_both_orders():
    rows = pairs(4)
    swapped = rows[1] | {"chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    data = [*rows, rows[0], swapped]
    assert found(data, "duplicates").rows == ("memory:1 and memory:5",)
    both = found(data, "one pair in both orders")
    assert (both.count, both.rows, both.severity) == (1, ("memory:2 and memory:6",), "warning")
    shared = found(data, "prompts shared by rows")
    assert shared.count == 4
    assert shared.what == "4 distinct prompts in 6 rows"


@pytest.mark.parametrize(("chosen", "severity"), [("yes" * 9, "warning"), ("x", "warning"), ("no ", "note")])
def test_length_as_a_judge(chosen, severity):
    finding = found(pairs(chosen=chosen, rejected="no!"), "lengths")
    assert finding.severity == severity
    right = {"yes" * 9: "800% longer (27 against 3 characters); length alone is right on 100%", "x": "67% shorter"}
    right["no "] = "chosen as long as rejected (3 against 3 characters); length alone is right on 50%"
    assert right[chosen] in finding.what


def test_rankings_are_measured_by_their_verdicts():
    data = [{"prompt": f"p{i}", "responses": ["aaaa", "bb"], "preferences": [2]} for i in range(3)]
    finding = found(data, "lengths")
    assert finding.count == 3
    assert "50% shorter" in finding.what


def test_prompt_repeated_in_a_completion():
    rows = pairs(3, prompt="Why is the sky as blue as it is?")
    rows[1]["chosen"] = "Why is the sky as blue as it is? Because."
    finding = found(rows, "prompt repeated in completions")
    assert finding.rows == ("memory:2",)


def test_feedback_classes():
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i % 3 == 0} for i in range(9)]
    assert found(rows, "classes").what == "3 wanted, 6 unwanted"
    rows = [r | {"label": True} for r in rows]
    assert found(rows, "one class only").severity == "error"


def test_files_without_an_answer_in_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    for content in (b"", b"\n", b"PAR1", '{"a": 1}'.encode("utf-16"), b"[\n"):
        path.write_bytes(content)
        findings = doctor(path)
        assert findings.exit_code == 3
        assert findings[0].fix
        assert str(path) in findings[0].rows[0]
        json.dumps(findings.as_dict())
    with pytest.raises(NotThereError):
        doctor(tmp_path / "none.jsonl")
    with pytest.raises(UsageError):
        doctor(path, format="xml")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=8
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "x"]) | scalars,
            "content": scalars,
            "from": st.sampled_from(["human", "gpt"]),
            "value": scalars,
        },
    ),
    max_size=4,
)
values = anything | messages | st.text(max_size=8) | st.lists(st.integers(0, 3), max_size=6)
rows = st.dictionaries(st.sampled_from(NAMES), values, max_size=6) | anything


def read_all(path) -> None:
    findings = doctor(path)
    assert findings.exit_code in (0, 3)
    json.dumps(findings.as_dict())
    for read in (read_pairs, read_demonstrations, read_feedback, read_prompts):
        for bad_rows in ("stop", "skip"):
            with contextlib.suppress(RefusedError):
                for record in read(path, bad_rows=bad_rows):
                    assert record.source is not None


@FUZZ
@given(st.lists(rows, max_size=5))
def test_rows_of_any_shape_get_an_answer(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    read_all(path)


@FUZZ
@given(rows, rows)
def test_rows_of_one_shape_get_an_answer(tmp_path, first, second):
    """Half of the time the second row changes one value alone, so that a dialect is found."""
    if isinstance(first, dict) and isinstance(second, dict):
        second = first | dict(list(second.items())[:1])
    path = tmp_path / "a.json"
    path.write_text(json.dumps([first, second]))
    read_all(path)


@FUZZ
@given(st.data())
def test_spoilt_text_gets_an_answer(tmp_path, data):
    """A sound file in which a few bytes are replaced, removed or doubled."""
    content = bytearray("".join(json.dumps(r) + "\n" for r in pairs(3)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"{", b"]"])
        )
    path = tmp_path / f"a{data.draw(st.sampled_from(['.jsonl', '.json', '.csv']))}"
    path.write_bytes(content)
    read_all(path)


@FUZZ
@given(st.binary(max_size=100))
def test_any_bytes_get_an_answer(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    read_all(path)
