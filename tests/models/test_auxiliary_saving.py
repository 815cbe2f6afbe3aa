"""Folders of `AuxiliaryForCausalLM`: what is written, what loads again, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tiny import PAIRS, tiny_config, tiny_model, tiny_pair  # noqa: E402
from transformers_adapters import add_adapter  # noqa: E402

from auxkernels.models import AuxiliaryConfig, AuxiliaryForCausalLM  # noqa: E402
from auxkernels.models.saving import fingerprint, is_same_base  # noqa: E402


@pytest.fixture
def base_folder(tmp_path):
    folder = str(tmp_path / "the-base")
    tiny_model("llama", seed=1, width=24).save_pretrained(folder)
    return folder


def joined(base_folder, aux="gpt2", **options):
    options = {"zero_init": False, **options}
    aux_options = options.pop("aux_options", {})
    return AuxiliaryForCausalLM.from_base_and_aux(base_folder, tiny_model(aux, seed=2, **aux_options), **options).eval()


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def only_aux_is_trained(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return bool(trained) and all(name.startswith(("aux.", "trunk_projection.")) for name in trained)


@pytest.mark.parametrize("aux", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"zero_init": True}, {"trunk_layer": 1, "aux_scale": 0.5}], ids=str)
def test_pointer_folder_loads_the_same_model(base_folder, tmp_path, tokens, aux, tied, options):
    model = joined(base_folder, aux, aux_options={"tie_word_embeddings": tied}, **options)
    model.save_pretrained(tmp_path / "saved")
    keys = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert keys and all(key.startswith(("aux.", "trunk_projection.")) for key in keys)
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "generation_config.json", "model.safetensors"]
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_state(model, loaded) and only_aux_is_trained(loaded) and not loaded.training
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    one, other = (
        {**m.config.to_dict(), "aux_config": None, "base_config": None, "_name_or_path": None} for m in (model, loaded)
    )
    assert one == other


@pytest.mark.parametrize("base, aux", PAIRS)
def test_self_contained_folder_loads_the_same_model(base, aux, tmp_path, tokens):
    model = tiny_pair(base, aux)
    model.save_pretrained(tmp_path, save_base=True)
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path)
    assert same_state(model, loaded) and only_aux_is_trained(loaded)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="base")
    assert torch.equal(alone(tokens).logits, model.base(tokens).logits)


def test_auto_classes_load_it(base_folder, tmp_path, tokens):
    model = joined(base_folder)
    model.save_pretrained(tmp_path / "saved")
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "saved"), AuxiliaryConfig)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is AuxiliaryForCausalLM and torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_sharded_weights_load(base_folder, tmp_path):
    model = joined(base_folder, trunk_layer=1)
    model.save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    assert len([name for name in os.listdir(tmp_path / "saved") if name.endswith(".safetensors")]) > 1
    assert same_state(model, AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "saved")  # one file again: the shards are gone
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert same_state(model, AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved"))


def test_dtype_is_of_both_models_and_base_kwargs_of_the_base(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base_kwargs={"dtype": torch.float16})
    assert {p.dtype for p in loaded.base.parameters()} == {torch.float16}
    assert {p.dtype for p in loaded.aux.parameters()} == {torch.float32}


def test_generation_config_is_kept(base_folder, tmp_path):
    model = joined(base_folder)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.max_new_tokens == 17 and loaded.generation_config.eos_token_id == 1


def test_base_may_be_shared(base_folder, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    model = AuxiliaryForCausalLM.from_base_and_aux(base, tiny_config("gpt2"))
    model.save_pretrained(tmp_path / "saved")
    models = [AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=base) for _ in range(2)]
    assert all(m.base is base for m in models) and models[0].aux is not models[1].aux


def test_missing_base_is_an_error_and_base_says_where_it_is_now(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    os.rename(base_folder, base_folder + "-moved")
    with pytest.raises(OSError, match=r"the-base', which .* points to, could not be loaded: pass base="):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=base_folder + "-moved")


def test_base_with_missing_weights_is_an_error(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    path = os.path.join(base_folder, "model.safetensors")
    weights = load_file(path)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"base must have all its weights, .* lacks model\.layers\.1\.mlp\.up_proj"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")


def test_another_base_is_an_error_unless_meant(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    for seed, width in ((5, 24), (1, 32)):
        other = tiny_model("llama", seed=seed, width=width)
        with pytest.raises(ValueError, match="base must be the model that the auxiliary was saved with"):
            AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=other)
        assert AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=other, check_base=False).base is other
    tiny_model("llama", seed=5, width=24).save_pretrained(base_folder)
    with pytest.raises(ValueError, match="base must be the model"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fingerprint_knows_a_base_in_another_dtype(base_folder, tmp_path, dtype):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base_kwargs={"dtype": dtype})
    with pytest.raises(ValueError, match="base must be the model"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=tiny_model("llama", seed=5, width=24).to(dtype))


def test_fingerprint_sees_a_fine_tuned_base():
    model = tiny_model("gpt2")
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4)
    assert before != fingerprint(model)


def test_base_without_a_name_needs_save_base(tmp_path):
    with pytest.raises(ValueError, match="save_base must be True for a base that has no name"):
        tiny_pair().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["aux.transformer.h.0.attn.c_attn.weight", "trunk_projection.bias"])
def test_missing_and_unexpected_weights_are_errors(base_folder, tmp_path, key):
    joined(base_folder, trunk_layer=1).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != key}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys: transformer\.h\.0|weights must be .*trunk_projection"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    save_file({**weights, key.replace("0", "9") + "2": weights[key].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected_keys: transformer\.h\.9|weights must be .*bias2"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")


def test_interrupted_save_leaves_no_folder_that_loads(base_folder, tmp_path, interrupted):
    model = joined(base_folder)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    with pytest.raises(OSError):
        AuxiliaryForCausalLM.from_pretrained(folder)


def test_failed_write_leaves_the_old_folder_as_it_was(base_folder, tmp_path, monkeypatch):
    model = joined(base_folder)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    monkeypatch.setattr(AuxiliaryConfig, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert same_state(model, AuxiliaryForCausalLM.from_pretrained(folder))


def test_revision_is_in_the_pointer(base_folder, tmp_path):
    model = joined(base_folder, base_revision="v1.0")
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["base_name_or_path"], config["base_revision"]) == (base_folder, "v1.0")
    assert config["base_fingerprint"] == fingerprint(model.base)


def test_tied_weights_are_known():
    assert tiny_pair("gpt2", "llama").all_tied_weights_keys == {"base.lm_head.weight": "base.transformer.wte.weight"}
    model = tiny_pair("llama", "gpt2", zero_init=False)
    assert model.all_tied_weights_keys == {"aux.lm_head.weight": "aux.transformer.wte.weight"}
    model = tiny_pair("llama", "gpt2", zero_init=True)
    assert model.all_tied_weights_keys == {} and not model.aux.config.tie_word_embeddings
    model.tie_weights()
    assert not model.aux.get_output_embeddings().weight.any()


# -- a folder is never destroyed ---------------------------------------------------------------------------------------


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("inside", ["", "base", "base/deeper"])
@pytest.mark.parametrize("save_base", [False, True])
def test_saving_over_the_bases_own_folder_is_refused_and_changes_nothing(tmp_path, inside, save_base):
    folder = tmp_path / "out" / inside
    tiny_model("llama", seed=1).save_pretrained(folder)
    model = AuxiliaryForCausalLM.from_base_and_aux(folder, tiny_config("gpt2"))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"save_directory must be"):
        model.save_pretrained(tmp_path / "out", save_base=save_base)
    assert files_of(tmp_path) == before


def test_a_base_folder_of_other_origin_stays(base_folder, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "out" / "base")
    model, before = joined(base_folder), files_of(tmp_path / "out" / "base")
    with pytest.raises(ValueError, match="no base/ of other origin"):
        model.save_pretrained(tmp_path / "out", save_base=True)
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert files_of(tmp_path / "out" / "base") == before


def test_a_base_that_was_saved_with_the_model_is_replaced_or_removed(base_folder, tmp_path):
    model = joined(base_folder)
    for save_base in (True, True, False):
        model.save_pretrained(tmp_path / "out", save_base=save_base)
        assert (tmp_path / "out" / "base").exists() == save_base
        assert same_state(model, AuxiliaryForCausalLM.from_pretrained(tmp_path / "out"))


def test_self_contained_folder_is_saved_over_itself(tmp_path):
    tiny_pair().save_pretrained(tmp_path, save_base=True)
    model = AuxiliaryForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, save_base=True)
    assert same_state(model, AuxiliaryForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("text", [None, "{}", "no json"])
def test_folder_of_another_model_is_refused(base_folder, tmp_path, text):
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    if text is not None:
        (tmp_path / "other" / "config.json").write_text(text)
    before = files_of(tmp_path / "other")
    with pytest.raises(ValueError, match="save_directory must be new or hold an AuxiliaryForCausalLM"):
        joined(base_folder).save_pretrained(tmp_path / "other")
    assert files_of(tmp_path / "other") == before


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_adapters_are_refused_and_the_old_folder_stays(base_folder, tmp_path, how):
    peft = pytest.importorskip("peft")
    model, folder = joined(base_folder), tmp_path / "saved"
    model.save_pretrained(folder)
    before = files_of(folder)
    config = peft.LoraConfig(r=2, target_modules=r"aux\..*c_attn", fan_in_fan_out=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config) if how == "get_peft_model" else add_adapter(model, config)
    with pytest.raises(ValueError, match="save the PeftModel, or merge_and_unload first"):
        model.save_pretrained(folder)
    assert files_of(folder) == before
    if wrapped is not None:
        merged = wrapped.merge_and_unload()
        merged.save_pretrained(folder)
        assert same_state(merged, AuxiliaryForCausalLM.from_pretrained(folder))


def test_old_weights_stay_where_nothing_was_written(base_folder, tmp_path, monkeypatch):
    model, folder = joined(base_folder), tmp_path / "saved"
    model.save_pretrained(folder)
    before = files_of(folder)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="nothing was saved"):
        model.save_pretrained(folder)
    assert files_of(folder) == before


# -- which base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in tiny_model("llama").named_parameters()])
def test_a_change_in_any_one_parameter_of_the_base_is_seen(base_folder, tmp_path, name):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    other = tiny_model("llama", seed=1, width=24)
    with torch.no_grad():
        other.get_parameter(name).flatten()[5] += 1e-3
    with pytest.raises(ValueError, match="base must be the model that the auxiliary was saved with"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=other)


def test_sums_look_at_all_columns_of_a_large_parameter():
    model = torch.nn.Linear(4096, 8, bias=False)
    model.dtype = torch.float32
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[:, 1::2] += 0.01
    after = {**fingerprint(model), "values": before["values"]}
    assert not is_same_base(before, after)


def test_missing_fingerprint_is_an_error_unless_meant(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": None}))
    with pytest.raises(ValueError, match="must say which base it was saved with: pass check_base=False"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", check_base=False)


def test_pointer_to_a_relative_folder_is_absolute(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    joined("the-base").save_pretrained("saved")
    monkeypatch.chdir("/")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.base_name_or_path == base_folder


def test_pointer_is_that_of_the_base_it_was_loaded_with(base_folder, tmp_path):
    joined(base_folder, base_revision="v1").save_pretrained(tmp_path / "saved")
    os.rename(base_folder, base_folder + "-moved")
    model = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=tmp_path / "the-base-moved")
    model.save_pretrained(tmp_path / "again")
    again = AuxiliaryForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.base_name_or_path == base_folder + "-moved" and again.config.base_revision is None


def test_unchecked_base_model_leaves_no_pointer_to_another(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    other = tiny_model("llama", seed=5, width=24)
    model = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=other, check_base=False)
    with pytest.raises(ValueError, match="save_base must be True"):
        model.save_pretrained(tmp_path / "again")


def test_revision_of_a_base_model_is_recorded():
    model = AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), tiny_config("gpt2"), base_revision="v2")
    assert model.config.base_revision == "v2"


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_info_is_returned_beside_the_model(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    model, info = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert isinstance(model, AuxiliaryForCausalLM)
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def test_missing_generation_config_falls_back_to_the_bases(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    os.remove(tmp_path / "saved" / "generation_config.json")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.to_dict() == loaded.base.generation_config.to_dict()
    assert loaded.generation_config is not loaded.base.generation_config


def test_dtypes_are_those_that_were_saved(base_folder, tmp_path):
    model = joined(base_folder, trunk_layer=1, base_kwargs={"dtype": torch.bfloat16})
    model.aux.bfloat16()
    model.aux.transformer.ln_f.float()
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_state(model, loaded)
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    whole = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
