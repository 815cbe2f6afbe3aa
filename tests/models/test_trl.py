"""TRL's trainers train both composites as plain loops of PyTorch do."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl")

from tiny import VOCAB_SIZE
from trl_training import MODELS, assert_trained_alike, auxiliary, log_probs, planner, replay, text, train, twice

TEXTS = {"text": [text(i, 5 + i % 3) for i in range(8)]}
COMPLETIONS = {"prompt": [text(i, 4) for i in range(8)], "completion": [" " + text(i + 9, 3) for i in range(8)]}


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


@pytest.mark.parametrize(
    "options", [{"padding_free": True, "max_length": None}, {"packing": True}], ids=["free", "bfd"]
)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_several_texts_are_trained_as_the_texts_alone(kind, options):
    model, plain, before = twice(MODELS[kind])
    trainer, calls = sft(model, **options)

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
    trainer, calls = sft(model, COMPLETIONS)
    assert all((inputs["labels"][:, :4] == -100).all() for inputs, _, _ in calls)
    losses = replay(plain, calls, sft_loss)
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-5)
    assert_trained_alike(model, plain, before)


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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reference", ["given", "precomputed"])
def test_preferences_are_trained_as_by_a_plain_loop(kind, reference):
    model, plain, before = twice(MODELS[kind])
    given = {"ref_model": copy.deepcopy(before)} if reference == "given" else {}
    options = {} if reference == "given" else {"precompute_ref_log_probs": True}
    trainer, calls = train(trl.DPOTrainer, trl.DPOConfig, model, PREFERENCES, options=options, **given)
    losses = replay(plain, calls, dpo_loss(copy.deepcopy(before).eval()))
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4)
    assert_trained_alike(model, plain, before)


def test_the_base_is_the_reference_of_an_untrained_auxiliary():
    model, plain, before = twice(lambda: auxiliary(zero_init=True))
    base = copy.deepcopy(model.base)
    trainer, calls = train(trl.DPOTrainer, trl.DPOConfig, model, PREFERENCES, ref_model=model.base)
    losses = replay(plain, calls, dpo_loss(base))
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4)
    assert losses[0] == pytest.approx(0.6931472, rel=1e-5)
    assert_trained_alike(model, plain, before)


def test_statistics_of_logits_are_those_of_the_sum():
    """Mean logits and the weights of WPO, which DPO asks for."""
    model, before, _ = twice(auxiliary)
    trainer, calls = train(
        trl.DPOTrainer,
        trl.DPOConfig,
        model,
        PREFERENCES,
        options={"use_weighting": True},
        ref_model=copy.deepcopy(before),
    )
    inputs, _, _ = calls[0]
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    got = before.eval() and fused(before, inputs, labels)
    logits = before(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].double()
    mask = labels[:, 1:] != -100
    log_p = logits.log_softmax(-1)
    want = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "is_top1": logits.argmax(-1) == labels[:, 1:],
    }
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value.double() * mask, rtol=1e-4, atol=1e-5)
    chosen = mask[: len(mask) // 2]
    mean = (want["mean_logits"] * mask)[: len(mask) // 2].sum() / chosen.sum()
    assert trainer.state.log_history[0]["logits/chosen"] == pytest.approx(mean.item(), rel=1e-3)


def fused(model, inputs, labels):
    from trl.trainer.utils import add_fused_lm_head

    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=names)
    return model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
    )


@pytest.mark.parametrize("kind", MODELS)
def test_binary_feedback_is_trained(kind):
    model, plain, before = twice(MODELS[kind])
    data = {**COMPLETIONS, "label": [i % 2 == 0 for i in range(8)]}
    trainer, calls = train(trl.KTOTrainer, trl.KTOConfig, model, data, ref_model=copy.deepcopy(before))
    assert all(loss.isfinite() for _, _, loss in calls)
    changed = [
        name for (name, one), two in zip(model.named_parameters(), before.parameters()) if not torch.equal(one, two)
    ]
    assert changed and not any(name.startswith(("base.", "lm.")) for name in changed)


# -- reinforcement -----------------------------------------------------------------------------------------------------


def reward(completions, **kwargs):
    """Differs within every group, whatever is sampled."""
    return [float(i % 3) + 0.1 * len(set(one.split())) for i, one in enumerate(completions)]


ONLINE = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5, "temperature": 0.7}
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
    trainer, calls = train(trl.GRPOTrainer, trl.GRPOConfig, model, PROMPTS, options=options, reward_funcs=reward)
    assert any((inputs["prompt_mask"] == 0).any() for inputs, _, _ in calls) or len(calls) == 2
    losses = replay(plain, calls, grpo_loss)
    assert [loss.item() for _, _, loss in calls] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert_trained_alike(model, plain, before)


@pytest.mark.parametrize("kind", MODELS)
def test_leave_one_out_is_trained(kind):
    model, plain, before = twice(MODELS[kind])
    options = {**ONLINE, "beta": 0.0}
    trainer, calls = train(trl.RLOOTrainer, trl.RLOOConfig, model, PROMPTS, options=options, reward_funcs=reward)
    changed = [
        name for (name, one), two in zip(model.named_parameters(), before.parameters()) if not torch.equal(one, two)
    ]
    assert changed and not any(name.startswith(("base.", "lm.")) for name in changed)
