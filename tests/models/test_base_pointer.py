"""What an auxiliary's folder says of its base, and what users are told of bases that it cannot point to."""

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny import tiny_config, tiny_model, tiny_pair  # noqa: E402

from auxkernels.models import AuxiliaryForCausalLM  # noqa: E402
from auxkernels.models import saving as saving_module  # noqa: E402

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-tiny"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def joined(base, **options):
    return AuxiliaryForCausalLM.from_base_and_aux(base, tiny_model("gpt2", seed=2), zero_init=False, **options).eval()


def saved_and_loaded(model, folder, **options):
    model.save_pretrained(folder)
    return AuxiliaryForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def base_folder(tmp_path):
    folder = str(tmp_path / "the-base")
    tiny_model("llama", seed=1, width=24).save_pretrained(folder)
    return folder


# -- options of the weights --------------------------------------------------------------------------------------------


def test_subfolder_and_variant_are_in_the_pointer(tmp_path, tokens):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "many" / "inside", variant="small")
    model = joined(str(tmp_path / "many"), base_kwargs={"subfolder": "inside", "variant": "small"})
    loaded = saved_and_loaded(model, tmp_path / "saved")
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    again = saved_and_loaded(loaded, tmp_path / "again")
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("how", ["values", "config"])
def test_configuration_that_the_base_was_loaded_with_is_in_the_pointer(base_folder, tmp_path, tokens, how):
    config = transformers.AutoConfig.from_pretrained(base_folder, num_hidden_layers=1)
    model = joined(base_folder, base_kwargs={"num_hidden_layers": 1} if how == "values" else {"config": config})
    assert len(model.base.model.layers) == 1
    loaded = saved_and_loaded(model, tmp_path / "saved")
    assert len(loaded.base.model.layers) == 1 and torch.equal(model(tokens).logits, loaded(tokens).logits)


def recorded(monkeypatch):
    """The options with which bases are loaded; quantisation and GGUF are left out, which need other packages."""
    calls, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def record(name, **kwargs):
        calls.append(dict(kwargs))
        return load(name, **{k: v for k, v in kwargs.items() if k not in ("quantization_config", "gguf_file")})

    monkeypatch.setattr(saving_module.AutoModelForCausalLM, "from_pretrained", record)
    return calls


def test_quantisation_and_file_of_the_base_are_in_the_pointer(base_folder, tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    given = {"quantization_config": config, "gguf_file": "base.Q4.gguf", "device_map": {"": "cpu"}}
    model = joined(base_folder, base_kwargs=given)
    saved_and_loaded(model, tmp_path / "saved")
    assert calls[1]["quantization_config"].to_dict() == config.to_dict()
    assert calls[1]["gguf_file"] == "base.Q4.gguf" and "device_map" not in calls[1]
    saved_and_loaded(model, tmp_path / "saved", base=base_folder, base_kwargs={"dtype": torch.float32})
    assert calls[2]["quantization_config"].to_dict() == config.to_dict() and "gguf_file" not in calls[2]


def test_only_what_says_which_weights_is_in_the_pointer(base_folder, tmp_path):
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True, "token": "secret"}
    model = joined(base_folder, base_kwargs=options)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["base_options"] == {}


@pytest.mark.parametrize("save_base", [False, True])
def test_code_of_the_base_runs_only_where_the_caller_trusts_it(tmp_path, tokens, save_base, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny_model("llama", seed=1).save_pretrained(folder)
    (folder / "own_code.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own-tiny", "auto_map": names}))
    model = joined(str(folder), base_kwargs={"trust_remote_code": True})
    model.save_pretrained(tmp_path / "saved", save_base=save_base)
    with pytest.raises(ValueError, match="runs code that comes with its weights: pass trust_remote_code=True"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    for trust in ({"trust_remote_code": True}, {"base_kwargs": {"trust_remote_code": True}}):
        loaded = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", **trust)
        assert type(loaded.base).__name__ == "OwnForCausalLM"
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


# -- what a user is told -----------------------------------------------------------------------------------------------


def told(model, tokens):
    """The warnings of two training steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.train()(tokens, labels=tokens).loss.backward()
    return [str(one.message) for one in caught if "base has" in str(one.message)]


def test_nameless_base_is_told_of_at_the_first_step_and_once(tokens):
    model = tiny_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(tokens, labels=tokens)
    (message,) = told(model, tokens)
    assert "Trainer's first checkpoint, will fail unless save_base=True: save the base to a folder" in message


def test_base_that_is_as_its_name_says_is_not_told_of(base_folder, tokens):
    assert told(joined(base_folder), tokens) == []
    assert told(joined(base_folder, base_kwargs={"dtype": torch.bfloat16}), tokens) == []
    assert told(joined(transformers.AutoModelForCausalLM.from_pretrained(base_folder)), tokens) == []


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "4KB"}], ids=["file", "shards"])
def test_merged_base_is_told_of_before_it_is_saved(tmp_path, tokens, shards):
    peft = pytest.importorskip("peft")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "base", **shards)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    (message,) = told(joined(peft.get_peft_model(base, config).merge_and_unload()), tokens)
    assert f"base has other weights than {tmp_path / 'base'}" in message and "save the base to a folder" in message


def test_base_with_adapters_is_told_of_unless_its_name_leads_to_them(base_folder, tmp_path, tokens):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    base = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    base.save_pretrained(tmp_path / "adapters")
    (message,) = told(joined(base), tokens)
    assert f"base has other adapters than {base_folder}" in message and "save_base" not in message
    model = joined(str(tmp_path / "adapters"))
    assert told(model, tokens) == []
    assert torch.equal(saved_and_loaded(model, tmp_path / "saved")(tokens).logits, model.eval()(tokens).logits)


def test_resized_base_is_told_of_and_refused_with_its_sizes(base_folder, tmp_path, tokens):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    base.resize_token_embeddings(70)
    model = joined(base, vocab_policy="pad")
    (message,) = told(model, tokens)
    assert "base has another number of tokens (70) than" in message
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"got 61 tokens where it had 70: pass base= that model.*folder of its own"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved", base=base)


def test_way_out_that_is_named_for_a_merged_base_works(base_folder, tmp_path, tokens):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.add_(0.1)
    base.save_pretrained(tmp_path / "merged")
    model = joined(str(tmp_path / "merged"))
    assert told(model, tokens) == []
    assert torch.equal(saved_and_loaded(model, tmp_path / "saved")(tokens).logits, model.eval()(tokens).logits)


def test_advice_for_a_quantised_base_names_its_checkpoint(tmp_path, tokens):
    model = tiny_pair()
    model.base.hf_quantizer = object()
    (message,) = told(model, tokens)
    way = "joined by the name of the checkpoint that it is quantised from"
    assert way in message
    with pytest.raises(ValueError, match=f"save_base must be True for a base that has no name .*{way}"):
        model.save_pretrained(tmp_path)


def test_auxiliary_of_a_class_that_transformers_does_not_know_is_refused_by_name(base_folder, tmp_path):
    joined(base_folder).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["aux_config"]["model_type"] = "own-tiny"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="aux must be of a class of transformers, or registered there, got own-tiny"):
        AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")


def test_new_configuration_of_the_auxiliary_trains_beside_a_named_base_without_a_word(base_folder, tokens):
    assert told(AuxiliaryForCausalLM.from_base_and_aux(base_folder, tiny_config("gpt2")), tokens) == []
