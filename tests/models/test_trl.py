"""TRL's trainers train both composites as plain loops of PyTorch do."""

import copy
import re
import types
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("trl")

import trl
from tiny import VOCAB_SIZE, tiny_model
from trl.trainer.utils import add_fused_lm_head
from trl_training import MODELS, assert_trained_alike, auxiliary, log_probs, planner, replay, text, train, twice

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM
from auxkernels.models.modules import is_called_whole

TEXTS = {"text": [text(i, 5 + i % 3) for i in range(8)]}
COMPLETIONS = {"prompt": [text(i, 4) for i in range(8)], "completion": [" " + text(i + 9, 3) for i in range(8)]}


def assert_moved(model, before) -> None:
    """Something has been trained, and nothing of the frozen model."""
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    changed = [name for (name, one), other in pairs if not torch.equal(one, other)]
    assert changed and not any(name.startswith(("base.", "lm.")) for name in changed)


def sft_loss(model, inputs, num_items):
    inputs = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs} | {
        "input_ids": inputs["input_ids"],
        "labels": inputs["labels"],
    }
    return -log_probs(model, **inputs).sum() / num_items


def sft(model, data=TEXTS, **options):
    return train(trl.SFTTrainer, trl.SFTConfig, model, data, options={"max_length": 32, **options})


@pytest.mark.parametrize("kind", MODELS)
def test_supervised_training_is_that_of_a_plain_loop(kind):
    model, plain, before = twice(MODELS[kind])
    trainer, calls = sft(model, gradient_accumulation_steps=2)
    losses = replay(plain, calls, sft_loss, accumulated=2)
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-5)
    assert_trained_alike(model, plain, before)
    assert all("entropy" in row and "mean_token_accuracy" in row for row in trainer.state.log_history[:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"padding_free": True, "max_length": None}, {"packing": True}], ids=["free", "bfd"]
)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_several_texts_are_trained_as_the_texts_alone(kind, options):
    model, plain, before = twice(MODELS[kind])
    _, calls = sft(model, **options)

    def loss_alone(model, inputs, num_items):
        (starts,) = (inputs["position_ids"][0] == 0).nonzero(as_tuple=True)
        ends = [*starts.tolist()[1:], inputs["position_ids"].shape[1]]
        total = 0.0
        for start, end in zip(starts.tolist(), ends, strict=True):
            ids, labels = (inputs[name][:, start:end] for name in ("input_ids", "labels"))
            total = total - log_probs(model, ids, labels).sum()
        return total / num_items

    assert any((inputs["position_ids"] == 0).sum() > 1 for inputs, _, _ in calls)
    losses = replay(plain, calls, loss_alone)
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-5)
    assert_trained_alike(model, plain, before)


@pytest.mark.parametrize("kind", MODELS)
def test_completions_alone_are_counted(kind):
    model, plain, before = twice(MODELS[kind])
    _, calls = sft(model, COMPLETIONS)
    assert all((inputs["labels"][:, :4] == -100).all() for inputs, _, _ in calls)
    losses = replay(plain, calls, sft_loss)
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-5)
    assert_trained_alike(model, plain, before)


# -- the numbers of a token --------------------------------------------------------------------------------------------


def softcapped(**options):
    """With a base whose logits are bounded, and logits beyond the auxiliary's width."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_SIZE + 3,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=5.0,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    aux = tiny_model("llama", seed=2)
    return AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False, vocab_policy="pad", aux_scale=0.5)


def with_new_head(head: str, **options):
    model = AuxiliaryForCausalLM.from_base_and_aux(
        tiny_model("llama", seed=1, width=24), tiny_model("llama", seed=2), head=head, aux_scale=0.5, **options
    ).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.aux_head.parameters():
            weight.normal_()
    return model


def shared():
    return with_new_head("shared")


def low_rank():
    return with_new_head("low_rank", head_rank=3)


def called():
    """With heads whose logits hooks change."""
    model = auxiliary()
    model.aux.lm_head.register_forward_hook(lambda layer, args, logits: torch.tanh(logits))
    model.base.lm_head.register_forward_hook(lambda layer, args, logits: 2 * logits)
    return model


def called_planner():
    model = planner()
    model.lm.lm_head.register_forward_hook(lambda layer, args, logits: 2 * logits)
    return model


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("make", [auxiliary, planner, softcapped, shared, low_rank, called, called_planner])
def test_the_numbers_of_each_token_are_those_of_the_summed_logits(make, is_shifted):
    model, plain, _ = twice(make)
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, temperature=0.7, outputs=names)
    ids = torch.randint(2, VOCAB_SIZE, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=5) if is_shifted else labels[:, 1:]
    got = model(input_ids=ids, **{"shift_labels" if is_shifted else "labels": shifted if is_shifted else labels},
                fused_lm_head=True)  # fmt: skip

    logits = plain(input_ids=ids).logits[:, : shifted.shape[1]].float() / 0.7
    finite = logits[..., :VOCAB_SIZE]
    log_p, mask = finite.log_softmax(-1), shifted != -100
    want = {
        "log_probs": log_p.gather(-1, shifted.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": finite.mean(-1),
        "is_top1": finite.argmax(-1) == shifted,
    }
    want = {name: value.masked_fill(~mask, 0) for name, value in want.items()}
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(got.label_mask, mask)

    (got.log_probs.sum() + 0.3 * got.entropy.sum()).backward()
    (want["log_probs"].sum() + 0.3 * want["entropy"].sum()).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            size = other.grad.abs().max().item()
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * size + 1e-6, msg=name)
    assert not any(
        weight.grad is not None for name, weight in model.named_parameters() if name.startswith(("base.", "lm."))
    )


def test_other_replacements_of_forward_are_left_alone():
    model = auxiliary()
    plain, calls = model.forward, []

    def forward(self, *args, **kwargs):
        calls.append(kwargs)
        return plain(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    ids = torch.randint(2, VOCAB_SIZE, (2, 5))
    assert model(input_ids=ids, labels=ids).loss.isfinite() and len(calls) == 1
    add_fused_lm_head(model)
    assert model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.shape == (2, 4) and len(calls) == 2


@pytest.mark.slow
def test_losses_that_a_trainer_would_leave_out_are_refused():
    model = auxiliary()
    model.config.label_smoothing = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 here.*label_smoothing_factor"):
        sft(model)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama", seed=1), config)
    with pytest.raises(ValueError, match="output_router_logits must be False here"):
        sft(model)
    model.aux.config.output_router_logits = False
    sft(model)


@pytest.mark.parametrize("freeze_lm", [True, False])
def test_experts_of_a_planners_language_model_are_balanced_where_they_are_trained(freeze_lm):
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=0.5,
    )  # fmt: skip
    lm = transformers.AutoModelForCausalLM.from_config(config)
    model = PlannerForCausalLM.from_lm(lm, num_labels=2, label_dim=2, mode="fixed", freeze_lm=freeze_lm)
    plain = copy.deepcopy(model).train()
    _, calls = sft(model)
    inputs, num_items, loss = calls[0]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    want = plain(**inputs, num_items_in_batch=num_items, output_router_logits=True)
    assert (want.router_loss is None) == freeze_lm
    assert loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


# -- preferences -------------------------------------------------------------------------------------------------------

PREFERENCES = {
    **COMPLETIONS,
    "chosen": COMPLETIONS["completion"],
    "rejected": [" " + text(i + 30, 3) for i in range(8)],
}
del PREFERENCES["completion"]


def completion_log_probs(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return log_probs(model, inputs["input_ids"], labels, attention_mask=inputs["attention_mask"]).sum(-1)


def dpo_loss(reference):
    def loss(model, inputs, num_items):
        with torch.no_grad():
            of_reference = completion_log_probs(reference, inputs)
        gains = completion_log_probs(model, inputs) - of_reference
        chosen, rejected = gains.chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reference", ["given", "precomputed"])
def test_preferences_are_trained_as_by_a_plain_loop(kind, reference):
    model, plain, before = twice(MODELS[kind])
    given = {"ref_model": copy.deepcopy(before)} if reference == "given" else {}
    options = {} if reference == "given" else {"precompute_ref_log_probs": True}
    _, calls = train(trl.DPOTrainer, trl.DPOConfig, model, PREFERENCES, options=options, **given)
    losses = replay(plain, calls, dpo_loss(copy.deepcopy(before).eval()))
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4)
    assert_trained_alike(model, plain, before)


def test_the_base_is_the_reference_of_an_untrained_auxiliary():
    model, plain, before = twice(lambda: auxiliary(zero_init=True))
    base = copy.deepcopy(model.base)
    _, calls = train(trl.DPOTrainer, trl.DPOConfig, model, PREFERENCES, ref_model=model.base)
    assert not is_called_whole(model.base)  # TRL has replaced its forward, which does no more by that
    losses = replay(plain, calls, dpo_loss(base))
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4)
    assert losses[0] == pytest.approx(0.6931472, rel=1e-5)
    assert_trained_alike(model, plain, before)


def test_weighted_preferences_and_mean_logits_are_those_of_the_sum():
    model, before, _ = twice(auxiliary)
    options = {"use_weighting": True}
    reference = copy.deepcopy(before)
    trainer, calls = train(trl.DPOTrainer, trl.DPOConfig, model, PREFERENCES, options=options, ref_model=reference)
    inputs, _, loss = calls[0]
    mask = inputs["completion_mask"][:, 1:].bool()
    logits = before(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    mean = logits.mean(-1)[: len(mask) // 2][mask[: len(mask) // 2]].mean()
    assert trainer.state.log_history[0]["logits/chosen"] == pytest.approx(mean.item(), rel=1e-4)
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    of_text = ((chosen - (2 * log_p).logsumexp(-1)) * mask).sum(-1) / mask.sum(-1)
    weight = of_text.view(2, -1).sum(0).exp().clamp(max=1.0)
    assert loss.item() == pytest.approx((weight * 0.6931472).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_binary_feedback_is_trained(kind):
    model, _, before = twice(MODELS[kind])
    data = {**COMPLETIONS, "label": [i % 2 == 0 for i in range(8)]}
    _, calls = train(trl.KTOTrainer, trl.KTOConfig, model, data, ref_model=copy.deepcopy(before))
    assert all(loss.isfinite() for _, _, loss in calls)
    assert_moved(model, before)


# -- reinforcement -----------------------------------------------------------------------------------------------------


def reward(completions, **kwargs):
    """Differs within every group, whatever is sampled."""
    return [float(i % 3) + 0.1 * len(set(one.split())) for i, one in enumerate(completions)]


ONLINE = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5, "temperature": 0.7}
PROMPTS = {"prompt": [text(i, 2 + i % 4) for i in range(8)]}


def grpo_loss(model, inputs, num_items):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 0.7
    target = labels[:, 1:]
    of_token = logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(of_token - of_token.detach())
    terms = -(ratio * inputs["advantages"].view(-1, 1)).masked_fill(target == -100, 0.0)
    return (terms.sum(-1) / (target != -100).sum(-1).clamp(min=1)).mean()


@pytest.mark.parametrize("kind", MODELS)
def test_groups_are_trained_as_by_a_plain_loop(kind):
    model, plain, before = twice(MODELS[kind])
    options = {**ONLINE, "loss_type": "grpo"}
    _, calls = train(trl.GRPOTrainer, trl.GRPOConfig, model, PROMPTS, options=options, reward_funcs=reward)
    assert any((inputs["prompt_mask"] == 0).any() for inputs, _, _ in calls)
    losses = replay(plain, calls, grpo_loss)
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert_trained_alike(model, plain, before)


@pytest.mark.parametrize("kind", MODELS)
def test_leave_one_out_is_trained(kind):
    model, _, before = twice(MODELS[kind])
    options = {**ONLINE, "beta": 0.0}
    train(trl.RLOOTrainer, trl.RLOOConfig, model, PROMPTS, options=options, reward_funcs=reward)
    assert_moved(model, before)


# -- references, adapters, plans ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_reference_is_loaded_from_the_folder_that_the_model_came_from(kind, tmp_path):
    tiny_model("llama", seed=1, width=24).save_pretrained(tmp_path / "base")
    if kind == "auxiliary":
        aux = tiny_model("llama", seed=2)
        model = AuxiliaryForCausalLM.from_base_and_aux(str(tmp_path / "base"), aux, zero_init=False)
    else:
        model = planner()
    model.save_pretrained(tmp_path / "saved")
    model, plain, before = twice(lambda: type(model).from_pretrained(tmp_path / "saved").train())
    _, calls = train(trl.DPOTrainer, trl.DPOConfig, model, PREFERENCES)
    losses = replay(plain, calls, dpo_loss(copy.deepcopy(before).eval()))
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4)
    options = {**ONLINE, "beta": 0.1}
    trainer, _ = train(trl.GRPOTrainer, trl.GRPOConfig, model, PROMPTS, options=options, reward_funcs=reward)
    assert type(trainer.ref_model) is type(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind, names", [("auxiliary", r"aux\..*q_proj"), ("planner", r"lm\..*q_proj")])
def test_adapters_of_a_trainer_are_trained(kind, names):
    config = pytest.importorskip("peft").LoraConfig(r=2, target_modules=names)
    model = auxiliary if kind == "auxiliary" else lambda: planner(freeze_lm=False)
    for trainer_class, config_class, data, options in (
        (trl.SFTTrainer, trl.SFTConfig, TEXTS, {}),
        (trl.DPOTrainer, trl.DPOConfig, PREFERENCES, {}),
        (trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, {**ONLINE, "beta": 0.1}),
    ):
        rewards = {"reward_funcs": reward} if data is PROMPTS else {}
        trainer, _ = train(trainer_class, config_class, model(), data, options=options, peft_config=config, **rewards)
        weights = dict(trainer.model.named_parameters())
        moved = {name for name, weight in weights.items() if "lora_B" in name and weight.any()}
        assert moved and all(f".{names[:2]}" in name for name in moved)


def test_a_planner_attached_to_the_model_plans_in_training_as_in_generation():
    """The class of docs/models.md."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class SelfPlanned" in block)
    names = {"torch": torch, "PlannerForCausalLM": PlannerForCausalLM}
    exec(block.partition("planner = SelfPlanned")[0], names)
    model = names["SelfPlanned"].from_lm(tiny_model("llama", layers=3), names["Planner"](), num_labels=4, label_dim=3)
    with torch.no_grad():
        for weight in (*model.conditioning.parameters(), *model.planner.parameters()):
            weight.normal_()
    ids = torch.randint(8, VOCAB_SIZE, (3, 6))
    ids[:, 3] = names["END"]
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    generated = model.eval().generate(ids, attention_mask=mask, **options)
    mask = torch.nn.functional.pad(mask, (0, 5), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(generated.sequences, attention_mask=mask, position_ids=positions).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), logits, rtol=1e-3, atol=1e-3)
    changed = model(generated.sequences.index_fill(1, torch.tensor([3]), 9), attention_mask=mask).logits[:, -1]
    assert not torch.allclose(changed, logits[:, -1], atol=0.1)
