"""The built-in data: the shipped bytes are what the worlds write, and no request stands in two files."""

import json
import re

import pytest

from palate import builtin, read_demonstrations, read_pairs
from palate.data.sources import read_prompts
from palate.errors import NotThereError
from palate.worlds import files
from palate.worlds.reviews import judge, requests, sealed, verdict


@pytest.mark.parametrize("name", files.SHIPPED)
def test_shipped_bytes_are_written_again(name):
    shipped = builtin.data_file(name.replace("-", "/")).read_bytes()
    assert shipped == files.content(name)
    assert shipped.count(b"\n") == files.SHIPPED[name]


def asked(name):
    """The requests of a shipped file, those that stand in a judge's prompt too."""
    rows = [json.loads(line) for line in builtin.data_file(name).open(encoding="utf-8")]
    texts = {(row.get("prompt") or row["messages"])[0]["content"] for row in rows}
    texts |= {found[1] for text in texts if (found := re.search("\nRequest: (.*)\n", text))}
    return {text for text in texts if text in requests()}, len(texts)


def test_files_are_sealed_from_each_other_by_prompt():
    found = {name: asked(name) for name in builtin.DATA}
    homes = {"reviews": "reviews", "reviews/heldout": "heldout", "seed": "demonstrations"}
    for name, (texts, _) in found.items():
        assert {sealed(text) for text in texts} == {homes.get(name, name)}
    assert [len(found[name][0]) for name in ("reviews", "reviews/heldout", "prompts")] == [2400, 300, 600]
    assert len(found["demonstrations"][0]) == 2534
    assert not found["demonstrations"][0] & found["seed"][0]


def test_the_seed_shows_how_to_answer_and_then_how_to_judge():
    rows = [(one["content"], two["content"]) for one, two in (row["messages"] for row in files.rows("seed"))]
    answers, judgements = rows[: files.ANSWERS], rows[files.ANSWERS :]
    known = [(text, answer) for text, answer in answers if text in requests()]
    assert len(known) == len({text for text, _ in known}) == 300
    assert all(not verdict(requests()[text], answer).broken for text, answer in known)
    said, scores = {}, []
    for prompt, answer in judgements:
        _, request, review = re.split("\nRequest: |\nReview: ", prompt)
        said.setdefault(request, set()).add(review)
        points = verdict(requests()[request], review).points
        *words, score = re.findall(r"yes|no(?=\.)|\d", answer)
        assert [word == "yes" for word in words] == list(points.values())
        assert answer.endswith(f"\nScore: {sum(points.values())}")
        scores.append(int(score))
    assert len(said) == 300 and {len(reviews) for reviews in said.values()} == {4}
    assert not set(said) & {text for text, _ in known}
    assert max(scores.count(score) for score in range(6)) < len(scores) / 2


def test_texts_for_pre_training_know_the_demonstrations_requests_alone():
    held = {row["text"] for row in files.rows("text-heldout")}
    written = [row["text"] for row in files.rows("text", 2000)]
    assert not held & set(written)
    homes = {sealed(line) for text in written for line in text.split("\n") if line in requests()}
    assert homes == {"demonstrations"}


def test_the_readers_take_them_by_name():
    pairs = read_pairs("builtin:reviews[:50]")
    assert (
        len(pairs) == 50
        and pairs.sources[0]["path"] == "builtin:reviews"
        and str(pairs[0].source) == "builtin:reviews:1"
    )
    assert len(read_pairs("builtin:reviews/heldout")) == 300
    assert len(read_demonstrations("builtin:demonstrations[2800:]")) == 200
    assert len(read_prompts("builtin:prompts")) == 600
    with pytest.raises(NotThereError, match="did you mean builtin:reviews"):
        read_pairs("builtin:review")


def test_labels_agree_with_the_rule_as_often_as_the_temperature_lets_them():
    pairs = read_pairs("builtin:reviews")
    gaps = [judge(p.prompt, p.chosen[0].content) - judge(p.prompt, p.rejected[0].content) for p in pairs]
    right, ties = sum(gap > 0 for gap in gaps) / len(gaps), sum(gap == 0 for gap in gaps) / len(gaps)
    assert 0.7 < right < 0.85 and 0.05 < ties < 0.15
    assert sum(gap > 0 for gap in gaps if abs(gap) >= 4) / sum(abs(gap) >= 4 for gap in gaps) > 0.97
