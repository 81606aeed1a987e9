"""palate report through the command line, on runs that were really made."""

import json
import os
from pathlib import Path

import pytest
from report_kit import Page
from runs_kit import demonstrations, feedbacks, lines, pairs, write_rows

ROWS = list(pairs(40))


@pytest.fixture
def trained(palate, tiny, tmp_path):
    """A function that trains a tiny model on pairs and judges it by others, labelled rightly."""

    def train(out: str, rows=ROWS[:24], **options):
        data, held = write_rows(tmp_path / f"{out}.jsonl", rows), write_rows(tmp_path / "held.jsonl", ROWS[24:])
        options = {"steps": 6, "batch": 12, "lr": 3e-3, "device": "cpu"} | options
        return palate.ok("dpo", model=tiny, data=data, eval=held, out=out, **options)

    return train


def test_the_page_says_what_the_run_says(palate, trained):
    result = trained("run", samples=2)
    made = palate.ok("report", "run")
    assert (made["out"], made["runs"]) == (os.path.join("run", "report.html"), ["run"])
    page = Page(Path(made["out"]))
    word, _, rest = result["verdict"].partition(": ")
    assert (word, f'<h1 class="tone-better">{word.capitalize()}</h1>' in page.html) == ("better", True)
    assert rest[1:] in page.text
    last = [line for line in lines(Path("run/metrics.jsonl")) if "eval/loss" in line][-1]
    assert f"Held-out accuracy {last['eval/rewards/accuracies']:.1%}" in page.text
    for row in lines(Path("run/samples.jsonl"))[-2:]:
        assert " ".join(row["prompt"].split()) in page.text
    tokens = sum(line.get("tokens", 0) for line in lines(Path("run/metrics.jsonl")))
    assert f"Tokens {tokens:,} {tokens:,}" in page.text  # planned, spent
    third = next(line for line in lines(Path("run/metrics.jsonl")) if line["step"] == 3 and "seconds" in line)
    plan = json.loads(Path("run/run.json").read_text())["plan"]
    assert plan["seconds"] == 6 * third["seconds"] and plan["tokens"] == tokens
    before = Path(made["out"]).read_bytes()
    assert palate.ok("report", "run")["out"] == made["out"]
    assert Path(made["out"]).read_bytes() == before


def test_a_run_ends_with_its_report(trained):
    result = trained("told", report=True)
    word = result["verdict"].partition(":")[0].capitalize()
    assert f">{word}</h1>" in Page(Path("told/report.html")).html
    trained("untold")
    assert not Path("untold/report.html").exists()


def test_a_report_that_cannot_be_written_ends_no_run(palate, trained, monkeypatch):
    import palate.report as page
    from palate.errors import MachineError

    def full(*args):
        raise MachineError("No space left on device", where="report.html")

    monkeypatch.setattr(page, "write_report", full)
    result = trained("told", report=True)
    assert (palate.code, result["status"]) == (0, "done")


def test_swapped_labels_end_in_worse(palate, trained):
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS[:24]]
    result = trained("swapped", swapped)
    assert result["verdict"].startswith("worse")
    page = Page(Path(palate.ok("report", "swapped")["out"]))
    assert '<h1 class="tone-worse">Worse</h1>' in page.html
    assert "Better" not in page.text


def test_kto_sft_and_runs_without_held_out_rows(palate, tiny, tmp_path):
    options = {"model": tiny, "steps": 1, "batch": 8, "device": "cpu", "samples": 1}
    palate.ok("kto", data=write_rows(tmp_path / "k.jsonl", feedbacks(40)), out="kto", **options)
    palate.ok("sft", data=write_rows(tmp_path / "s.jsonl", demonstrations(40)), out="sft", **options)
    palate.ok("sft", data="s.jsonl", out="blind", eval="none", **options)
    for name, said in (("kto", "wanted held out"), ("sft", "nats a token"), ("blind", "No held-out rows, so")):
        assert said in Page(Path(palate.ok("report", name)["out"])).text
    several = palate.ok("report", "kto", "sft", "blind", out="all.html")
    assert several["out"] == "all.html"
    assert "3 runs, side by side" in Page(Path("all.html")).text


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["nowhere"], 3, "there is no run here [E101]"),
        ([], 2, "--runs is needed"),
        (["run", "--out", "mine.html"], 2, "exists already and is no report [E313]"),
        (["run", "--out", "."], 2, "is a folder [E313]"),
        (["broken"], 3, "run.json: is not JSON"),
    ],
)
def test_what_is_refused(palate, tmp_path, arguments, code, said):
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "a", "verb": "dpo", "status": "done"}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    palate("report", *arguments)
    assert (palate.code, said in palate.said) == (code, True), palate.said
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert not list(tmp_path.glob("**/report.html"))
