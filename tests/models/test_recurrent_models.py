"""Models with recurrent or convolutional states: what cannot be taken back is refused, and padding changes nothing."""

import pytest
import torch

pytest.importorskip("transformers")

from recurrent_models import CONFIGS, STATEFUL, recurrent_model
from tiny import tiny_model

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM

PREFIX = torch.tensor([[7, 9, 11, 13], [7, 9, 11, 13], [7, 9, 11, 13], [7, 9, 11, 13]])
PREFIX_MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1]])
PADS = (0, 4, 2, 3)  # on the left of the text


def joined(family, as_base=False, **options):
    models = [recurrent_model(family), tiny_model("llama").double()]
    return AuxiliaryForCausalLM.from_base_and_aux(*models[:: 1 if as_base else -1], zero_init=False, **options).eval()


def conditioned(family):
    options = {"num_labels": 5, "label_dim": 4, "layers": [1], "mode": "fixed", "conditioning_init": "xavier"}
    return PlannerForCausalLM.from_lm(recurrent_model(family), **options).eval()


def repeating(seed=0):
    """A text in which prompt lookup finds candidates."""
    a, b, c = (torch.randint(3, 20, (1, n), generator=torch.Generator().manual_seed(seed)) for n in (4, 2, 1))
    return torch.cat([a, b, a, c, a], dim=1)


def generate(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, **options)


KINDS = {"base": lambda family: joined(family, as_base=True), "auxiliary": joined, "planner": conditioned}


@pytest.mark.parametrize("family", STATEFUL)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_refused_where_a_state_cannot_be_taken_back(family, kind):
    model = KINDS[kind](family)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, repeating(), prompt_lookup_num_tokens=3)
    assert generate(model, repeating()).equal(generate(model, repeating(), use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_drafts_of_convolutional_models_equal_greedy(kind, seed):
    model, tokens = KINDS[kind]("lfm2"), repeating(seed)
    assert generate(model, tokens, prompt_lookup_num_tokens=3).equal(generate(model, tokens))


def test_attention_alone_is_not_stateful():
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), tiny_model("gpt2"))
    assert not model._is_stateful and not AuxiliaryForCausalLM._is_stateful


@pytest.mark.parametrize("family", STATEFUL)
@pytest.mark.parametrize("as_base", [False, True])
def test_a_cache_with_a_recurrent_state_refuses_to_be_cropped(family, as_base):
    model = joined(family, as_base)
    cache = model(repeating(), use_cache=True).past_key_values
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="cannot take back the tokens it has read"):
        cache.crop(-2)


def padded_rows(length=6):
    tokens = torch.randint(3, 61, (4, length + max(PADS)))
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor(PADS)[:, None]).long()
    return tokens * mask, mask


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("trunk_layer", [None, 1])
def test_padding_around_prefix_and_text_equals_the_rows_alone(family, trunk_layer):
    model = joined(family, as_base=trunk_layer is not None, trunk_layer=trunk_layer)
    tokens, mask = padded_rows()
    mask[0, -2:] = 0  # padding on the right stays where it is
    prefix = {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}
    got = model(tokens, attention_mask=mask, labels=torch.where(mask.bool(), tokens, -100), **prefix)
    for row in range(4):
        is_token, is_prefix = mask[row].bool(), PREFIX_MASK[row].bool()
        want = model(tokens[row, is_token][None], aux_input_ids=PREFIX[row, is_prefix][None]).logits
        # these families scan in float32 whatever their dtype
        torch.testing.assert_close(got.logits[row, is_token][None], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_behind_padded_prefixes_equals_the_rows_alone(family):
    model, (tokens, mask) = joined(family), padded_rows()
    prefix = {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}
    got = generate(model, tokens, attention_mask=mask, **prefix)
    for row in range(4):
        alone = {"aux_input_ids": PREFIX[row, PREFIX_MASK[row].bool()][None]}
        want = generate(model, tokens[row, PADS[row] :][None], **alone)
        assert got[row, PADS[row] :][None].equal(want)


@pytest.mark.parametrize("family", ["bamba", "lfm2"])
def test_beams_behind_padded_prefixes_equal_the_rows_alone(family):
    model, (tokens, mask) = joined(family), padded_rows()
    prefix = {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK}
    got = generate(model, tokens, attention_mask=mask, num_beams=2, **prefix)
    for row in range(4):
        alone = {"aux_input_ids": PREFIX[row, PREFIX_MASK[row].bool()][None]}
        assert got[row, PADS[row] :][None].equal(generate(model, tokens[row, PADS[row] :][None], num_beams=2, **alone))


def test_left_padding_that_comes_after_the_prefix_was_read_is_refused():
    model, (tokens, mask) = joined("bamba"), padded_rows()
    with pytest.raises(ValueError, match="give the whole prompt at once"):
        generate(model, tokens, attention_mask=mask, aux_input_ids=PREFIX, prefill_chunk_size=2)
    want = generate(model, tokens[:1], aux_input_ids=PREFIX[:1])
    assert generate(model, tokens[:1], aux_input_ids=PREFIX[:1], prefill_chunk_size=2).equal(want)
