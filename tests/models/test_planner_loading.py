"""Reloaded planners have every buffer of every family."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from recurrent_models import COMMON, CONFIGS, SIZES  # noqa: E402

from auxkernels.models import PlannerForCausalLM  # noqa: E402

OTHERS = {
    "gemma3": lambda **sizes: transformers.Gemma3TextConfig(head_dim=8, intermediate_size=48, **sizes),
    "gpt_neo": lambda **sizes: transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], **COMMON
    ),
    "llama": lambda **sizes: transformers.LlamaConfig(intermediate_size=48, **sizes),
    "phi3": lambda **sizes: transformers.Phi3Config(intermediate_size=48, **sizes),
    "gptj": lambda **sizes: transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **COMMON),
}


def unsaved_buffers(model):
    return dict(model.named_non_persistent_buffers())


@pytest.mark.parametrize("family", [*CONFIGS, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_that_are_not_saved_are_those_of_the_family_reloaded_alone(family, dtype, tmp_path):
    config = CONFIGS[family] if family in CONFIGS else OTHERS[family](**SIZES, **COMMON)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lm.save_pretrained(tmp_path / "alone")
    want = unsaved_buffers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone"))
    assert want.keys() == unsaved_buffers(lm).keys()
    model = PlannerForCausalLM.from_lm(lm, num_labels=5, label_dim=4, layers=[1], mode="fixed").eval()
    model.conditioning.weight.data.normal_()
    model.save_pretrained(tmp_path / "planner")
    junk = [torch.full((4096,), 7.0e7) for _ in range(64)]  # so that freed memory is not zeros by chance
    del junk
    again = PlannerForCausalLM.from_pretrained(tmp_path / "planner").eval()
    torch.testing.assert_close(unsaved_buffers(again.lm), want, rtol=0.0, atol=0.0, equal_nan=True)
    if dtype == torch.float32:  # in others GPT-J's tables depend on whether they were made anew, alone too
        tokens = torch.randint(3, 61, (2, 7))
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        torch.testing.assert_close(want, unsaved_buffers(lm), rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0.0, atol=0.0)
