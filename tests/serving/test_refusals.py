"""Each wrong folder and option is an error that names it and the way out, when the engine starts."""

import json
import os
import shutil

import pairs
import pytest
from engines import ENGINE, PROMPTS, check, generate
from pairs import PAIRS, change_config, change_weights, copied
from transformers import MambaConfig, Qwen3MoeConfig
from vllm import LLM, envs
from vllm.engine.arg_utils import EngineArgs

NAME = "other-head-size"
OF_AUX, OF_BASE = "model.safetensors", "base/model.safetensors"


def configured(folder, **options):
    """vLLM's configuration of an engine, which is not started."""
    return EngineArgs(model=str(folder), **{**ENGINE, **options}).create_engine_config()


@pytest.fixture
def copy(folder, tmp_path):
    return copied(folder(NAME), tmp_path / "copy")


# -- options of the engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds must be False"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1, got 2"),
        ({"prefill_context_parallel_size": 2}, "context parallelism and micro-batches must be off"),
        ({"enable_dbo": True}, "context parallelism and micro-batches must be off"),
        ({"tensor_parallel_size": 2}, "the aux has 3 attention heads"),
        ({"disable_sliding_window": True}, "disable_sliding_window must be False"),
        ({"quantization": "fp8"}, "quantization must not be given, got 'fp8'"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, "speculative_config must be None"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, "cudagraph_mode must be PIECEWISE or NONE, got FULL"),
        ({"runner": "pooling", "convert": "embed"}, "runner must be 'generate'"),
        ({"hf_overrides": {"aux_scale": "big"}}, "aux_scale must be"),
        ({"hf_overrides": {"check_base": "no"}}, "check_base must be a bool"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, options, message):
    with pytest.raises(Exception, match=message):
        configured(folder(NAME), **options)


def test_the_v2_runner_is_refused(folder, monkeypatch):
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", True)  # vLLM reads the variable once
    with pytest.raises(Exception, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        configured(folder(NAME))


def test_an_own_logits_processor_stays_beside_that_of_the_scale(folder):
    given = ["auxkernels.vllm.scales:AuxScale"]
    assert configured(folder(NAME)).model_config.logits_processors == given
    assert configured(folder(NAME), logits_processors=given).model_config.logits_processors == given


def test_another_release_of_vllm_is_refused(folder, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version_tuple__", (0, 33, 0))
    with pytest.raises(Exception, match=r"vllm must be 0\.32"):
        configured(folder(NAME))


def test_the_auxiliarys_longest_text_bounds_the_engines(tmp_path, monkeypatch):
    monkeypatch.setitem(PAIRS, "short", pairs.Pair(pairs.BASE, pairs.gpt2(positions=128)))
    short = pairs.make("short", tmp_path)
    assert configured(short, max_model_len=None).model_config.max_model_len == 128
    with pytest.raises(Exception, match="max_model_len"):
        configured(short, max_model_len=256)


def test_a_base_with_stretched_positions_does_not_stretch_the_auxiliarys(tmp_path, monkeypatch):
    stretched = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}  # 512 tokens, as vLLM counts them
    base = pairs.llama(4, 128, 2, 1, 64, positions=128, rope_parameters=stretched)
    monkeypatch.setitem(PAIRS, "stretched", pairs.Pair(base, pairs.llama(2, 96, 3, 3, 32, positions=128)))
    folder = pairs.make("stretched", tmp_path)
    assert configured(folder, max_model_len=128)
    with pytest.raises(Exception, match=r"the auxiliary's max_position_embeddings is 128: pass --max-model-len 128"):
        configured(folder, max_model_len=512)


def test_a_tokenizer_with_tokens_that_the_auxiliary_has_not_is_refused(folder, tmp_path):
    narrow, wide = (copied(folder("narrower-vocabulary"), tmp_path / name) for name in ("narrow", "wide"))
    save_tokenizer(narrow, 480)
    assert configured(narrow, skip_tokenizer_init=False).model_config.get_vocab_size() == 480
    save_tokenizer(wide, 500)
    with pytest.raises(Exception, match="which has 480, got token 499"):
        configured(wide, skip_tokenizer_init=False)


def save_tokenizer(folder, size):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, size)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained(folder)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"aux_adapters": {"configs": {}}}, "the auxiliary must have no adapters of PEFT"),
        ({"num_valid_tokens": None}, "no base_config, aux_config or num_valid_tokens"),
        ({"base_fingerprint": None}, "the folder must say which base it was saved with"),
        ({"base_is_saved": False}, "base_name_or_path must be the name or path"),
        (
            {"base_is_saved": False, "base_name_or_path": "/gone"},
            "base '/gone', which the folder points to, must exist",
        ),
        (
            {"base_is_saved": False, "base_name_or_path": "some/name", "base_options": {"gguf_file": "a.gguf"}},
            "the folder also says gguf_file",
        ),
        (
            {"base_is_saved": False, "base_name_or_path": "some/name", "base_options": {"trust_remote_code": True}},
            "the folder also says trust_remote_code",
        ),
    ],
)
def test_folders_that_vllm_cannot_serve_are_refused(copy, values, message):
    change_config(copy, **values)
    with pytest.raises(Exception, match=message):
        configured(copy)


def test_a_base_with_adapters_is_refused(copy, tmp_path):
    os.makedirs(tmp_path / "adapters")
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    change_config(copy, base_is_saved=False, base_name_or_path=str(tmp_path / "adapters"))
    with pytest.raises(Exception, match="the base must have no adapters of PEFT"):
        configured(copy)


@pytest.mark.parametrize("kind", ["AuxiliaryEnsembleForCausalLM", "AuxiliaryGroupForCausalLM", "PlannerForCausalLM"])
def test_other_models_of_this_package_are_refused(folder, tmp_path, kind):
    from auxkernels import models

    one = models.AuxiliaryForCausalLM.from_pretrained(folder("fewer-layers"))
    if kind == "PlannerForCausalLM":
        made = models.PlannerForCausalLM.from_lm(one.base, None, num_labels=4, label_dim=3)
    elif kind == "AuxiliaryGroupForCausalLM":
        made = models.AuxiliaryGroupForCausalLM.from_members({"one": one})
    else:
        made = models.AuxiliaryEnsembleForCausalLM.from_members(one.base, {"one": one})
    made.save_pretrained(tmp_path / "saved")
    with pytest.raises(Exception, match=f"vLLM serves AuxiliaryForCausalLM alone, got {kind}"):
        configured(tmp_path / "saved")


def experts():
    sizes = pairs._sizes(2, 64, 2, 1, 32)
    return Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)


@pytest.mark.parametrize(
    "base, aux, message",
    [
        (experts(), pairs.SMALL, "base must be a model without experts.*got qwen3_moe"),
        (pairs.SMALL, experts(), "aux must be a model without experts.*got qwen3_moe"),
    ],
    ids=["base", "aux"],
)
def test_experts_are_refused(tmp_path, monkeypatch, base, aux, message):
    monkeypatch.setitem(PAIRS, "experts", pairs.Pair(base, aux))
    with pytest.raises(Exception, match=message):
        configured(pairs.make("experts", tmp_path))


# -- weights -----------------------------------------------------------------------------------------------------------


def started(folder, **options):
    return LLM(model=str(folder), **{**ENGINE, **options})


def _without(name):
    return lambda weights: weights.pop(name)


def _with(name, like):
    return lambda weights: weights.update({name: weights[like].clone()})


def _cut(name):
    return lambda weights: weights.update({name: weights[name][:-1].clone()})


def _nudged(name):
    def change(weights):
        weights[name][0, 0] += 0.01

    return change


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            OF_AUX,
            _without("aux.model.layers.1.self_attn.o_proj.weight"),
            "it lacks aux.model.layers.1.self_attn.o_proj",
        ),
        (OF_AUX, _without("aux.model.layers.1.mlp.up_proj.weight"), "it lacks aux.model.layers.1.mlp.up_proj"),
        (OF_AUX, _without("aux.lm_head.weight"), "it lacks aux.lm_head.weight"),
        (OF_AUX, _with("aux.extra.weight", "aux.lm_head.weight"), "no others, got aux.extra.weight"),
        (OF_AUX, _with("extra", "aux.lm_head.weight"), "no others, got extra"),
        (OF_AUX, _cut("aux.lm_head.weight"), r"aux.lm_head.weight must be \[512, 96\].*got \[511, 96\]"),
        (OF_BASE, _without("model.layers.1.self_attn.o_proj.weight"), "lacks model.layers.1.self_attn.o_proj.weight"),
        (OF_BASE, _without("model.embed_tokens.weight"), "lacks model.embed_tokens.weight"),
        (OF_BASE, _cut("lm_head.weight"), r"base.lm_head.weight must be \[512, 128\]"),
        (OF_BASE, _nudged("model.embed_tokens.weight"), "the base must be the model that the auxiliary was saved with"),
    ],
)
def test_weights_that_are_not_the_folders_are_refused(engines, copy, file, change, message):
    engines.close()
    change_weights(copy / file, change)
    with pytest.raises(ValueError, match=message):
        started(copy)


def test_a_folder_without_its_base_is_refused(engines, copy):
    engines.close()
    shutil.rmtree(copy / "base")
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        started(copy)


def test_another_base_that_is_meant_is_served(engines, copy):
    change_weights(copy / OF_BASE, _nudged("model.embed_tokens.weight"))
    engine = engines(copy, hf_overrides={"check_base": False})
    check(generate(engine, PROMPTS, logprobs=1), pairs.Sums(copy, check_base=False))


def test_a_trunk_that_vllm_does_not_give_is_refused(engines, tmp_path, monkeypatch):
    engines.close()
    monkeypatch.setitem(PAIRS, "early", pairs.Pair(pairs.gpt2(), pairs.SMALL, {"trunk_layer": 1}))
    early = pairs.make("early", tmp_path)
    with pytest.raises(
        ValueError, match="trunk_layer must be None or 3, the last, for a base of GPT2LMHeadModel, got 1"
    ):
        started(early)


def test_a_recurrent_model_is_refused(engines, tmp_path, monkeypatch):
    engines.close()
    mamba = MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    monkeypatch.setitem(PAIRS, "recurrent", pairs.Pair(pairs.SMALL, mamba))
    with pytest.raises(ValueError, match="aux must have attention in all its layers, got MambaForCausalLM"):
        started(pairs.make("recurrent", tmp_path))


def test_adapters_of_vllm_are_refused(engines, folder):
    engines.close()
    with pytest.raises(ValueError, match="AuxiliaryForCausalLM does not support LoRA"):
        started(folder(NAME), enable_lora=True)


def test_a_base_in_another_dtype_and_in_several_files_is_the_same_base(engines, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    moved = copied(folder("fewer-layers"), tmp_path / "copy")
    base = AutoModelForCausalLM.from_pretrained(json.loads((moved / "config.json").read_text())["base_name_or_path"])
    base.bfloat16().save_pretrained(tmp_path / "half", max_shard_size="200KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    engine = engines(moved, hf_overrides={"base_name_or_path": str(tmp_path / "half")})
    sums = pairs.Sums(moved, base=str(tmp_path / "half"), check_base=False, dtype="float32")
    check(generate(engine, PROMPTS, logprobs=1), sums)
