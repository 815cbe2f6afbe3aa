"""Padded rows behind prefixes and packed texts, called as a Trainer does: equal to each text alone."""

import pytest
import torch

pytest.importorskip("transformers")

import planner_models
from tiny import tiny_pair

PREFIX = torch.tensor([[7, 9, 11]])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])  # positions of two texts in one row


def padded_left(text, pads):
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), text], dim=1)
    mask = (torch.arange(ids.shape[1]) >= pads).long()[None]
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, pads] = -100  # alone, the first token is not predicted either
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("aux", ["gpt2", "llama"])
@pytest.mark.parametrize("pads", [1, 4, 16])
@pytest.mark.parametrize("prefix_mask", [[1, 1, 1], [0, 1, 1], [1, 1, 0]], ids=str)
def test_left_padded_text_behind_a_prefix_has_the_loss_of_the_row_alone(aux, pads, prefix_mask, tokens):
    model, mask = tiny_pair("llama", aux), torch.tensor([prefix_mask])
    want = model(tokens[:1], labels=tokens[:1], aux_input_ids=PREFIX[mask.bool()][None])
    got = model(**padded_left(tokens[:1], pads), aux_input_ids=PREFIX, aux_attention_mask=mask)
    torch.testing.assert_close((got.loss, got.base_loss), (want.loss, want.base_loss), rtol=1e-4, atol=1e-4)


def test_left_padded_text_is_read_in_parts_as_at_once(tokens):
    model, inputs = tiny_pair("llama", "llama"), padded_left(tokens[:1], 3)
    ids, mask, prefix = inputs["input_ids"], inputs["attention_mask"], {"aux_input_ids": PREFIX}
    want = model(ids, attention_mask=mask, **prefix).logits
    first = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True, **prefix)
    cache = first.past_key_values
    second = model(ids[:, 5:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1)[:, 3:], want[:, 3:])


def packed_loss(loss_of, tokens):
    """The mean loss of two texts, each in a row of its own, over all their predicted tokens."""
    return sum(loss_of(tokens[:, part]) * (part.stop - part.start - 1) for part in (slice(0, 4), slice(4, 9))) / 7


@pytest.mark.parametrize("training", [False, True])
def test_packed_texts_of_the_auxiliary_model_have_the_loss_of_each_alone(training, tokens):
    model = tiny_pair("llama", "llama").train(training)
    labels = tokens[:1].clone()
    labels[:, 4] = -100
    got = model(tokens[:1], position_ids=PACKED, labels=labels).loss
    torch.testing.assert_close(got, packed_loss(lambda ids: model(ids, labels=ids).loss, tokens[:1]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_packed_texts_of_the_planner_have_the_loss_of_each_alone(training, frozen, tokens):
    model = planner_models.tiny_model("llama", mode="fixed", freeze_lm=frozen).train(training)
    labels = tokens[:1].clone()
    labels[:, 4] = -100
    got = model(tokens[:1], position_ids=PACKED, labels=labels).loss
    torch.testing.assert_close(got, packed_loss(lambda ids: model(ids, labels=ids).loss, tokens[:1]))


@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
def test_logits_of_packed_texts_are_those_of_each_alone(kind, tokens):
    model = tiny_pair("llama", "llama") if kind == "auxiliary" else planner_models.tiny_model(mode="fixed")
    got = model(tokens[:1], position_ids=PACKED)
    torch.testing.assert_close(got.logits[:, 4:], model(tokens[:1, 4:]).logits, rtol=1e-4, atol=1e-4)
    assert got.past_key_values is None


@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
def test_a_cache_is_made_where_it_is_asked_for(kind, tokens):
    model = tiny_pair() if kind == "auxiliary" else planner_models.tiny_model(mode="fixed")
    assert model(tokens, labels=tokens).past_key_values is None
    assert model(tokens, labels=tokens, use_cache=True).past_key_values.get_seq_length() == 9
    assert model(tokens).past_key_values.get_seq_length() == 9  # as the configuration says
