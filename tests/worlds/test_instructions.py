"""Instructions have one answer, judgements say what the rule sees."""

from random import Random

import pytest

from palate.worlds.instructions import KINDS, instruction, judgement
from palate.worlds.reviews import request_of


@pytest.mark.parametrize("kind", KINDS)
def test_one_right_answer(kind):
    random = Random(0)
    answers = {}
    for _ in range(500):
        text, answer = kind(random)
        assert answers.setdefault(text, answer) == answer and answer.endswith(".")
    assert len(answers) >= 11
    assert instruction(Random(1)) == instruction(Random(1))


def test_a_judgement_counts_its_points():
    request = request_of("Write a review of the hotel in Alden. Mention the bed.")
    prompt, answer = judgement(request, "I loved the hotel in Alden. The bed bed was old.")
    assert request.text in prompt and "The bed bed was old." in prompt
    said = "Friendly: yes. Well made: no. On topic: no. Not repeated: yes. Complete: yes.\nScore: 3"
    assert answer == said
    assert judgement(request, "", finished=False)[1].endswith("Score: 1")
