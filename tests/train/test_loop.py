"""The loop against NumPy: updates, schedules, clipping, what moves, and what stops before anything moves."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import build, lifted
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import NAMES, pair_of_models, ready, rows_for, whole_batch

from palate.data.stream import stream
from palate.distributed import Ranks
from palate.errors import NotFiniteError, UsageError
from palate.model.adapters import add_lora
from palate.model.fingerprint import base_fingerprint, fingerprint
from palate.reference import annotate
from palate.scoring import support
from palate.train.loop import TrainState, steps
from palate.train.objectives import objective, pairwise
from palate.train.optim import OptimConfig, build_optimizer, learning_rate


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batches(name, groups, **options):
    return stream(groups, objective(name).collate, **({"batch": 4, "tokens": 30} | options))


def train(model, name, groups, config=None, total=None, **options):
    """(state, steps taken) of a run over the groups."""
    state = TrainState.fresh(model, config or OptimConfig(lr=1e-3, warmup_steps=0), total)
    return state, list(steps(state, batches(name, groups, **options), objective(name)))


# updates


def adam(start, gradients, lr, b1, b2, eps, decay):
    """Kingma and Ba 2015, algorithm 1, with decoupled decay (Loshchilov and Hutter 2019, algorithm 2)."""
    x, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(gradients, 1):
        x = x - lr * decay * x
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = x - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return x


def rmsprop(start, gradients, lr, eps, decay):
    """Tieleman and Hinton 2012, lecture 6.5, alpha 0.99; decay as an L2 term in the gradient."""
    x, v = start.copy(), np.zeros_like(start)
    for g in gradients:
        g = g + decay * x
        v = 0.99 * v + 0.01 * g * g
        x = x - lr * g / (np.sqrt(v) + eps)
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_five_steps_equal_plain_numpy(optimizer, decay):
    """Gradients taken apart from the loop; the update worked in NumPy; step counters advance."""
    config = OptimConfig(lr=1e-2, warmup_steps=0, optimizer=optimizer, weight_decay=decay, clip_norm=1e9)
    with lifted():
        policy, reference = pair_of_models()
        groups = ready("dpo", rows_for("dpo", 3), reference)
        start, gradients = weights(policy), []
        state = TrainState.fresh(policy, config)
        for step in range(5):
            _, found, _ = whole_batch("dpo", policy, groups)
            gradients.append(found)
            policy.zero_grad()
            (done,) = steps(state, batches("dpo", groups, start=step, steps=step + 1), objective("dpo"))
            assert done.number == step + 1
    for name, value in weights(policy).items():
        history = [g[name].numpy() for g in gradients]
        if optimizer == "adamw":
            expected = adam(start[name].numpy(), history, 1e-2, 0.9, 0.999, 1e-8, decay)
        else:
            expected = rmsprop(start[name].numpy(), history, 1e-2, 1e-8, decay)
        assert value.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-11), name


def test_the_loop_takes_the_whole_batch_whatever_the_cut():
    """META-accum through the loop: five updates, the same weights for any `tokens`, in float64."""
    with lifted():
        ends = []
        for tokens in (1, 40, 10**6):
            policy, reference = pair_of_models()
            groups = ready("dpo", rows_for("dpo", 7), reference)
            _, done = train(policy, "dpo", groups, tokens=tokens, batch=3, steps=5)
            ends.append((weights(policy), [s.loss for s in done]))
    for end, losses in ends[1:]:
        assert losses == pytest.approx(ends[0][1], rel=1e-10)
        for name, value in end.items():
            assert torch.allclose(value, ends[0][0][name], rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("name", NAMES)
def test_the_logged_loss_is_the_optimised_one_and_falls(name):
    """MET: of step 1, before its update; after some updates on the same rows the loss is lower."""
    with lifted():
        policy, reference = pair_of_models()
        groups = ready(name, rows_for(name, 4), reference)
        before = whole_batch(name, policy, groups)[0]
        policy.zero_grad()
        _, done = train(policy, name, groups, OptimConfig(lr=1e-4, warmup_steps=0), steps=3)
        after = whole_batch(name, policy, groups)[0]
    assert done[0].loss == pytest.approx(before, rel=1e-10)
    assert after < before


# schedules


def test_warm_up_and_schedules_by_hand():
    rate = lambda **c: [learning_rate(OptimConfig(lr=1.0, **c), s, 10) for s in range(1, 11)]  # noqa: E731
    assert rate(schedule="constant", warmup_steps=0) == [1.0] * 10
    assert rate(schedule="constant", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)
    assert rate(schedule="linear", warmup_steps=0) == pytest.approx([1 - k / 10 for k in range(10)])
    assert rate(schedule="linear", warmup_steps=2) == pytest.approx([1 / 3, 2 / 3] + [1 - k / 8 for k in range(8)])
    cosine = [0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert rate(schedule="cosine", warmup_steps=0) == pytest.approx(cosine)
    # the default warm-up: a tenth of the run, at most 150
    assert learning_rate(OptimConfig(lr=1.0), 1, 10) == pytest.approx(0.5)
    assert learning_rate(OptimConfig(lr=1.0), 150, 10**5) == pytest.approx(150 / 151)
    assert learning_rate(OptimConfig(lr=1.0), 151, 10**5) == 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 10, 20, None])
@pytest.mark.parametrize("total", [1, 2, 10])
def test_rates_are_never_zero_nor_above_the_peak(schedule, warmup, total):
    config = OptimConfig(lr=3e-4, schedule=schedule, warmup_steps=warmup)
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    assert all(0 < rate <= 3e-4 for rate in rates), rates


def test_a_run_of_unknown_length_has_a_constant_rate_or_none():
    assert learning_rate(OptimConfig(lr=1.0), 10**6, None) == 1.0
    with pytest.raises(UsageError, match="--steps"):
        learning_rate(OptimConfig(lr=1.0, schedule="linear", warmup_steps=0), 1, None)


def test_the_loop_uses_the_schedule():
    policy = build("llama")
    config = OptimConfig(lr=1e-3, schedule="linear", warmup_steps=2)
    _, done = train(policy, "completion_nll", rows_for("completion_nll", 4), config, total=6, steps=6)
    assert [s.learning_rate for s in done] == [learning_rate(config, n, 6) for n in range(1, 7)]


# clipping


def test_clipping_scales_the_update_and_reports_the_norm_before_it():
    class SGD:
        """The plainest optimizer: its update shows the gradient."""

    groups = rows_for("completion_nll", 4)
    moved = {}
    for clip in (1e9, 0.01):
        with lifted():
            policy = build("llama", dtype=torch.float64)
            state = TrainState.fresh(policy, OptimConfig(lr=1.0, warmup_steps=0, clip_norm=clip))
            state.optimizers["policy"] = torch.optim.SGD(policy.parameters(), lr=1.0)
            before = weights(policy)
            (step,) = steps(state, batches("completion_nll", groups), objective("completion_nll"))
        moved[clip] = {n: v - before[n] for n, v in weights(policy).items()}
        norm = math.sqrt(sum(float((d**2).sum()) for d in moved[clip].values()))
        assert norm == pytest.approx(min(step.grad_norm, clip), rel=1e-4)
        assert step.grad_norm > 0.01
    ratio = 0.01 / step.grad_norm
    for name, value in moved[0.01].items():
        assert torch.allclose(value, moved[1e9][name] * ratio, rtol=1e-4, atol=1e-12), name


# what moves


def test_every_weight_that_should_move_moves():
    policy, reference = pair_of_models(dtype=torch.float32)
    before = weights(policy)
    train(policy, "dpo", ready("dpo", rows_for("dpo", 8, longest=20), reference), steps=2)
    assert [name for name, value in weights(policy).items() if torch.equal(value, before[name])] == []


def test_lora_moves_adapters_alone_and_the_reference_never():
    """MOVE, REF: the base below the adapters, bit for bit, and its scores."""
    model = build("llama")
    name_before = base_fingerprint(model)
    adapted = add_lora(model, 4, seed=0)
    before = weights(adapted)
    groups = annotate(rows_for("dpo", 6), adapted)
    train(adapted, "dpo", groups, OptimConfig(lr=1e-2, warmup_steps=0), steps=5)
    after, adapters = weights(adapted), {n for n, weight in adapted.named_parameters() if weight.requires_grad}
    assert adapters
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name in adapters), name
    assert base_fingerprint(adapted) == name_before
    again = annotate([replace(g, reference=None) for g in groups], adapted)
    assert [g.reference for g in again] == [g.reference for g in groups]


def test_the_reference_model_is_untouched_by_training():
    policy, reference = pair_of_models(dtype=torch.float32)
    before = fingerprint(reference)
    train(policy, "dpo", ready("dpo", rows_for("dpo", 6), reference), steps=5)
    assert fingerprint(reference) == before
    assert all(p.grad is None for p in reference.parameters())


def test_nothing_to_train_is_an_error_not_a_run():
    policy = build("llama").requires_grad_(False)
    with pytest.raises(UsageError, match="trainable"):
        build_optimizer(policy, OptimConfig())


def test_training_spends_no_random_state():
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("dpo", rows_for("dpo", 6), reference)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    train(policy, "dpo", groups, steps=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_dropout_in_the_config_is_off():
    import transformers

    options = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=300, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    ends = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).train()
        torch.manual_seed(seed)
        _, done = train(model, "completion_nll", rows_for("completion_nll", 4), steps=3)
        ends.append([s.loss for s in done])
    assert ends[0] == ends[1]


# not finite


def bits(state):
    weights_ = [p.detach().clone() for p in state.model.parameters()]
    moments = [{k: v.clone() for k, v in s.items()} for s in state.optimizers["policy"].state.values()]
    return weights_, moments


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True)) and all(
        torch.equal(a[k], b[k]) for a, b in zip(one[1], two[1], strict=True) for k in a
    )


@pytest.mark.parametrize("name", ["dpo", "kto", "plackett_luce", "completion_nll", "orpo"])
@pytest.mark.parametrize("where", ["reference", "gradient", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_before_the_update_and_names_rows(name, where, value):
    from palate import losses

    if where == "reference" and not losses.info(name).reference:
        pytest.skip("no reference")
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready(name, rows_for(name, 4), reference)
    state = TrainState.fresh(policy, OptimConfig(lr=1e-3, warmup_steps=0))
    list(steps(state, batches(name, groups, batch=4, steps=1), objective(name)))  # one good step, so that moments exist
    hooks, expected = [], "rows.jsonl:"
    if where == "reference":
        bad = 2
        poisoned = tuple(value for _ in groups[bad].reference) if name == "kto" else None
        column = poisoned or (groups[bad].reference[0], *([value] * (len(groups[bad].reference) - 1)))
        groups[bad] = replace(groups[bad], reference=column)
        expected = "rows.jsonl:3"
    elif where == "gradient":
        weight = dict(policy.named_parameters())["model.layers.0.mlp.up_proj.weight"]
        hooks.append(weight.register_hook(lambda g: g * value))
    else:
        weight = policy.get_output_embeddings().weight
        with torch.no_grad():
            weight[5, 0] = value
    before = bits(state)
    with pytest.raises(NotFiniteError, match=expected) as raised:
        list(steps(state, batches(name, groups, batch=4, start=1, steps=2), objective(name)))
    for hook in hooks:
        hook.remove()
    assert raised.value.exit_code == 3
    assert raised.value.code == "E603"
    assert "step 2" in str(raised.value)
    if where == "weight":
        with torch.no_grad():
            weight[5, 0] = before[0][[n for n, _ in policy.named_parameters()].index("lm_head.weight")][5, 0] = 0.0
    assert same(bits(state), before)
    assert state.step == 1
    assert all(p.grad is None or not p.grad.abs().sum() for p in policy.parameters())


def test_only_the_bad_rows_are_named():
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("dpo", rows_for("dpo", 6), reference)
    for bad in (1, 4):
        groups[bad] = replace(groups[bad], reference=(math.nan, 0.0))
    state = TrainState.fresh(policy)
    with pytest.raises(NotFiniteError) as raised:
        list(steps(state, batches("dpo", groups, batch=6), objective("dpo")))
    text = str(raised.value)
    assert "rows.jsonl:2" in text
    assert "rows.jsonl:5" in text
    assert not any(f"rows.jsonl:{n}" in text for n in (1, 3, 4, 6))


def test_an_infinite_reference_point_of_kto_stops_too():
    """Its clamp at 0 would hide it: only the mismatched completions' scores are poisoned."""
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("kto", rows_for("kto", 4), reference)
    groups[1] = replace(groups[1], reference=(groups[1].reference[0], math.inf))
    state = TrainState.fresh(policy)
    with pytest.raises(NotFiniteError, match="nothing was updated"):
        list(steps(state, batches("kto", groups, tokens=1), objective("kto")))
    assert state.step == 0


def test_a_step_that_was_broken_off_leaves_nothing_in_the_next():
    """A callback or Ctrl-C in the middle of a step: its gradients are not added to the next one's."""
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("dpo", rows_for("dpo", 4), reference)
    state = TrainState.fresh(policy, OptimConfig(lr=1e-3, warmup_steps=0))

    def stop(number, outcomes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(steps(state, batches("dpo", groups, steps=1), objective("dpo"), inspect=stop))
    assert state.step == 0
    (broken,) = steps(state, batches("dpo", groups, steps=1), objective("dpo"))
    other, _ = pair_of_models(dtype=torch.float32)
    _, (clean,) = train(other, "dpo", groups, steps=1)
    assert broken.grad_norm == clean.grad_norm
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


# checkpointing of activations


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_nothing_but_memory(family):
    from palate.model.recompute import enable_recompute

    ends, calls = [], []
    for on in (False, True):
        with lifted():
            policy, reference = pair_of_models(name=family)
            groups = ready("dpo", rows_for("dpo", 6), reference)
            if on:
                enable_recompute(policy)
            seen = []
            layer = next(m for m in policy.modules() if type(m).__name__.endswith(("MLP", "Gemma2MLP")))
            hook = layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
            _, done = train(policy, "dpo", groups, batch=3, steps=4)
            hook.remove()
            ends.append((weights(policy), [s.loss for s in done]))
            calls.append(len(seen))
    assert calls[1] > calls[0], "nothing was recomputed"
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-10)
    for name, value in ends[0][0].items():
        assert torch.allclose(value, ends[1][0][name], rtol=1e-8, atol=1e-10), name


def test_gradient_checkpointing_with_lora_and_dropout():
    import transformers

    from palate.model.recompute import enable_recompute

    ends = []
    for on in (False, True):
        torch.manual_seed(0)
        config = transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
            max_position_embeddings=256, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5,
        )  # fmt: skip
        model = add_lora(transformers.OPTForCausalLM(config).eval(), 4, seed=0)
        groups = annotate(rows_for("dpo", 4), model)
        if on:
            enable_recompute(model)
        _, done = train(model, "dpo", groups, OptimConfig(lr=1e-2, warmup_steps=0), steps=3)
        ends.append([s.loss for s in done])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


# steps


def test_a_step_says_what_it_did():
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("dpo", rows_for("dpo", 7), reference)
    state, done = train(policy, "dpo", groups, epochs=2)
    assert [s.number for s in done] == [1, 2, 3, 4]
    assert sorted(sum((s.rows for s in done[:2]), ())) == list(range(7))
    assert state.step == 4
    assert state.cursor == {"step": 4, "epoch": 1, "row": 8}
    from palate.data.batch import stream_length

    assert sum(s.tokens for s in done[:2]) == sum(stream_length(g) for g in groups)
    line = done[0].as_dict()
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "rewards/margins", "displaced"} <= {
        *line
    }


def test_the_loop_is_lazy_and_a_callback_is_a_line_of_the_body():
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("dpo", rows_for("dpo", 8), reference)
    state = TrainState.fresh(policy)
    for step in steps(state, batches("dpo", groups, steps=100), pairwise("dpo"), Ranks.single()):
        if step.number == 2:
            break
    assert state.step == 2


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: numbers that are read, and shapes that depend on numbers."""

    waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, read):
        def counting(tensor, *args, **kwargs):
            self.count += 1
            return read(tensor, *args, **kwargs)

        return counting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        chosen = args[1] if func is torch.ops.aten.index.Tensor else ()
        masked = any(index is not None and index.dtype == torch.bool for index in chosen)
        self.count += masked or func in self.waiting
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_its_device_once(name, monkeypatch):
    """Each read lets a GPU run dry; all that a step says of itself comes over in one."""
    policy, reference = pair_of_models()
    assert support(policy).path == "shared"  # what a model is asked once, at its loading
    groups = ready(name, rows_for(name, 8), reference)
    state = TrainState.fresh(policy, OptimConfig(lr=1e-3, warmup_steps=0))
    given = list(batches(name, groups))
    assert max(len(batch.micro) for batch in given) > 1
    taken = 0
    with Reads(monkeypatch) as reads:
        for _ in steps(state, given, objective(name)):
            taken += 1
            assert reads.count == taken
    assert taken == len(given) > 1


def test_inspect_sees_the_step_before_its_update():
    policy, reference = pair_of_models(dtype=torch.float32)
    groups = ready("dpo", rows_for("dpo", 4), reference)
    state, seen, before = TrainState.fresh(policy), [], weights(policy)

    def look(number, outcomes):
        assert all(torch.equal(v, before[n]) for n, v in weights(policy).items())
        seen.append((number, sum(len(o.row_losses) for o in outcomes)))

    list(steps(state, batches("dpo", groups, steps=1), objective("dpo"), inspect=look))
    assert seen == [(1, 4)]


def test_a_state_puts_the_policy_in_evaluation_mode():
    policy = build("llama").train()
    TrainState.fresh(policy)
    assert not policy.training
