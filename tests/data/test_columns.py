# ruff: noqa: E501, one row of a table a line
"""Each dialect against the record it means, and what is said about it."""

import json

import pytest

from palate.data.columns import split_strings
from palate.data.records import Feedback, Message, PreferencePair, Prompt, Ranking
from palate.data.sources import read_any, read_demonstrations, read_feedback, read_pairs, read_prompts
from palate.errors import DataError


def u(text):
    return Message("user", text)


def a(text):
    return Message("assistant", text)


def s(text):
    return Message("system", text)


def m(*messages):
    return [{"role": x.role, "content": x.content} for x in messages]


def share(*messages):
    roles = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    return [{"from": roles[x.role], "value": x.content} for x in messages]


Q, Y, N = u("Why?"), a("Because."), a("No.")
PLAIN = ("Why?", " Because.", " No.")
CHAT = ((Q,), (Y,), (N,))
SYSTEM = ((s("Be kind."), Q), (Y,), (N,))
EARLIER = (u("Hi"), a("Hello"))
LATER = ((*EARLIER, Q), (Y,), (N,))
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"

PAIRS = [
    ("plain", {"prompt": "Why?", "chosen": " Because.", "rejected": " No.", "subset": "x"}, PLAIN),
    ("conversational", {"prompt": m(Q), "chosen": m(Y), "rejected": m(N)}, CHAT),
    ("system", {"prompt": m(*SYSTEM[0]), "chosen": m(Y), "rejected": m(N)}, SYSTEM),
    ("prompt text, replies messages", {"prompt": "Why?", "chosen": m(Y), "rejected": m(N)}, CHAT),
    ("UltraFeedback", {"prompt": "Why?", "chosen": m(Q, Y), "rejected": m(Q, N), "messages": m(Q, Y), "score_chosen": 8.0, "score_rejected": 3.0}, CHAT),
    ("UltraFeedback, system", {"prompt": "Why?", "chosen": m(*SYSTEM[0], Y), "rejected": m(*SYSTEM[0], N)}, SYSTEM),
    ("messages repeat the prompt", {"prompt": m(Q), "chosen": m(Q, Y), "rejected": m(Q, N)}, CHAT),
    ("messages prompt, text replies", {"prompt": m(Q), "chosen": "Because.", "rejected": "No."}, CHAT),
    ("single messages", {"prompt": m(Q), "chosen": m(Y)[0], "rejected": m(N)[0]}, CHAT),
    ("longer replies", {"prompt": m(Q), "chosen": m(Y, Q, Y), "rejected": m(N, Q, N)}, ((Q,), (Y, Q, Y), (N, Q, N))),
    ("implicit messages", {"chosen": m(*EARLIER, Q, Y), "rejected": m(*EARLIER, Q, N)}, LATER),
    ("implicit, system", {"chosen": m(*SYSTEM[0], Y), "rejected": m(*SYSTEM[0], N)}, SYSTEM),
    ("implicit, parting early", {"chosen": m(Q, Y, u("b"), a("c")), "rejected": m(Q, N, u("d"), a("e"))}, ((Q,), (Y, u("b"), a("c")), (N, u("d"), a("e")))),
    ("implicit, one is a beginning", {"chosen": m(Q, Y), "rejected": m(Q, Y, u("b"), N)}, ((Q,), (Y,), (Y, u("b"), N))),
    ("HH", {"chosen": HH + " Because.", "rejected": HH + " No."}, (HH, " Because.", " No.")),
    ("HH, shared reply start", {"chosen": HH + " It is so.", "rejected": HH + " It is not."}, (HH, " It is so.", " It is not.")),
    ("implicit text", {"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
    ("implicit text, part of a word", {"chosen": "1 + 1 = 2", "rejected": "1 + 1 = 22"}, ("1 + 1 =", " 2", " 22")),
    ("implicit text, marker", {"chosen": "Q: Why?\nA: It is so", "rejected": "Q: Why?\nA: It is not"}, ("Q: Why?\nA:", " It is so", " It is not")),
    ("implicit ChatML", {"chosen": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nYes, so", "rejected": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nYes, no"}, ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Yes, so", "Yes, no")),
    ("implicit lines", {"chosen": "One\ntwo", "rejected": "One\nthree"}, ("One\n", "two", "three")),
    ("implicit Chinese", {"chosen": "问为什么答因为", "rejected": "问为什么答不"}, ("问为什么答", "因为", "不")),
    ("ShareGPT", {"conversations": share(*SYSTEM[0]), "chosen": share(Y)[0], "rejected": share(N)[0]}, SYSTEM),
    ("ShareGPT, system column", {"conversations": share(Q), "chosen": share(Y)[0], "rejected": share(N)[0], "system": "Be kind."}, SYSTEM),
    ("axolotl chat template", {"messages": m(*SYSTEM[0]), "chosen": m(Y)[0], "rejected": m(N)[0]}, SYSTEM),
    ("axolotl intel", {"system": "Be kind.", "question": "Why?", "chosen": "Because.", "rejected": "No."}, SYSTEM),
    ("axolotl argilla", {"system": "", "instruction": "Why?", "chosen_response": "Because.", "rejected_response": "No."}, CHAT),
    ("axolotl icr", {"system": "Be kind.", "input": "Why?", "chosen": "Because.", "rejected": "No."}, SYSTEM),
    ("axolotl prompt pairs", {"system": "Be kind.", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}, SYSTEM),
    ("Alpaca", {"instruction": "Say", "input": "Why?", "chosen": "Because.", "rejected": "No."}, ((u("Say\n\nWhy?"),), (Y,), (N,))),
    ("ms-swift query", {"query": "Why?", "response": "Because.", "rejected_response": "No.", "history": [["Hi", "Hello"]], "system": None}, LATER),
    ("ms-swift messages", {"messages": m(*EARLIER, Q, Y), "rejected_response": "No."}, LATER),
    ("ms-swift two messages", {"messages": m(Q, Y), "rejected_messages": m(Q, N)}, CHAT),
    ("arena", {"prompt": "Why?", "response_a": " No.", "response_b": " Because.", "winner": "model_b"}, PLAIN),
    ("votes", {"prompt": "Why?", "response_a": " Because.", "response_b": " No.", "labels": [1, 2, 1]}, PLAIN),
    ("arena conversations", {"conversation_a": m(Q, Y), "conversation_b": m(Q, N), "winner": "model_a"}, CHAT),
]  # fmt: skip


@pytest.mark.parametrize(("row", "meaning"), [c[1:] for c in PAIRS], ids=[c[0] for c in PAIRS])
def test_pairs(tmp_path, row, meaning):
    (pair,) = read_pairs([row])
    assert (pair.prompt, pair.chosen, pair.rejected) == meaning
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    records = read_pairs(path)
    assert records.notes[0].startswith("columns ")
    assert str(records[0].source) == f"{path}:1"
    assert read_prompts(path)[0].prompt == meaning[0]
    (again,) = read_any([row])
    assert isinstance(again, PreferencePair)


RANKED = [
    ("best first", {"prompt": "p", "completions": ["a", "b", "c"]}, ((0, 1), (0, 2), (1, 2))),
    ("verdicts", {"prompt": "p", "responses": list("abcd"), "preferences": [0, 1, 2, 1, 0, 2]}, ((0, 2), (3, 0), (1, 2), (3, 2))),
    ("scores", {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3.5, 1]}, ((1, 0), (1, 2))),
    ("rewards", {"prompt": "p", "completions": ["a", "b"], "rewards": [0.0, 1]}, ((1, 0),)),
    ("equal texts", {"prompt": "p", "completions": ["a", "b", "a"]}, ((0, 1), (1, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "preferences"), [c[1:] for c in RANKED], ids=[c[0] for c in RANKED])
def test_rankings(row, preferences):
    (ranking,) = read_pairs([row])
    assert isinstance(ranking, Ranking)
    assert ranking.preferences == preferences
    assert ranking.completions == tuple(row.get("responses") or row["completions"])


def test_ranked_conversations():
    (ranking,) = read_pairs([{"prompt": m(Q), "completions": [m(Y), m(N)]}])
    assert ranking.completions == ((Y,), (N,))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": ["a", "b"], "preferences": [0]},
        {"prompt": "p", "responses": ["a", "b"], "scores": [2, 2.0]},
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"},
        {"prompt": "p", "response_a": "a", "response_b": "b", "labels": [1, 2, 0]},
    ],
)
def test_ties_are_left_out_and_counted(row):
    records = read_pairs([row, {k: v for k, v in row.items() if k not in ("preferences", "scores", "winner", "labels")} | {
        k: v for k, v in {"preferences": [1], "scores": [2, 1], "winner": "a", "labels": [1, 1, 2]}.items() if k in row
    }])  # fmt: skip
    assert len(records) == 1
    assert records.dropped == {"tie": 1}
    with pytest.raises(DataError, match="1 tie"):
        read_pairs([row])


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "p", "responses": ["a", "b"], "preferences": [3]}, "E225"),
        ({"prompt": "p", "responses": ["a", "b"], "preferences": [True]}, "E225"),
        ({"prompt": "p", "responses": ["a", "b"], "preferences": [1, 1]}, "E203"),
        ({"prompt": "p", "responses": ["a"], "preferences": []}, "E203"),
        ({"prompt": "p", "responses": "ab", "preferences": [1]}, "E203"),
        ({"prompt": "p", "responses": ["a", ""], "preferences": [1]}, "E208"),
        ({"prompt": "p", "responses": ["a", m(Y)], "preferences": [1]}, "E219"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "E203"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "E205"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "E204"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "c"}, "E225"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": 1}, "E203"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "labels": [5]}, "E225"),
        ({"query": "q", "response": "a", "rejected_response": "b", "history": [["x"]]}, "E203"),
        ({"chosen": HH + " a", "rejected": HH.replace("Why", "How") + " b"}, "E217"),
        ({"chosen": HH + " a", "rejected": HH}, "E208"),
        ({"chosen": "xa", "rejected": "yb"}, "E217"),
        ({"chosen": HH + " a", "rejected": HH + " a"}, "E209"),
        ({"chosen": "The sky", "rejected": "The sky"}, "E209"),
        ({"chosen": m(Q, Y), "rejected": m(u("How?"), N)}, "E217"),
        ({"chosen": m(Q, Y, u("1"), Y), "rejected": m(Q, Y, u("2"), N)}, "E217"),
        ({"chosen": m(Q, Y), "rejected": m(Q, Y)}, "E209"),
        ({"chosen": m(Y), "rejected": m(N)}, "E207"),
        ({"prompt": "Other", "chosen": m(Q, Y), "rejected": m(Q, N)}, "E217"),
        ({"prompt": m(Q), "chosen": m(Q), "rejected": m(N)}, "E215"),
        ({"conversations": [{"from": "narrator", "value": "x"}], "chosen": m(Y)[0], "rejected": m(N)[0]}, "E214"),
        ({"messages": m(Q), "rejected_response": "x"}, "E215"),
        ({"instruction": " ", "chosen": "a", "rejected": "b"}, "E207"),
    ],
)
def test_bad_dialect_rows(row, code):
    with pytest.raises(DataError, match=code) as caught:
        read_pairs([row])
    assert "memory:1: field " in str(caught.value)


DEMONSTRATIONS = [
    ("prompt, completion", {"prompt": "p", "completion": " c"}, "p", " c"),
    ("prompt, response", {"prompt": "p", "response": " c"}, "p", " c"),
    ("conversational", {"prompt": m(Q), "completion": m(Y)}, (Q,), (Y,)),
    ("messages", {"messages": m(*SYSTEM[0], Y), "source": "x"}, SYSTEM[0], (Y,)),
    ("several turns", {"messages": m(*EARLIER, Q, Y)}, EARLIER[:1], (EARLIER[1], Q, Y)),
    ("ShareGPT", {"conversations": share(*SYSTEM[0], Y)}, SYSTEM[0], (Y,)),
    ("ShareGPT, system column", {"conversations": share(Q, Y), "system": "Be kind."}, SYSTEM[0], (Y,)),
    ("Alpaca", {"instruction": "Why?", "input": "", "output": "Because.", "text": "whole"}, (Q,), (Y,)),
    ("Dolly", {"instruction": "Why?", "context": "Rain", "response": "Because."}, (u("Why?\n\nRain"),), (Y,)),
    ("ms-swift", {"query": "Why?", "response": "Because."}, (Q,), (Y,)),
    ("text", {"text": " once"}, "", " once"),
    ("pair", {"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
    ("implicit pair", {"chosen": HH + " c", "rejected": HH + " r"}, HH, " c"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "completion"), [c[1:] for c in DEMONSTRATIONS], ids=[c[0] for c in DEMONSTRATIONS])  # fmt: skip
def test_demonstrations(row, prompt, completion):
    (found,) = read_demonstrations([row])
    assert (found.prompt, found.completion) == (prompt, completion)


def test_last_turn_alone():
    (found,) = read_demonstrations([{"messages": m(*EARLIER, Q, Y)}], turns="last")
    assert (found.prompt, found.completion) == ((*EARLIER, Q), (Y,))


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": []}, "E207"),
        ({"messages": m(Q)}, "E215"),
        ({"messages": m(Y)}, "E207"),
        ({"messages": m(Q, Y, Q)}, "E215"),
        ({"messages": "text"}, "E203"),
        ({"messages": None}, "E204"),
        ({"text": " "}, "E208"),
        ({"text": 3}, "E203"),
        ({"prompt": "", "completion": "x"}, "E207"),
    ],
)
def test_bad_demonstrations(row, code):
    with pytest.raises(DataError, match=code):
        read_demonstrations([row])


def test_unwanted_rows_are_no_demonstrations():
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    records = read_demonstrations(rows)
    assert len(records) == 1
    assert records.dropped == {"unwanted": 1}


def test_feedback_and_its_mismatched_completions():
    rows = [("p", "1", True), ("p", "2", False), ("q", "3", True), ("q", "4", False), ("p", "5", True)]
    found = read_feedback([{"prompt": p, "completion": c, "label": label} for p, c, label in rows])
    assert [f.label for f in found] == [True, False, True, False, True]
    assert [f.mismatched for f in found] == ["3", "3", "5", "5", "3"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": m(Q, Y), "label": True},
        {"conversations": share(Q, Y), "kto_tag": True},
        {"instruction": "Why?", "input": "", "output": "Because.", "kto_tag": True},
        {"query": "Why?", "response": "Because.", "label": True},
        {"prompt": m(Q), "completion": m(Y), "label": True},
        {"system": "", "question": "Why?", "completion": "Because.", "label": True},
    ],
)
def test_feedback_dialects(row):
    other = json.loads(json.dumps(row).replace("Why?", "How?").replace("true", "false"))
    first, second = read_feedback([row, other])
    assert first == Feedback((Q,), (Y,), True, (Y,), first.source)
    assert second.label is False
    assert second.prompt == (u("How?"),)


@pytest.mark.parametrize("prompts", ["ab", "aab", "abb", "aba", "aabbaacbba", "abbbb", "aaaab", "abcabc"])
def test_mismatched_completions_come_from_the_next_row_under_another_prompt_around_the_end(prompts):
    """Held or read again each time, the same rows, those of the definition."""
    rows = [{"prompt": p + "?", "completion": f"{n}", "label": n % 2 == 0} for n, p in enumerate(prompts)]
    streamed = read_feedback(rows, hold=False)
    assert list(read_feedback(rows)) == list(streamed) == list(streamed)
    for n, row in enumerate(streamed):
        after = [(n + k) % len(prompts) for k in range(1, len(prompts))]
        assert row.mismatched == str(next(k for k in after if prompts[k] != prompts[n]))


def test_pairs_as_feedback():
    pairs = [{"prompt": p, "chosen": p + "+", "rejected": p + "-"} for p in "ab"]
    # completions that repeat a prompt as a whole conversation would are refused, these only begin with another letter
    pairs = [{"prompt": p + "?", "chosen": p + "+", "rejected": p + "-"} for p in "ab"]
    found = read_feedback(pairs)
    assert [(f.completion, f.label, f.mismatched) for f in found] == [
        ("a+", True, "b+"), ("a-", False, "b+"), ("b+", True, "a+"), ("b-", False, "a+")
    ]  # fmt: skip
    assert "wanted" in found.notes[0]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": m(Q)}, (Q,)),
        ({"messages": m(Q)}, (Q,)),
        ({"messages": m(*EARLIER, Q, Y)}, (*EARLIER, Q)),
        ({"question": "Why?", "answer": 3}, (Q,)),
        ({"instruction": "Why?", "system": "Be kind."}, SYSTEM[0]),
        ({"text": "Once"}, "Once"),
        ({"chosen": HH + " a", "rejected": HH + " b"}, HH),
    ],
)
def test_prompts(row, prompt):
    (found,) = read_prompts([row])
    assert found == Prompt(prompt, found.source)


def test_columns_are_overridable():
    row = {"q": "p", "good": "a", "bad": "b", "prompt": 3}
    (pair,) = read_pairs([row], columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "a", "b")
    (pair,) = read_pairs(
        [{"prompt": "p", "chosen": "a", "rejected": "b"}], columns={"chosen": "rejected", "rejected": "chosen"}
    )
    assert (pair.chosen, pair.rejected) == ("b", "a")
    (pair,) = read_pairs([{"question": "Why?", "chosen": "a", "rejected": "b"}], columns={"prompt": "question"})
    assert pair.prompt == "Why?"  # named so, it is plain text
    (pair,) = read_pairs([{"prompt": "x", "chosen": "x y a", "rejected": "x y b"}], columns={"prompt": ""})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("x y", " a", " b")
    with pytest.raises(DataError, match='field "good": empty'):
        read_pairs([{"prompt": "p", "good": "", "rejected": "b"}], columns={"chosen": "good"})
    with pytest.raises(DataError, match='field "better"'):
        read_pairs([{"prompt": "p", "good": "a", "rejected": "b"}], columns={"chosen": "better"})


def test_a_dialect_holds_for_the_file():
    rows = [{"prompt": f"p{i}", "chosen": f"x a{i}", "rejected": f"x b{i}"} for i in range(9)]
    del rows[0]["prompt"]
    with pytest.raises(DataError, match=r'memory:1: field "prompt": not there; the row has chosen, rejected \[E202\]'):
        read_pairs(rows)


@pytest.mark.parametrize("common", ["\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b\n\nAssistant:"])
def test_transcripts_split_at_the_last_marker(common):
    assert split_strings(common + " x", common + "  y\n", ("chosen", "rejected"))[:3] == (common, " x", "  y\n")


def test_the_split_is_said():
    rows = [{"chosen": HH + " a", "rejected": HH + " b"}, {"chosen": "It is so", "rejected": "It is not"}]
    assert read_pairs(rows).notes[1:] == [
        'prompts end at the last "\\n\\nAssistant:" in 1 rows',
        "prompts end at the longest common beginning in whole words in 1 rows",
    ]
