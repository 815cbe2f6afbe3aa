"""The balancing loss of a mixture of experts: added where its routers are trained, as its own model adds it."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from experts import MASK, experts, skip_unless_balanced  # noqa: E402
from tiny import tiny_model  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM  # noqa: E402


def router_part(model, **inputs):
    """What the balancing loss adds to the model's own loss."""
    return model(**inputs).loss - model(**inputs, output_router_logits=False).loss.detach()


def balancing_loss(model, **inputs):
    """Of the model alone, before it is weighted; skips where this transformers has none for the family."""
    try:
        loss = model(**inputs).aux_loss
    except AttributeError:
        loss = None
    if loss is None:
        pytest.skip(f"transformers {transformers.__version__} does not balance {type(model).__name__} alone")
    return loss


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jetmoe", "dbrx"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_auxiliary_adds_what_the_model_alone_adds(family, mask, tokens):
    skip_unless_balanced(family)
    labels = tokens if mask is None else torch.where(mask.bool(), tokens, -100)
    inputs = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    want = 10.0 * balancing_loss(alone := experts(family), **inputs)
    assert want > 1.0
    want.backward()
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), experts(family), zero_init=False)
    got = model(**inputs)
    torch.testing.assert_close(
        (got.router_loss, got.loss - model(**inputs, output_router_logits=False).loss), (want, want)
    )
    got.router_loss.backward()
    for weight, other in zip(alone.parameters(), model.aux.parameters(), strict=True):
        if weight.grad is not None and weight.grad.any():
            torch.testing.assert_close(other.grad, weight.grad, rtol=1e-3, atol=1e-4 * weight.grad.abs().max().item())


def test_the_prefix_is_balanced_with_the_text(tokens):
    prefix = torch.tensor([[7, 9, 11]]).expand(3, 3)
    want = router_part(experts(), input_ids=torch.cat([prefix, tokens], 1), labels=torch.cat([prefix, tokens], 1))
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), experts(), zero_init=False)
    torch.testing.assert_close(model(tokens, labels=tokens, aux_input_ids=prefix).router_loss, want)


def test_a_planner_that_trains_its_language_model_adds_it_and_a_frozen_one_does_not(tokens):
    want = router_part(experts(), input_ids=tokens, labels=tokens)
    losses = {}
    for frozen in (False, True):
        options = {"num_labels": 4, "label_dim": 4, "layers": [1], "mode": "fixed", "freeze_lm": frozen}
        output = PlannerForCausalLM.from_lm(experts(), **options)(tokens, labels=tokens)
        losses[frozen] = output.loss
        assert (output.router_loss is None) == frozen
    torch.testing.assert_close(losses[False] - losses[True], want)


def test_a_frozen_base_adds_nothing_and_is_not_asked(tokens):
    models = [AuxiliaryForCausalLM.from_base_and_aux(experts(balanced=b), tiny_model("gpt2")) for b in (True, False)]
    got, want = (model(tokens, labels=tokens) for model in models)
    assert torch.equal(got.loss, want.loss) and got.router_loss is None
    assert torch.equal(models[0](tokens, labels=tokens, output_router_logits=True).loss, want.loss)


def test_a_call_may_ask_for_it_and_calls_without_labels_have_none(tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), experts(balanced=False), zero_init=False)
    assert model(tokens, labels=tokens).router_loss is None
    assert model(tokens, labels=tokens, output_router_logits=True).router_loss > 1.0
    assert model(tokens, output_router_logits=True).router_loss is None


def test_checkpointed_training_has_the_same_loss_and_gradients(tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), experts(), zero_init=False).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.aux.parameters() if weight.grad is not None])
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(*gradients)
