"""People as a judge: votes are read whatever their order, open ballots are written once, nothing said is lost."""

import io
import json
from pathlib import Path

import pytest
from runs_kit import lines, write_rows

from palate.data.records import Message
from palate.errors import AwaitsVotes, DataError, NotThereError
from palate.sampling.judge import Completion, open_judge
from palate.sampling.votes import main, read_votes, vote

CHAT = (Message("system", "Be brief."), Message("user", "Say {x} ü"))


def ballot(prompt, first, second, vote=None, **more) -> dict:
    return {"prompt": prompt, "first": first, "second": second, "vote": vote, **more}


def outcomes(path, *cases) -> list[float]:
    """One outcome for each (prompt, first, second)."""
    columns = zip(*cases, strict=True)
    prompts, ones, twos = (list(column) for column in columns)
    return open_judge(f"people:{path}").prefer(prompts, [Completion(t) for t in ones], [Completion(t) for t in twos])


def test_votes_count_whatever_the_order_and_the_majority_decides(tmp_path):
    path = write_rows(
        tmp_path / "v.jsonl",
        [
            ballot("p", "a", "b", "first"),
            ballot("p", "b", "a", "first"),
            ballot("p", "b", "a", "second"),
            ballot("q", "a", "b", "first", voter="Ada"),
            ballot("q", "a", "b", "second", voter="Bo"),
            ballot("r", "a", "b", "first", voter="Ada"),
            ballot("r", "b", "a", "first", voter="Ada"),  # she thought again
            ballot("s", "a", "b", "tie"),
            ballot("s", "a", "b"),
            ballot([{"role": m.role, "content": m.content} for m in CHAT], "a", "b", "second"),
        ],
    )
    cases = [("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("r", "a", "b"), ("r", "b", "a"), ("s", "b", "a")]
    assert outcomes(path, *cases, (CHAT, "a", "b"), ("never asked", "a", "a")) == [1, 0, 0.5, 0, 1, 0.5, 0, 0.5]
    assert len(lines(path)) == 10


def test_what_nobody_has_voted_on_is_written_once_in_an_order_by_hash(tmp_path):
    path = tmp_path / "new" / "v.jsonl"
    cases = [(f"p{n}", "long", "short") for n in range(60)]
    judge = open_judge(f"people:{path}")
    columns = [list(column) for column in zip(*cases, strict=True)]
    for _ in range(2):
        with pytest.raises(AwaitsVotes, match="60 pairs wait for a vote") as caught:
            judge.prefer(columns[0], [Completion(t) for t in columns[1]], [Completion(t) for t in columns[2]])
        assert (caught.value.where, caught.value.exit_code) == (str(path), 6)
    rows = lines(path)
    assert [row["prompt"] for row in rows] == columns[0] and all(list(row) == list(ballot(0, 0, 0)) for row in rows)
    assert {row["vote"] for row in rows} == {None}
    assert 15 < sum(row["first"] == "long" for row in rows) < 45
    with pytest.raises(AwaitsVotes, match="61 pairs"):  # a process that asks for one more, the other way round
        outcomes(path, *[(p, b, a) for p, a, b in cases], (CHAT, "", "\0\ud800"))
    assert lines(path)[:60] == rows and len(lines(path)) == 61
    filled = [row | {"vote": "first" if row["first"] in ("long", "") else "second"} for row in lines(path)]
    path.write_text("\n".join(map(json.dumps, filled)))  # without a last line feed, as some editors write it
    assert outcomes(path, *cases, (CHAT, "\0\ud800", "")) == [1] * 60 + [0]
    with pytest.raises(AwaitsVotes):
        outcomes(path, ("another", "a", "b"))
    assert len(lines(path)) == 62 and len(read_votes(path)) == 62


@pytest.mark.parametrize(
    "line, code, said",
    [
        ("{", "E200", "v.jsonl:2"),
        ("3", "E201", "v.jsonl:2: a number where a row belongs"),
        (json.dumps(ballot("p", "a", "b", "First")), "E225", 'v.jsonl:2: field "vote": unknown vote "First"'),
        (json.dumps(ballot("p", "a", "b", 1)), "E225", 'v.jsonl:2: field "vote": a number where a vote belongs'),
        (json.dumps(ballot("p", "a", None)), "E203", 'v.jsonl:2: field "second": null where text belongs'),
        (json.dumps(ballot("p", "a", "b", voter=3)), "E203", 'v.jsonl:2: field "voter"'),
        ('{"prompt": "p", "first": "a", "second": "b", "votes": "tie"}', "E202", 'v.jsonl:2: field "vote": not there'),
    ],
)
def test_votes_that_cannot_be_read_are_named_by_line(tmp_path, line, code, said):
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps(ballot("p", "a", "b", "tie")) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        open_judge(f"people:{path}")
    assert caught.value.code == code and said in str(caught.value) and "--" not in str(caught.value)


def test_a_folder_is_no_file_and_an_empty_file_has_no_votes(tmp_path):
    (tmp_path / "v.jsonl").write_text("\n")
    assert read_votes(tmp_path / "v.jsonl") == read_votes(tmp_path / "nowhere.jsonl") == {}
    with pytest.raises(DataError, match="a folder"):
        open_judge(f"people:{tmp_path}")
    with pytest.raises(NotThereError):
        vote(tmp_path / "nowhere.jsonl")


def test_voting_at_a_terminal(tmp_path, capsys, monkeypatch):
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    rows = [ballot("p", "a", "b", "tie"), ballot("p", "b", "c"), ballot(chat, "\x1b[2Jx", "y"), ballot("q", "1", "2")]
    path, shown = write_rows(tmp_path / "v.jsonl", [*rows, ballot("p", "b", "a")]), []

    def person(*answers):
        keys = iter(answers)
        return lambda text: shown.append(text) or next(keys)

    assert vote(path, "Ada", person("2", "yes", "1", "q")) == 1
    assert "--- p" in shown[0] and "[1 of 3]" in shown[0] and "\x1b" not in shown[1] and "\\x1b[2Jx" in shown[1]
    assert [row["vote"] for row in lines(path)] == ["tie", "second", "first", None, None]
    assert lines(path)[1] == ballot("p", "b", "c", "second", voter="Ada")

    def adding(text):  # somebody else writes while this one thinks
        write_rows(path, [*lines(path), ballot("r", "a", "b")])
        return "t"

    assert vote(path, ask=adding) == 0
    assert [row["vote"] for row in lines(path)] == ["tie", "second", "first", "tie", None, None]
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    assert main([str(path)]) == 0 and "0 ballots are open" in capsys.readouterr().err
    assert read_votes(path)["r", "a", "b"] == [1.0]
    with Path(path).open("a") as file:
        file.write("{\n")
    assert main([str(path)]) == 3 and "v.jsonl:7" in capsys.readouterr().err
