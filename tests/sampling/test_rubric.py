"""A model that is asked: what counts as a score, that nothing else does, and that a seed says everything twice."""

import re
from types import SimpleNamespace

import pytest
import torch
from runs_kit import TEMPLATE

from palate.data.records import Message
from palate.data.tokens import encode_prompt
from palate.errors import DataError, NotThereError, UsageError
from palate.sampling.best_of import best_of
from palate.sampling.judge import Completion, Judge, open_judge
from palate.sampling.pairing import Candidate, best_and_worst
from palate.sampling.rubric import (
    ADDITIVE,
    BUILTIN,
    Judged,
    Judgement,
    ModelJudge,
    Rubric,
    default_rubric,
    load_rubric,
    parse_score,
)
from palate.worlds.instructions import judgement
from palate.worlds.reviews import requests

# --- the parser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, score",
    [
        *[(f"Score: {n}", n) for n in range(6)],
        ("Friendly: yes. Complete: no.\nScore: 3", 3),
        ("It is about the request.\n\nScore: 4\n", 4),
        ("Score: 2\nThat is because much is missing.", 2),
        ("  Score: 5  ", 5),
        ("Why\r\nScore: 1\r\n", 1),
        ("The score: it could be 5.\nScore: 0", 0),
        ("I gave Score: 5 before.\nScore: 2", 2),
        ("", None),
        ("A fine answer.", None),
        ("Score:", None),
        ("Score: ", None),
        ("Score: N", None),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: +3", None),
        ("Score: 10", None),
        ("Score: 03", None),
        ("Score: 3.5", None),
        ("Score: 3.0", None),
        ("Score: 3/5", None),
        ("Score: 3 / 5", None),
        ("Score: 3 points", None),
        ("Score: 3.", None),
        ("Score: three", None),
        ("Score: <3>", None),
        ("Score: 3 4", None),
        ("Score: 3, Score: 3", None),
        ("Score:3", None),
        ("Score : 3", None),
        ("Score 3", None),
        ("score: 3", None),
        ("SCORE: 3", None),
        ("**Score: 3**", None),
        ("Score: **3**", None),
        ("- Score: 3", None),
        ("Final score: 3", None),
        ("I say Score: 3", None),
        ("Score:\n3", None),
        ("Score: ٣", None),  # a digit, of another script
        ("Score: ３", None),
        ("Ѕcore: 3", None),  # Cyrillic
        ("Why\u2028Score: 3", None),  # no line of its own in a plain reading
        ("Score: 3\nScore: 3", None),
        ("Score: 3\nScore: 4", None),
        ("Score: high\nScore: 4", None),
        ("score: 2\nScore: 4", None),
        ("3", None),
    ],
)
def test_one_score_on_its_own_line_or_none(text, score):
    assert parse_score(text) == score
    assert parse_score(text, finished=False) is None  # it may have been going on


def test_the_mean_is_of_what_can_be_read():
    def judged(*scores):
        return Judged(tuple(Judgement("", True, score) for score in scores))

    assert judged(3, 4, 4).score == pytest.approx(11 / 3)
    assert judged(None, 5, None).score == 5
    assert judged(0, None).score == 0  # a score of 0 is a score
    assert judged(None, None).score is None
    assert judged().score is None


def test_an_unread_judgement_rejects_nobody():
    """The trap: an answer that cannot be read as -1 or 0 makes its completion the worst, and trains it away."""
    said = ["Score: 4", "well, I like it", "Score: 3", "Score: 5 of 5"]
    candidates = [Candidate(f"text {n}", True, 3, parse_score(text)) for n, text in enumerate(said)]
    pair = best_and_worst("p", candidates)
    assert (pair.chosen, pair.rejected) == ("text 0", "text 2")
    assert best_and_worst("p", candidates[:2]) == "unparsed"


# --- the template ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("prompt", ["Say {completion} and {x}", "Two\n\nlines: {prompt}\nReview: no"])
def test_a_filled_template_is_parsed_again_and_gaps_in_texts_are_text(name, prompt):
    rubric, completion = load_rubric(name), "a {prompt} {completion} %s \\1"
    text = rubric.fill(prompt, completion)
    assert text.count(prompt) == 1 and text.count(completion) == 1
    if "Review: no" not in prompt:  # what looks like the words around a gap cannot be told from them
        assert rubric.parse(text) == (prompt, completion)
    assert rubric.parse("x" + text) is None and rubric.parse("Write a review.") is None


def test_the_built_in_rubric_asks_in_the_words_of_the_seed():
    request = next(iter(requests().values()))
    asked, _ = judgement(request, "It was good.")
    assert load_rubric("reviews").fill((Message("user", request.text),), "It was good.") == asked


def test_the_additive_rubric_asks_for_a_line_that_is_read():
    assert ADDITIVE.endswith("\nScore: N") and re.findall(r"^([1-5])\.", ADDITIVE, re.M) == list("12345")
    assert parse_score(ADDITIVE.rpartition("\n")[2].replace("N", "5")) == 5


def test_a_longer_conversation_shows_every_turn():
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "So"))
    rubric = Rubric("own", "{prompt}|{completion}")
    assert rubric.fill(turns, "ok") == "system: Be brief.\nuser: Hi\nassistant: Yes?\nuser: So|ok"


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_bytes("Für {prompt}: {completion} {{json}}?\r\n".encode())
    rubric = load_rubric(str(path))
    assert rubric.template == "Für {prompt}: {completion} {{json}}?" and rubric.name == str(path)
    for text, words in (("{prompt}", "{completion} once, this one has it 0 times"),
                        ("{prompt} {prompt} {completion}", "{prompt} once, this one has it 2 times")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match="E604") as caught:
            load_rubric(str(path))
        assert words in str(caught.value) and str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe{prompt}{completion}")
    with pytest.raises(DataError, match="cannot be read"):
        load_rubric(str(path))
    with pytest.raises(NotThereError, match="additive, reviews"):
        load_rubric("additiv")


def test_which_rubric_a_model_gets():
    assert default_rubric("builtin:tiny").name == "reviews"
    assert default_rubric("HuggingFaceTB/SmolLM2-135M-Instruct").name == "additive"


# --- the judge -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    from palate import load

    return load("builtin:base")


REQUESTS = list(requests().values())[:6]
PROMPTS = [(Message("user", request.text),) for request in REQUESTS]
REVIEWS = [f"The {request.place} in {request.town} was good. We were sorry to leave." for request in REQUESTS]


def test_what_a_model_says_depends_on_seed_place_and_number_alone(base):
    judge = ModelJudge(base, load_rubric("reviews"), judgements=2, max_tokens=48, seed=3)
    whole = judge.judge(PROMPTS, REVIEWS)
    assert [len(one.judgements) for one in whole] == [2] * 6
    assert judge.judge(PROMPTS, REVIEWS) == whole
    again = ModelJudge(base, load_rubric("reviews"), judgements=3, max_tokens=48, seed=3)
    parts = [*again.judge(PROMPTS[:2], REVIEWS[:2]), *again.judge(PROMPTS[3:], REVIEWS[3:], range(3, 6))]
    assert [one.judgements[:2] for one in parts] == [one.judgements for one in (*whole[:2], *whole[3:])]
    other = ModelJudge(base, load_rubric("reviews"), judgements=2, max_tokens=48, seed=4)
    assert other.judge(PROMPTS, REVIEWS) != whole
    assert any(one.judgements[0].text != one.judgements[1].text for one in whole)
    for one in whole:
        for said in one.judgements:
            assert said.score == parse_score(said.text, said.finished)


def test_a_cut_judgement_and_a_full_context_give_no_score(base):
    judge = ModelJudge(base, load_rubric("reviews"), judgements=1, max_tokens=2)
    assert [one.score for one in judge.judge(PROMPTS[:1], REVIEWS[:1])] == [None]
    long = ModelJudge(base, load_rubric("reviews"), judgements=1, max_tokens=48)
    assert [one.score for one in long.judge(PROMPTS[:1], ["The bed was good. " * 400])] == [None]


def test_the_judges_prompt_is_encoded_as_in_training(tiny_tokenizer):
    """The trap: a system turn or another template in judging, which training never showed."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    rubric = Rubric("own", "Judge {prompt} {completion}")
    chat = ModelJudge(SimpleNamespace(tokenizer=tokenizer), rubric)
    assert chat.ask("a", "b") == (Message("user", "Judge a b"),)
    trained = tokenizer.decode(encode_prompt((Message("user", "Judge a b"),), tokenizer).tolist())
    assert tokenizer.decode(encode_prompt(chat.ask("a", "b"), tokenizer).tolist()) == trained
    assert ModelJudge(SimpleNamespace(tokenizer=tokenizer), rubric, chat=False).ask("a", "b") == "Judge a b"
    assert ModelJudge(SimpleNamespace(tokenizer=tiny_tokenizer), rubric).ask("a", "b") == "Judge a b"


def test_as_a_judge_of_compare_it_ties_what_it_could_not_read():
    scores = {"good": 4.0, "bad": 1.0, "odd": None}
    judge = Judge("asked", score=lambda prompts, completions: [scores[c.text] for c in completions])
    texts = [Completion(word) for word in scores]
    assert judge.ratings(["p"] * 3, texts) == [4.0, 1.0, None]
    assert judge.prefer(["p"] * 3, texts, [texts[1], texts[0], texts[0]]) == [1, 0, 0.5]
    with pytest.raises(DataError, match="1 of 3 completions no score"):
        judge.scores(["p"] * 3, texts)
    with pytest.raises(DataError, match="no score"):
        best_of(judge, ["p"], [texts])


def test_a_model_becomes_a_judge_by_its_name():
    judge = open_judge("policy:builtin:tiny", seed=1)
    with torch.random.fork_rng():
        first = judge.ratings(PROMPTS[:2], [Completion(text) for text in REVIEWS[:2]])
    assert judge.scores_alone and judge.name == "policy:builtin:tiny"
    assert first == open_judge("policy:builtin:tiny", seed=1).ratings(PROMPTS[:2], [Completion(t) for t in REVIEWS[:2]])
    assert all(value is None or 0 <= value <= 5 for value in first)
    with pytest.raises(UsageError, match=r"did you mean policy:MODEL"):
        open_judge("polcy:builtin:tiny")
