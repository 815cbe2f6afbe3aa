"""`nn.AuxCrossEntropyLoss`: the function as a module, whose weight moves, is saved and is loaded."""

import copy
import pickle

import pytest
import torch
from inputs import logits

from auxkernels import Logits, aux_cross_entropy, nn

OPTIONS = {
    "ignore_index": 3,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "reduction": "sum",
    "vocab_size": 9,
    "return_stats": True,
    "recompute": True,
}


def arguments(device):
    base, aux = logits(4, 12, device=device), logits(4, 12, device=device, requires_grad=True)
    return base, aux, torch.tensor([0, 3, 8, 5], device=device)


def test_the_module_is_the_function_with_its_options(impl):
    given, weight = arguments(impl.device), torch.rand(9, device=impl.device)
    module = nn.AuxCrossEntropyLoss(weight, backend=impl.backend, **OPTIONS)
    loss, stats = module(*given)
    want, want_stats = aux_cross_entropy(*given, weight=weight, backend=impl.backend, **OPTIONS)
    assert torch.equal(loss, want) and torch.equal(stats.entropy, want_stats.entropy)
    assert torch.equal(torch.autograd.grad(loss, given[1])[0], torch.autograd.grad(want, given[1])[0])


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_the_function(impl, option):
    """One option at a time, against the function with that option and against the module without it."""
    base, aux, target = arguments(impl.device)
    aux = aux if option == "vocab_size" else aux[:, :9]
    base = base if option == "vocab_size" else base[:, :9]
    module = nn.AuxCrossEntropyLoss(backend=impl.backend, **{option: OPTIONS[option]})
    got = module(base, aux, target)
    want = aux_cross_entropy(base, aux, target, backend=impl.backend, **{option: OPTIONS[option]})
    plain = nn.AuxCrossEntropyLoss(backend=impl.backend)(base, aux, target)
    if option == "return_stats":
        assert torch.equal(got[0], want[0]) and torch.equal(got[1].lse, want[1].lse)
        return
    assert torch.equal(got, want)
    if option == "recompute":
        first, second = (torch.autograd.grad(got, aux, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
    else:
        assert not torch.equal(got, plain)


def test_the_normalizer_belongs_to_a_call_and_not_to_the_module(impl):
    given = arguments(impl.device)
    module = nn.AuxCrossEntropyLoss(ignore_index=3, backend=impl.backend)
    want = aux_cross_entropy(*given, ignore_index=3, normalizer=7, backend=impl.backend)
    assert torch.equal(module(*given, normalizer=7), want)
    assert torch.equal(module(*given, torch.tensor(7)), want)


def test_sources_of_every_kind_go_through(impl):
    base, aux, target = arguments(impl.device)
    module = nn.AuxCrossEntropyLoss(ignore_index=3, backend=impl.backend)
    sources = ([base, Logits(base, scale=-0.5)], Logits(aux, softcap=4.0))
    want = aux_cross_entropy(*sources, target, ignore_index=3, backend=impl.backend)
    assert torch.equal(module(*sources, target), want)
    assert torch.equal(
        module(base, None, target), aux_cross_entropy(base, None, target, ignore_index=3, backend=impl.backend)
    )


def test_the_weight_is_a_buffer_that_moves_is_saved_and_is_loaded():
    module = nn.AuxCrossEntropyLoss(torch.rand(9))
    assert list(module.state_dict()) == ["weight"] and not list(module.parameters())
    other = nn.AuxCrossEntropyLoss(torch.zeros(9))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert module.double().weight.dtype == torch.float64
    assert module.to("meta").weight.device.type == "meta"
    assert nn.AuxCrossEntropyLoss().state_dict() == {}


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_the_module_survives_deepcopy_and_pickle(again):
    given = arguments("cpu")
    module = nn.AuxCrossEntropyLoss(torch.rand(9), **OPTIONS)
    copied = again(module)
    assert copied.weight is not module.weight
    assert torch.equal(copied(*given)[0], module(*given)[0])


def test_the_module_says_what_it_is():
    text = repr(nn.AuxCrossEntropyLoss(ignore_index=3, label_smoothing=0.25, reduction="sum"))
    assert text.startswith("AuxCrossEntropyLoss(")
    for part in ("ignore_index=3", "label_smoothing=0.25", "reduction='sum'"):
        assert part in text


def test_bad_options_are_refused_by_name():
    with pytest.raises(TypeError, match="labels_smoothing"):
        nn.AuxCrossEntropyLoss(labels_smoothing=0.1)
    base, aux, target = arguments("cpu")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        nn.AuxCrossEntropyLoss(label_smoothing=2.0, ignore_index=3)(base, aux, target)
