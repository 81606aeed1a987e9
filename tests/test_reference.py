"""The reference column: scored once ever, found by content, never stale, resumed to the same bits."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import build, random_group
from training_cases import ready, rows_for

from palate import reference as module
from palate.data.stream import order, stream
from palate.errors import CheckpointError
from palate.model.adapters import add_lora
from palate.model.fingerprint import fingerprint
from palate.reference import ReferenceColumn, annotate, reference_column, reference_identity, with_reference
from palate.scoring import Numerics, support
from palate.store import reference_store
from palate.train.loop import TrainState, steps
from palate.train.objectives import objective
from palate.train.optim import OptimConfig


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    support(model)
    return model


@pytest.fixture(scope="module")
def groups():
    return rows_for("dpo", 12, longest=20)


def store_of(model, precision="float32"):
    return reference_store(reference_identity(model, precision))


def column(model, groups, precision="float32", tokens=256, **options):
    numerics = Numerics.of(model, precision, tokens)
    return reference_column(
        groups, model, numerics=numerics, tokens=tokens, store=store_of(model, precision), **options
    )


def facts(column):
    return column.totals, column.scored, column.reused, column.tags, column.identity, column.keys.tolist()


def completions(groups):
    return sum(len(g.completions) for g in groups)


# reuse


def test_the_second_time_nothing_is_scored(llama, groups, monkeypatch):
    first = column(llama, groups)
    assert (first.scored, first.reused) == (completions(groups), 0)
    monkeypatch.setattr(module, "logps", lambda *a, **k: pytest.fail("scored again"))
    again = column(llama, groups)
    assert (again.scored, again.reused) == (0, completions(groups))
    assert again.totals == first.totals


def test_any_order_slice_side_or_repeat_finds_them(llama, groups):
    known = {id(g): t for g, t in zip(groups, column(llama, groups).totals, strict=True)}
    shuffled = [groups[i] for i in order(len(groups), 5, 3)]
    for some in (shuffled, groups[3:7], groups[:1] * 5, groups[::-2]):
        found = column(llama, some, tokens=256)
        assert found.scored == 0
        assert found.totals == tuple(known[id(g)] for g in some)
    turned = [replace(g, completions=g.completions[::-1], spans=g.spans[::-1]) for g in groups]
    assert column(llama, turned).totals == tuple(t[::-1] for t in column(llama, groups).totals)
    assert column(llama, turned).scored == 0


def test_only_new_rows_are_scored(llama, groups):
    column(llama, groups[:8])
    found = column(llama, groups)
    assert found.scored == completions(groups[8:])
    assert found.reused == completions(groups[:8])


def test_a_completion_that_stands_twice_is_scored_once(llama, groups):
    twin = replace(groups[0], completions=(groups[0].completions[0],) * 2, spans=(groups[0].spans[0],) * 2)
    found = column(llama, [twin, twin, groups[0]])
    assert found.scored == 2
    assert found.totals[0][0] == found.totals[0][1] == found.totals[1][0] == found.totals[2][0]


def test_where_the_model_lies_does_not_count(llama, groups, tmp_path):
    """Another folder, another object, another dropout: the same weights are the same reference."""
    column(llama, groups)
    llama.save_pretrained(tmp_path / "elsewhere")
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere").eval()
    again.config.attention_dropout = 0.3
    assert column(again, groups).scored == 0


def test_full_and_lora_runs_share(llama, groups):
    full = column(llama, groups)
    adapted = add_lora(build("llama"), 4, seed=1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(1.0)  # trained already: the reference is still what lies below
    shared = column(adapted, groups)
    assert shared.scored == 0
    assert shared.totals == full.totals
    alone = reference_column(groups, adapted, numerics=Numerics.of(adapted, "float32", 256), tokens=256)
    assert alone.totals == full.totals


# never stale


def changed_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


def changed_norm_eps(model):
    model.config.rms_norm_eps = 1e-3


def changed_rope(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}


def smallest_bit(model):
    with torch.no_grad():
        flat = model.lm_head.weight.view(torch.int32)
        flat[7, 7] ^= 1


@pytest.mark.parametrize("change", [changed_weight, smallest_bit, changed_norm_eps, changed_rope])
def test_another_function_is_another_reference(llama, groups, change):
    column(llama, groups)
    other = build("llama")
    change(other)
    found = column(other, groups)
    assert (found.scored, found.reused) == (completions(groups), 0)


def test_another_precision_is_another_reference(llama, groups):
    wide = column(llama, groups)
    narrow = column(llama, groups, "bfloat16")
    assert narrow.reused == 0
    assert narrow.totals != wide.totals
    assert column(build("llama", dtype=torch.bfloat16), groups).reused == 0


def test_a_changed_token_prompt_or_span_is_scored_again(llama, groups):
    column(llama, groups)
    one = groups[4]
    changed = []
    for k in (0, 1):
        ids = one.completions[k].copy()
        ids[-1] = (ids[-1] + 1) % 300
        changed.append((replace(one, completions=(*one.completions[:k], ids, *one.completions[k + 1 :])), 1))
    prompt = one.prompt.copy()
    prompt[0] = (prompt[0] + 1) % 300
    changed.append((replace(one, prompt=prompt), 2))
    seam = replace(  # the same text, cut elsewhere
        one,
        prompt=np.concatenate([one.prompt, one.completions[0][:1]]),
        completions=(one.completions[0][1:], one.completions[1]),
        spans=(((0, len(one.completions[0]) - 1),), one.spans[1]),
    )
    if len(one.completions[0]) > 1:
        changed.append((seam, 2))
        changed.append((replace(one, spans=(((1, len(one.completions[0])),), one.spans[1])), 1))
    for group, new in changed:
        assert column(llama, [group]).scored == new


def test_an_annotated_value_is_the_models_own(llama, groups):
    from models import totals

    got = np.array([v for g in annotate(groups, llama) for v in g.reference])
    assert got == pytest.approx(totals(llama, groups), abs=1e-4)


# pinned


def test_a_pinned_column_is_read_alone(llama, groups, tmp_path):
    made = column(llama, groups)
    made.write(tmp_path / "reference.safetensors")
    assert facts(ReferenceColumn.read(tmp_path / "reference.safetensors", groups)) == facts(made)
    assert ReferenceColumn.read(tmp_path / "none.safetensors", groups) is None


def test_a_pinned_column_of_other_rows_is_refused(llama, groups, tmp_path):
    path = tmp_path / "reference.safetensors"
    column(llama, groups).write(path)
    for other in (groups[::-1], groups[1:], [*groups, groups[0]]):
        with pytest.raises(CheckpointError, match="other rows") as raised:
            ReferenceColumn.read(path, other)
        assert raised.value.exit_code == 3


def test_a_rotten_pinned_column_is_refused(llama, groups, tmp_path):
    path = tmp_path / "reference.safetensors"
    column(llama, groups).write(path)
    good, chance = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[int(chance.integers(len(bad)))] ^= 1 << int(chance.integers(8))
        path.write_bytes(bytes(bad))
        with pytest.raises(CheckpointError):
            ReferenceColumn.read(path, groups)
    for size in (0, 8, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError):
            ReferenceColumn.read(path, groups)


# the pass


class Killed(BaseException):
    pass


def test_a_killed_pass_follows_its_plan_to_the_same_bits(llama, groups, tmp_path, monkeypatch):
    """Killed after each part in turn, with another store each time: the plan decides, not what is known by then."""
    monkeypatch.setattr(module, "MICRO_BATCHES_PER_PART", 1)
    numerics = Numerics.of(llama, "float32", 40)
    straight = reference_column(groups, llama, numerics=numerics, tokens=40, folder=tmp_path / "straight")
    parts = len(list((tmp_path / "straight").glob("part-*")))
    assert parts > 3
    for kill in range(1, parts + 1):
        folder, done = tmp_path / f"killed-{kill}", []

        def stop(scored, todo, kill=kill, done=done):
            done.append(scored)
            if len(done) == kill:
                raise Killed

        with pytest.raises(Killed):
            reference_column(groups, llama, numerics=numerics, tokens=40, folder=folder, progress=stop)
        seen = []
        original = module._score
        monkeypatch.setattr(module, "_score", lambda *a, o=original, s=seen: s.append(1) or o(*a))
        again = reference_column(groups, llama, numerics=numerics, tokens=40, folder=folder, store=store_of(llama))
        monkeypatch.setattr(module, "_score", original)
        assert len(seen) == parts - kill  # finished parts are read, not made again
        assert facts(again) == facts(straight)


def test_a_pass_killed_under_the_old_plan_goes_on(llama, groups, tmp_path, monkeypatch):
    """The plan was one JSON file of row numbers once: its parts are read, its micro-batches followed."""
    monkeypatch.setattr(module, "MICRO_BATCHES_PER_PART", 2)
    column(llama, groups[:3], tokens=40)  # so that some are found
    options = dict(numerics=Numerics.of(llama, "float32", 40), tokens=40)
    straight = reference_column(groups, llama, store=store_of(llama), folder=tmp_path / "straight", **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "old")
    (plan, written), old = module._Plan.read(tmp_path / "straight"), tmp_path / "old"
    missing = np.flatnonzero(plan.missing(straight.scored + straight.reused)).tolist()
    micro = [missing[a:b] for a, b in zip(plan.cuts, plan.cuts[1:], strict=False)]
    parts = [micro[i : i + 2] for i in range(0, len(micro), 2)]
    assert len(parts) > 2
    before = {name: written[name] for name in ("identity", "tag", "tokens", "keys", "tags")}
    text = json.dumps(before | {"found": plan.found.tolist(), "logps": plan.logps.tolist(), "parts": parts})
    (old / "plan.safetensors").unlink()
    (old / "plan.json").write_text(text)
    for part in sorted(old.glob("part-*"))[1:]:
        part.unlink()
    monkeypatch.setattr(module, "MICRO_BATCHES_PER_PART", 5)
    seen, original = [], module._score
    monkeypatch.setattr(module, "_score", lambda *a: seen.append(1) or original(*a))
    again = reference_column(groups, llama, folder=old, **options)
    assert len(seen) == len(parts) - 1
    assert facts(again) == facts(straight)
    (old / "plan.json").write_text(text.replace(before["identity"], "0" * 32))
    with pytest.raises(CheckpointError, match="identity"):
        reference_column(groups, llama, folder=old, **options)


def test_a_plan_of_another_pass_is_refused(llama, groups, tmp_path):
    numerics = Numerics.of(llama, "float32", 40)
    options = dict(numerics=numerics, tokens=40, folder=tmp_path / "scoring")
    reference_column(groups, llama, **options)
    other = build("llama", seed=1)
    with pytest.raises(CheckpointError, match="identity"):
        reference_column(groups, other, **options)
    with pytest.raises(CheckpointError, match="keys"):
        reference_column(groups[1:], llama, **options)
    with pytest.raises(CheckpointError, match="tokens"):
        reference_column(groups, llama, **options | {"tokens": 50})


def test_a_rotten_part_is_refused(llama, groups, tmp_path):
    options = dict(numerics=Numerics.of(llama, "float32", 40), tokens=40, folder=tmp_path / "scoring")
    reference_column(groups, llama, **options)
    part = sorted((tmp_path / "scoring").glob("part-*"))[0]
    data = bytearray(part.read_bytes())
    data[-3] ^= 16
    part.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="checksum"):
        reference_column(groups, llama, **options)


def test_progress_counts_completions(llama, groups):
    told = []
    column(llama, groups, progress=lambda *x: told.append(x))
    assert told[-1] == (completions(groups),) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_scoring_spends_no_random_state_and_moves_nothing(llama, groups):
    torch.manual_seed(3)
    before, name = torch.get_rng_state(), fingerprint(llama)
    column(llama, groups)
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(llama) == name
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


# step 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_margins_at_the_start_are_exactly_zero_over_a_warm_store(family, precision):
    """Whatever the seed, batch and slice of the run that filled the store, or of this one."""
    model = build(family)
    generator = np.random.default_rng(2)
    groups = [
        random_group(generator, *(int(n) for n in generator.integers(1, 30, 3)), preferences=((0, 1),))
        for _ in range(24)
    ]
    column(model, [groups[i] for i in order(24, 1, 1)], precision)  # warms the store in another order
    numerics = Numerics.of(model, precision, 256)
    for seed, rows in ((0, groups), (1, groups[5:17]), (2, groups[::-1])):
        found = column(model, rows, precision)
        assert found.scored == 0
        made = objective("dpo", numerics)
        for step in stream(with_reference(rows, found), made.collate, batch=5, tokens=256, seed=seed):
            for part in step:
                with torch.no_grad():
                    outcome = made(model, part)
                assert outcome.log_ratio.abs().max() == 0
                assert outcome.row_losses == pytest.approx(np.log(2), abs=1e-12)


def test_every_loss_starts_at_its_closed_form():
    from training_cases import NAMES

    from palate import losses

    model = build("llama")
    for name in NAMES:
        if not losses.info(name).reference:
            continue
        rows = ready(name, rows_for(name, 6), model)
        made = objective(name, Numerics.of(model))
        (step,) = stream(rows, made.collate, batch=6)
        outcome = made(model, step.micro[0], made.prepare(model, step.micro, _single()))
        assert outcome.row_losses == pytest.approx(outcome.start_losses.numpy(), abs=1e-7), name
        if made.at_start is not None:
            assert outcome.row_losses == pytest.approx(made.at_start, abs=1e-9), name


def _single():
    from palate.distributed import Ranks

    return Ranks.single()


def test_a_trained_policy_is_never_taken_for_the_reference(groups):
    """The store, asked after training began, knows the start's scores and not the trained model's."""
    model = build("llama")
    start = column(model, groups)
    annotated = with_reference(groups, start)
    made = objective("dpo", Numerics.of(model, "float32", 256))
    state = TrainState.fresh(model, OptimConfig(lr=1e-3, warmup_steps=0))
    list(steps(state, stream(annotated, made.collate, batch=4), made))
    later = column(model, groups)
    assert later.reused == 0
    assert later.totals != start.totals
    assert column(build("llama"), groups).totals == start.totals
