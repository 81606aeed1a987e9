"""Folders that are no whole runs: named, refused with exit code 3, and nothing is written."""

import json

import pytest
from report_kit import comparison

from palate.errors import CheckpointError, NotThereError, UsageError
from palate.report import write_report
from palate.report.reading import finite, read_run, series

DEEP = "[" * 100_000
BROKEN = {
    "run.json": ["", "{", "[]", "null", "\x00\xff", DEEP, '{"id": 3, "verb": "dpo"}', '{"id": "a"}'],
    "config.yaml": ["a: [", "- 1\n- 2", "\x00", "a: &x [1]\nb: *x\n", "!!python/object:os.system {}", "{" * 50_000],
    "data.json": ["", "[]", '{"counts": {"rows": "many"}}', '{"sources": [{"rows": 3}]}', '{"train": -1}', DEEP],
    "metrics.jsonl": [
        "x\n",
        "[]\n",
        '{"loss": 1}\n',
        '{"step": "1"}\n',
        '{"step": -1}\n',
        '{"step": true}\n',
        DEEP + "\n",
    ],
    "samples.jsonl": ["{\n", "3\n", '{"step": 1}\n', '{"step": 1, "prompt": 3}\n', '{"step": 1, "prompt": [{}]}\n'],
    "comparison.json": [
        "{",
        "{}",
        json.dumps(comparison(win_rate=1.5)),
        json.dumps(comparison(n=-1)),
        json.dumps(comparison(verdict="excellent")),
        json.dumps(comparison(kl="small")),
        json.dumps(comparison()).replace("1.234", "NaN"),
        json.dumps(comparison(examples=[{"prompt": "p"}])),
    ],
}


@pytest.mark.parametrize("name, content", [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_a_damaged_file_is_refused_by_name(folder, name, content):
    path = folder()
    (path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        write_report([path])
    assert caught.value.exit_code == 3
    assert name in str(caught.value) and "[E501]" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))
    assert not (path / "report.html").exists()


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_folder_in_the_place_of_a_file_is_refused(folder, name):
    path = folder()
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        write_report([path])


def test_a_line_that_was_cut_off_at_the_end_is_left_out(folder):
    path = folder()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert read_run(path).last_step == 4


def test_what_is_no_run_is_said(tmp_path, folder):
    with pytest.raises(NotThereError, match="there is no run here"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(NotThereError):
        write_report([folder(), tmp_path])
    with pytest.raises(UsageError, match="needs a run"):
        write_report([])


def test_only_reports_are_written_over(folder, tmp_path):
    run = folder()
    page = write_report([run])
    assert page == run / "report.html"
    before = page.read_bytes()
    assert write_report([run]).read_bytes() == before
    other = tmp_path / "mine.html"
    other.write_text("<html>mine</html>")
    for out in (other, run, run / "run.json"):
        with pytest.raises(UsageError, match="E313"):
            write_report([run], out)
    assert other.read_text() == "<html>mine</html>"
    assert write_report([run], tmp_path / "new" / "a b ü.html").exists()


@pytest.mark.parametrize(
    "value, number",
    [
        (1, 1.0),
        (0.5, 0.5),
        (True, None),
        (None, None),
        ("1", None),
        (float("nan"), None),
        (float("-inf"), None),
        (10**400, None),
    ],
)
def test_finite(value, number):
    assert finite(value) == number


def test_series_leaves_out_what_is_no_number():
    lines = [{"step": 1, "a": 1}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2.5}]
    assert series(lines, "a") == [(1, 1.0), (4, 2.5)]
