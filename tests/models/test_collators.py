"""Data collators: what a batch says is what each example says, under a Trainer too; evaluation without logits."""

import pickle

import pytest
import torch

pytest.importorskip("transformers")

import planner_models
from planner_models import FEATURES
from tiny import PAIRS, VOCAB_SIZE, tiny_pair
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from auxkernels.models import DataCollatorForPrefixes, DataCollatorForSegments
from auxkernels.models.labels import collate_segments


def segmented(count=4, **kinds):
    """Examples of unequal lengths and numbers of segments; 0: each has `planner_inputs`."""
    examples = []
    for i in range(count):
        ids = torch.randint(3, planner_models.VOCAB, (5 + i,))
        segments = torch.arange(5 + i) // (2 + i % 2)
        rows = int(segments.max()) + 1
        examples.append({"input_ids": ids.tolist(), "segment_ids": segments.tolist()})
        examples[-1]["planner_inputs"] = {"features": torch.randn(rows, FEATURES).tolist()}
    return examples


def sum_and_count(model, batch):
    """Summed nats and counted tokens."""
    count = int((batch["labels"][:, 1:] != -100).sum())
    return model(**batch).loss.item() * count, count


@pytest.mark.parametrize("architecture", planner_models.ARCHITECTURES)
@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorForSegments(),
        DataCollatorForSegments(padding_side="left"),
        DataCollatorForSegments(is_packed=True),
    ],
    ids=["right", "left", "packed"],
)
def test_a_batch_of_segments_has_the_loss_of_its_examples(architecture, collator):
    model, examples = planner_models.tiny_model(architecture), segmented()
    want = [sum_and_count(model, collate_segments([example], 0)) for example in examples]
    batch = pickle.loads(pickle.dumps(collator))(examples)
    assert batch["segment_ids"].max() + 1 == len(batch["planner_inputs"]["features"])
    nats, count = sum_and_count(model, batch)
    assert count == sum(n for _, n in want)
    assert nats == pytest.approx(sum(n for n, _ in want), rel=1e-5)
    if collator.is_packed:
        assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch


def test_segments_need_rows_for_each():
    examples = segmented(2)
    del examples[1]["planner_inputs"]
    with pytest.raises(ValueError, match="features must be given for every example or for none"):
        DataCollatorForSegments()(examples)
    examples = segmented(2)
    examples[1]["planner_inputs"]["features"] = [[0.0] * FEATURES]
    with pytest.raises(ValueError, match=r"examples\[1\] has 2 segments, but 1 features"):
        DataCollatorForSegments()(examples)


def prefixed(lengths=(3, 0, 5, 1)):
    return [
        {
            "input_ids": torch.randint(2, VOCAB_SIZE, (6 + i,)).tolist(),
            "aux_input_ids": torch.randint(2, VOCAB_SIZE, (n,)).tolist(),
        }
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(("padding_side", "aux_padding_side"), [("right", "left"), ("left", "right")])
@pytest.mark.parametrize(("base", "aux"), PAIRS)
def test_a_batch_of_prefixes_has_the_loss_of_its_examples(padding_side, aux_padding_side, base, aux):
    model, examples = tiny_pair(base, aux), prefixed()
    nats = 0.0
    for example in examples:
        prefix = {"aux_input_ids": torch.tensor([example["aux_input_ids"]])} if example["aux_input_ids"] else {}
        ids = torch.tensor([example["input_ids"]])
        nats += model(ids, labels=ids, **prefix).loss.item() * (ids.shape[1] - 1)
    collator = DataCollatorForPrefixes(0, padding_side=padding_side, aux_padding_side=aux_padding_side)
    out = model(**pickle.loads(pickle.dumps(collator))(examples))
    assert out.loss.item() * out.num_valid_tokens.item() == pytest.approx(nats, rel=1e-5)
    assert out.num_valid_tokens == sum(len(example["input_ids"]) - 1 for example in examples)


def test_prefixes_may_be_missing_and_labels_are_kept():
    batch = DataCollatorForPrefixes(0, aux_pad_token_id=9)(
        [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7]}]
    )
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    batch = DataCollatorForPrefixes(0, aux_pad_token_id=9)(prefixed((1, 2)))
    assert batch["aux_input_ids"][0, 0] == 9 and batch["aux_attention_mask"].tolist() == [[0, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"examples\[0\] must have a label for each of 2 tokens, got 1"):
        DataCollatorForPrefixes()([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="aux_padding_side must be 'right' or 'left'"):
        DataCollatorForPrefixes(aux_padding_side="both")


class LogitsMade(TorchDispatchMode):
    """Whether any tensor of [at least so many tokens, vocabulary] was made."""

    def __init__(self, tokens, width):
        super().__init__()
        self.tokens, self.width, self.found = tokens, width, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            is_wide = isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.width
            self.found |= is_wide and tensor.numel() // self.width >= self.tokens
        return out


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )


@pytest.mark.parametrize("kind", ["planner", "auxiliary"])
def test_a_trainer_trains_and_evaluates_without_logits(kind, tmp_path):
    if kind == "planner":
        model, data, collator = planner_models.tiny_model(), segmented(8), DataCollatorForSegments()
    else:
        model, data, collator = tiny_pair(), prefixed((3, 0, 5, 1, 2, 2, 4, 0)), DataCollatorForPrefixes(0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=data, eval_dataset=data, data_collator=collator
    )
    trainer.train()
    moved = {name.split(".")[0] for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == ({"conditioning", "planner"} if kind == "planner" else {"aux"})
    batch = collator(data[:4])
    want = trainer.evaluate()["eval_loss"]
    assert model.eval()(**batch).logits is not None
    model.config.skip_logits_in_evaluation = True
    assert trainer.evaluate()["eval_loss"] == want
    assert model.eval()(**batch).logits is None and model(**batch, skip_logits=False).logits is not None
    without = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**without).logits is not None
    wide = int(batch["attention_mask"].numel())
    with torch.no_grad():
        for skips in (True, False):
            model.config.skip_logits_in_evaluation = skips
            with LogitsMade(wide, planner_models.VOCAB) as made:
                model(**batch)
            assert made.found or skips
    assert type(model.config).from_dict(model.config.to_dict()).skip_logits_in_evaluation is False


def test_the_option_is_a_bool():
    with pytest.raises(TypeError, match="skip_logits_in_evaluation must be a bool"):
        type(tiny_pair().config)(skip_logits_in_evaluation="yes")
