"""A cache goes in under both names that transformers has had for it, and comes out under the release's own."""

import pytest
import torch

pytest.importorskip("transformers")

import planner_models
from ensembles import tiny_base, tiny_ensemble, tiny_member
from tiny import tiny_pair
from transformers import AutoModelForCausalLM, DynamicCache

from auxkernels.models import AuxiliaryGroupForCausalLM
from auxkernels.models.cache_argument import CACHE, CACHE_NAMES

KINDS = {"auxiliary": tiny_pair, "ensemble": tiny_ensemble, "planner": planner_models.tiny_model}
TEXT = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def call_of(kind: str) -> dict:
    return {"mode": "fixed"} if kind == "planner" else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_reads_on_from_a_cache_under_either_name(kind, name):
    model = KINDS[kind]()
    with torch.no_grad():
        want = model(TEXT, **call_of(kind)).logits[:, 5:]
        first = model(TEXT[:, :5], use_cache=True, **call_of(kind))
        second = model(TEXT[:, 5:], **{name: first[CACHE]}, **call_of(kind))
    torch.testing.assert_close(second.logits, want)
    assert second[CACHE] is first[CACHE] and second[CACHE].get_seq_length() == 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generation_reads_on_from_a_cache_under_either_name(kind, name, recwarn):
    model = KINDS[kind]()
    options = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True, **call_of(kind)}
    want = model.generate(TEXT, max_new_tokens=8, **options).sequences
    first = model.generate(TEXT, max_new_tokens=4, **options)
    second = model.generate(first.sequences, max_new_tokens=4, **{name: first[CACHE]}, **options)
    assert second.sequences.equal(want)
    assert second[CACHE] is first[CACHE] and second[CACHE].get_seq_length() == 9 + 8 - 1
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_under_both_names_is_refused(kind):
    model = KINDS[kind]()
    caches = {name: DynamicCache() for name in CACHE_NAMES}
    for call in (model, model.generate):
        with pytest.raises(TypeError, match="cache and past_key_values are one argument"):
            call(TEXT, **caches, **call_of(kind))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_group_has_no_cache_under_either_name(name):
    group = AuxiliaryGroupForCausalLM.from_members({"a": tiny_member(tiny_base())})
    with pytest.raises(ValueError, match=f"{name} must not be given"):
        group(TEXT, labels=TEXT, **{name: DynamicCache()})


def test_trainers_drop_the_output_under_either_name():
    for make in KINDS.values():
        assert set(CACHE_NAMES) <= set(make().config.keys_to_ignore_at_inference)


def test_the_name_is_that_of_the_models():
    model = AutoModelForCausalLM.from_config(tiny_pair().base.config)
    assert CACHE in list(model(TEXT, use_cache=True))  # not by `in`, which knows old names too
