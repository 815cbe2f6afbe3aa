"""Pretraining of the planner, the freezing schedule, and the Trainer of transformers."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from network import assert_same_in_16_bits, assert_same_network
from planner_models import FEATURES, NUM_LABELS, TinyPlanner, tiny_lm, tiny_model, tokens
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers_adapters import add_adapter

from auxkernels.models.labels import collate_segments
from auxkernels.models.planner_training import UnfreezePlanner


def test_planner_loss_is_the_cross_entropy_of_its_scores():
    model, features, labels = tiny_model(), torch.randn(9, FEATURES), torch.randint(0, NUM_LABELS, (9,))
    labels[4] = -100
    want = cross_entropy(model.planner(features), labels)
    assert_same_network(model.planner_loss(labels, planner_inputs={"features": features}), want)
    got = model.planner_loss(labels, label_scores=model.planner(features), num_items_in_batch=16)
    assert_same_network(got, want * 8 / 16)
    with pytest.raises(ValueError, match="exactly one of planner_inputs and label_scores"):
        model.planner_loss(labels)


def test_pretraining_on_oracle_labels_teaches_the_planner_alone():
    model, features = tiny_model().train(), torch.randn(64, FEATURES)
    labels = (features @ torch.randn(FEATURES, NUM_LABELS)).argmax(-1)
    before = copy.deepcopy(model.conditioning.state_dict())
    optimizer = torch.optim.Adam(model.planner.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model.planner_loss(labels, planner_inputs={"features": features}).backward()
        optimizer.step()
    assert (model.planner(features).argmax(-1) == labels).float().mean() > 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.conditioning.state_dict().items())


# -- Trainer -----------------------------------------------------------------------------------------------------------


def examples(count=16):
    """Texts of unequal lengths with 1 to 3 segments, and the planner's features of each."""
    result = []
    for i in range(count):
        ids, segments = tokens(1, 6 + i % 5)[0], 1 + i % 3
        segment_ids = torch.arange(len(ids)) * segments // len(ids)
        result.append({"input_ids": ids, "segment_ids": segment_ids, "features": torch.randn(segments, FEATURES)})
    return result


def collate(batch):
    features = torch.cat([example["features"] for example in batch])
    return collate_segments(batch, pad_token_id=0) | {"planner_inputs": {"features": features}}


def train(model, data, path, batch_size=4, accumulation=1, callbacks=(), **options):
    torch.manual_seed(0)
    settings = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.0} | options
    arguments = TrainingArguments(
        str(path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_accumulation_of_four_trains_as_one_batch(tmp_path):
    data, start = examples(), tiny_model("gpt2", lm=tiny_lm("gpt2"))
    models = copy.deepcopy(start), copy.deepcopy(start)
    whole = train(models[0], data, tmp_path, batch_size=8, optim="sgd")
    parts = train(models[1], data, tmp_path, batch_size=2, accumulation=4, optim="sgd")
    assert_same_network(models[0].state_dict(), models[1].state_dict())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, parts)]
    assert_same_network(*(torch.tensor(logged) for logged in losses))
    assert not torch.equal(models[0].planner.head.weight, start.planner.head.weight)
    assert torch.equal(models[0].lm.lm_head.weight, start.lm.lm_head.weight)


def test_the_optimizer_holds_no_weight_of_the_frozen_language_model(tmp_path):
    model = tiny_model()
    trainer = train(model, examples(4), tmp_path, max_steps=1)
    held = sum(weight.numel() for group in trainer.optimizer.param_groups for weight in group["params"])
    parts = (model.planner, model.conditioning)
    assert held == sum(weight.numel() for part in parts for weight in part.parameters())


def test_evaluation_gives_loss_and_logits(tmp_path):
    model, data = tiny_model(), examples(8)
    trainer = train(model, data, tmp_path, max_steps=1)
    for example in data:  # one length, so that logits of all batches fit together
        example["input_ids"], example["segment_ids"] = example["input_ids"][:6], example["segment_ids"][:6]
    output = trainer.predict(data)
    assert output.predictions.shape == (8, 6, 61) and output.metrics["test_loss"] > 0


def test_label_smoothing_of_the_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        train(tiny_model(), examples(4), tmp_path, label_smoothing_factor=0.1)


class Record(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.planner.head.weight.detach().clone())


@pytest.mark.parametrize("schedule", [{"at_step": 2}, {"at_fraction": 0.5}])
def test_planner_is_trained_from_the_chosen_step_on(tmp_path, schedule):
    model, record = tiny_model(), Record()
    start = model.planner.head.weight.detach().clone()
    train(model, examples(), tmp_path, callbacks=[UnfreezePlanner(**schedule), record])
    changed = [not torch.equal(weight, start) for weight in record.weights]
    assert changed == [False, False, True, True]


def test_a_planner_frozen_before_the_optimizer_was_made_is_an_error(tmp_path):
    model = tiny_model(planner=TinyPlanner())
    model.freeze_planner()
    with pytest.raises(ValueError, match="optimizer does not hold the planner's weights"):
        train(model, examples(4), tmp_path, callbacks=[UnfreezePlanner(at_step=1)])


@pytest.mark.parametrize("options", [{}, {"at_step": 1, "at_fraction": 0.5}, {"at_step": -1}, {"at_fraction": 1.5}])
def test_a_schedule_without_one_point_is_an_error(options):
    with pytest.raises(ValueError, match="at_"):
        UnfreezePlanner(**options)


# -- other tools -------------------------------------------------------------------------------------------------------


def call(model, data):
    return model(**{**collate(data), "labels": collate(data)["input_ids"]}).loss


def test_adapters_of_the_language_model_train_beside_the_planner():
    peft = pytest.importorskip("peft")
    lm, data = tiny_lm("llama"), examples(4)
    want = call(tiny_model(lm=copy.deepcopy(lm), planner=(planner := TinyPlanner())), data)
    add_adapter(lm, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True))
    model = tiny_model(lm=lm, planner=planner, freeze_lm=False)
    adapters = {name: weight for name, weight in lm.named_parameters() if weight.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    assert all(weight.abs().max() == 0 for name, weight in adapters.items() if "lora_B" in name)  # not drawn anew
    loss = call(model, data)
    assert loss.isfinite() and want.isfinite()
    loss.backward()
    assert all(weight.grad is not None for weight in adapters.values())
    assert planner.head.weight.grad.abs().max() > 0


def test_a_peft_model_around_it_trains_adapters_conditioning_and_planner():
    peft = pytest.importorskip("peft")
    options = {"target_modules": r"lm\..*q_proj", "modules_to_save": ["planner", "conditioning"]}
    model = peft.get_peft_model(tiny_model(freeze_lm=False), peft.LoraConfig(r=2, **options)).train()
    call(model, examples(4)).backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(any(part in name for name in trained) for part in ("lora_B", "planner.", "codebooks", "conditioning"))
    assert not any("base_layer" in name or "original" in name for name in trained)


def test_autocast_trains_with_finite_gradients():
    model, data = tiny_model("gpt2").train(), examples(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(model, data)
    loss.backward()
    exact = [example | {"features": example["features"].double()} for example in data]
    assert_same_in_16_bits(loss, lambda m: call(m, exact), model)
    assert all(weight.grad.isfinite().all() for weight in model.conditioning.parameters())
