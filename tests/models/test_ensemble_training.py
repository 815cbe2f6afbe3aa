"""Training `AuxiliaryEnsembleForCausalLM`: who is trained, gradients, Trainer, adapters."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ensembles import PREFIX, eager_sum, tiny_base, tiny_ensemble, tiny_member  # noqa: E402
from network import assert_same_network  # noqa: E402
from tiny import VOCAB_SIZE, tiny_config, tiny_model  # noqa: E402

from auxkernels import aux_cross_entropy  # noqa: E402
from auxkernels.models import AuxiliaryEnsembleForCausalLM, AuxiliaryForCausalLM  # noqa: E402


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- who is trained ----------------------------------------------------------------------------------------------------


def assert_frozen(part):
    assert not any(module.training for module in part.modules())
    assert not any(parameter.requires_grad for parameter in part.parameters())


def test_base_and_frozen_members_stay_so_whatever_is_called(tokens):
    model = tiny_ensemble(("own", "trunk", "shared"), frozen=["b"])
    for change in (lambda: model.train(), lambda: model.requires_grad_(True), lambda: model.train(False).train()):
        change()
        assert model.members["a"].aux.training == model.training
        assert_frozen(model.base)
        model(tokens, labels=tokens).loss.backward()
        assert all(parameter.grad is None for parameter in model.base.parameters())
    model = copy.deepcopy(tiny_ensemble(("own", "trunk"), frozen=["b"])).train()
    assert all(one.base is model.base for one in model.members.values())
    assert_frozen(model.members["b"])
    assert model.members["a"].aux.training


def test_a_member_frozen_later_is_in_eval_mode_and_run_without_gradients(tokens):
    model, seen = tiny_ensemble(("own", "own")).train(), []
    model.members["b"].requires_grad_(False)
    for one in model.members.values():
        one.aux.transformer.register_forward_hook(
            lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
        )
    model.enable_input_require_grads()  # what a trainer asks for with adapters: hooks on all embeddings
    got = gradients(model, model(tokens, labels=tokens).loss)
    assert seen == [(True, True), (False, False)]
    assert got and all(name.startswith("members.a.aux.") for name in got)


@pytest.mark.parametrize(
    "kinds", [("own", "trunk"), ("shared", "low_rank", "factored"), ("own", "own", "shared")], ids="-".join
)
@pytest.mark.parametrize("frozen", [[], ["a"]], ids=["all", "some"])
@pytest.mark.parametrize("base_scale", [1.0, 1.7])
def test_gradients_are_those_of_the_eager_sum(kinds, frozen, base_scale, tokens):
    model = without_dropout(tiny_ensemble(kinds, frozen=frozen, base_scale=base_scale)).train()
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels)
    got = gradients(model, output.loss)
    total = eager_sum(model, tokens, list(model.config.aux_scales.values()), base_scale)
    want = torch.nn.functional.cross_entropy(total[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_same_network(output.loss, want)
    wanted = gradients(model, want)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert got.keys() == wanted.keys() == trained and all(name.split(".")[1] not in frozen for name in got)
    assert_same_network(got, wanted)
    assert output.logits is None


def test_scales_have_gradients(tokens):
    model = tiny_ensemble(("own", "shared"))
    scales = torch.tensor([0.5, -0.3], requires_grad=True)
    base_scale = torch.tensor(1.2, requires_grad=True)
    model(tokens, labels=tokens, aux_scale=scales, base_scale=base_scale).loss.backward()
    got = scales.grad.clone(), base_scale.grad.clone()
    scales.grad = base_scale.grad = None
    total = eager_sum(model, tokens, scales.unbind(), base_scale)
    torch.nn.functional.cross_entropy(total[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert_same_network(got, (scales.grad, base_scale.grad))


def test_label_smoothing_is_the_ensembles(tokens):
    model = tiny_ensemble().train()
    without_dropout(model).config.label_smoothing = 0.2
    model.members["a"].config.label_smoothing = 0.9
    total = eager_sum(model, tokens, (1.0, -0.5))
    want = aux_cross_entropy(total[:, :-1], None, tokens[:, 1:], label_smoothing=0.2)
    assert_same_network(model(tokens, labels=tokens).loss, want)


def test_a_head_of_zeros_that_is_frozen_is_warned_of(tokens):
    base = tiny_base()
    member = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model("gpt2", seed=2))
    member.aux.get_output_embeddings().requires_grad_(False)
    model = AuxiliaryEnsembleForCausalLM.from_members(base, {"a": member, "b": tiny_member(base)}).train()
    with pytest.warns(UserWarning, match="output head is zero and frozen"):
        model(tokens, labels=tokens)


@pytest.mark.parametrize("kinds", [("own", "trunk"), ("shared", "own")], ids="-".join)
def test_gradient_checkpointing_reaches_trained_members(kinds, tokens):
    model = without_dropout(tiny_ensemble((*kinds, "own"), frozen=["c"])).train()
    kwargs = {"labels": tokens, "aux_input_ids": {"a": PREFIX + 1}}
    want = gradients(model, model(tokens, **kwargs).loss)
    model.gradient_checkpointing_enable()
    flags = {
        name: m.gradient_checkpointing for name, m in model.named_modules() if hasattr(m, "gradient_checkpointing")
    }
    assert {name.split(".")[1] for name, is_on in flags.items() if is_on} == {"a", "b"}
    assert_same_network(gradients(model, model(tokens, **kwargs).loss), want)


def test_experts_balance_their_routers(tokens):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0,
    )  # fmt: skip
    members = {name: transformers.MixtralForCausalLM(config).eval() for name in "ab"}
    model = AuxiliaryEnsembleForCausalLM.from_members(tiny_base(), members)
    got = model(tokens, labels=tokens)
    alone = [one(tokens, labels=tokens).router_loss for one in model.members.values()]
    torch.testing.assert_close(got.router_loss, sum(alone))
    torch.testing.assert_close(got.loss - model(tokens, labels=tokens, output_router_logits=False).loss, sum(alone))


# -- Trainer -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base_folder(tmp_path):
    folder = str(tmp_path / "the-base")
    tiny_base().save_pretrained(folder)
    return folder


def new_ensemble(base_folder, **options):
    """One that can be saved, without dropout: two new members and a frozen language model."""
    torch.manual_seed(4)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    members = {
        "first": AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("llama")),
        "second": AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("llama"), head="shared"),
        "frozen": tiny_model("gpt2", seed=9),
    }
    options = {"aux_scales": {"frozen": -0.25}, "frozen": ["frozen"], **options}
    return AuxiliaryEnsembleForCausalLM.from_members(base, members, **options).train()


def dataset(rows=16, width=10):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCAB_SIZE, (rows, width), generator=generator)
    labels = tokens.clone()
    labels[torch.arange(width) > torch.randint(3, width, (rows, 1), generator=generator)] = -100
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def trainer(model, folder, *, batch=4, accumulation=1, steps=4, **options):
    options = {
        "max_steps": steps,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant",
        "seed": 11,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=dataset(), eval_dataset=dataset())


def test_training_changes_trained_members_alone(base_folder, tmp_path):
    model = new_ensemble(base_folder)
    before = copy.deepcopy(model.state_dict())
    run = trainer(model, tmp_path, steps=6)
    run.train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert {key.split(".")[1] for key in changed} == {"first", "second"}
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_accumulation_is_the_same_training(base_folder, tmp_path):
    states = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = new_ensemble(base_folder)
        trainer(model, tmp_path, batch=batch, accumulation=accumulation, optim="sgd", max_grad_norm=0.0).train()
        states.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert_same_network(*states)


def test_checkpoints_resume_to_the_same_weights(base_folder, tmp_path, caplog):
    from safetensors.torch import load_file

    whole, half, resumed = (new_ensemble(base_folder) for _ in range(3))
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(whole, tmp_path / "whole", **options).train()
    trainer(half, tmp_path / "half", steps=2, **options).train()
    checkpoint = tmp_path / "half" / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    assert {key.split(".")[1] for key in weights} == {"first", "second"}
    missing = copy.deepcopy(half).load_state_dict(weights, strict=False).missing_keys
    assert set(missing) == set(half._keys_to_ignore_on_save)  # what Trainer then does not warn of
    trainer(resumed, tmp_path / "half", **options).train(resume_from_checkpoint=str(checkpoint))
    assert_same_network(resumed.state_dict(), whole.state_dict())
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(checkpoint)
    assert_same_network(loaded.state_dict(), half.state_dict())
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in half.named_parameters() if p.requires_grad
    ]


def test_evaluation_gathers_logits_and_nothing_else(base_folder, tmp_path):
    model, data = new_ensemble(base_folder), dataset()
    result = trainer(model, tmp_path, per_device_eval_batch_size=16).predict(data)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    want = model.eval()(**batch)
    assert_same_network(torch.from_numpy(result.predictions), want.logits)
    assert_same_network(torch.tensor(result.metrics["test_loss"]), want.loss.detach())


def test_a_base_without_a_name_is_warned_of_at_the_first_step(tokens):
    model = tiny_ensemble().train()
    with pytest.warns(UserWarning, match="base has no name to be found by"):
        model(tokens, labels=tokens)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_on_a_member_train_save_and_load(base_folder, tmp_path, tokens):
    peft = pytest.importorskip("peft")
    model = new_ensemble(base_folder)
    member = model.members["frozen"]
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    member.aux = peft.get_peft_model(member.aux, config)
    model.members["first"].requires_grad_(False)
    got = gradients(model, model(tokens, labels=tokens).loss)
    assert any("frozen" in name and "lora" in name for name in got)
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert loaded.config.frozen_members == ["first"]
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_adapters_in_the_base_are_refused_in_training(tokens):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        tiny_ensemble(("trunk", "own")), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).train()
    with pytest.raises(ValueError, match=r"the frozen base must have no trainable weights, got base\."):
        wrapped(input_ids=tokens, labels=tokens)
    options = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"base\..*"}
    wrapped = peft.get_peft_model(tiny_ensemble(("trunk", "own")), peft.LoraConfig(r=2, **options)).train()
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert trained and all(".members.a.aux." in name for name in trained)
