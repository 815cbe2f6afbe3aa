"""The tolerance of the models' tests, by what roundings at every layer do to the networks that they build."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from network import OF_A_NETWORK, assert_same_network, drawn_error
from planner_models import tiny_lm, tokens
from tiny import ARCHITECTURES, tiny_model
from tolerance import unit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("make", ["sharp", "planned"])
@pytest.mark.parametrize("results", ["logits", "gradient"])
def test_roundings_are_within_the_tolerance_and_defects_are_not(architecture, make, results):
    """Two paths' worth of roundings; half a percent of one weight is far outside."""
    model = tiny_model(architecture, seed=3, width=24) if make == "sharp" else tiny_lm(architecture)
    ids = tokens(3, 13)

    def results_of(model):
        logits = model(ids).logits
        if results == "logits":
            return logits.detach()
        return torch.autograd.grad(logits.square().mean(), model.get_input_embeddings().weight)[0]

    allowed = 2 * OF_A_NETWORK * unit(torch.float32)
    assert max(2 * drawn_error(model, results_of, seed) for seed in range(8)) < allowed < 1e-4
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.005)
    with pytest.raises(AssertionError):
        assert_same_network(results_of(other), results_of(model))
