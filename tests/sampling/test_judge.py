"""Judges: what each says of completions whose worth is known, and one clear error where one says nothing usable."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs_kit import TEMPLATE

from palate.data.records import Message
from palate.errors import DataError, ModelError, NotThereError, UsageError
from palate.sampling.judge import Completion, Judge, from_callable, open_judge

HELLO = (Message("system", "Be brief."), Message("user", "Hello?"))


def texts(*words: str) -> list[Completion]:
    return [Completion(word) for word in words]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a Python module of its own name into the working directory, and says that name."""
    monkeypatch.chdir(tmp_path)
    made = []

    def write(code: str) -> str:
        made.append(f"judge_{tmp_path.name.replace('-', '_')}_{len(made)}")
        (tmp_path / f"{made[-1]}.py").write_text(code)
        return made[-1]

    return write


# --- one interface ---------------------------------------------------------------------------------------------------


def test_scores_become_preferences():
    judge = Judge("length", score=lambda prompts, completions: [len(c.text) for c in completions])
    assert judge.scores_alone
    assert judge.scores(["p"] * 3, texts("a", "bb", "")) == [1, 2, 0]
    assert judge.prefer(["p"] * 3, texts("a", "bb", "c"), texts("aa", "b", "d")) == [0, 1, 0.5]


def test_the_reward_of_the_world_that_can_be_listed():
    from palate.worlds.enumerable import World

    world = World()
    judge, reward = open_judge("enumerable:3"), world.reward(3)
    prompts, completions = [world.prompt(1), world.prompt(2)], texts(world.completion(5), world.completion(7000))
    assert judge.scores(prompts, completions) == [reward[1, 5], reward[2, 7000]]
    with pytest.raises(UsageError, match="no prompt and completion"):
        judge.scores(["abc"], texts("abcde"))
    with pytest.raises(UsageError, match="no seed"):
        open_judge("enumerable:-1")
    with pytest.raises(UsageError) as refused:
        open_judge("enumerble:1")
    assert "enumerable:SEED" in str(refused.value)


def test_what_stands_twice_is_asked_once():
    asked = []
    judge = Judge("counting", score=lambda prompts, completions: [asked.append(c.text) or len(asked) for c in completions])  # fmt: skip  # noqa: E501
    one, two, three = judge.scores(["p", "p", "q"], texts("same", "same", "same"))
    assert one == two != three
    assert asked == ["same", "same"]


def test_a_judge_of_two_is_asked_in_both_orders():
    asked = []

    def longer(prompts, firsts, seconds):
        asked.extend(zip(firsts, seconds, strict=True))
        return [float(len(a.text) > len(b.text)) for a, b in zip(firsts, seconds, strict=True)]

    judge = Judge("longer", choose=longer)
    assert judge.prefer(["p", "p"], texts("aaa", "b"), texts("a", "b")) == [1, 0.5]
    assert len(asked) == 2  # equal completions tie unasked
    assert asked[0] == asked[1][::-1]
    with pytest.raises(UsageError, match="compares two"):
        judge.scores(["p"], texts("a"))


def test_samples_of_a_prompt_stand_by_score_or_by_the_others_that_they_beat():
    longer = Judge("longer", choose=lambda p, a, b: [0.5 + ((x.text > y.text) - (x.text < y.text)) / 2 for x, y in zip(a, b, strict=True)])  # fmt: skip  # noqa: E501
    made = texts("b", "a", "c", "d", "d", "d")
    assert longer.standings(["p"] * 3 + ["q"] * 3, made, 3) == [0.5, 0.0, 1.0, 0.5, 0.5, 0.5]
    silent = Judge("points", score=lambda p, c: [None if x.text == "a" else 2.0 for x in c])
    assert silent.standings(["p"] * 3, made[:3], 3) == [2.0, None, 2.0]  # unread is not the worst
    with pytest.raises(UsageError, match="gives none a score"):
        longer.standings(["p"], made[:1], 1)


def test_whom_it_costs_is_not_asked_about_samples_that_make_no_pair():
    """Cut, empty, or of a character that no reader takes: whatever a judge says of them, nobody reads it."""
    asked = []

    def longer(prompts, firsts, seconds):
        asked.extend((a.text, b.text) for a, b in zip(firsts, seconds, strict=True))
        return [float(len(a.text) > len(b.text)) for a, b in zip(firsts, seconds, strict=True)]

    made = [*texts("a", "bb"), Completion("ccc", finished=False), *texts(" ", "d", "e\0", "ff", "ggg")]
    judge = Judge("longer", choose=longer)
    assert judge.standings(["p"] * 4 + ["q"] * 4, made, 4) == [0, 1, None, None, 0, None, 0.5, 1]
    assert {*asked} == {(a, b) for part in (("a", "bb"), ("d", "ff", "ggg")) for a in part for b in part if a != b}
    assert judge.standings(["p"] * 2, made[2:4], 2) == [None, None]
    assert judge.standings(["p"] * 2, made[3:5], 2) == [None, 0.5]
    length = Judge("length", score=lambda p, c: [float(len(one.text)) for one in c])
    assert length.standings(["p"] * 4, made[:4], 4) == [1, 2, 3, 1]  # what costs nothing is told of all
    assert replace(length, costly=True).standings(["p"] * 4, made[:4], 4) == [1, 2, None, None]


@pytest.mark.parametrize("vote", [0.0, 1.0, 0.5])
def test_a_judge_that_contradicts_itself_gives_ties(vote):
    judge = Judge("first", choose=lambda prompts, firsts, seconds: [vote] * len(prompts))
    assert judge.prefer(["p"] * 4, texts(*"abcd"), texts(*"wxyz")) == [0.5] * 4


def test_swapped_sides_are_the_mirror_image():
    votes = np.random.default_rng(0)
    table: dict = {}

    def noisy(prompts, firsts, seconds):
        return [table.setdefault((p, a, b), votes.random()) for p, a, b in zip(prompts, firsts, seconds, strict=True)]

    for judge in (Judge("noisy", choose=noisy), open_judge("random")):
        prompts = [f"p{n}" for n in range(50)]
        one, two = texts(*(f"a{n}" for n in range(50))), texts(*(f"b{n}" for n in range(50)))
        there, back = judge.prefer(prompts, one, two), judge.prefer(prompts, two, one)
        assert there == [1 - outcome for outcome in back]
        assert {*there} >= {0.0, 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(DataError, match="not finite") as caught:
        Judge("odd", score=lambda prompts, completions: [value] * len(prompts)).scores(["p"], texts("a"))
    assert caught.value.code == "E601"


# --- rule and chance -------------------------------------------------------------------------------------------------


def test_the_rule_is_the_reward_of_the_world():
    from palate.worlds import reviews

    prompt = next(iter(reviews.requests()))
    good, cut = Completion("Nothing that belongs here."), Completion("Nothing that belongs here.", finished=False)
    judge = open_judge("rule")
    assert judge.scores([prompt] * 2, [good, cut]) == [
        reviews.judge(prompt, good.text), reviews.judge(prompt, cut.text, finished=False)]  # fmt: skip
    assert judge.scores([prompt], [good]) > judge.scores([prompt], [cut])
    assert judge.scores([(Message("user", prompt),)], [good]) == judge.scores([prompt], [good])
    with pytest.raises(DataError, match="not 'What now"):
        judge.scores(["What now?"], [good])


def test_chance_is_fair_and_seeded():
    prompts = [f"prompt {n}" for n in range(2000)]
    one, two = texts(*["yes"] * 2000), texts(*["no"] * 2000)
    outcomes = open_judge("random").prefer(prompts, one, two)
    assert abs(np.mean(outcomes) - 0.5) < 3.3 * 0.5 / 2000**0.5
    assert outcomes == open_judge("random", seed=0).prefer(prompts, one, two)
    assert outcomes[:5] == open_judge("random").prefer(prompts[:5], one[:5], two[:5])
    assert outcomes != open_judge("random", seed=1).prefer(prompts, one, two)


# --- a function of the user's ----------------------------------------------------------------------------------------


def test_a_function_of_one_completion(module):
    name = module("def score(prompt, completion):\n    return len(prompt) + 10 * len(completion)\n")
    judge = open_judge(f"{name}:score")
    assert judge.name == f"{name}:score"
    assert judge.scores(["pp", "p"], texts("a", "bb")) == [12, 21]


def test_what_a_function_is_given():
    seen = []

    def score(prompt, completion, weight=2, *, finished):
        seen.append((prompt, completion, weight, finished))
        return 0

    from_callable(score, "seen").scores([HELLO, "plain"], [Completion("Hi"), Completion("cut", finished=False)])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    assert seen == [(chat, "Hi", 2, True), ("plain", "cut", 2, False)]


@pytest.mark.parametrize(
    "body, outcomes",
    [
        ("float(len(first) > len(second))", [1.0, 0.0, 0.0]),
        ("(len(first) > len(second)) - (len(first) < len(second))", [1.0, 0.0, 0.5]),
        ("len(first) > len(second)", [1.0, 0.0, 0.0]),
        ("1 / (1 + 2.0 ** (len(second) - len(first)))", [1.0, 0.0, 0.5]),
        ("0", [0.5, 0.5, 0.5]),
        ("1", [0.5, 0.5, 0.5]),
    ],
)
def test_a_function_of_two_completions(module, body, outcomes):
    name = module(f"def prefer(prompt, first, second):\n    return {body}\n")
    found = open_judge(f"{name}:prefer").prefer(["p"] * 3, texts("aaa", "b", "cc"), texts("a", "bbb", "dd"))
    # for two of one length "not longer" is said of both: a contradiction, so a tie
    assert found == [0.5 if n == 2 and outcomes[0] != outcomes[1] else outcome for n, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    "body, words",
    [
        ("1 / 0", ("ZeroDivisionError", "prompt 'p'")),
        ("float('nan')", ("not finite", "nan")),
        ("'very good'", ("str", "very good", "no number")),
        ("None", ("NoneType", "no number")),
    ],
)
def test_what_a_function_says_wrongly_is_one_clear_error(module, body, words):
    name = module(f"def score(prompt, completion):\n    return {body}\n")
    with pytest.raises(DataError) as caught:
        open_judge(f"{name}:score").scores(["p"], texts("a"))
    assert caught.value.code == "E601"
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("vote", ["2", "-0.5", "-1 if first < second else 0.5"])
def test_votes_of_no_scale_are_refused(module, vote):
    name = module(f"def prefer(prompt, first, second):\n    return {vote}\n")
    with pytest.raises(DataError, match="neither in") as caught:
        open_judge(f"{name}:prefer").prefer(["p"], texts("a"), texts("b"))
    assert caught.value.code == "E601"


@pytest.mark.parametrize("signature", ["()", "(prompt)", "(*parts)", "(a, b, c, d)", "(a, b, *, strict)"])
def test_other_signatures_are_refused(module, signature):
    name = module(f"def score{signature}:\n    return 1\n")
    with pytest.raises(UsageError, match="takes"):
        open_judge(f"{name}:score")


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("rul", UsageError, ("did you mean rule",)),
        ("implicit", UsageError, ("did you mean implicit:RUN",)),
        ("truth", UsageError, ('no judge "truth"', "module:function")),
        ("no_such_module_here:score", UsageError, ("no Python module", "no_such_module_here")),
        ("math:sqr", UsageError, ('no function "sqr"', "did you mean math:sqrt")),
        ("./nothing", NotThereError, ("no such folder",)),
        ("implicit:nothing", NotThereError, ("no run here",)),
    ],
)
def test_names_of_no_judge(name, error, words):
    with pytest.raises(error) as caught:
        open_judge(name)
    for word in words:
        assert word in str(caught.value)


def test_a_module_that_fails_when_imported(module):
    name = module("raise RuntimeError('no licence')\n")
    with pytest.raises(UsageError, match="RuntimeError: no licence"):
        open_judge(f"{name}:score")


# --- a reward model's folder -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, tiny_tokenizer):
    """A function from changes of the config to a folder with a tiny reward model."""
    import copy

    from transformers import LlamaConfig, LlamaForSequenceClassification

    def make(template: str | None = None, **changes):
        shape = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=256, num_labels=1, bos_token_id=0, eos_token_id=1)  # fmt: skip
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("reward") / "model"
        LlamaForSequenceClassification(LlamaConfig(**(shape | changes))).save_pretrained(folder)
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("pad", [None, 2])
def test_a_reward_model_scores_as_transformers_does(reward_folder, pad):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = reward_folder(pad_token_id=pad, reward_bias=0.25)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = [("Say one:", " two"), ("Say three, please:", " four and five"), ("Say one:", " two"), ("Say six:", " ten")]
    expected = []
    for prompt, completion in cases:
        ids = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id]
        with torch.no_grad():
            expected.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]) + 0.25)
    found = open_judge(str(folder)).scores([p for p, _ in cases], texts(*(c for _, c in cases)))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == found[2]
    cut = open_judge(str(folder)).scores(["Say one:"], [Completion(" two", finished=False)])
    assert cut[0] != found[0]


def test_a_reward_model_reads_conversations(reward_folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = reward_folder(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": m.role, "content": m.content} for m in (*HELLO, Message("assistant", "Hi there"))]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
    assert open_judge(str(folder)).scores([HELLO], texts("Hi there")) == pytest.approx([expected], abs=1e-5)
    plain = open_judge(str(reward_folder()))
    assert plain.scores([HELLO], texts("Hi")) == plain.scores(["Be brief.\n\nHello?\n\n"], texts("Hi"))
    assert len(plain.scores([HELLO, "Hello?"], texts("", ""))) == 2


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ({"num_labels": 3}, "E412", ("3 labels",)),
        ({"reward_bias": "much"}, "E412", ("reward_bias", "'much'")),
        ({"architectures": ["LlamaForCausalLM"]}, "E412", ("LlamaForCausalLM is no reward model",)),
    ],
)
def test_folders_that_hold_no_reward_model(reward_folder, changes, code, words):
    folder = reward_folder(**changes)
    if "architectures" in changes:  # transformers writes its own
        import json

        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError) as caught:
        open_judge(str(folder))
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_pickled_missing_and_broken_weights_are_refused(reward_folder):
    from safetensors.torch import load_file, save_file

    folder = reward_folder()
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != "score.weight"}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"'score\.weight' is missing"):
        open_judge(str(folder))
    save_file(weights | {"score.weight": weights["score.weight"] * float("nan")}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        open_judge(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        open_judge(str(folder))
