"""dtype and device_map of a call that joins models: of all that it loads or makes, under what is said of one part."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny import tiny_config, tiny_model  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM, PlannerForCausalLM, auxiliary  # noqa: E402
from auxkernels.models.loading_options import pop_place  # noqa: E402

PLANNER = {"num_labels": 4, "label_dim": 4, "mode": "fixed", "layers": [1]}


@pytest.fixture
def folders(tmp_path):
    """Of a base, in float32, and of an auxiliary."""
    for name, architecture in (("base", "llama"), ("aux", "gpt2")):
        tiny_model(architecture).save_pretrained(tmp_path / name)
    return tmp_path / "base", str(tmp_path / "aux")


def dtypes(model):
    return model.base.dtype, model.aux.dtype


@pytest.mark.parametrize("aux", ["name", "configuration", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=str)
def test_dtype_is_of_both(aux, dtype, folders, tokens):
    base, name = folders
    aux = {"name": name, "configuration": tiny_config("gpt2"), "small": "small"}[aux]
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, dtype=dtype)
    assert dtypes(model) == (torch.bfloat16, torch.bfloat16)
    model(tokens, labels=tokens).loss.backward()
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, dtype="auto")
    assert dtypes(model) == (torch.float32, torch.float32)


@pytest.fixture
def loaded(monkeypatch):
    """The device_map of each call of from_pretrained."""
    maps, from_pretrained = [], transformers.AutoModelForCausalLM.from_pretrained
    record = lambda *args, **kwargs: maps.append(kwargs.get("device_map")) or from_pretrained(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    return maps


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_options_of_one_part_win(name, folders, tokens):
    base, aux = folders
    options = {"dtype": torch.bfloat16, "aux_kwargs": {name: torch.float32}}
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, **options)
    assert dtypes(model) == (torch.bfloat16, torch.float32)
    assert model(tokens).logits.dtype == torch.float32
    model.train()(tokens, labels=tokens).loss.backward()
    assert model.aux.lm_head.weight.grad.dtype == torch.float32
    options = {"dtype": torch.bfloat16, "base_kwargs": {name: torch.float64}}
    assert dtypes(AuxiliaryForCausalLM.from_base_and_aux(base, aux, **options)) == (torch.float64, torch.bfloat16)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("aux", ["name", "configuration", "small"])
def test_device_map_is_of_both(aux, device_map, folders, loaded, tokens):
    pytest.importorskip("accelerate")
    base, name = folders
    aux = {"name": name, "configuration": tiny_config("gpt2"), "small": "small"}[aux]
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, device_map=device_map, zero_init=False).eval()
    assert loaded == [device_map] * (2 if aux == name else 1)
    assert model.base.device == model.aux.device == torch.device("cpu")
    want = model.base(tokens).logits + model.aux(tokens).logits
    torch.testing.assert_close(model(tokens).logits, want)


def test_a_new_auxiliary_is_put_where_it_is_said(folders, monkeypatch):
    monkeypatch.setattr(auxiliary, "check_output_head", lambda model: None)  # runs the model, which meta cannot
    base = folders[0]
    options = {"base_kwargs": {"device_map": "cpu"}, "device_map": "meta"}
    for aux in (tiny_config("llama"), "small"):
        model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, zero_init=False, **options)
        assert model.base.device.type == "cpu" and model.aux.device.type == "meta"
        places = {"device_map": {"lm_head": "cpu", "model": "cpu"}, "base_kwargs": {"device_map": "cpu"}}
        with pytest.raises(ValueError, match="device_map of a new aux must be one device"):
            AuxiliaryForCausalLM.from_base_and_aux(base, aux, **places)


def test_a_map_over_all_devices_puts_a_new_auxiliary_beside_its_base():
    for place in ("cpu", "meta"):
        kwargs = {"device_map": "auto", "dtype": "auto", "attn_implementation": "eager"}
        assert pop_place(kwargs, tiny_model("llama").to(place)) == torch.device(place)
        assert kwargs == {"attn_implementation": "eager"}


@pytest.mark.parametrize("option, value", [("dtype", torch.bfloat16), ("device_map", "cpu")])
def test_models_that_are_given_are_not_converted_in_silence(option, value, folders):
    base, aux = folders
    given = {option: value}
    with pytest.raises(ValueError, match=rf"{option} must be None where base is a model.*base\.to\(\.\.\.\)"):
        AuxiliaryForCausalLM.from_base_and_aux(tiny_model("llama"), aux, **given)
    with pytest.raises(ValueError, match=f"{option} must be None where aux is a model"):
        AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model("gpt2"), **given)
    with pytest.raises(ValueError, match=f"{option} must be None where lm is a model"):
        PlannerForCausalLM.from_lm(tiny_model("llama"), **PLANNER, **given)


def test_options_of_a_planners_language_model(folders):
    base = folders[0]
    model = PlannerForCausalLM.from_lm(base, **PLANNER, dtype=torch.bfloat16)
    assert model.lm.dtype == torch.bfloat16 and model.conditioning.weight.dtype == torch.float32
    model = PlannerForCausalLM.from_lm(base, **PLANNER, dtype="bfloat16", lm_kwargs={"dtype": torch.float64})
    assert model.lm.dtype == torch.float64


def test_a_planners_language_model_is_put_where_it_is_said(folders, loaded):
    pytest.importorskip("accelerate")
    model = PlannerForCausalLM.from_lm(folders[0], **PLANNER, device_map={"": "cpu"})
    assert loaded == [{"": "cpu"}]
    assert not model.config.lm_options


def test_the_pointer_says_nothing_of_dtype_and_places(folders, tmp_path):
    pytest.importorskip("accelerate")
    base, aux = folders
    model = AuxiliaryForCausalLM.from_base_and_aux(base, aux, dtype=torch.bfloat16, device_map="cpu")
    assert not model.config.base_options
    model.save_pretrained(tmp_path / "saved")
    assert dtypes(AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")) == (torch.bfloat16, torch.bfloat16)
