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
