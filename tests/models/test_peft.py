"""PEFT's models as parts of the composites, and adapters that are saved with their auxiliary."""

import copy

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, tiny_model
from transformers_adapters import add_adapter

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM

ADDED = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def lora(model, **options):
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**{**ADDED, **options}))


def merged(wrapped):
    return copy.deepcopy(wrapped).merge_and_unload()


def with_adapters(base, way: str, **options):
    """A composite whose auxiliary has adapters; its head is its own, not zero, and trained."""
    aux = tiny_model("llama", seed=2)
    if way == "given":
        return AuxiliaryForCausalLM.from_base_and_aux(base, lora(aux, **options), zero_init=False)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False)
    torch.manual_seed(5)
    if way == "assigned":
        model.aux = peft.get_peft_model(model.aux, peft.LoraConfig(**{**ADDED, **options}))
    else:
        add_adapter(model.aux, peft.LoraConfig(**{**ADDED, **options}))
    return model


@pytest.fixture
def base_folder(tmp_path):
    tiny_model("llama", seed=1, width=24).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def tokens():
    return torch.randint(2, VOCAB_SIZE, (3, 9))


def assert_same_logits(model, other, tokens) -> None:
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, names", [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
@pytest.mark.parametrize("part", ["base", "aux"])
def test_a_model_with_adapters_counts_as_if_they_were_merged(architecture, names, part, tokens):
    models = {"base": tiny_model("llama", seed=1, width=24), "aux": tiny_model("gpt2", seed=2)}
    plain = tiny_model(architecture, seed=3)
    before = plain(tokens).logits
    wrapped = lora(plain, target_modules=names).eval()
    want = AuxiliaryForCausalLM.from_base_and_aux(**{**models, part: merged(wrapped)}, zero_init=False)
    got = AuxiliaryForCausalLM.from_base_and_aux(**{**models, part: wrapped}, zero_init=False)
    assert not torch.allclose(before, wrapped(tokens).logits, atol=1e-2)
    assert_same_logits(got.eval(), want.eval(), tokens)
    got(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, weight in got.named_parameters() if weight.grad is not None}
    assert not any(name.startswith("base.") for name in trained)
    assert part == "base" or any("lora_A" in name for name in trained)


def test_adapters_that_are_assigned_stay_in_the_users_hands(tokens):
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), tiny_model("llama", seed=2), zero_init=False)
    before = model(tokens).logits
    wrapped = model.aux = lora(model.aux)
    model.eval()
    assert not torch.allclose(before, model(tokens).logits, atol=1e-2)
    with wrapped.disable_adapter():
        assert torch.equal(before, model(tokens).logits)
    with_adapter = model(tokens).logits
    wrapped.merge_and_unload()
    torch.testing.assert_close(with_adapter, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in model.state_dict())


def test_a_planner_takes_a_language_model_with_adapters(tokens):
    wrapped = lora(tiny_model("llama", layers=3)).eval()
    want = merged(wrapped)(tokens).logits
    model = PlannerForCausalLM.from_lm(wrapped, num_labels=3, label_dim=2, mode="fixed").eval()
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["base", "aux"])
def test_prompts_of_peft_are_refused(part):
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(tiny_model("llama"), prompts)
    with pytest.raises(TypeError, match=f"{part} must have adapters in its layers"):
        AuxiliaryForCausalLM.from_base_and_aux(
            **{"base": tiny_model("llama"), "aux": tiny_model("llama"), part: wrapped}
        )


def test_a_head_with_adapters_is_not_replaced_by_zeros():
    for options in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        wrapped = lora(tiny_model("llama", seed=2), **options)
        with pytest.raises(ValueError, match="zero_init must be False"):
            AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), wrapped)


def test_an_auxiliary_with_adapters_and_tied_embeddings_loads(tmp_path, tokens):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "base")
    aux = tiny_model("gpt2", seed=2)
    model = AuxiliaryForCausalLM.from_base_and_aux(str(tmp_path / "base"), aux, zero_init=False).eval()
    assert aux.get_input_embeddings().weight is aux.get_output_embeddings().weight
    model.aux = lora(model.aux, target_modules=["c_attn"])
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert loaded.aux.get_input_embeddings().weight is loaded.aux.get_output_embeddings().weight


# -- one folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way, options",
    [
        *(
            (way, options)
            for way in ("assigned", "added", "given")
            for options in ({}, {"modules_to_save": ["lm_head"]})
        ),
        ("assigned", {"target_modules": "all-linear"}),  # which transformers does not know
    ],
)
def test_adapters_are_saved_loaded_and_merged_in_one_folder(base_folder, tmp_path, tokens, way, options):
    model = with_adapters(base_folder, way, **options).eval()
    if not options:
        model.aux.get_output_embeddings().requires_grad_(True)
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    trained = [{name for name, weight in one.named_parameters() if weight.requires_grad} for one in (loaded, model)]
    assert trained[0] == trained[1] and any("lora" in name for name in trained[0])

    loaded.merge_adapters()
    assert_same_logits(loaded, model, tokens)
    loaded.save_pretrained(tmp_path / "merged")
    again = AuxiliaryForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name or "base_layer" in name for name in again.state_dict())
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"head": "shared"},
        {"head": "low_rank", "head_rank": 2, "trunk_layer": 1},
        {"trunk_layer": 1, "zero_init": False},
    ],
    ids=["shared", "low rank", "trunk"],
)
def test_adapters_come_back_beside_matrices_that_nothing_reads(base_folder, tmp_path, tokens, options):
    model = AuxiliaryForCausalLM.from_base_and_aux(base_folder, tiny_model("llama", seed=2), **options)
    with torch.no_grad():
        for weight in getattr(model, "aux_head", torch.nn.Identity()).parameters():
            weight.normal_()
    model.aux = lora(model.aux)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert any("lora_A" in name for name in loaded.state_dict())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.merge_adapters()
    assert_same_logits(loaded, model, tokens)


def test_several_adapters_come_back_with_the_one_in_use(base_folder, tmp_path, tokens):
    model = with_adapters(base_folder, "assigned").eval()
    add_adapter(model.aux, peft.LoraConfig(**{**ADDED, "target_modules": ["k_proj"]}), adapter_name="other")
    model.aux.set_adapter("other")
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.aux.set_adapter("default")
    model.aux.set_adapter("default")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_adapters_that_are_merged_and_kept_are_refused(base_folder, tmp_path):
    model = AuxiliaryForCausalLM.from_base_and_aux(base_folder, tiny_model("llama", seed=2), zero_init=False)
    wrapped = model.aux = lora(model.aux)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="must not be merged and kept"):
        model.save_pretrained(tmp_path / "saved")
    wrapped.unmerge_adapter()
    model.save_pretrained(tmp_path / "saved")


def test_a_base_with_adapters_is_found_by_their_folder(base_folder, tmp_path, tokens):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    lora(base).save_pretrained(tmp_path / "adapter")
    model = AuxiliaryForCausalLM.from_base_and_aux(
        str(tmp_path / "adapter"), tiny_model("llama", seed=2), zero_init=False
    ).eval()
    with pytest.raises(ValueError, match="no adapters with save_base"):
        model.save_pretrained(tmp_path / "saved", save_base=True)
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="base must be the model that the auxiliary was saved with"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=base_folder)


def test_training_goes_on_from_a_checkpoint_with_adapters(base_folder, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, VOCAB_SIZE, (8, 6))]

    def trained(steps: int, resume=None):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, save_steps=2, report_to=[], use_cpu=True,
            per_device_train_batch_size=2, learning_rate=0.01, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        model = with_adapters(base_folder, "assigned")
        transformers.Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model.state_dict()

    want = trained(4)
    got = trained(4, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(want[name], got[name]) for name in want)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == {name for name in want if not name.startswith("base.")}
    assert any(not torch.equal(saved[name], got[name]) for name in saved if "lora" in name)
