"""Images beside the tokens: they reach the models that read them, in forward and in generation, and no others."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from family_configs import IMAGE_TOKEN, tiny_model  # noqa: E402
from family_trials import TOLERANCE, check_close  # noqa: E402
from tiny import tiny_model as text_model  # noqa: E402

from auxkernels.models import AuxiliaryEnsembleForCausalLM, AuxiliaryForCausalLM, PlannerForCausalLM  # noqa: E402

FAMILIES = ("llava", "gemma3", "qwen2_vl")
NEW = 4
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


def images_of(family: str, count: int) -> dict:
    """One image, of four tokens, for each of some rows."""
    if family == "qwen2_vl":  # patches of all images, 2 frames of 4 x 4 each
        return {"pixel_values": torch.randn(16 * count, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    return {"pixel_values": torch.randn(count, 3, 8, 8)}


def inputs_of(family: str, rows: int = 2) -> dict:
    """Tokens with an image among them, and what else the family wants."""
    text = torch.randint(3, 50, (rows, 5))
    tokens = torch.cat([text[:, :2], torch.full((rows, 4), IMAGE_TOKEN), text[:, 2:]], dim=1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **images_of(family, rows)}
    types = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids"}.get(family)
    return inputs if types is None else inputs | {types: (tokens == IMAGE_TOKEN).long()}


def grown(inputs: dict, tokens: torch.Tensor) -> dict:
    """The same inputs with more tokens, of text, behind them."""
    more = tokens.shape[1] - inputs["input_ids"].shape[1]
    longer = {name: torch.nn.functional.pad(inputs[name], (0, more)) for name in PER_TOKEN if name in inputs}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    return inputs | longer | {"input_ids": tokens, "attention_mask": mask}


def generated(model, inputs: dict, **options) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, eos_token_id=None, suppress_tokens=[IMAGE_TOKEN, 59, 58], **options)


def beams_alone(model, inputs: dict) -> torch.Tensor | None:
    """What the plain model makes with two beams; None: transformers before 5.20 fails at that with images."""
    try:
        return generated(model, inputs, num_beams=2)
    except (AttributeError, RuntimeError):
        if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20):
            raise
        return None


@torch.no_grad()
def assert_greedy(made: torch.Tensor, logits_of, inputs: dict) -> None:
    """Each token is the likeliest of logits_of(all inputs before it), or as likely up to rounding."""
    assert made.shape[1] == inputs["input_ids"].shape[1] + NEW
    for n in range(inputs["input_ids"].shape[1], made.shape[1]):
        logits = logits_of(grown(inputs, made[:, :n]))[:, -1].clone()
        logits[:, [IMAGE_TOKEN, 59, 58]] = -torch.inf
        chosen = logits.gather(1, made[:, n : n + 1]).squeeze(1)
        limit = TOLERANCE * logits[logits.isfinite()].abs().max()
        assert (logits.amax(1) - chosen <= limit).all(), n


def plain(model, inputs: dict) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_model_generates_what_its_base_does_of_the_same_images(family):
    base, inputs = tiny_model(family), inputs_of(family)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, text_model("llama")).eval()
    for options in ({}, {"use_cache": False}):
        assert torch.equal(generated(joined, inputs, **options), generated(base, inputs, **options)), options
    if (want := beams_alone(base, inputs)) is not None:
        assert torch.equal(generated(joined, inputs, num_beams=2), want)
    other = inputs | images_of(family, 2)
    assert not torch.allclose(joined(**inputs).logits, joined(**other).logits, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_auxiliary_of_text_reads_the_placeholders_as_tokens(family):
    base, aux, inputs = tiny_model(family), text_model("llama", seed=3), inputs_of(family)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()

    def sums(given):
        return plain(base, given) + aux(given["input_ids"], given["attention_mask"]).logits

    seen: set = set()
    hook = aux.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    check_close(joined(**inputs).logits, sums(inputs), "logits")
    hook.remove()
    assert "input_ids" in seen and not seen & (images_of(family, 1).keys() | {*PER_TOKEN})
    for use_cache in (True, False):
        assert_greedy(generated(joined, inputs, use_cache=use_cache), sums, inputs)
    joined.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert aux.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_padding_generate_what_they_do_alone(family):
    base, aux = tiny_model(family), text_model("llama", seed=3)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()
    alone = inputs_of(family, rows=1)
    names = {"input_ids", "attention_mask", *PER_TOKEN} & alone.keys()
    padded = {name: torch.nn.functional.pad(value, (3, 0)) if name in names else value for name, value in alone.items()}
    want = generated(joined, alone)
    assert torch.equal(generated(joined, padded)[:, 3:], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_auxiliary_behind_a_trunk_layer_reads_images_in_the_bases_states_alone(family):
    base, inputs = tiny_model(family), inputs_of(family)
    aux = text_model("llama", seed=3)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False, trunk_layer=1).eval()

    def sums(given):
        output = base(**given, use_cache=False, output_hidden_states=True)
        read = joined.trunk_projection(output.hidden_states[1])
        return output.logits + aux(inputs_embeds=read, attention_mask=given["attention_mask"]).logits

    check_close(joined(**inputs).logits, sums(inputs), "logits")
    assert_greedy(generated(joined, inputs), sums, inputs)
    prefix = {"aux_input_ids": torch.randint(3, 50, (2, 3))}
    made = generated(joined, inputs | prefix)
    assert torch.equal(generated(joined, inputs | prefix, use_cache=False), made)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_auxiliary_that_reads_images_gets_them(family):
    base, aux, inputs = tiny_model(family), tiny_model(family, seed=1), inputs_of(family)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()

    def sums(given):
        return plain(base, given) + plain(aux, given)

    check_close(joined(**inputs).logits, sums(inputs), "logits")
    assert_greedy(generated(joined, inputs), sums, inputs)
    with pytest.raises(ValueError, match="num_beams and num_return_sequences must be 1 where two models read images"):
        generated(joined, inputs, num_beams=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_text_leaves_images_to_the_auxiliary(family):
    base, aux, inputs = text_model("llama", seed=3), tiny_model(family), inputs_of(family)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()

    def sums(given):
        return base(given["input_ids"], given["attention_mask"]).logits + plain(aux, given)

    check_close(joined(**inputs).logits, sums(inputs), "logits")
    assert_greedy(generated(joined, inputs), sums, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_the_auxiliary_stands_in_front_of_text_and_images(family):
    base, aux, inputs = tiny_model(family), text_model("llama", seed=3), inputs_of(family)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()
    prefix = torch.randint(3, 50, (2, 3))

    def sums(given):
        behind = aux(torch.cat([prefix, given["input_ids"]], dim=1)).logits[:, 3:]
        return plain(base, given) + behind

    check_close(joined(**inputs, aux_input_ids=prefix).logits, sums(inputs), "logits")
    assert_greedy(generated(joined, inputs | {"aux_input_ids": prefix}), sums, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_planner_passes_images_on_to_its_language_model(family):
    lm, inputs = tiny_model(family), inputs_of(family)
    want = {cache: generated(lm, inputs, use_cache=cache) for cache in (True, False)}
    beams = beams_alone(lm, inputs)
    planner = PlannerForCausalLM.from_lm(lm, num_labels=4, label_dim=4, mode="fixed", layers=[1]).eval()
    check_close(planner(**inputs).logits, plain(lm, inputs), "logits")
    assert all(torch.equal(generated(planner, inputs, use_cache=cache), made) for cache, made in want.items())
    assert beams is None or torch.equal(generated(planner, inputs, num_beams=2), beams)
    with torch.no_grad():
        planner.conditioning.bias.normal_()
    assert_greedy(generated(planner, inputs), lambda given: planner(**given, use_cache=False).logits, inputs)


def test_images_with_placeholders_that_the_auxiliary_has_not_are_refused():
    base, inputs = tiny_model("llava"), inputs_of("llava")
    narrow = text_model("llama", vocab_size=IMAGE_TOKEN)
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, narrow, vocab_policy="pad").eval()
    with pytest.raises(ValueError, match="image_token_index 60 is not among its 60 tokens: resize"):
        joined(**inputs)
    text = inputs["input_ids"].clamp(max=50)
    assert torch.equal(joined(text).logits[..., :IMAGE_TOKEN], base(text).logits[..., :IMAGE_TOKEN])
    behind = AuxiliaryForCausalLM.from_base_and_aux(base, narrow, vocab_policy="pad", trunk_layer=1).eval()
    assert torch.equal(generated(behind, inputs), generated(base, inputs))


def test_images_of_three_dimensional_positions_behind_a_prefix_are_refused():
    base, aux, inputs = tiny_model("qwen2_vl"), tiny_model("qwen2_vl", seed=1), inputs_of("qwen2_vl")
    joined = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval()
    prefix = {"aux_input_ids": torch.randint(3, 50, (2, 3))}
    with pytest.raises(ValueError, match="aux_input_ids must be None with images whose positions"):
        joined(**inputs, **prefix)
    text = torch.randint(3, 50, (2, 6))
    behind = aux(torch.cat([prefix["aux_input_ids"], text], dim=1)).logits[:, 3:]
    check_close(joined(text, **prefix).logits, base(text).logits + behind, "logits")
    ids = {"input_ids": text, "attention_mask": torch.ones_like(text), **prefix}
    assert torch.equal(generated(joined, ids), generated(joined, ids, use_cache=False))


def test_arguments_that_no_model_has_are_refused_by_name():
    inputs = inputs_of("llava")
    joined = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llava"), text_model("llama"))
    with pytest.raises(ValueError, match="pixel_valeus"):
        generated(joined, inputs | {"pixel_valeus": inputs["pixel_values"]})
    plain_text = AuxiliaryForCausalLM.from_base_and_aux(text_model("llama"), text_model("llama", seed=1))
    with pytest.raises(ValueError, match="pixel_values"):
        generated(plain_text, inputs)


@pytest.mark.parametrize("side", ["base", "aux"])
def test_models_of_images_are_saved_and_found_again(side, tmp_path):
    inputs, parts = inputs_of("llava"), [text_model("llama", seed=3), tiny_model("llava")]
    base, aux = reversed(parts) if side == "base" else parts
    base.save_pretrained(tmp_path / "base")
    joined = AuxiliaryForCausalLM.from_base_and_aux(str(tmp_path / "base"), aux, zero_init=False).eval()
    joined.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded.base) is type(base) and type(loaded.aux) is type(aux)
    assert torch.equal(loaded(**inputs).logits, joined(**inputs).logits)


@pytest.mark.parametrize("save_lm", [False, True])
def test_planners_of_images_are_saved_and_found_again(save_lm, tmp_path):
    inputs = inputs_of("llava")
    tiny_model("llava").save_pretrained(tmp_path / "lm")
    planner = PlannerForCausalLM.from_lm(
        str(tmp_path / "lm"), num_labels=4, label_dim=4, mode="fixed", layers=[1], conditioning_init="xavier"
    ).eval()
    planner.save_pretrained(tmp_path / "saved", save_lm=save_lm)
    loaded = PlannerForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**inputs).logits, planner(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ensemble_gives_images_to_its_base_and_to_the_members_that_read_them(family):
    base, inputs = tiny_model(family), inputs_of(family)
    text, images = text_model("llama", vocab_size=base.config.get_text_config().vocab_size), tiny_model(family, seed=5)
    members = {"text": text, "images": images}
    joined = {
        name: AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False).eval() for name, aux in members.items()
    }
    alone = AuxiliaryEnsembleForCausalLM.from_members(base, {"text": joined["text"]}).eval()
    assert torch.equal(generated(alone, inputs), generated(joined["text"], inputs))
    assert torch.equal(alone(**inputs).logits, joined["text"](**inputs).logits)
    both = AuxiliaryEnsembleForCausalLM.from_members(base, joined).eval()
    want = plain(base, inputs) + plain(images, inputs) + text(inputs["input_ids"]).logits
    check_close(both(**inputs).logits, want, "sums")
    assert_greedy(generated(both, inputs), lambda given: both(**given, use_cache=False).logits, inputs)


def test_an_ensemble_over_a_base_of_text_generates_without_images():
    base, inputs = tiny_model("llama"), inputs_of("llava")
    image_reader = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model("llava"), zero_init=False).eval()
    model = AuxiliaryEnsembleForCausalLM.from_members(base, {"images": image_reader}).eval()
    assert torch.equal(model(**inputs).logits, image_reader(**inputs).logits)
    with pytest.raises(ValueError, match="images in generation must be read by the base"):
        model.generate(**inputs, max_new_tokens=2)
