"""The page of a run: what it says is what the files say, whatever they hold."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_kit import LINES, RESULT, comparison, evaluation, sample, step

from palate.report import write_report
from palate.report.reading import read_run
from palate.report.words import clean
from palate.run import Lock

TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "footer", "figure"}
TAGS |= {"figcaption", "h1", "h2", "h3", "p", "b", "i", "bdi", "code", "pre", "br", "div", "span", "dl", "dt", "dd"}
TAGS |= {"ul", "li", "table", "tr", "th", "td", "svg", "g", "path", "defs", "use", "text", "clippath", "rect"}


def test_the_numbers_are_those_of_the_files(folder, report):
    page = report(folder(comparison=comparison())).text
    for said in (
        "Not shown to be different",
        "Judged by rule, after wins 66.7% [35.4%, 87.9%] of 9 comparisons with before.",
        "Better: on 40 held-out pairs the chosen completion wins 80.0% [65.2%, 89.5%].",
        "Held-out accuracy 80.0% [65.0%, 90.0%]",
        "Held-out margin 1.600",
        "KL from the start 1.23",
        "Length of completions 21.2 24.5",
        "Score by rule 0.40 0.38",
        "KL from the start 0.00 1.23",
        "57 rows to train on, 3 held out.",
        "refused 2",
        "pairs.jsonl:9: no prompt",
        "ab" * 32,
        "Steps 4 4",
        "Time in steps 2.0 s",
        "Tokens 2,048",
        "Tokens per second 1,024",
        "Completions scored under the reference 120 6 reused",
        "palate dpo --model models/start --out run",
        "weights " + "cd" * 16,
        "train.keep 2",
        "lr 0.0001",
    ):
        assert said in page, said
    assert "prompts cut" not in page  # of what did not happen nothing is said


def test_what_stands_first_is_the_verdict(folder, report):
    page = report(folder(comparison=comparison()))
    assert page.text.index("Not shown to be different") < page.text.index("Win rate") < page.text.index("prompt 8")
    order = ["Before and after", "How it learned", "Rewards and likelihood", "Length and distance", "Data", "Cost"]
    places = [page.html.index(f"<h2>{name}</h2>") for name in [*order, "Do it again"]]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "changes, word, tone, sentence",
    [
        ({}, "Better", "better", "On 40 held-out pairs the chosen completion wins 80.0% [65.2%, 89.5%]."),
        ({"result": RESULT | {"verdict": "worse: on 40 it lost"}}, "Worse", "worse", "On 40 it lost."),
        (
            {"result": RESULT | {"verdict": "not shown to be better: on 40"}},
            "Not shown to be better",
            "open",
            "On 40.",
        ),
        ({"result": {"verdict": "held-out loss 0.5 to 0.4"}}, "", None, "Held-out loss 0.5 to 0.4."),
        ({"result": {}}, "", None, "The run recorded no verdict."),
        ({"comparison": comparison(verdict="better")}, "Better", "better", "Judged by rule, after wins"),
        ({"comparison": comparison(verdict="worse")}, "Worse", "worse", "Judged by rule, after wins"),
        ({"status": "interrupted"}, "Interrupted", "broken", "did not come to its end."),
        ({"status": "failed"}, "Failed", "broken", "did not come to its end."),
    ],
)
def test_the_verdict_is_the_recorded_one(folder, report, changes, word, tone, sentence):
    page = report(folder(**changes))
    found = re.search(r'<h1 class="tone-(\w+)">(.*?)</h1>', page.html)
    assert (found[2], found[1]) == (word, tone) if tone else found is None
    assert sentence in page.text
    others = {"Better", "Worse"} - {word}
    assert not any(f">{other}</h1>" in page.html for other in others)


def test_ties_and_no_comparisons_are_said(folder, report):
    assert "; ties, 12.3%, count half." in report(folder("a", comparison=comparison(n=300, ties=37))).text
    none = comparison(n=0, wins=0, losses=0, win_rate=None, low=0.0, high=1.0, examples=[])
    assert "after and before were not compared" in report(folder("b", comparison=none)).text


def test_unfinished_runs_say_so_on_top(folder, report):
    page = report(folder(status="interrupted", record={"plan": {"steps": 400}})).text
    assert "This run was interrupted after step 4 of 400. What follows is the run so far." in page
    assert "stopped by SIGINT after step 4" in page
    assert "palate dpo -c" in page and "--resume" in page
    running = folder("on", record={"status": "running"})
    with Lock(running / ".lock"):
        assert "This run is not over after step 4" in report(running).text
    assert "This run was interrupted" in report(running).text  # its process is gone


def test_a_verb_of_two_words_is_run_again_as_two(folder, report):
    assert "palate sweep dpo -c" in report(folder(verb="sweep dpo")).text


def test_before_any_step_nothing_is_concluded(folder, report):
    page = report(folder(status="failed", lines=[evaluation(0)], samples=[])).text
    assert "after step 0" in page
    assert "Held-out accuracy" not in page and "displacement" not in page


@pytest.mark.parametrize("verb, sides", [("dpo", ("chosen", "rejected")), ("kto", ("wanted", "unwanted")), ("sft", ())])
def test_every_verb_has_its_page(folder, report, verb, sides):
    lines = LINES
    if verb == "sft":
        keep = ("step", "loss", "tokens", "seconds", "eval/loss", "logps/chosen", "eval/logps/chosen")
        lines = [{key: value for key, value in line.items() if key in keep} for line in LINES]
    page = report(folder(verb=verb, lines=lines))
    assert f"{verb} on models/start" in page.text
    for side in sides:
        assert f"{side} held out" in page.text
    assert ("rejected held out" in page.text) == (verb == "dpo")


@pytest.mark.parametrize(
    "chosen, rejected, share, words",
    [
        (-2.5, -6.5, 0.625, ["fell by 2.50 nats", "fell by 6.50 nats", "62.5% of the chosen", "This is displacement"]),
        (-2.5, 1.0, 0.9, ["fell by 2.50 nats", "rose by 1.00 nats", "not what the data asked for"]),
        (3.0, -1.0, 0.1, ["rose by 3.00 nats", "fell by 1.00 nats", "there is no displacement"]),
        (0.0, 0.0, 0.0, ["did not move, that of the rejected ones did not move"]),
    ],
)
def test_displacement_is_read_in_plain_words(folder, report, chosen, rejected, share, words):
    after = {"eval/logps/chosen": -40 + chosen, "eval/logps/rejected": -41 + rejected, "eval/displaced": share}
    page = report(folder(lines=[evaluation(0), step(1), evaluation(1, **after)])).text
    for said in words:
        assert said in page, said


def test_completions_go_by_the_scores(folder, report):
    page = report(folder(comparison=comparison(9)))
    after = [n / 10 + (0.05 if n % 3 else -0.15) for n in range(9)]
    order = sorted(range(9), key=after.__getitem__)
    heads = re.findall(
        r'<div class="head"><h3>(.*?)</h3></div>\s*<div class="prompt" dir="auto">prompt (\d)', page.html
    )
    assert heads[:3] == [("Best", str(order[-1])), ("Median", str(order[4])), ("Worst", str(order[0]))]
    assert heads[3:] == [("Fell by 0.15", str(n)) for n in (0, 3, 6) if n not in (order[-1], order[4], order[0])]
    assert "6 higher after training, 3 lower" in page.text


def test_the_median_is_the_middle_one_of_its_equals(folder, report):
    """Scores of a rule are few: among equal ones the median is no accident of the order, and is the usual gain."""
    after, before = (0, 1, 1, 1, 1, 1, 3), (0, 4, -3, 0, -1, 3, 2)
    rows = [
        {"prompt": f"prompt {n}", "before": "b", "after": "a", "score_before": one, "score_after": two}
        for n, (one, two) in enumerate(zip(before, after, strict=True))
    ]
    page = report(folder(comparison=comparison(examples=rows)))
    assert re.search(r"<h3>Median</h3></div>\s*<div class=\"prompt\" dir=\"auto\">prompt 3<", page.html)


def test_scores_stand_beside_their_completions(folder, report):
    page = report(folder(comparison=comparison(9)))
    after = [n / 10 + (0.05 if n % 3 else -0.15) for n in range(9)]
    order = sorted(range(9), key=after.__getitem__)
    assert f"score {after[order[-1]]:.2f}" in page.text


def test_a_comparison_without_scores_is_shown_in_its_order(folder, report):
    rows = [row | {"score_before": None, "score_after": None} for row in comparison(20)["examples"]]
    page = report(folder(comparison=comparison(20, examples=rows))).text
    assert "Nobody scored these completions" in page and "the first 8 of 20" in page
    assert "prompt 7" in page and "prompt 8" not in page


def test_without_a_comparison_the_samples_stand(folder, report):
    page = report(folder()).text
    assert "How are you?" in page and "very well" in page and "still well" in page
    assert "Length of the samples 8.0 9.5" in page
    unfinished = report(folder("b", status="interrupted", samples=[sample(0, "How are you?", "bad", None)])).text
    assert "not reached" in unfinished


def test_samples_that_a_reward_scored_go_by_it(folder, report):
    rows = [sample(0, "How are you?", "bad", None), sample(0, "And now?", "worse", None)]
    after = [sample(4, "How are you?", "bad", "very well"), sample(4, "And now?", "worse", "so so")]
    for row, now, then in zip(after, (1.5, -0.25), (-1.0, 0.75), strict=True):
        row["scores"] |= {"reward": now, "reward_before": then}
    page = report(folder(samples=[*rows, *after])).text
    assert "2 comparisons scored by its reward: 1 higher after training, 1 lower" in page
    assert "score \u22120.25" in page and "score 1.50" in page and page.index("Best") < page.index("very well")
    assert "Nobody scored" not in page


def test_retention_has_its_flags_and_numbers(folder, report):
    lines = [evaluation(0, **{"eval/retain/loss": 2.5}), step(1), evaluation(1, **{"eval/retain/loss": 3.125})]
    flag = "The demonstrations became less likely: 2.50 to 3.12 nats a token."
    page = report(folder("a", lines=lines, result=RESULT | {"retention": {"flags": [flag], "completions": 24}})).text
    assert f"What did it break? {flag}" in page
    assert "Loss on the demonstrations 2.500 3.125 nats a token" in page
    healthy = report(folder("b", lines=lines, result=RESULT | {"retention": {"flags": []}})).text
    assert "What did it break? Nothing was flagged." in healthy
    assert "What did it break?" not in report(folder("c")).text


def test_cost_stands_against_the_plan(folder, report):
    record = {"plan": {"steps": 8, "seconds": 90.0, "tokens": 4096, "peak_bytes": 3 * 2**30}}
    page = report(folder(result=RESULT | {"peak_bytes": 512 * 2**20}, record=record)).text
    assert "planned spent" in page
    assert "Steps 8 4" in page and "Time in steps 1 min 30 s 2.0 s" in page
    assert "Memory at the peak 3.0 GB 512 MB" in page and "Tokens 4,096 2,048" in page


def test_what_the_doctor_said_is_repeated(folder, report):
    finding = {"check": "length", "severity": "note", "count": 3, "what": "chosen 9% longer", "fix": "mind it"}
    data = {"sources": [], "counts": {"rows": 5}, "doctor": {"findings": [finding]}}
    assert "note, length: 3 rows; chosen 9% longer; mind it" in report(folder("a", data=data)).text
    assert "The doctor found nothing." in report(folder("b", data=data | {"doctor": {"findings": []}})).text


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x07\x00 \x85 \x7f",
    "שלום \u202eevil\u202c עולם",
    "w" * 5000,
    "half a pair \ud83d here",
    "line\r\nand\rline\u2028end",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(folder, report, text):
    rows = [{"prompt": text, "before": text, "after": text, "score_before": 0.5, "score_after": 0.25}]
    turns = [{"role": text, "content": text}, {"role": "user", "content": "and?"}]
    rows += [{"prompt": turns, "before": "b", "after": text, "score_before": 0.5, "score_after": 0.75}]
    data = {"sources": [{"path": text, "role": text}], "counts": {text: 3}, "notes": [text], "rejected": [text]}
    result = {"verdict": f"better: {text}", "retention": {"flags": [text]}}
    record = {"hardware": text, "error": text, "argv": ["palate", text], "parents": [{"model": text}]}
    record |= {"versions": {text: text}, "times": {text: text}}
    run = folder(
        lines=[],
        result=result,
        record=record,
        data=data,
        comparison=comparison(a=text, b=text, judge=text, examples=rows),
        config=f"model: {clean(text)!r}\n" if "\x1b" in text or "\ud83d" in text else "model: plain\n",
    )
    page = report(run)
    assert {tag for tag, _ in page.elements} <= TAGS
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on") or name == "src"]
    assert page.html.count("<style>") == page.html.count("</style>") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page.html)
    shown = " ".join(clean(text[:1000]).split())
    assert shown in page.text


@given(st.text(st.characters(codec=None), max_size=60))
def test_cleaned_text_can_be_written_and_keeps_its_letters(text):
    shown = clean(text)
    assert shown.encode("utf-8").decode() == shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    if text.isprintable():
        assert shown == text


def test_the_page_loads_and_runs_nothing(folder, report):
    page = report(folder(comparison=comparison()))
    for word in ("http", "<script", "javascript:", "@import", "<link", "<iframe", "src=", "@font-face"):
        assert word not in page.html, word
    for _, attrs in page.elements:
        assert attrs.get("href", "#").startswith("#")
    assert set(re.findall(r"url\((.)", page.html)) <= {"#"}


def test_names_inside_the_page_are_whole(folder, report):
    page = report(folder(comparison=comparison()))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page.html)
    assert {one or other for one, other in used} <= set(ids)
    variables = set(re.findall(r"var\(--([\w-]+)\)", page.html))
    assert variables - {"of"} <= set(re.findall(r"--([\w-]+):", page.html))


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    run = folder(comparison=comparison())
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first
    code = "import sys; from palate.report import write_report; write_report([sys.argv[1]], sys.argv[2])"
    environ = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    elsewhere = tmp_path / "elsewhere.html"
    subprocess.run([sys.executable, "-c", code, str(run), str(elsewhere)], env=environ, check=True)
    assert hashlib.sha256(elsewhere.read_bytes()).digest() == hashlib.sha256(first).digest()


def test_small_and_odd_runs(folder, report):
    one = report(
        folder("one", lines=[step(1)], samples=[], result={"verdict": "no held-out pairs, so nothing is shown"})
    )
    assert "No held-out pairs, so nothing is shown." in one.text
    assert "Loss" in one.svgs
    nothing = report(folder("nothing", lines=[], samples=[], status="failed", data={}, config="{}"))
    assert nothing.svgs == {}
    nulls = [step(1), step(2, loss=None, **{"logps/chosen": None}), step(3, loss=float("nan")), step(4, loss=10**400)]
    odd = report(folder("odd", lines=[*nulls[:3], evaluation(3, **{"eval/loss": None})]))
    assert "Loss" in odd.svgs and "Held-out loss" not in odd.text
    path = folder("extra")
    (path / "notes.txt").write_text("mine")
    (path / "more").mkdir()
    (path / "notes.json").write_text("{")
    report(path)


def test_only_the_files_that_the_page_needs_are_needed(folder, report):
    path = folder()
    for name in ("config.yaml", "data.json", "metrics.jsonl", "samples.jsonl"):
        (path / name).unlink()
    assert "Better" in report(path).text


def test_a_long_run_is_thinned(folder, report):
    path = folder("long")
    lines = [step(n) for n in range(1, 3001)]
    with (path / "metrics.jsonl").open("w") as file:
        import json

        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = report(path)
    assert len(page.html) < 300_000
    assert "a mean of about 8 steps" in page.text
    assert len(read_run(path).steps) == 3000


def test_a_comparison_of_300_long_completions_stays_small(folder, report):
    rows = comparison(300)["examples"]
    rows = [row | {"before": "word " * 4000, "after": "word " * 4000} for row in rows]
    page = report(folder(comparison=comparison(300, examples=rows)))
    assert len(page.html) < 600_000
    assert "and 18,800 characters more" in page.text
