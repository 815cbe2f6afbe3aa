"""What the plugin does to a vLLM that serves other models: nothing."""

import subprocess
import sys

import pairs
import torch
from engines import PROMPTS, generate, tokens, vllm
from transformers import AutoModelForCausalLM


def test_loading_it_twice_is_once_and_imports_no_model():
    code = """
import sys
from vllm.plugins import load_general_plugins
from vllm import ModelRegistry
load_general_plugins()
from auxkernels.vllm import register
register()
assert "AuxiliaryForCausalLM" in ModelRegistry.get_supported_archs()
assert "auxkernels.vllm.model" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be served" not in done.stderr + done.stdout


def test_other_models_are_served_as_without_it(engines, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(pairs.SMALL).eval()
    model.save_pretrained(tmp_path)
    engine = engines(tmp_path)
    assert not engine.model_config.logits_processors
    found = tokens(generate(engine, PROMPTS[:2], max_tokens=8, extra_args={"aux_scale": "not ours"}))
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, found, strict=False):
            assert model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_transformers_still_loads_a_folder_in_the_same_process(engines, folder):
    assert vllm.ModelRegistry
    vllm.plugins.load_general_plugins()
    loaded = AutoModelForCausalLM.from_pretrained(folder("other-head-size"))
    assert type(loaded).__name__ == "AuxiliaryForCausalLM"
