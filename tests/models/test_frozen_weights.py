"""Adapters where they cannot be meant: in a frozen model, or behind a head that passes no gradient."""

import copy
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import planner_models  # noqa: E402
from tiny import tiny_pair  # noqa: E402

SHORT = {
    "short names": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "a head by its short name": {"target_modules": r"aux\..*q_proj", "modules_to_save": ["lm_head"]},
}


def wrapped(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).train()


@pytest.mark.parametrize("options", SHORT.values(), ids=SHORT)
def test_adapters_in_the_frozen_base_are_refused_when_training_begins(options, tokens):
    model = wrapped(tiny_pair("llama", "llama"), **options)
    with pytest.raises(ValueError, match=r"frozen base must have no trainable weights, got base\.(.*)exclude_modules"):
        model(input_ids=tokens, labels=tokens)
    model.eval()
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
def test_the_exclusion_that_is_named_keeps_peft_out_of_the_base(targets, tokens):
    options = {"exclude_modules": r"base\..*", "modules_to_save": ["aux.lm_head"]}
    model = wrapped(tiny_pair("llama", "llama", zero_init=True), target_modules=targets, **options)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all(".aux." in name for name in trained)
    losses = []
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["head"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_adapters_in_a_frozen_language_model_of_a_planner_are_refused(options):
    tokens, inputs = planner_models.tokens(), {"mode": "fixed"}
    model = wrapped(planner_models.tiny_model(), **options)
    with pytest.raises(ValueError, match=r"frozen lm must have no trainable weights, got lm\.(.*)freeze_lm=False"):
        model(input_ids=tokens, labels=tokens, **inputs)
    if options["target_modules"] == ["q_proj"]:
        open_model = wrapped(planner_models.tiny_model(freeze_lm=False), **options)
        open_model(input_ids=tokens, labels=tokens, **inputs).loss.backward()
        assert any(weight.grad is not None for name, weight in open_model.named_parameters() if "lora_B" in name)


def messages(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "output head is zero and frozen" in str(one.message)]


@pytest.mark.parametrize("aux", ["gpt2", "llama"])
def test_adapters_behind_a_zero_head_that_is_frozen_are_warned_of_once(aux, tokens):
    model = wrapped(tiny_pair("llama", aux, zero_init=True), target_modules=r"aux\..*(q_proj|c_attn)")
    assert len(messages(lambda: [model(input_ids=tokens, labels=tokens) for _ in range(3)])) == 1
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["aux.lm_head"]},
        {"target_modules": r"aux\..*(q_proj|lm_head)"},
        None,
    ],
    ids=["head trained", "adapter on the head", "no adapters"],
)
def test_heads_that_pass_a_gradient_are_not_warned_of(options, tokens):
    model = tiny_pair("llama", "llama", zero_init=True).train()
    if options is not None:
        model = wrapped(model, **{"target_modules": r"aux\..*q_proj", **options})
    assert messages(lambda: model(input_ids=tokens, labels=tokens)) == []
    frozen = tiny_pair("llama", "llama", zero_init=False).train()
    frozen.aux.lm_head.requires_grad_(False)
    assert messages(lambda: frozen(tokens, labels=tokens)) == []


def test_a_head_frozen_later_and_an_auxiliary_that_is_not_trained(tokens):
    model = tiny_pair("llama", "llama", zero_init=True).train()
    assert messages(lambda: model(tokens, labels=tokens)) == []
    model.aux.lm_head.requires_grad_(False)
    assert len(messages(lambda: model(tokens, labels=tokens))) == 1
    idle = copy.deepcopy(tiny_pair("llama", "llama", zero_init=True)).requires_grad_(False).train()
    assert messages(lambda: idle(tokens, labels=tokens)) == []
