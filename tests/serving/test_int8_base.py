"""A base in int8 (compressed-tensors, weights and activations) beside an auxiliary in float32."""

import pairs
import pytest
import torch
from engines import MANY, generate
from pairs import BASE, SCALE, SMALL, change_config, change_weights
from transformers import AutoModelForCausalLM

from auxkernels.models import AuxiliaryForCausalLM


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """(folder of the pair, its auxiliary, the base's weights as float32)."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(BASE)
    base.save_pretrained(folder / "base")

    def quantise(weights):
        for name in [name for name in weights if name.endswith("proj.weight")]:
            scale = weights[name].abs().amax(1, keepdim=True) / 127
            weights[name] = (weights[name] / scale).round().to(torch.int8)
            weights[name + "_scale"] = scale
            base.get_parameter(name).data = weights[name] * scale

    change_weights(folder / "base" / "model.safetensors", quantise)
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    change_config(folder / "base", quantization_config=quantisation)
    aux = AutoModelForCausalLM.from_config(SMALL).eval()
    quantised = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    joined = AuxiliaryForCausalLM.from_base_and_aux(quantised, aux, zero_init=False, aux_scale=SCALE)
    joined.save_pretrained(folder / "tuned")
    return folder / "tuned", aux, base.eval()


def rounded(layer, inputs):
    """A token's numbers as int8 of one scale."""
    (x,) = inputs
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale,)


@torch.no_grad()
def test_only_the_base_is_rounded_to_int8(engines, int8):
    """Nearer, four times and more, to a sum with a base of rounded weights and activations than to other sums."""
    folder, aux, base = int8
    base, aux = base.double(), aux.double()
    engine = engines(folder)
    outputs = generate(engine, MANY, max_tokens=1, prompt_logprobs=1)

    def sums(rounded_models):
        layers = [layer for model in rounded_models for name, layer in model.named_modules() if name.endswith("proj")]
        hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
        tokens = [torch.tensor([prompt]) for prompt in MANY]
        total = [(base(ids).logits[0] + SCALE * aux(ids).logits[0]).log_softmax(-1) for ids in tokens]
        for hook in hooks:
            hook.remove()
        return total

    def error(total):
        found = [
            abs(got.logprob - total[i][n - 1, token].item())
            for i, one in enumerate(outputs)
            for n, row in enumerate(one.prompt_logprobs)
            for token, got in (row or {}).items()
        ]
        assert len(found) > 1000
        return sum(found) / len(found)

    of_int8 = error(sums([base]))
    assert 4 * of_int8 < error(sums([]))
    assert 4 * of_int8 < error(sums([base, aux]))


def test_another_int8_base_is_refused(engines, int8, tmp_path):
    folder = pairs.copied(int8[0].parent, tmp_path / "copy")
    engines.close()
    change_config(folder / "tuned", base_name_or_path=str(folder / "base"))

    def nudge(weights):
        weights["model.layers.1.mlp.up_proj.weight"][0, :8] += 1

    change_weights(folder / "base" / "model.safetensors", nudge)
    with pytest.raises(ValueError, match="the base must be the model that the auxiliary was saved with"):
        engines(folder / "tuned")


def test_an_int8_base_that_lacks_a_weight_is_refused(engines, int8, tmp_path):
    folder = pairs.copied(int8[0].parent, tmp_path / "copy")
    engines.close()
    change_config(folder / "tuned", base_name_or_path=str(folder / "base"))
    name = "model.layers.1.mlp.up_proj.weight"

    def remove(weights):
        del weights[name], weights[name + "_scale"]

    change_weights(folder / "base" / "model.safetensors", remove)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        engines(folder / "tuned", hf_overrides={"check_base": False})
