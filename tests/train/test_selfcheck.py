"""The check at the start: passes where the policy is the reference, and names what differs where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import build
from training_cases import NAMES, ready, rows_for

from palate import losses
from palate.data.stream import stream
from palate.distributed import Ranks
from palate.errors import ModelError
from palate.scoring import Numerics
from palate.train.loop import TrainState, steps
from palate.train.objectives import objective
from palate.train.selfcheck import TOLERANCE, check_start, start_report

WITH_REFERENCE = [name for name in NAMES if losses.info(name).reference]


def outcomes(model, name, groups, precision="float32", **options):
    made = objective(name, Numerics(precision), **options)
    (step,) = stream(groups, made.collate, batch=len(groups), tokens=40)
    context = made.prepare(model, step.micro, Ranks.single())
    return [made(model, part, context) for part in step], made


def nothing():
    pytest.fail("nothing differs")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_start_passes(name, precision):
    from palate.reference import annotate

    model = build("llama")
    groups = annotate(rows_for(name, 6), model, numerics=Numerics(precision))
    seen, made = outcomes(model, name, groups, precision)
    report = check_start(seen, made, nothing)
    assert report.largest <= TOLERANCE[precision]
    assert report.loss == pytest.approx(report.closed_form, abs=1e-5)
    assert "closed form" in str(report)


@pytest.mark.parametrize("shift, passes", [(0.9e-5, True), (1.2e-5, False)])
def test_the_bound_is_a_token(shift, passes):
    """1e-5 nats a token in float32: rows of ten tokens may be ten times as far."""
    from palate.reference import annotate

    model = build("llama")
    groups = [replace(g, reference=None) for g in rows_for("dpo", 3, longest=14)]
    groups = annotate(groups, model)
    moved = [
        replace(g, reference=tuple(v + shift * len(c) for v, c in zip(g.reference, g.completions, strict=True)))
        for g in groups
    ]
    seen, made = outcomes(model, "dpo", moved)
    if passes:
        check_start(seen, made, nothing)
    else:
        with pytest.raises(ModelError, match="weights"):
            check_start(seen, made, lambda: "weights")


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_another_reference_is_caught_and_nothing_moves(name):
    model = build("llama")
    groups = ready(name, rows_for(name, 4), build("llama", seed=1))
    made = objective(name)
    state, before = TrainState.fresh(model), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ModelError, match="the one thing") as raised:
        list(
            steps(
                state,
                stream(groups, made.collate, batch=4),
                made,
                inspect=lambda number, seen: check_start(seen, made, lambda: "the one thing"),
            )
        )
    assert raised.value.code == "E602"
    assert raised.value.exit_code == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_swapped_pair_of_stored_values_is_caught():
    """Stored by position and shuffled: the bug of many."""
    model = build("llama")
    groups = ready("dpo", rows_for("dpo", 6), model)
    swapped = [replace(groups[0], reference=groups[0].reference[::-1]), *groups[1:]]
    seen, made = outcomes(model, "dpo", swapped)
    with pytest.raises(ModelError):
        check_start(seen, made, lambda: "values")


def test_dropout_that_is_on_is_caught():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=300, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    groups = ready("dpo", rows_for("dpo", 4), model)
    model.train()
    seen, made = outcomes(model, "dpo", groups)
    with pytest.raises(ModelError):
        check_start(seen, made, lambda: "dropout")


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_loss_that_is_plumbed_wrongly_is_caught(name, monkeypatch):
    """The log-ratios are zero and the loss is not at its closed form: a factor, a sign, another column."""
    model = build("llama")
    groups = ready(name, rows_for(name, 4), model)
    seen, made = outcomes(model, name, groups)
    check_start(seen, made, nothing)
    for wrong in (lambda v: v * 1.001, lambda v: v + 1e-4, lambda v: v * 0.5):
        broken = [replace(outcome, row_losses=wrong(outcome.row_losses)) for outcome in seen]
        with pytest.raises(ModelError, match="closed form"):
            check_start(broken, made, lambda: "the loss")


def test_what_is_not_a_number_does_not_pass():
    model = build("llama")
    groups = ready("dpo", rows_for("dpo", 3), model)
    seen, made = outcomes(model, "dpo", groups)
    broken = [replace(outcome, log_ratio=outcome.log_ratio * np.nan) for outcome in seen]
    with pytest.raises(ModelError):
        check_start(broken, made, lambda: "nan")


def test_the_report_of_another_reference_shows_the_distance():
    model = build("llama")
    groups = ready("dpo", rows_for("dpo", 4), build("llama", seed=1))
    seen, made = outcomes(model, "dpo", groups)
    report = start_report(seen, made)
    expected = max(
        float(abs(r) / n) for o in seen for r, n in zip(o.log_ratio.tolist(), o.length.tolist(), strict=True)
    )
    assert report.largest == pytest.approx(expected)
    assert report.largest > 0.01


@pytest.mark.parametrize("what, says", [
    ("dropout", "dropout"), ("weights", "weights"), ("values", "stored values"), ("dtype", "dtype"),
])  # fmt: skip
def test_a_run_says_which_of_them_differs(what, says, tmp_path, monkeypatch, capsys, tiny_llama, tiny_tokenizer):
    """Through the command: something goes wrong between the reference pass and the first step."""
    from runs_kit import Command, pairs, save_model, write_rows

    from palate.recipes import preference
    from palate.train import loop

    monkeypatch.chdir(tmp_path)
    tiny = save_model(tmp_path / "tiny", tiny_llama(0, attention_dropout=0.5), tiny_tokenizer)
    fresh = loop.TrainState.fresh.__func__

    def spoilt(cls, policy, *arguments):
        state = fresh(cls, policy, *arguments)
        if what == "weights":
            with torch.no_grad():
                policy.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        if what == "dropout":
            policy.model.embed_tokens.register_forward_hook(
                lambda module, _, out: torch.nn.functional.dropout(out, 0.3, training=True)
            )
            policy.model.dropped = torch.nn.Dropout(0.3)
        return state

    monkeypatch.setattr(loop.TrainState, "fresh", classmethod(spoilt))
    if what in ("values", "dtype"):
        with_reference = preference.__dict__.get("with_reference")
        assert with_reference is None  # imported inside: patch where it lives
        from palate import reference

        original = reference.reference_column

        def shifted(*arguments, **options):
            column = original(*arguments, **options)
            tags = ("bfloat16 elsewhere",) if what == "dtype" else column.tags
            return replace(column, values=column.values + 1.0, tags=tags)

        monkeypatch.setattr(reference, "reference_column", shifted)
    palate = Command(capsys)
    data = write_rows(tmp_path / "d.jsonl", pairs(12))
    palate("dpo", model=tiny, data=data, out="run", batch=4, steps=2, device="cpu", samples=0)
    assert palate.code == 3, palate.said
    assert "E602" in palate.said
    assert says in palate.said.split("what differs:")[1]
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
