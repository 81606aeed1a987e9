"""Real input: the 260k model on the shared data. Log-probs against plain transformers in float64, a row at a time.

The oracle reads no palate code: prompt and completion ids are laid out as one row, stock transformers runs in float64,
and log_softmax is taken there. The fast tier sees the first rows of every file, the slow tier every row.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch

import palate
from palate.data.batch import collate, scored_length, stream_length
from palate.data.sources import read_any, read_feedback
from palate.data.stream import pack
from palate.data.tokens import tokenize
from palate.losses import PairLogps
from palate.recipes.preference import PreferenceConfig, run
from palate.scoring import Numerics, logps, support

CONTEXT = 512
# file -> rows the readers give (ties left out, and one row of the Vicuna file whose reply is empty)
PLAIN = {
    "gsm8k_sft_prompt_completion": 300,
    "gsm8k_solution_pairs": 450,
    "hh_harmless_implicit": 728,
    "llmbar_pairs": 226,
    "mtbench_human_pairs": 143,
    "pandalm_judged": 544,
    "qa_feedback_ranked": 321,
    "sentiment_pairs": 766,
    "sentiment_reviews": 60,
    "sentiment_sentences": 3000,
    "tinyshakespeare_speeches": 3279,
    "tinystories": 1300,
    "vicuna_bench_judged": 301,
    "yes_no_pairs": 636,
}
CHATS = {
    "kto_en_unpaired": 209,
    "mixed_dpo_en_conversational": 165,
    "mixed_dpo_zh_conversational": 60,
    "sft_dolly_messages": 97,
    "sft_self_instruct_messages": 289,
}
PAIRS = (
    "gsm8k_solution_pairs",
    "hh_harmless_implicit",
    "llmbar_pairs",
    "mtbench_human_pairs",
    "pandalm_judged",
    "qa_feedback_ranked",
    "sentiment_pairs",
    "vicuna_bench_judged",
    "yes_no_pairs",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def loaded(data_dir):
    """The 260k model and its tokenizer, with a chat template, which it has none of its own."""
    found = palate.load(data_dir / "tiny-llama-260k")
    found.tokenizer.chat_template = CHAT_TEMPLATE
    assert support(found.model).path == "shared"
    return found


@pytest.fixture(scope="module")
def float64_model(loaded):
    return copy.deepcopy(loaded.model).double()


@torch.no_grad()
def oracle(model, prompt, completion, spans) -> float:
    """Summed log-prob of the completion's scored tokens: one stock forward over one row, in the model's float64."""
    row = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
    logps = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
    assert logps.dtype == torch.float64
    places = [len(prompt) + i for start, stop in spans for i in range(start, stop)]
    return sum(float(logps[place - 1, row[0, place]]) for place in places)


def read_groups(path, tokenizer, rows=None):
    """Every row that the readers accept, as token groups; `rows`: the first ones only."""
    name = f"{path}[:{rows}]" if rows else path
    if path.stem == "kto_en_unpaired":  # with the mismatched completions that KTO scores as well
        records = read_feedback(path).records[:rows]
    else:
        records = read_any(name, bad_rows="skip").records
    return [tokenize(record, tokenizer, max_length=CONTEXT) for record in records]


@torch.no_grad()
def scored(model, groups):
    """palate's sums, shared stream by shared stream, one a completion."""
    numerics, totals = Numerics.of(model, "float32", 2048), []
    for part in pack([stream_length(group) for group in groups], 2048):
        found = logps(model, collate([groups[i] for i in part]), numerics=numerics)
        totals += found.total.tolist()
    return totals


def compare(loaded, float64_model, groups):
    got = np.array(scored(loaded.model, groups))
    flat = [(group, k) for group in groups for k in range(len(group.completions))]
    expected = np.array([oracle(float64_model, g.prompt, g.completions[k], g.spans[k]) for g, k in flat])
    assert len(got) == len(expected) > 0
    assert np.isfinite(expected).all()
    error = np.abs(got - expected) / np.maximum(1, np.abs(expected))
    worst = int(error.argmax())
    group, k = flat[worst]
    assert error[worst] <= 1e-4, f"{group.source}, completion {k}: {got[worst]} against {expected[worst]}"
    per_token = np.abs(got - expected) / [scored_length(g, k) for g, k in flat]
    assert per_token.max() <= 1e-5
    return got


@pytest.mark.parametrize("name", [*PLAIN, *CHATS])
def test_first_rows_equal_a_float64_pass_row_by_row(name, data_dir, loaded, float64_model):
    groups = read_groups(data_dir / f"{name}.jsonl", loaded.tokenizer, rows=4)
    assert len(groups) >= 3
    compare(loaded, float64_model, groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PLAIN, *CHATS])
def test_every_row_equals_a_float64_pass_row_by_row(name, data_dir, loaded, float64_model):
    groups = read_groups(data_dir / f"{name}.jsonl", loaded.tokenizer)
    assert len(groups) == (PLAIN | CHATS)[name]
    reference = compare(loaded, float64_model, groups)
    # step 0 over the whole file: in other company and order the same bits, so every margin is 0 and the loss is ln 2
    again = iter(scored(loaded.model, groups[::-1]))
    policy = [[next(again) for _ in group.completions] for group in groups[::-1]][::-1]
    assert np.array_equal(reference, [total for totals in policy for total in totals])
    known = iter(reference.tolist())
    pairs = [
        [*totals[better], *totals[worse]]
        for group, mine in zip(groups, policy, strict=True)
        for totals in [[(value, next(known)) for value in mine]]
        for better, worse in group.preferences
    ]
    if pairs:
        chosen, chosen_before, rejected, rejected_before = torch.tensor(pairs, dtype=torch.float64).T
        loss = palate.losses.LOSSES["dpo"](PairLogps(chosen, rejected, chosen_before, rejected_before))
        assert (loss - math.log(2)).abs().max() <= 1e-12


def test_published_text_and_log_probs_come_back(data_dir, loaded, float64_model):
    """The author's greedy 200 tokens, and the float64 sums that come with the files."""
    expected = json.loads((data_dir / "tiny-llama-260k" / "expected.json").read_text(encoding="utf-8"))
    greedy = expected["greedy_from_bos"]
    prompt = [np.array([loaded.tokenizer.bos_token_id], dtype=np.int32)]
    count = greedy["new_tokens"]
    (sample,) = palate.generate(loaded.model, loaded.tokenizer, prompt, max_tokens=count, temperature=0, end_ids=())
    assert [prompt[0][0], *sample.ids] == greedy["ids"] or list(sample.ids) == greedy["ids"]
    for row in expected["logps"]["rows"]:
        record = palate.PreferencePair(row["prompt"], row["chosen"], row["rejected"])
        group = palate.tokenize_pair(record, loaded.tokenizer, max_length=CONTEXT)
        assert group.prompt.tolist() == row["prompt_ids"]
        for k, side in enumerate(("chosen", "rejected")):
            assert group.completions[k].tolist() == row[f"{side}_ids"]
            assert oracle(float64_model, group.prompt, group.completions[k], group.spans[k]) == pytest.approx(
                row[f"{side}_logp"], abs=1e-4
            )
        assert scored(loaded.model, [group]) == pytest.approx([row["chosen_logp"], row["rejected_logp"]], abs=1e-3)


def train(tmp_path, data_dir, data, **options):
    options = {"eval": "none", "samples": 0, "precision": "float32", "device": "cpu"} | options
    config = PreferenceConfig(
        model=str(data_dir / "tiny-llama-260k"), data=str(data), out=str(tmp_path / "run"), **options
    )
    said = []
    result = run(config, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return result, lines, said


def check_start(lines):
    first = next(line for line in lines if "loss" in line)
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/margins"]) <= 1e-5


@pytest.mark.parametrize("name", ["hh_harmless_implicit", "sentiment_pairs", "yes_no_pairs"])
def test_the_first_loss_is_ln_2(name, tmp_path, data_dir):
    _, lines, _ = train(tmp_path, data_dir, f"{data_dir / name}.jsonl[:6]", steps=1)
    check_start(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_the_first_loss_is_ln_2_on_every_file(name, tmp_path, data_dir):
    """One step over fifty rows, so that all of them stand in the first loss."""
    _, lines, _ = train(tmp_path, data_dir, f"{data_dir / name}.jsonl[:50]", steps=1, batch=50)
    check_start(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed_dpo_en_conversational", "mixed_dpo_zh_conversational"])
def test_the_first_loss_is_ln_2_on_conversations(name, tmp_path, data_dir):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    data = f"{data_dir / name}.jsonl[:25]"
    _, lines, _ = train(tmp_path, data_dir, data, steps=1, batch=25, chat_template=str(template), max_length=CONTEXT)
    check_start(lines)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 8])
def test_held_out_accuracy_rises_on_yes_no_and_the_saved_model_reloads(lora_rank, tmp_path, data_dir, loaded):
    """Personas held out in even shares: every fifth prompt. At the start all rewards are equal, so no pair counts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = (data_dir / "yes_no_pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held = [row for number, row in enumerate(rows) if number % 5 == 0]
    (tmp_path / "held.jsonl").write_text("".join(held), encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("".join(row for row in rows if row not in held), encoding="utf-8")
    result, lines, _ = train(
        tmp_path,
        data_dir,
        tmp_path / "train.jsonl",
        eval=str(tmp_path / "held.jsonl"),
        epochs=2,
        batch=32,
        lr=5e-4 if lora_rank is None else 5e-3,
        lora_rank=lora_rank,
        eval_every=100,
    )
    check_start(lines)
    assert result["better"], result["verdict"]
    before, after = result["before"], result["after"]
    assert before["eval/rewards/accuracies"] == 0 and before["eval/rewards/ties"] == 1
    assert after["eval/rewards/accuracies_low"] > 0.5
    assert after["eval/logps/accuracies"] > before["eval/logps/accuracies"]
    assert after["eval/loss"] < before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)

    # what was evaluated last is what is saved, and plain transformers reads it without palate
    folder = tmp_path / "run" / "model"
    ours, plain = palate.load(folder).model, AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = palate.read_pairs(tmp_path / "held.jsonl").records
    for record in records[:20]:
        ids = tokenizer(record.prompt + record.chosen, return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    groups = [tokenize(record, tokenizer, max_length=CONTEXT) for record in records]
    chosen = np.array(scored(plain, groups))[::2]
    assert chosen.mean() == pytest.approx(after["eval/logps/chosen"], abs=1e-3)
