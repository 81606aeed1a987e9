"""Losses that other projects publish with their tests, `loss_vectors.json` of the shared test data."""

import json
import os
from pathlib import Path

import pytest
import torch

from palate.losses import LOSSES, DemonstrationLogps, PairLogps, completion_nll

NAMES = {"sigmoid": "dpo", "hinge": "hinge"}


@pytest.fixture(scope="module")
def cases() -> dict:
    if "PALATE_TEST_DATA" not in os.environ:
        pytest.skip("PALATE_TEST_DATA is not set: the published loss vectors are NOT checked")
    read = json.loads((Path(os.environ["PALATE_TEST_DATA"]) / "loss_vectors.json").read_text())["cases"]
    assert len(read) == 3
    return {case["name"]: case for case in read}


@pytest.mark.parametrize("name", ["sigmoid_beta0.1", "hinge_gamma0.1"])
def test_published_losses(cases, name):
    case = cases[name]
    columns = ["policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    logps = PairLogps(*(torch.tensor(case[column], dtype=torch.float64) for column in columns))
    losses = LOSSES[NAMES[case["loss"]]](logps, beta=case["beta"])
    torch.testing.assert_close(losses, torch.tensor(case["expected_losses"]).double(), atol=case["atol"], rtol=0)
    if "scaled_logits" in case:
        scaled = torch.tensor(case["scaled_logits"], dtype=torch.float64)
        torch.testing.assert_close(case["beta"] * logps.log_ratio, scaled, atol=1e-9, rtol=0)


def test_published_uniform_logits(cases):
    case = cases["uniform_logits_no_margin"]
    logits = torch.zeros(1, case["sequence_length"], case["vocab_size"], dtype=torch.float64)
    mask = torch.tensor([case["token_mask"]], dtype=torch.float64)
    total = (logits.log_softmax(-1)[..., 0] * mask).sum(1)
    logps = PairLogps(total, total, torch.zeros(1).double(), torch.zeros(1).double())
    preference = LOSSES["dpo"](logps).item()
    nll = completion_nll(DemonstrationLogps(total, mask.sum(1))).item()
    assert preference == pytest.approx(case["expected_preference_loss"], rel=1e-12)
    assert nll == pytest.approx(case["expected_sft_loss_summed_over_the_2_reply_tokens"], rel=1e-12)
    assert preference + nll / 2 == pytest.approx(case["expected_preference_plus_half_sft"], rel=1e-12)
