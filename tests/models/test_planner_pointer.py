"""A planner's folder points to its frozen language model, and holds it only where a pointer would not bring it back."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from planner_models import ARCHITECTURES, LABEL_DIM, NUM_LABELS, SEGMENT_IDS, TinyPlanner, scores, tiny_lm, tokens
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from auxkernels.models.labels import collate_segments
from auxkernels.models.planner import PlannerForCausalLM


@pytest.fixture(params=ARCHITECTURES)
def lm_folder(request, tmp_path):
    tiny_lm(request.param).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def model_of(lm, **options):
    model = PlannerForCausalLM.from_lm(lm, TinyPlanner(), num_labels=NUM_LABELS, label_dim=LABEL_DIM, **options)
    with torch.no_grad():
        for weight in model.conditioning.parameters():
            weight.normal_()
    return model.eval()


def loaded(folder, **options):
    return PlannerForCausalLM.from_pretrained(folder, planner=TinyPlanner(), **options)


def kept_keys(folder):
    return set(load_file(folder / "model.safetensors"))


def holds_lm(folder):
    return any(key.startswith("lm.") for key in kept_keys(folder))


def logits(model, ids, given):
    return model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("place", ["layer_input", "attention_output"])
def test_a_frozen_language_model_is_pointed_to(lm_folder, tmp_path, by_name, place):
    lm = str(lm_folder) if by_name else AutoModelForCausalLM.from_pretrained(lm_folder)
    model, ids, given = model_of(lm, place=place), tokens(), scores()
    model.save_pretrained(tmp_path / "planner")
    assert kept_keys(tmp_path / "planner") == {key for key in model.state_dict() if not key.startswith("lm.")}
    other = loaded(tmp_path / "planner")
    assert torch.equal(logits(other, ids, given), logits(model, ids, given))
    assert torch.equal(other.planner.head.weight, model.planner.head.weight) and not other.training
    assert not any(weight.requires_grad for weight in other.lm.parameters())
    assert all(weight.requires_grad for weight in other.conditioning.parameters())
    assert other.generation_config.to_dict() == model.generation_config.to_dict()
    other.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), ids, given), logits(model, ids, given))


def test_save_lm_includes_it_and_a_folder_forgets_what_it_held(lm_folder, tmp_path):
    model, ids, given = model_of(str(lm_folder)), tokens(), scores()
    model.save_pretrained(tmp_path / "planner", save_lm=True)
    assert holds_lm(tmp_path / "planner")
    other = loaded(tmp_path / "planner")
    assert torch.equal(logits(other, ids, given), logits(model, ids, given))
    other.save_pretrained(tmp_path / "planner")
    assert not holds_lm(tmp_path / "planner")
    assert torch.equal(logits(loaded(tmp_path / "planner"), ids, given), logits(model, ids, given))
    with pytest.raises(ValueError, match="lm and lm_kwargs must be None"):
        model.save_pretrained(tmp_path / "planner", save_lm=True)
        loaded(tmp_path / "planner", lm=model.lm)


def test_a_language_model_that_is_trained_is_saved_whole(lm_folder, tmp_path):
    model = model_of(str(lm_folder), freeze_lm=False)
    model.save_pretrained(tmp_path / "unfrozen")
    assert holds_lm(tmp_path / "unfrozen")
    with pytest.raises(ValueError, match="save_lm must be True for a language model that is not frozen"):
        model.save_pretrained(tmp_path / "refused", save_lm=False)
    with torch.no_grad():
        model.lm.get_input_embeddings().weight[5] += 1.0
    model.freeze_lm()
    model.save_pretrained(tmp_path / "tuned")
    assert holds_lm(tmp_path / "tuned")
    with pytest.raises(ValueError, match="has changed since it was given"):
        model.save_pretrained(tmp_path / "refused", save_lm=False)
    ids, given = tokens(), scores()
    assert torch.equal(logits(loaded(tmp_path / "tuned"), ids, given), logits(model, ids, given))


def test_a_nameless_language_model_is_saved_whole(tmp_path):
    model = model_of(tiny_lm("llama"))
    model.save_pretrained(tmp_path)
    assert holds_lm(tmp_path)
    with pytest.raises(ValueError, match="has no name or path"):
        model.save_pretrained(tmp_path / "refused", save_lm=False)


def test_a_folder_from_before_the_pointer_loads(lm_folder, tmp_path):
    model, ids, given = model_of(str(lm_folder)), tokens(), scores()
    model.save_pretrained(tmp_path / "planner", save_lm=True)
    file = tmp_path / "planner" / "config.json"
    config = json.loads(file.read_text())
    names = ["lm_name_or_path", "lm_revision", "lm_fingerprint", "lm_is_saved", "place", "gumbel_clean_gradient"]
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in names}))
    other = loaded(tmp_path / "planner")
    assert torch.equal(logits(other, ids, given), logits(model, ids, given))
    other.save_pretrained(tmp_path / "again")
    assert holds_lm(tmp_path / "again"), "nobody knows where it came from"


@pytest.mark.parametrize("how", ["values", "config"])
def test_what_a_language_model_was_loaded_with_is_in_the_pointer(tmp_path, how):
    tiny_lm("llama").save_pretrained(tmp_path / "many" / "inside", variant="small")
    where = {"subfolder": "inside", "variant": "small"}
    config = AutoConfig.from_pretrained(tmp_path / "many", subfolder="inside", num_hidden_layers=3)
    what = {"num_hidden_layers": 3} if how == "values" else {"config": config}
    model, ids, given = model_of(str(tmp_path / "many"), lm_kwargs=where | what), tokens(), scores()
    model.save_pretrained(tmp_path / "planner")
    assert not holds_lm(tmp_path / "planner")
    other = loaded(tmp_path / "planner")
    assert len(other.lm.model.layers) == 3 and torch.equal(logits(other, ids, given), logits(model, ids, given))
    (tmp_path / "many" / "inside").rename(tmp_path / "moved")
    moved = loaded(tmp_path / "planner", lm=tmp_path / "moved", lm_kwargs={"variant": "small"})
    moved.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), ids, given), logits(model, ids, given))


def test_a_language_model_of_another_vocabulary_is_called_by_its_number_of_tokens(lm_folder, tmp_path):
    model_of(str(lm_folder)).save_pretrained(tmp_path / "planner")
    other = AutoModelForCausalLM.from_pretrained(lm_folder)
    other.resize_token_embeddings(other.config.vocab_size + 3)
    with pytest.raises(ValueError, match=f"got {other.config.vocab_size} tokens where it had"):
        loaded(tmp_path / "planner", lm=other)


def test_another_language_model_is_refused_and_a_given_one_is_shared(lm_folder, tmp_path):
    model, ids, given = model_of(str(lm_folder)), tokens(), scores()
    model.save_pretrained(tmp_path / "planner")
    shared = AutoModelForCausalLM.from_pretrained(lm_folder)
    other = loaded(tmp_path / "planner", lm=shared)
    assert other.lm is shared and torch.equal(logits(other, ids, given), logits(model, ids, given))
    with torch.no_grad():
        next(shared.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="got other weights or shapes"):
        loaded(tmp_path / "planner", lm=shared)
    assert loaded(tmp_path / "planner", lm=shared, check_lm=False).lm is shared
    lm_folder.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="could not be loaded: pass lm="):
        loaded(tmp_path / "planner")
    moved = loaded(tmp_path / "planner", lm=tmp_path / "moved")
    moved.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), ids, given), logits(model, ids, given))


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("lm_fingerprint", ValueError, "must say which language model it was saved with: pass check_lm=False"),
        ("text_config", OSError, "must hold the configuration of a PlannerForCausalLM, found none"),
    ],
)
def test_a_folder_that_does_not_describe_its_language_model_says_so(lm_folder, tmp_path, name, error, message):
    model_of(str(lm_folder)).save_pretrained(tmp_path / "planner")
    file = tmp_path / "planner" / "config.json"
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        loaded(tmp_path / "planner")


def test_the_language_models_own_folder_is_never_overwritten(lm_folder):
    model = model_of(str(lm_folder))
    before = (lm_folder / "config.json").read_bytes()
    for save_lm in (None, True):
        with pytest.raises(ValueError, match="apart from the language model's own folder"):
            model.save_pretrained(lm_folder, save_lm=save_lm)
    assert (lm_folder / "config.json").read_bytes() == before


def test_missing_own_weights_are_an_error(lm_folder, tmp_path):
    PlannerForCausalLM.from_lm(str(lm_folder), num_labels=NUM_LABELS, label_dim=LABEL_DIM).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"has_planner": True}))
    with pytest.raises(ValueError, match=r"missing or belong to nothing: planner\.head\.bias"):
        loaded(tmp_path)


def test_dtypes_come_back(tmp_path):
    tiny_lm("llama", torch.bfloat16).save_pretrained(tmp_path / "lm")
    model, ids, given = model_of(str(tmp_path / "lm"), lm_kwargs={"dtype": torch.bfloat16}), tokens(), scores()
    model.save_pretrained(tmp_path / "planner")
    other = loaded(tmp_path / "planner")
    assert other.lm.dtype == torch.bfloat16 and other.conditioning.weight.dtype == torch.float32
    assert torch.equal(logits(other, ids, given), logits(model, ids, given))
    assert loaded(tmp_path / "planner", dtype=torch.float32).lm.dtype == torch.float32


def test_a_trainer_resumes_from_a_checkpoint_without_the_language_model(lm_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(3, 60, (8,), generator=generator).tolist(),
            "segment_ids": [0, 0, 0, 1, 1, 1, 2, 2],
            "label_scores": torch.randn(3, NUM_LABELS, generator=generator).tolist(),
        }
        for _ in range(8)
    ]

    def run(steps, **options):
        torch.manual_seed(1)
        model = model_of(str(lm_folder))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"run {steps}"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
        )
        collator = lambda examples: collate_segments(examples, 0)  # noqa: E731
        Trainer(model, arguments, train_dataset=data, data_collator=collator).train(**options)
        return model

    whole = run(4)
    checkpoint = tmp_path / "run 4" / "checkpoint-2"
    assert not holds_lm(checkpoint)
    resumed = run(4, resume_from_checkpoint=str(checkpoint))
    for one, two in zip(whole.conditioning.parameters(), resumed.conditioning.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert loaded(tmp_path / "run 4" / "checkpoint-4").config.lm_name_or_path == str(lm_folder)
