"""Every registered loss bound to a model: what the cut, the order and the neighbours may not change, and metrics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import lifted, random_group, truth
from training_cases import NAMES, gradients, pair_of_models, ready, rows_for, whole_batch

from palate import losses
from palate.data.batch import collate_feedback, collate_pairs
from palate.distributed import Ranks
from palate.train.objectives import completion_nll, feedback, objective, pairwise, ranked


@pytest.fixture(scope="module")
def models():
    with lifted():
        policy, reference = pair_of_models()
        from palate.scoring import support

        assert support(policy).path == support(reference).path == "shared"
        yield policy, reference


def close(one, two, tolerance=1e-10):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=tolerance, atol=tolerance * 1e-2), name


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_gives_the_same_loss_gradients_and_metrics(name, models):
    """META-accum, META-split: rows not divisible by anything, ragged lengths."""
    policy, reference = models
    groups = ready(name, rows_for(name), reference)
    loss, grads, metrics = whole_batch(name, policy, groups)
    assert grads
    for tokens in (1, 30, 67):
        other, other_grads, other_metrics = whole_batch(name, policy, groups, tokens)
        assert other == pytest.approx(loss, rel=1e-10)
        close(grads, other_grads)
        assert other_metrics == pytest.approx(metrics, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_changes_nothing(name, models):
    policy, reference = models
    groups = ready(name, rows_for(name, 6), reference)
    loss, grads, _ = whole_batch(name, policy, groups)
    other, other_grads, _ = whole_batch(name, policy, groups[::-1])
    assert other == pytest.approx(loss, rel=1e-12)
    close(grads, other_grads)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_rows_scored_one_by_one(name, models):
    """Row by row through transformers' own forward, and the registered loss on those numbers."""
    policy, reference = models
    groups = ready(name, rows_for(name), reference)
    with torch.no_grad():
        mine = [[sum(truth(policy, g, k)) for k in range(len(g.completions))] for g in groups]
        theirs = [[sum(truth(reference, g, k)) for k in range(len(g.completions))] for g in groups]
    wide = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    lengths = [[len(c) for c in g.completions] for g in groups]
    kind, loss = losses.info(name).kind, losses.LOSSES[name]
    if kind == "pairwise":
        (a, b), (c, d), (m, n) = (wide(x).T for x in (mine, theirs, lengths))
        with_reference = (c, d) if losses.info(name).reference else (None, None)
        expected = loss(losses.PairLogps(a, b, *with_reference, m, n)).mean()
    elif kind == "feedback":
        label = torch.tensor([bool(g.label) for g in groups])
        (a, b), (c, d), (m, _) = (wide(x).T for x in (mine, theirs, lengths))
        expected = loss(losses.FeedbackLogps(a, c, label, m, b, d)).mean()
    elif kind == "ranked":
        values = []
        for group, x, y in zip(groups, mine, theirs, strict=True):
            best = sorted(range(len(x)), key=lambda k: -sum(w == k for w, _ in group.preferences))
            values.append(loss(losses.RankedLogps(wide([[x[k] for k in best]]), wide([[y[k] for k in best]]))))
        expected = torch.cat(values).mean()
    else:
        expected = -wide([x for row in mine for x in row]).sum() / sum(n for row in lengths for n in row)
    got, _, _ = whole_batch(name, policy, groups, 40)
    assert got == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_one_small_step_against_the_gradient_lowers_the_loss(name, models):
    policy, reference = models
    groups = ready(name, rows_for(name, 5), reference)
    loss, grads, _ = whole_batch(name, policy, groups)
    size = 1e-6 / max(float(sum((g**2).sum() for g in grads.values())) ** 0.5, 1e-12)
    named = dict(policy.named_parameters())
    with torch.no_grad():
        for key, grad in grads.items():
            named[key].sub_(size * grad)
    try:
        assert whole_batch(name, policy, groups)[0] < loss
    finally:
        with torch.no_grad():
            for key, grad in grads.items():
                named[key].add_(size * grad)


def test_swapping_sides_turns_the_margin_exactly(models):
    policy, reference = models
    groups = ready("dpo", rows_for("dpo", 4), reference)
    turned = [replace(g, preferences=((1, 0),)) for g in groups]
    one, two = (whole_batch("dpo", policy, x)[2] for x in (groups, turned))
    assert one["rewards/margins"] == -two["rewards/margins"]
    assert one["rewards/accuracies"] + two["rewards/accuracies"] == 1
    loss = whole_batch("dpo", policy, groups)[0]
    assert whole_batch("dpo", policy, turned)[0] - loss == pytest.approx(one["rewards/margins"], rel=1e-9)


def test_metrics_are_recomputed_from_the_rows(models):
    """MET: each number that is logged, from row-by-row log-probs."""
    policy, reference = models
    groups = ready("dpo", rows_for("dpo", 6), reference)
    a, b = np.array([[sum(truth(policy, g, k)) for k in (0, 1)] for g in groups]).T
    c, d = np.array([g.reference for g in groups]).T
    metrics = whole_batch("dpo", policy, groups, 20, beta=0.3)[2]
    margin = 0.3 * ((a - c) - (b - d))
    assert metrics == pytest.approx(
        {
            "rewards/chosen": (0.3 * (a - c)).mean(),
            "rewards/rejected": (0.3 * (b - d)).mean(),
            "rewards/margins": margin.mean(),
            "rewards/accuracies": (margin > 0).mean(),
            "rewards/ties": 0.0,
            "logps/chosen": a.mean(),
            "logps/rejected": b.mean(),
            "logps/accuracies": (a > b).mean(),
            "length/chosen": np.mean([len(g.completions[0]) for g in groups]),
            "length/rejected": np.mean([len(g.completions[1]) for g in groups]),
            "displaced": (a < c).mean(),
        },
        rel=1e-9,
    )


def test_a_tie_is_not_accurate_and_has_its_own_share(models):
    policy, reference = models
    group = rows_for("dpo", 1)[0]
    tied = replace(group, completions=(group.completions[0],) * 2, spans=(group.spans[0],) * 2)
    metrics = whole_batch("dpo", policy, ready("dpo", [tied, group], reference))[2]
    assert metrics["rewards/ties"] == 0.5
    assert metrics["rewards/accuracies"] <= 0.5


def test_a_ranking_under_a_pairwise_loss_is_its_strict_pairs(models):
    policy, reference = models
    (group,) = rows_for("plackett_luce", 2)[1:]
    assert len(group.completions) == 3
    (annotated,) = ready("dpo", [group], reference)
    pairs = [
        replace(
            annotated,
            completions=tuple(annotated.completions[k] for k in (win, lose)),
            spans=tuple(annotated.spans[k] for k in (win, lose)),
            reference=tuple(annotated.reference[k] for k in (win, lose)),
            preferences=((0, 1),),
        )
        for win, lose in annotated.preferences
    ]
    one, two = whole_batch("dpo", policy, [annotated]), whole_batch("dpo", policy, pairs)
    assert one[0] == pytest.approx(two[0], rel=1e-10)
    close(one[1], two[1])


def test_plackett_luce_of_two_is_dpo(models):
    policy, reference = models
    groups = ready("dpo", rows_for("dpo", 5), reference)
    one, two = whole_batch("dpo", policy, groups), whole_batch("plackett_luce", policy, groups)
    assert one[0] == pytest.approx(two[0], rel=1e-12)
    close(one[1], two[1])


@pytest.mark.parametrize("name", [n for n in NAMES if losses.info(n).reference])
def test_a_poisoned_reference_value_moves_the_loss(name, models):
    """The stored column is really read."""
    policy, reference = models
    groups = ready(name, rows_for(name, 4), reference)
    loss = whole_batch(name, policy, groups)[0]
    for k in range(len(groups[1].completions)):
        values = list(groups[1].reference)
        values[k] -= 50.0
        poisoned = [groups[0], replace(groups[1], reference=tuple(values)), *groups[2:]]
        assert abs(whole_batch(name, policy, poisoned)[0] - loss) > 1e-6, k


@pytest.mark.parametrize("name", [n for n in NAMES if losses.info(n).reference])
def test_without_reference_scores_it_says_what_to_do(name, models):
    with pytest.raises(ValueError, match="annotate"):
        whole_batch(name, models[0], rows_for(name, 2))


def test_unknown_losses_and_options_are_refused():
    with pytest.raises(ValueError, match="there is no loss"):
        objective("dpoo")
    with pytest.raises(ValueError, match="takes"):
        objective("dpo", gamma=1.0)
    with pytest.raises(ValueError):
        pairwise("ipo", tau=-1.0)
    assert [f().name for f in (pairwise, feedback, ranked, completion_nll)] == [
        "dpo", "kto", "plackett_luce", "completion_nll"]  # fmt: skip


# KTO


def test_ktos_reference_point_is_of_the_whole_step(models):
    """Not of a micro-batch: the loss by hand from z0 over all rows, under every cut."""
    policy, reference = models
    groups = ready("kto", rows_for("kto", 7, seed=3), reference)
    own = np.array([sum(truth(policy, g, 0)) - g.reference[0] for g in groups])
    other = np.array([sum(truth(policy, g, 1)) - g.reference[1] for g in groups])
    for shift in (0.0, 5.0):  # with and without the clamp at 0
        moved = [replace(g, reference=(g.reference[0], g.reference[1] - shift)) for g in groups]
        z0 = max(0.0, float((other + shift).mean()))
        sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
        gain = 0.1 * (own - z0)
        expected = np.mean([1 - sigmoid(v) if g.label else 1 - sigmoid(-v) for v, g in zip(gain, groups, strict=True)])
        for tokens in (1, 25, 10**6):
            got, _, metrics = whole_batch("kto", policy, moved, tokens)
            assert got == pytest.approx(expected, rel=1e-9)
            assert metrics["kl"] == pytest.approx(z0, abs=1e-9)


def test_no_gradient_enters_ktos_reference_point(models):
    """Its completions hold tokens that nothing else holds: no gradient reaches these embeddings."""
    policy, reference = models
    generator = np.random.default_rng(5)
    groups = [random_group(generator, 3, 4, 4, label=bool(i % 2), preferences=()) for i in range(3)]
    groups = [
        replace(
            g,
            prompt=g.prompt % 100 + 3,
            completions=(g.completions[0] % 100 + 3, g.completions[1] % 100 + 150),
        )
        for g in groups
    ]
    _, grads, _ = whole_batch("kto", policy, ready("kto", groups, reference))
    rows = grads["model.embed_tokens.weight"].abs().sum(1)
    assert rows[:110].sum() > 0
    assert rows[150:].sum() == 0


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_one_class_absent_is_finite(label, models):
    policy, reference = models
    groups = [replace(g, label=label) for g in ready("kto", rows_for("kto", 3), reference)]
    loss, grads, metrics = whole_batch("kto", policy, groups)
    assert np.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert np.isnan(metrics["rewards/rejected" if label else "rewards/chosen"])


def test_kto_called_alone_prepares_itself(models):
    policy, reference = models
    groups = ready("kto", rows_for("kto", 4), reference)
    batch, made = collate_feedback(groups), feedback("kto")
    alone = made(policy, batch)
    with_context = made(policy, batch, made.prepare(policy, [batch], Ranks.single()))
    assert float(alone.loss.total) == float(with_context.loss.total)


def test_the_mismatched_completion_is_the_next_rows_under_another_prompt():
    from palate.data.sources import read_feedback

    rows = [
        {"prompt": "p", "completion": "one", "label": True},
        {"prompt": "p", "completion": "two", "label": False},
        {"prompt": "q", "completion": "three", "label": True},
        {"prompt": "r", "completion": "four", "label": False},
        {"prompt": "q", "completion": "five", "label": False},
    ]
    records = read_feedback(rows)
    assert [r.mismatched for r in records] == ["three", "three", "four", "five", "one"]


# gradient support, on the way from rows to loss


def test_only_completion_tokens_carry_gradient(models):
    """SUP: of the loss with respect to the hidden states before the head."""
    policy, reference = models
    groups = ready("dpo", rows_for("dpo", 3), reference)
    batch, seen = collate_pairs(groups), {}

    def keep(module, arguments):
        arguments[0].retain_grad()
        seen["hidden"] = arguments[0]

    hook = policy.get_output_embeddings().register_forward_pre_hook(keep)
    policy.zero_grad()
    pairwise("dpo")(policy, batch).loss.total.backward()
    hook.remove()
    moved = torch.nonzero(seen["hidden"].grad[0].abs().sum(-1)).flatten().tolist()
    assert moved == sorted(set(batch.batch.predictors.tolist()))
    assert gradients(policy)
