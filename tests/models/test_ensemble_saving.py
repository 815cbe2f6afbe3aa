"""Folders of `AuxiliaryEnsembleForCausalLM`: what is written, what loads again, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from ensembles import KINDS, tiny_base, tiny_ensemble, tiny_member  # noqa: E402
from tiny import tiny_model  # noqa: E402

from auxkernels.models import (  # noqa: E402
    AuxiliaryConfig,
    AuxiliaryEnsembleConfig,
    AuxiliaryEnsembleForCausalLM,
    AuxiliaryForCausalLM,
)


@pytest.fixture
def base_folder(tmp_path):
    folder = str(tmp_path / "the-base")
    tiny_base().save_pretrained(folder)
    return folder


def named(base_folder, kinds=("own", "trunk", "shared"), **options):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    return tiny_ensemble(kinds, base=base, **options)


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kinds", [tuple(KINDS), ("own", "own")], ids="-".join)
@pytest.mark.parametrize("options", [{}, {"base_scale": 1.5, "base_floor": 0.1, "frozen": ["b"]}], ids=str)
def test_a_folder_loads_the_same_model(base_folder, tmp_path, tokens, kinds, options):
    model = named(base_folder, kinds, names="bacde", **options)  # not in the order of their names
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_state(model, loaded) and not loaded.training
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert list(loaded.members) == list(model.members)
    for name, value in model.config.to_dict().items():
        assert name == "_name_or_path" or value == loaded.config.to_dict()[name], name
    assert all(one.base is loaded.base for one in loaded.members.values())
    trained = [[name for name, p in one.named_parameters() if p.requires_grad] for one in (model, loaded)]
    assert trained[0] == trained[1] and trained[0]


def test_what_is_written(base_folder, tmp_path):
    named(base_folder, frozen=["b"]).save_pretrained(tmp_path / "saved")
    own = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "saved")) == [*own[:2], "members", own[2]]
    keys = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert {key.split(".")[1] for key in keys} == {"a", "c"} and not any(".base." in key for key in keys)
    for name in "abc":
        folder = tmp_path / "saved" / "members" / name
        assert sorted(os.listdir(folder)) == own
        assert not any(key.startswith("base.") for key in load_file(folder / "model.safetensors"))


def test_auto_classes_load_it(base_folder, tmp_path, tokens):
    model = named(base_folder)
    model.save_pretrained(tmp_path / "saved")
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "saved"), AuxiliaryEnsembleConfig)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is AuxiliaryEnsembleForCausalLM and torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_members_load_alone_and_into_other_ensembles(base_folder, tmp_path, tokens):
    model = named(base_folder)
    model.save_pretrained(tmp_path / "saved")
    model.members["c"].save_pretrained(tmp_path / "alone")
    for folder, name in ((tmp_path / "saved" / "members" / "a", "a"), (tmp_path / "alone", "c")):
        loaded = AuxiliaryForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(tokens).logits, model.members[name](tokens).logits)
    tiny_model("gpt2", seed=8).save_pretrained(tmp_path / "lm")
    members = {"one": tmp_path / "saved" / "members" / "a", "two": str(tmp_path / "alone"), "lm": tmp_path / "lm"}
    other = AuxiliaryEnsembleForCausalLM.from_members(base_folder, members, aux_scales={"lm": 0.0, "two": 0.7}).eval()
    want = model(tokens, aux_scale={"b": 0.0}).logits
    torch.testing.assert_close(other(tokens).logits, want)
    assert all(one.base is other.base for one in other.members.values())


def test_self_contained_folders(tmp_path, tokens):
    model = tiny_ensemble()  # its base has no name
    with pytest.raises(ValueError, match="save_base must be True for a base that has no name"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved", save_base=True)
    os.rename(tmp_path / "saved", tmp_path / "moved")
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "moved")
    assert same_state(model, loaded)
    member = AuxiliaryForCausalLM.from_pretrained(
        tmp_path / "moved" / "members" / "b", base=tmp_path / "moved" / "base"
    )
    assert torch.equal(member(tokens).logits, model.members["b"](tokens).logits)
    loaded.save_pretrained(tmp_path / "moved", save_base=True)
    assert same_state(model, AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "moved"))


def test_saving_again_leaves_nothing_of_the_old_version(base_folder, tmp_path):
    named(base_folder).save_pretrained(tmp_path / "saved", save_base=True)
    model = named(base_folder, ("own",), names="z")
    model.save_pretrained(tmp_path / "saved")
    assert os.listdir(tmp_path / "saved" / "members") == ["z"] and not (tmp_path / "saved" / "base").exists()
    assert same_state(model, AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved"))


def test_an_interrupted_save_leaves_no_folder_that_loads(base_folder, tmp_path, interrupted):
    model, folder = named(base_folder), tmp_path / "saved"
    model.save_pretrained(folder)
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    with pytest.raises(OSError):
        AuxiliaryEnsembleForCausalLM.from_pretrained(folder)


def test_a_failed_write_leaves_the_old_folder_as_it_was(base_folder, tmp_path, monkeypatch):
    model = named(base_folder)
    model.save_pretrained(tmp_path / "saved")
    before = files_of(tmp_path / "saved")
    monkeypatch.setattr(AuxiliaryConfig, "save_pretrained", lambda *args, **kwargs: 1 / 0)  # of a member
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == before


def test_folders_of_others_are_refused_and_stay(base_folder, tmp_path):
    model = named(base_folder)
    tiny_model("gpt2").save_pretrained(tmp_path / "lm")
    model.members["a"].save_pretrained(tmp_path / "member")
    (tmp_path / "notes" / "members").mkdir(parents=True)
    (tmp_path / "notes" / "members" / "list.txt").write_text("names")
    before = files_of(tmp_path)
    for folder, message in (
        ("lm", "must be new or hold an AuxiliaryEnsembleForCausalLM"),
        ("member", "must be new or hold an AuxiliaryEnsembleForCausalLM, .* 'auxiliary'"),
        ("notes", "must have no members/ of other origin"),
        ("the-base", "must be new or hold"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / folder)
    assert files_of(tmp_path) == before
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"must be new or hold an AuxiliaryForCausalLM, .* 'auxiliary_ensemble'"):
        model.members["a"].save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="push_to_hub must be False"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)


def test_a_base_inside_the_folder_is_not_destroyed(tmp_path):
    tiny_base().save_pretrained(tmp_path / "out" / "members" / "base")
    model = named(str(tmp_path / "out" / "members" / "base"))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="save_directory must be apart from the base's own folder"):
        model.save_pretrained(tmp_path / "out")
    assert files_of(tmp_path) == before


def test_another_base_is_an_error_unless_meant(base_folder, tmp_path, tokens):
    model = named(base_folder)
    model.save_pretrained(tmp_path / "saved")
    os.rename(base_folder, base_folder + "-moved")
    with pytest.raises(OSError, match="could not be loaded: pass base="):
        AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved", base=base_folder + "-moved")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path / "again")
    pointers = [json.loads(path.read_text())["base_name_or_path"] for path in (tmp_path / "again").rglob("config.json")]
    assert pointers == [base_folder + "-moved"] * 4
    other = tiny_model("llama", seed=5, width=24)
    with pytest.raises(ValueError, match="base must be the model that the auxiliary was saved with"):
        AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved", base=other)
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved", base=other, check_base=False)
    assert loaded.base is other
    with pytest.raises(ValueError, match="save_base must be True"):
        loaded.save_pretrained(tmp_path / "third")


def test_members_of_another_base_in_a_folder_are_an_error(base_folder, tmp_path):
    named(base_folder).save_pretrained(tmp_path / "saved")
    other = tiny_ensemble(base=tiny_model("llama", seed=5, width=24))
    other.save_pretrained(tmp_path / "other", save_base=True)
    os.rename(tmp_path / "saved" / "members" / "a", tmp_path / "kept")
    os.rename(tmp_path / "other" / "members" / "a", tmp_path / "saved" / "members" / "a")
    with pytest.raises(ValueError, match="base must be the model that the auxiliary was saved with"):
        AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved")


def test_missing_members_are_errors(base_folder, tmp_path):
    named(base_folder).save_pretrained(tmp_path / "saved")
    os.rename(tmp_path / "saved" / "members" / "b", tmp_path / "b")
    with pytest.raises(OSError):
        AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match="must hold the configuration of an AuxiliaryEnsembleForCausalLM"):
        AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path, config=AuxiliaryEnsembleConfig())
    with pytest.raises(TypeError, match="config must be an AuxiliaryEnsembleConfig"):
        AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path, config=AuxiliaryConfig())


def test_ensembles_are_no_members(base_folder, tmp_path):
    model = named(base_folder)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(TypeError, match="must not be an ensemble: take a member's folder in"):
        AuxiliaryEnsembleForCausalLM.from_members(model.base, {"x": tmp_path / "saved"})


def test_options_of_loading(base_folder, tmp_path):
    model = named(base_folder)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "saved")
    loaded, info = AuxiliaryEnsembleForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, base_kwargs={"dtype": torch.float16}, output_loading_info=True
    )
    assert {p.dtype for p in loaded.base.parameters()} == {torch.float16}
    assert {p.dtype for one in loaded.members.values() for p in one.aux.parameters()} == {torch.bfloat16}
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    assert loaded.generation_config.max_new_tokens == 17 and loaded.generation_config.eos_token_id == 1


def test_sharded_weights_load(base_folder, tmp_path):
    model = named(base_folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    assert len(list((tmp_path / "saved" / "members" / "a").glob("*.safetensors"))) > 1
    assert same_state(model, AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved"))


def test_tied_weights_are_saved_and_stay_tied(base_folder, tmp_path, tokens):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    model = AuxiliaryEnsembleForCausalLM.from_members(
        base, {"tied": tiny_model("gpt2", seed=3), "a": tiny_member(base)}
    ).eval()
    assert model.all_tied_weights_keys["members.tied.aux.lm_head.weight"] == "members.tied.aux.transformer.wte.weight"
    model.save_pretrained(tmp_path / "saved")
    loaded = AuxiliaryEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    aux = loaded.members["tied"].aux
    assert aux.get_input_embeddings().weight is aux.get_output_embeddings().weight


def test_tokens_of_named_models_must_agree(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for name, words in (("one", ["a", "b"]), ("two", ["b", "a"])):
        tiny_model("gpt2", seed=len(name)).save_pretrained(tmp_path / name)
        vocabulary = {word: i for i, word in enumerate(words)}
        model = tokenizers.models.WordLevel(vocabulary, unk_token="a")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="base and aux must share their tokens"):
        AuxiliaryEnsembleForCausalLM.from_members(str(tmp_path / "one"), {"other": str(tmp_path / "two")})
