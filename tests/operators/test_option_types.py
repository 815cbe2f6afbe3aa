"""Options of other types than Python's int, float and bool: what torch takes for one is one, and gives its bits."""

import enum
import fractions

import numpy as np
import pytest
import torch
from inputs import logits

from auxkernels import Head, Logits, aux_cross_entropy, chunk_settings, logit_stats, soft_embedding
from auxkernels.nn import AuxCrossEntropyLoss, SoftEmbedding


class Number(enum.IntEnum):
    TWO = 2


class Whole(int):
    pass


TWOS = [
    np.int64(2),
    np.int8(2),
    np.uint16(2),
    np.array(2),
    Number.TWO,
    Whole(2),
    torch.tensor(2),
    torch.tensor(2).int(),
]
HALVES = [np.float64(0.5), np.float32(0.5), np.float16(0.5), fractions.Fraction(1, 2)]


def losses(impl, **options):
    base, aux = logits(5, 9, device=impl.device), logits(5, 9, device=impl.device, requires_grad=True)
    aux_scale, cap = options.pop("scale", 0.5), options.pop("softcap", 2.0)
    target = torch.tensor([0, 1, 2, 2, 1], device=impl.device)
    loss = aux_cross_entropy(base, Logits(aux, scale=aux_scale, softcap=cap), target, backend=impl.backend, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), aux)


def lookups(impl, **options):
    scores, table = (logits(*shape, device=impl.device, requires_grad=True) for shape in ((5, 9), (9, 3)))
    out, stats = soft_embedding(scores, table, return_stats=True, backend=impl.backend, **options)
    return out.detach(), stats.entropy.detach(), *torch.autograd.grad(out.sum(), (scores, table))


def assert_same(call, impl, given: dict, plain: dict) -> None:
    results = []
    for options in (given, plain):
        torch.manual_seed(0)
        results.append(call(impl, **options))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("value", TWOS, ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', '')}")
def test_integers_of_any_type_are_ints(impl, value):
    for name in ("ignore_index", "vocab_size", "normalizer"):
        assert_same(
            losses, impl, {name: value + (1 if name == "vocab_size" else 0)}, {name: 2 + (name == "vocab_size")}
        )
    assert_same(lookups, impl, {"top_k": value}, {"top_k": 2})
    assert_same(
        lookups,
        impl,
        {"gumbel": 1.0, "seed": torch.tensor(2) if torch.is_tensor(value) else value},
        {"gumbel": 1.0, "seed": 2},
    )
    if not torch.is_tensor(value) and not isinstance(value, np.ndarray):
        for name in ("scale", "softcap", "z_loss"):
            assert_same(losses, impl, {name: value}, {name: 2})
        for name in ("temperature", "gumbel"):
            assert_same(lookups, impl, {name: value, "seed": 1}, {name: 2, "seed": 1})
    stats = logit_stats(logits(2, 9, device=impl.device), None, vocab_size=value, backend=impl.backend)
    assert (stats.argmax < 2).all()


@pytest.mark.parametrize("value", HALVES, ids=lambda v: type(v).__name__)
def test_real_numbers_of_any_type_are_floats(impl, value):
    for name in ("label_smoothing", "z_loss", "scale", "softcap", "normalizer"):
        for extra in ({}, {"recompute": True}, {"reduction": "none"}):
            if name != "normalizer" or "reduction" not in extra:
                assert_same(losses, impl, {name: value} | extra, {name: 0.5} | extra)
    for name in ("temperature", "gumbel"):
        assert_same(lookups, impl, {name: value, "seed": 1}, {name: 0.5, "seed": 1})


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_truth_values_of_numpy_are_bools(impl, value):
    assert_same(lookups, impl, {"hard": value}, {"hard": bool(value)})
    assert_same(losses, impl, {"recompute": value}, {"recompute": bool(value)})


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), np.array([2]), torch.tensor([2]), 2.0, np.float64(2), "2"]
)
def test_what_torch_does_not_take_for_an_int_is_refused(impl, value):
    """bool too: torch.topk(x, True) is a TypeError."""
    for call, name in ((losses, "ignore_index"), (losses, "vocab_size"), (lookups, "top_k"), (lookups, "seed")):
        with pytest.raises((TypeError, ValueError), match=name):
            call(impl, **{name: value})


def test_hard_takes_no_number(impl):
    for value in (1, np.int64(1), np.array([True]), "yes", None):
        with pytest.raises(TypeError, match="hard must be a bool"):
            lookups(impl, hard=value)


def test_modules_take_them(impl):
    options = {"ignore_index": np.int64(2), "vocab_size": np.int32(8), "label_smoothing": np.float32(0.5)}
    base, target = logits(3, 9, device=impl.device), torch.tensor([0, 2, 7], device=impl.device)
    loss = AuxCrossEntropyLoss(**options, backend=impl.backend)(base, None, target, normalizer=np.int64(3))
    plain = {"ignore_index": 2, "vocab_size": 8, "label_smoothing": 0.5}
    assert torch.equal(loss, AuxCrossEntropyLoss(**plain, backend=impl.backend)(base, None, target, normalizer=3))
    module = SoftEmbedding(
        np.int64(9), np.int64(3), np.int64(1), temperature=np.float32(0.5), top_k=np.int64(2), hard=np.False_
    )
    module = module.to(impl.device)
    module.backend = impl.backend
    assert module(base).shape == (3, 3) and module.weight.shape == (9, 3)


def test_configurations_hold_what_json_holds():
    pytest.importorskip("transformers")
    from transformers import GPT2Config

    from auxkernels.models import AuxiliaryConfig, PlannerConfig

    small = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11)
    config = AuxiliaryConfig(small, small, trunk_layer=np.int64(1), vocab_size=np.int32(11), aux_scale=np.float32(0.5))
    assert '"trunk_layer": 1' in config.to_json_string() and '"aux_scale": 0.5' in config.to_json_string()
    options = {"layers": np.arange(2), "label_temperature": np.float32(0.5), "gumbel_hard": np.True_}
    config = PlannerConfig(
        small, np.int64(4), np.int64(3), fixed_label=np.int64(1), gumbel_scale=np.int64(2), **options
    )
    assert config.layers == [0, 1] and '"gumbel_hard": true' in config.to_json_string()


def test_numbers_of_heads_and_of_the_chunk_settings_may_be_numpys(impl, monkeypatch):
    monkeypatch.setattr(chunk_settings, "num_bytes", np.int64(1 << 20))
    hidden, weight = logits(4, 3, device=impl.device), logits(9, 3, device=impl.device)
    target = torch.tensor([0, 1, 2, 3], device=impl.device)
    given, plain = (
        aux_cross_entropy(Head(hidden, weight, scale=scale, softcap=cap), None, target, backend=impl.backend)
        for scale, cap in ((np.float32(0.5), np.int64(3)), (0.5, 3.0))
    )
    assert torch.equal(given, plain)
