"""Several runs on one page."""

from report_kit import LINES, RESULT, comparison, evaluation, step

from palate.report import write_report


def test_runs_stand_side_by_side(folder, report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worse = RESULT | {"verdict": "worse: on 40 it lost"}
    folder("one")
    folder("two", result=worse, lines=[evaluation(0), step(1), evaluation(1, **{"eval/loss": 1.5})])
    folder("three", comparison=comparison(), status="interrupted", config="model: other\nlr: 0.5\n")
    page = report("one", "two", "three")
    assert (tmp_path / "report.html").exists()
    for said in (
        "3 runs, side by side",
        "one · Better",
        "two · Worse",
        "On 40 it lost.",
        "three · Not shown to be different",
        "This run was interrupted after step 4",
        "verb dpo dpo dpo",
        "status done done interrupted",
        "win rate 66.7%",
        "held-out accuracy 80.0% 65.0% 80.0%",
        "held-out loss 0.2930 1.5000 0.2930",
        "lr 0.0001 0.0001 0.5",
    ):
        assert said in page.text, said
    differing = page.text[page.text.index("What differs") :]
    assert "model models/start models/start other" in differing
    assert "seed 0 0 –" in differing
    assert {"Loss", "Margin", "Accuracy"} <= set(page.svgs)
    for ink in ("s1", "s2", "s3"):
        assert f"var(--{ink})" in page.svgs["Loss"]
    assert "http" not in page.html


def test_runs_of_one_name_go_by_their_paths(folder, tmp_path, report):
    one, two = folder("a/run"), folder("b/run")
    page = report(one, two, out=tmp_path / "page.html")
    assert str(one) in page.text and str(two) in page.text
    assert "What differs in their configs Nothing." in page.text


def test_many_runs_are_drawn_apart(folder, report, tmp_path):
    runs = [folder(f"run{n}", lines=LINES) for n in range(8)]
    page = report(*runs, out=tmp_path / "page.html")
    assert "stroke-dasharray" in page.svgs["Loss"]
    assert write_report(runs, tmp_path / "page.html").read_bytes() == page.html.encode()
