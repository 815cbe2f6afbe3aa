"""TRL's trainers on tiny models, and the plain loops of PyTorch that they must agree with."""

import copy
import tempfile

import pytest
import torch

pytest.importorskip("trl")

import datasets
from tiny import VOCAB_SIZE, tiny_model, tiny_pair
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from auxkernels.models import PlannerForCausalLM

RATE = 0.1
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def auxiliary(**options):
    return tiny_pair("llama", "llama", **options).train()


def planner(**options):
    """With conditioning that is not zero, as in the middle of training."""
    options = {"num_labels": 4, "label_dim": 3, "mode": "fixed", **options}
    model = PlannerForCausalLM.from_lm(tiny_model("llama", layers=3), **options).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.conditioning.parameters():
            weight.normal_()
    return model


MODELS = {"auxiliary": auxiliary, "planner": planner}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w1")


def text(seed: int, length: int) -> str:
    return " ".join(f"w{(7 * seed + 3 * i) % (VOCAB_SIZE - 3) + 3}" for i in range(length))


def train(trainer_class, config_class, model, data: dict, *, options=None, **arguments):
    """(trainer, its calls of compute_loss as (inputs, number of items, loss)) after two steps."""
    calls = []

    class Recording(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not return_outputs:
                calls.append((kept, num_items_in_batch, loss.detach()))
            return loss

    trainer = Recording(
        model=model,
        args=config_class(output_dir=tempfile.mkdtemp(), **{**COMMON, **(options or {})}),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer(),
        **arguments,
    )
    trainer.train()
    return trainer, calls


def replay(model, calls, loss_of, *, accumulated: int = 1) -> list[float]:
    """Plain SGD over the recorded batches; returns the losses, and leaves the model trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=RATE), []
    for i, (inputs, num_items, _) in enumerate(calls, start=1):
        loss = loss_of(model, inputs, num_items)
        loss.backward()
        losses.append(loss.item())
        if i % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def log_probs(model, input_ids, labels, **inputs):
    """[batch, new - 1] from the model's logits, 0 where a label is -100."""
    logits = model(input_ids=input_ids, **inputs).logits[:, :-1].float()
    labels = labels[:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(labels == -100, 0.0)


def assert_trained_alike(got, want, before) -> None:
    """Equal but for float32's rounding; the trained weights have moved, all others have not at all."""
    starts, moved = dict(before.named_parameters()), 0
    for (name, one), (_, other) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        if not other.requires_grad:
            assert torch.equal(one, starts[name]), name
            continue
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        moved += not torch.equal(one, starts[name])
    assert moved


def twice(make):
    model = make()
    return model, copy.deepcopy(model), copy.deepcopy(model)
