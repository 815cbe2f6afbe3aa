"""Whatever `generate` runs on its own account runs with the arguments of the call, or is refused."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import planner_models  # noqa: E402
from tiny import VOCAB_SIZE, tiny_model, tiny_pair  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM  # noqa: E402

NEW = 6
PREFIX = torch.tensor([[7, 9, 11], [0, 21, 23], [31, 33, 35]])
PREFIX_MASK = (PREFIX != 0).long()
OWN = {
    "scale": {"aux_scale": 0.3},
    "scales": {"aux_scale": torch.tensor([0.0, 0.5, 2.0])},
    "prefix": {"aux_input_ids": PREFIX, "aux_attention_mask": PREFIX_MASK},
}


def generate(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=VOCAB_SIZE + 1, **options)


def guided_loop(model, tokens, negative, guidance_scale, **kwargs):
    """Classifier-free guidance without a cache, every branch with the same arguments."""
    for _ in range(NEW):
        scores, unconditional = (
            model(ids, use_cache=False, **kwargs).logits[:, -1].log_softmax(-1) for ids in (tokens, negative)
        )
        best = (unconditional + guidance_scale * (scores - unconditional)).argmax(-1, keepdim=True)
        tokens, negative = torch.cat([tokens, best], dim=1), torch.cat([negative, best], dim=1)
    return tokens


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("negative", [None, 4])
@torch.no_grad()
def test_the_unconditional_branch_has_the_arguments_of_the_call(own, negative, tokens):
    model, kwargs = tiny_pair("llama", "llama"), OWN[own]
    unconditional = tokens[:, -1:] if negative is None else torch.randint(2, VOCAB_SIZE, (3, negative))
    given = {} if negative is None else {"negative_prompt_ids": unconditional}
    want = guided_loop(model, tokens, unconditional, 2.5, **kwargs)
    assert generate(model, tokens, guidance_scale=2.5, **given, **kwargs).equal(want)
    assert not generate(model, tokens, guidance_scale=2.5, **given).equal(want)


@torch.no_grad()
def test_columns_that_do_not_count_are_not_guided(tokens):
    models = tiny_model("llama", vocab_size=64, seed=1), tiny_model("gpt2", seed=2)
    model = AuxiliaryForCausalLM.from_base_and_aux(*models, zero_init=False, vocab_policy="pad")
    text, negative = tokens, tokens[:, -1:]
    for _ in range(NEW):
        scores, unconditional = (
            model(ids, use_cache=False).logits[:, -1, :VOCAB_SIZE].log_softmax(-1) for ids in (text, negative)
        )
        best = (unconditional + 2.5 * (scores - unconditional)).argmax(-1, keepdim=True)
        text, negative = torch.cat([text, best], dim=1), torch.cat([negative, best], dim=1)
    got = model.generate(tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=65, guidance_scale=2.5)
    assert got.equal(text)


@torch.no_grad()
def test_the_unconditional_branch_has_the_mode_of_the_call():
    model, tokens = planner_models.tiny_model("llama"), planner_models.tokens()
    want = guided_loop(model, tokens, tokens[:, -1:], 2.5, mode="fixed")
    assert generate(model, tokens, guidance_scale=2.5, mode="fixed").equal(want)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_guidance_with_beams_or_drafts_is_refused(options, tokens):
    for model, mode in ((tiny_pair(), {}), (planner_models.tiny_model(), {"mode": "fixed"})):
        with pytest.raises(ValueError, match="guidance_scale needs greedy search or sampling"):
            generate(model, tokens[:1], guidance_scale=1.5, **options, **mode)


def test_guidance_with_plans_is_refused():
    model, tokens = planner_models.tiny_model(), planner_models.tokens()
    plans = {"planner_fn": lambda ids, mask: planner_models.scores(2), "is_segment_end": {5}}
    with pytest.raises(ValueError, match="guidance_scale cannot be used with a planner_fn"):
        generate(model, tokens, guidance_scale=1.5, **plans)
    generate(model, tokens, guidance_scale=1.0, **plans)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("assistant", ["gpt2", "pair"])
def test_an_assistant_that_does_not_know_the_auxiliarys_arguments_drafts_without_them(own, assistant, tokens):
    model = tiny_pair("llama", "gpt2")
    kwargs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in OWN[own].items()}
    drafts = tiny_model("gpt2", seed=5) if assistant == "gpt2" else tiny_pair("gpt2", "llama")
    want = generate(model, tokens[:1], **kwargs)
    assert generate(model, tokens[:1], assistant_model=drafts, **kwargs).equal(want)
    assert generate(model, tokens[:1], assistant_model=model, **kwargs).equal(want)


def test_an_assistant_of_a_planner_drafts_without_its_mode():
    model, tokens = planner_models.tiny_model(fixed_label=2), planner_models.tokens(1)
    want = generate(model, tokens, mode="fixed")
    for assistant in (planner_models.tiny_lm("gpt2"), model):
        assert generate(model, tokens, mode="fixed", assistant_model=assistant).equal(want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"penalty_alpha": 0.5, "top_k": 4}, "only supports"),
        ({"dola_layers": "low"}, "only supports"),
        ({"token_healing": True}, "token_healing must be off"),
        ({"assistant_early_exit": 1}, "assistant_early_exit must not be set"),
        ({"cache_implementation": "paged"}, "cannot batch continuously"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["auxiliary", "planner"])
def test_ways_that_leave_the_arguments_out_are_refused(kind, options, message, tokens):
    model, own = (tiny_pair(), {}) if kind == "auxiliary" else (planner_models.tiny_model(), {"mode": "fixed"})
    with pytest.raises(ValueError, match=message):
        generate(model, tokens[:1], trust_remote_code=True, **options, **own)


def test_continuous_batching_is_refused(tokens):
    for model in (tiny_pair(), planner_models.tiny_model(mode="fixed")):
        with pytest.raises(ValueError, match="cannot batch continuously"):
            model.generate_batch(tokens.tolist(), max_new_tokens=2)
