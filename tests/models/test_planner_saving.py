"""save_pretrained and from_pretrained: everything comes back, and nothing is made up."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from planner_models import (
    ARCHITECTURES,
    LABEL_DIM,
    NUM_LABELS,
    SEGMENT_IDS,
    TinyPlanner,
    scores,
    tiny_lm,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file, save_file

from auxkernels.models.planner import PlannerForCausalLM
from auxkernels.models.planner_config import PlannerConfig

FEATURES = {"features": torch.randn(6, 5)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("init", ["zero_projection", "zero_gate"])
def test_a_saved_model_comes_back(architecture, init, tmp_path):
    options = {"layers": [1, 3], "mode": "straight_through", "temperature": 0.5, "conditioning_init": init}
    model, ids = tiny_model(architecture, **options), tokens()
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix not in (".json",)] == [".safetensors"]
    planner = TinyPlanner()
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=planner)
    call = {"segment_ids": SEGMENT_IDS, "planner_inputs": FEATURES}
    assert torch.equal(other(ids, **call).logits, model(ids, **call).logits)
    assert other.planner is planner and not other.training and other.config.layers == [1, 3]
    assert not any(weight.requires_grad for weight in other.lm.parameters())
    assert all(weight.requires_grad for weight in other.conditioning.parameters())
    assert other.generation_config.to_dict() == model.generation_config.to_dict()
    other.freeze_lm(False)
    assert all(weight.requires_grad for weight in other.lm.parameters())


def test_an_unfrozen_model_comes_back_unfrozen(tmp_path):
    tiny_model(freeze_lm=False).save_pretrained(tmp_path)
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner())
    assert all(weight.requires_grad for weight in other.parameters())


def test_saved_planner_weights_need_their_module(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass planner="):
        PlannerForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing or belong to nothing: planner.0.bias"):
        PlannerForCausalLM.from_pretrained(tmp_path, planner=torch.nn.Sequential(torch.nn.Linear(5, 7)))


def test_a_planner_is_kept_as_it_is_where_none_was_saved(tmp_path):
    model = PlannerForCausalLM.from_lm(tiny_lm("gpt2"), num_labels=NUM_LABELS, label_dim=LABEL_DIM)
    model.save_pretrained(tmp_path)
    assert PlannerForCausalLM.from_pretrained(tmp_path).planner is None
    planner = TinyPlanner()
    before = planner.head.weight.detach().clone()
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=planner)
    assert torch.equal(other.planner.head.weight, before) and other.config.has_planner


@pytest.mark.parametrize("name", ["conditioning.bias", "lm.model.norm.weight", "planner.head.bias"])
def test_a_missing_weight_is_an_error_never_a_random_one(name, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        PlannerForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner())


def test_a_bfloat16_language_model_has_float32_conditioning_also_when_loaded(tmp_path):
    model, ids = tiny_model(lm=tiny_lm("llama", torch.bfloat16)), tokens()
    model.save_pretrained(tmp_path)
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner())
    for loaded in (model, other):
        assert loaded.conditioning.weight.dtype == torch.float32 and loaded.lm.dtype == torch.bfloat16
    assert torch.equal(other.planner.head.weight, model.planner.head.weight)
    assert other.planner.head.weight.dtype == torch.float32
    given = scores()
    out = other(ids, segment_ids=SEGMENT_IDS, label_scores=given, labels=ids)
    assert torch.equal(out.logits, model(ids, segment_ids=SEGMENT_IDS, label_scores=given).logits)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32


def test_configuration_comes_back_and_hides_no_generation_setting(tmp_path):
    model = tiny_model(temperature=0.3, gumbel_scale=0.5, fixed_label=4)
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "planner" and saved["text_config"]["model_type"] == "llama"
    config = PlannerConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.label_dim, config.label_temperature) == (NUM_LABELS, LABEL_DIM, 0.3)
    assert (config.gumbel_scale, config.fixed_label, config.get_text_config().num_hidden_layers) == (0.5, 4, 4)
    assert model.generation_config.temperature in (None, 1.0)


def test_a_planner_keeps_the_dtype_that_it_came_with(tmp_path):
    model = tiny_model(planner=TinyPlanner().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner().to(torch.bfloat16))
    assert other.planner.head.weight.dtype == torch.bfloat16
    assert torch.equal(other.planner.head.weight, model.planner.head.weight)


def test_auto_classes_load_it_where_they_know_it(tmp_path):
    transformers.AutoConfig.register("planner", PlannerConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(PlannerConfig, PlannerForCausalLM, exist_ok=True)
    model, ids = tiny_model(), tokens()
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner())
    call = {"segment_ids": SEGMENT_IDS, "planner_inputs": FEATURES}
    assert torch.equal(other(ids, **call).logits, model(ids, **call).logits)


def test_resized_embeddings_come_back(tmp_path):
    model, ids = tiny_model("gpt2"), tokens()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=TinyPlanner())
    call = {"segment_ids": SEGMENT_IDS, "planner_inputs": FEATURES}
    got = other(ids, **call).logits
    assert got.shape[-1] == 70 and torch.equal(got, model(ids, **call).logits)
    assert model.lm.config.vocab_size == model.config.text_config.vocab_size == 70


# -- modules that are given --------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """A planner around a model of transformers, or a plain one; two modules share a buffer."""

    def __init__(self, kind: str):
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        if kind == "plain":
            self.body = torch.nn.Linear(16, 16)
        elif kind == "bert":
            config = transformers.BertConfig(vocab_size=61, max_position_embeddings=16, **sizes)
            self.body = transformers.BertModel(config).eval()
        else:
            self.body = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=61, **sizes)).eval()
        self.head = torch.nn.Linear(16, NUM_LABELS)
        self.register_buffer("scale", torch.arange(1.0, 17.0, dtype=torch.float64), persistent=False)
        self.head.register_buffer("scale", self.scale, persistent=False)

    def forward(self, ids):
        is_plain = isinstance(self.body, torch.nn.Linear)
        hidden = self.body(ids.float()) if is_plain else self.body(ids).last_hidden_state[:, -1]
        return self.head(hidden * self.scale.float())


@pytest.mark.parametrize("kind", ["plain", "bert", "llama"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_buffers_that_are_not_saved_keep_their_values(kind, architecture, tmp_path):
    source = Encoder(kind)
    model, ids, sentences = tiny_model(architecture, planner=source), tokens(), torch.randint(3, 61, (6, 16))
    model.save_pretrained(tmp_path)
    planner = Encoder(kind)
    trash = [torch.full((size,), float("nan")) for size in range(1, 40) for _ in range(20)]
    del trash  # memory that is not initialized likely holds NaN now
    other = PlannerForCausalLM.from_pretrained(tmp_path, planner=planner)
    for one, two in ((source, planner), (model.lm, other.lm)):
        want, got = dict(one.named_buffers(remove_duplicate=False)), dict(two.named_buffers(remove_duplicate=False))
        assert want.keys() == got.keys() and (one is model.lm or "scale" in want)
        for name in want:
            assert torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype, name
    assert planner.head.scale is planner.scale
    call = {"segment_ids": SEGMENT_IDS, "planner_inputs": {"ids": sentences}}
    assert torch.equal(other(ids, **call).logits, model(ids, **call).logits)


def test_given_modules_keep_their_marks_and_weights():
    lm, planner = tiny_lm("llama"), Encoder("bert")
    marks = [vars(m).get("_is_hf_initialized") for root in (lm, planner) for m in root.modules()]
    weights = {name: value.clone() for name, value in planner.state_dict().items()}
    model = tiny_model(lm=lm, planner=planner)
    assert [vars(m).get("_is_hf_initialized") for root in (lm, planner) for m in root.modules()] == marks
    assert None in marks and True in marks
    assert all(torch.equal(value, weights[name]) for name, value in model.planner.state_dict().items())
