"""Training `AuxiliaryForCausalLM`: the frozen base, Trainer, PEFT, checkpointing, compilation."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from network import assert_same_in_16_bits, assert_same_network  # noqa: E402
from tiny import PAIRS, VOCAB_SIZE, tiny_config, tiny_model, tiny_pair  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM  # noqa: E402

PREFIX = torch.tensor([[7, 9, 11, 13]]).expand(3, 4)


@pytest.fixture
def base_folder(tmp_path):
    folder = str(tmp_path / "the-base")
    tiny_model("gpt2", seed=1, width=24).save_pretrained(folder)
    return folder


def new_pair(base_folder, **options):
    """A pair that can be saved, without dropout in the auxiliary."""
    torch.manual_seed(4)
    return AuxiliaryForCausalLM.from_base_and_aux(base_folder, tiny_config("llama"), **options)


def dataset(rows=16, width=10):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCAB_SIZE, (rows, width), generator=generator)
    labels = tokens.clone()
    labels[torch.arange(width) > torch.randint(3, width, (rows, 1), generator=generator)] = -100
    return [{"input_ids": t, "labels": y, "aux_input_ids": t[:3]} for t, y in zip(tokens, labels, strict=True)]


def trainer(model, folder, *, batch=4, accumulation=1, steps=4, data=None, **options):
    options = {
        "max_steps": steps,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "seed": 11,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    data = dataset() if data is None else data
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


# -- the base is frozen ------------------------------------------------------------------------------------------------


def assert_frozen(model):
    base = model.base
    assert not base.training and not any(module.training for module in base.modules())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    tokens = torch.randint(2, VOCAB_SIZE, (2, 6))
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert any(parameter.grad is not None for parameter in model.aux.parameters())


def test_base_stays_frozen_whatever_is_called(base_folder, tmp_path):
    model = new_pair(base_folder)
    assert_frozen(model)
    assert model.train() is model and model.training and model.aux.training
    assert_frozen(model)
    assert model.requires_grad_(True) is model
    assert_frozen(model)
    assert_frozen(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "saved")
    assert_frozen(AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved").train())


def test_base_gets_no_gradient_even_if_it_is_unfrozen_by_hand(tokens):
    model = tiny_pair().train()
    model.base.requires_grad_(True)
    output = model(tokens, labels=tokens, skip_logits=False)
    (output.loss + output.logits.square().mean()).backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_base_has_no_dropout_in_training_mode(tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("gpt2"), tiny_config("llama")).train()
    assert torch.equal(model(tokens).logits, model.base.eval()(tokens).logits)


def test_trainers_optimizer_holds_the_auxiliary_alone(base_folder, tmp_path):
    new_pair(base_folder, trunk_layer=1).save_pretrained(tmp_path / "saved")
    model = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    base = copy.deepcopy(model.base.state_dict())
    run = trainer(model, tmp_path)
    run.train()
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert not held & {id(p) for p in model.base.parameters()}
    assert all(torch.equal(base[key], value) for key, value in model.base.state_dict().items())


# -- Trainer -----------------------------------------------------------------------------------------------------------


def test_trainer_counts_shifted_labels(base_folder, tmp_path):
    model = new_pair(base_folder)
    assert model.loss_type == "ForCausalLM"
    run, data = trainer(model, tmp_path), dataset()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    count = run._get_num_items_in_batch([batch], torch.device("cpu"))
    assert count == (batch["labels"][:, 1:] != -100).sum() != (batch["labels"] != -100).sum()


@pytest.mark.parametrize("options", [{}, {"trunk_layer": 1}], ids=["tokens", "trunk"])
def test_accumulation_over_four_is_the_same_training(base_folder, tmp_path, options):
    states, losses = [], []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = new_pair(base_folder, **options)
        run = trainer(model, tmp_path, batch=batch, accumulation=accumulation)
        run.train()
        states.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][1]
    assert_same_network(*map(torch.tensor, losses))
    assert_same_network(states[0], states[1])


def test_evaluation_gathers_logits_and_nothing_else(base_folder, tmp_path):
    model, data = new_pair(base_folder), dataset()
    run = trainer(model, tmp_path, per_device_eval_batch_size=16)
    result = run.predict(data)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    want = model.eval()(**batch)
    metrics = [run.evaluate()["eval_loss"], result.metrics["test_loss"]]
    assert_same_network(torch.from_numpy(result.predictions), want.logits)
    assert_same_network(torch.tensor(metrics), want.loss.detach().expand(2))


def test_checkpoint_holds_the_auxiliary_and_resumes_to_the_same_weights(base_folder, tmp_path):
    from safetensors.torch import load_file

    whole, half, resumed = (new_pair(base_folder) for _ in range(3))
    options = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    trainer(whole, tmp_path / "whole", **options).train()
    trainer(half, tmp_path / "half", steps=2, **options).train()
    checkpoint = tmp_path / "half" / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    assert all(key.startswith("aux.") for key in weights)
    missing = copy.deepcopy(half).load_state_dict(weights, strict=False).missing_keys
    assert set(missing) == set(half._keys_to_ignore_on_save)  # what Trainer then does not warn of
    trainer(resumed, tmp_path / "half", **options).train(resume_from_checkpoint=str(checkpoint))
    assert_same_network(resumed.state_dict(), whole.state_dict())
    loaded = AuxiliaryForCausalLM.from_pretrained(checkpoint)
    assert_same_network(loaded.state_dict(), half.state_dict())


@pytest.mark.parametrize("head", ["shared", "own"])
def test_weights_that_nothing_reads_are_not_missed(base_folder, tmp_path, head):
    from safetensors.torch import load_file

    model = new_pair(base_folder, head=head, trunk_layer=1)
    model.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(weight.numel() for weight in weights.values())
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) == set(model._keys_to_ignore_on_save)  # else Trainer warns when it resumes


def test_label_smoothing_of_trainer_is_an_error_that_names_the_models_own(base_folder, tmp_path):
    run = trainer(new_pair(base_folder), tmp_path, label_smoothing_factor=0.1)
    for call in (run.train, run.evaluate):
        with pytest.raises(ValueError, match=r"label_smoothing_factor .* set model\.config\.label_smoothing instead"):
            call()


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, aux", PAIRS)
def test_adapters_on_the_auxiliary_train_save_and_load(base, aux, tmp_path, tokens):
    peft = pytest.importorskip("peft")
    model = tiny_pair(base, aux, zero_init=True)
    frozen = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=r"aux\..*(c_attn|q_proj|v_proj)", modules_to_save=["aux.lm_head"])
    wrapped = peft.get_peft_model(model, config).train()
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(".aux." in name for name in trained)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=tokens, labels=tokens, aux_input_ids=PREFIX).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    wrapped.eval()
    got = wrapped.generate(input_ids=tokens, aux_input_ids=PREFIX, max_new_tokens=4, do_sample=False)
    wrapped.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(frozen, tmp_path).eval()
    assert torch.equal(again(input_ids=tokens).logits, wrapped(input_ids=tokens).logits)
    assert torch.equal(again.generate(input_ids=tokens, aux_input_ids=PREFIX, max_new_tokens=4, do_sample=False), got)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(input_ids=tokens).logits, model.base(tokens).logits)


def test_adapter_on_the_auxiliarys_head_is_in_loss_and_logits(tokens):
    peft = pytest.importorskip("peft")
    model = tiny_pair("llama", "llama", zero_init=True)
    config = peft.LoraConfig(r=2, target_modules=r"aux\.lm_head", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    want = model.base(tokens).logits + model.aux(tokens).logits
    assert not torch.allclose(want, model.base(tokens).logits, atol=1e-3)
    output = wrapped(input_ids=tokens, labels=tokens)
    assert_same_network(output.logits, want)
    reference = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_same_network(output.loss, reference)
    reference.backward()
    wanted = [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]
    wrapped.zero_grad()
    output = wrapped(input_ids=tokens, labels=tokens)
    output.loss.backward()
    assert_same_network([p.grad for p in wrapped.parameters() if p.requires_grad], wanted)


# -- checkpointing, compilation, autocast ------------------------------------------------------------------------------


def gradients(model, tokens, **kwargs):
    model.zero_grad()
    model(tokens, labels=tokens, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("base, aux", PAIRS)
@pytest.mark.parametrize("options", [{}, {"trunk_layer": 1}], ids=["tokens", "trunk"])
def test_gradient_checkpointing_gives_the_same_gradients(base, aux, options, tokens):
    model = without_dropout(tiny_pair(base, aux, **options)).train()
    want = gradients(model, tokens, aux_input_ids=PREFIX)
    model.gradient_checkpointing_enable()
    flags = {
        name: m.gradient_checkpointing for name, m in model.named_modules() if hasattr(m, "gradient_checkpointing")
    }
    assert any(flags[name] for name in flags if name.startswith("aux."))
    assert not any(flags[name] for name in flags if name.startswith("base."))
    calls = []
    layers = [m for name, m in model.aux.named_modules() if name.endswith((".h.0", ".layers.0"))]
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(model, tokens, aux_input_ids=PREFIX)
    assert len(calls) == 2  # once more in backward
    assert_same_network(got, want)
    model.gradient_checkpointing_disable()
    assert not any(m.gradient_checkpointing for m in model.aux.modules() if hasattr(m, "gradient_checkpointing"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trunk_layer": 1}], ids=["tokens", "trunk"])
def test_compiled_forward_is_the_same(options, tokens):
    torch.compiler.reset()
    model = without_dropout(tiny_pair("llama", "gpt2", aux_options={"layers": 1}, **options)).train()
    compiled = torch.compile(model, backend="eager" if options else "aot_eager", fullgraph=True)
    want = gradients(model, tokens, aux_input_ids=PREFIX)
    model.zero_grad()
    loss = compiled(tokens, labels=tokens, aux_input_ids=PREFIX).loss
    loss.backward()
    assert_same_network(loss, model(tokens, labels=tokens, aux_input_ids=PREFIX).loss)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_network(got, want)
    model.eval()
    with torch.no_grad():
        logits = compiled(tokens, use_cache=False).logits
        assert_same_network(logits, model(tokens, use_cache=False).logits)


def test_autocast_trains_float32_weights(tokens):
    model = without_dropout(tiny_pair()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert_same_in_16_bits(loss, lambda m: m(tokens, labels=tokens).loss, model)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
