"""How far float32 paths through a tiny network may be apart: rows alone or in a batch, with or without a cache.

Products of the library sum in an order that depends on the processor and on the number of rows, and the layers multiply
what that makes. `drawn_error` is what roundings of that size do to a network in float64.
"""

import copy

import torch
from tolerance import Draw, assert_alike, limit_of, unit
from transformers.pytorch_utils import Conv1D

# roundings that a network of a few sharp layers makes of one: see test_network.py
OF_A_NETWORK = 512


def drawn_error(
    model: torch.nn.Module, results_of, seed: int, dtype: torch.dtype = torch.float32, part: str = ""
) -> float:
    """Largest error of results_of(model), a tensor, over its largest number, when every layer's output is rounded.

    A sum of K terms in float32, in any order, errs by about sqrt(K) roundings of the largest. dtype: what the layers of
    this part of the model store their outputs in.
    """
    draw, exact = Draw(seed), copy.deepcopy(model).double()

    def rounded(module, args, out):
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return None
        num_terms = module.weight.shape[0] if isinstance(module, Conv1D) else getattr(module, "in_features", 1)
        size = out.detach().abs()
        size = unit(torch.float32) * num_terms**0.5 * size.amax(-1, keepdim=True) + unit(dtype) * size
        return out + size * draw(out)

    want = results_of(exact)
    for module in exact.get_submodule(part).modules():
        if not list(module.children()):
            module.register_forward_hook(rounded)
    return float((results_of(exact) - want).abs().max() / want.abs().max())


def assert_same_in_16_bits(loss, exact_of, model, part: str = "") -> None:
    """A loss with a part of the model in bfloat16, against exact_of(model) in float64 with such roundings drawn."""
    errors = [drawn_error(model, lambda m: exact_of(m).detach(), seed, torch.bfloat16, part) for seed in range(8)]
    want = exact_of(copy.deepcopy(model).double())
    assert abs(float(loss / want) - 1) <= limit_of(errors)


def assert_same_network(got, want) -> None:
    """Tensors, or sequences or dicts of them, as two paths through a tiny network may make them.

    A tensor of small numbers beside large ones, such as the gradient of a bias that softmax takes no notice of, is made
    of roundings of the large ones.
    """
    if isinstance(want, torch.Tensor):
        assert_alike(got, want, OF_A_NETWORK)
        return
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = got.values(), want.values()
    got, want = list(got), list(want)
    floats = [t for t in want if t.is_floating_point() and t.numel()]
    largest = max((float(t.detach().abs().max()) for t in floats), default=0.0)
    for one, two in zip(got, want, strict=True):
        own = float(two.detach().abs().max()) if two.numel() and two.is_floating_point() else 0.0
        if own:
            assert_alike(one, two, OF_A_NETWORK * (1 + largest / 16 / own))
        else:
            torch.testing.assert_close(one, two, rtol=0, atol=OF_A_NETWORK / 8 * unit(torch.float32) * largest)
