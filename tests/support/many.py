"""`aux_cross_entropies` against the single calls that it stands for."""

from dataclasses import fields

import pytest
import torch

from auxkernels import Head, Logits, LogitStats, aux_cross_entropies, aux_cross_entropy
from auxkernels.cross_entropy import chunked, native, ops

OF_EACH = ("ignore_index", "weight", "label_smoothing", "z_loss", "reduction", "normalizer", "vocab_size")


def of(k, value):
    return value[k] if isinstance(value, (list, tuple)) else value


def leaves_of(source):
    """The tensors of a source-like that get a gradient."""
    if source is None:
        return []
    if isinstance(source, (list, tuple)):
        return [leaf for part in source for leaf in leaves_of(part)]
    if isinstance(source, Head):
        tensors = [source.hidden, source.weight, source.bias, source.scale]
    else:
        tensors = [source.values, source.scale] if isinstance(source, Logits) else [source]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


def singles(base, auxes, target, **options):
    """What K single calls return."""
    return [
        aux_cross_entropy(base, aux, of(k, target), **{n: of(k, v) if n in OF_EACH else v for n, v in options.items()})
        for k, aux in enumerate(auxes)
    ]


def numbers_of(result, aux):
    """Loss, statistics and gradients by name."""
    loss, stats = result if isinstance(result, tuple) else (result, None)
    found = {"loss": loss.detach()}
    if isinstance(stats, LogitStats):
        found |= {field.name: getattr(stats, field.name) for field in fields(stats)}
    leaves = leaves_of(aux)
    if leaves and loss.requires_grad:
        grads = torch.autograd.grad(loss.sum() * 0.5, leaves)
        found |= {f"gradient {i}": grad for i, grad in enumerate(grads)}
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        expected = other[name]
        assert (values is None) == (expected is None), name
        if values is None:
            continue
        assert (values.dtype, values.shape) == (expected.dtype, expected.shape), name
        as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (values, expected)]
        assert torch.equal(*as_bytes), name


def check_many(base, auxes, target, **options):
    """Losses, statistics and gradients are those of the single calls, bit for bit."""
    found = aux_cross_entropies(base, auxes, target, **options)
    expected = singles(base, auxes, target, **options)
    assert isinstance(found, list) and len(found) == len(auxes)
    for aux, one, other in zip(auxes, found, expected, strict=True):
        assert isinstance(one, tuple) == isinstance(other, tuple)
        assert_same_bits(numbers_of(one, aux), numbers_of(other, aux))


class Shared:
    """How many losses have been made in one pass, or beside others of a base that was computed once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.in_one_pass, self.beside_others, self.alone = [], [], 0
        losses, in_chunks, alone = native.losses, chunked._with_one_base, ops.loss

        def counted_losses(problems, *args):
            self.in_one_pass.append(len(problems))
            return losses(problems, *args)

        def counted_chunks(calls):
            groups = in_chunks(calls)
            self.beside_others += [len(group) for group in groups]
            return groups

        def counted_alone(*args):
            self.alone += 1
            return alone(*args)

        monkeypatch.setattr(native, "losses", counted_losses)
        monkeypatch.setattr(chunked, "_with_one_base", counted_chunks)
        monkeypatch.setattr(ops, "loss", counted_alone)
