"""Which base an auxiliary belongs to: also where its weights are sharded over processes, or quantised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny import tiny_model, tiny_pair

from auxkernels.models import AuxiliaryForCausalLM, saving

HERE = Path(__file__).parent


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
@pytest.mark.slow
def test_a_sharded_base_has_the_fingerprint_of_the_whole_one_and_one_rank_saves_alone(tmp_path):
    world = 2
    base = tiny_model("llama", seed=1, width=24)
    base.save_pretrained(tmp_path / "base")
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "sharded_base.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"joined": True, "fully sharded": True, "in columns": True}
    again = AuxiliaryForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.base_fingerprint == saving.fingerprint(base)


class Blocks(torch.Tensor):
    """A quantised weight as libraries have them: int8 blocks and a scale behind a tensor that does nothing else."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised tensor")


def quantised(weight, kind, change=0.0):
    scale = weight.abs().amax() / 127 + change
    data = (weight / scale).round().to(torch.int8)
    if kind == "blocks":
        return Blocks(data, scale)
    if kind == "packed":  # two four-bit numbers in a byte
        return (data.flatten()[::2].view(torch.uint8)).reshape(-1, 1)
    if kind == "torch":
        return torch.quantize_per_tensor(weight, scale.item(), 0, torch.qint8)
    return data if kind == "int8" else weight.to(getattr(torch, kind))


def with_quantised_layer(kind, change=0.0):
    model = tiny_model("llama", seed=1)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(quantised(layer.weight.detach() + change, kind), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.parametrize("kind", ["int8", "packed", "blocks", "torch", "float8_e4m3fn", "float8_e5m2"])
def test_quantised_weights_have_a_fingerprint_that_tells_them_apart(kind):
    one, same, other = (saving.fingerprint(with_quantised_layer(kind, change)) for change in (0.0, 0.0, 0.1))
    json.dumps(one)
    assert saving.is_same_base(one, same) and not saving.is_same_base(one, other)
    assert None not in one["values"] and None not in one["sums"]


@pytest.mark.parametrize("kind", ["int8", "packed", "blocks"])
def test_an_auxiliary_of_a_quantised_base_is_saved(kind, tmp_path):
    model = tiny_pair("llama", "gpt2")
    model.config.base_name_or_path = "somewhere"
    layer = model.base.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(quantised(layer.weight.detach(), kind), requires_grad=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["base_fingerprint"]
    assert saving.is_same_base(saved, saving.fingerprint(model.base))


def test_types_that_torch_cannot_convert_are_read_as_bytes():
    numbers = torch.arange(16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert saving._sums([numbers]) == (120.0, 120.0)


def test_fingerprints_of_integer_models_compare():
    one = saving.fingerprint(tiny_model("gpt2"))
    other = {**one, "dtype": "int8"}
    assert saving.is_same_base(one, other)
    assert saving.is_same_base({**one, "dtype": "uint8"}, other)


def test_weights_that_are_partitioned_away_are_not_compared():
    model = tiny_model("gpt2")
    whole = saving.fingerprint(model)
    for weight in model.parameters():
        weight.ds_id, weight.ds_shape = 0, weight.shape
        weight.data = torch.empty(0)
    assert saving.is_sharded(model) and not saving.is_sharded(tiny_model("gpt2"))
    assert saving.is_same_base(whole, saving.fingerprint(model))


def of_files(expected, weights):
    read = saving.FingerprintOfFiles(expected)
    for name, tensor in weights:
        read.add(name, tensor)
    return read


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_a_base_in_any_dtype_are_known_one_tensor_at_a_time(saved, loaded):
    model = tiny_model("llama", seed=1).to(saved)
    weights = [(name, weight.detach().clone()) for name, weight in model.named_parameters()]
    expected = json.loads(json.dumps(saving.fingerprint(model.to(loaded))))
    weights.reverse()  # files have an order of their own
    assert of_files(expected, weights).is_expected()
    assert not of_files(expected, weights[1:]).is_expected()
    other = [(name, weight * (1.1 if "up_proj" in name else 1.0)) for name, weight in weights]
    assert not of_files(expected, other).is_expected()


def test_files_with_some_weights_in_a_wider_dtype_are_those_of_a_model_that_was_loaded_in_one():
    model = tiny_model("llama", seed=1)
    weights = [(name, weight.detach().clone()) for name, weight in model.named_parameters()]
    expected = saving.fingerprint(model.to(torch.bfloat16))
    mixed = [(name, weight if "norm" in name else weight.to(torch.bfloat16)) for name, weight in weights]
    assert of_files(expected, mixed).is_expected()


@pytest.mark.parametrize("kind", ["int8", "packed", "float8_e4m3fn"])
def test_files_of_quantised_weights_are_known(kind):
    model = with_quantised_layer(kind)
    weights = dict(model.named_parameters())
    expected = saving.fingerprint(model)
    assert of_files(expected, weights.items()).is_expected()
    name = "model.layers.1.mlp.up_proj.weight"
    other = {**weights, name: quantised(torch.ones_like(weights[name], dtype=torch.float32), kind)}
    assert not of_files(expected, other.items()).is_expected()
