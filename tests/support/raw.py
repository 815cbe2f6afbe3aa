"""Calls of the registered ops themselves, past the public functions and their checks."""

import torch
from row_kernels import NEEDS_AUX

from auxkernels.cross_entropy.request import COEFFICIENTS, FIELDS, RowState, mask_of, named_fields

scan_op = torch.ops.auxkernels.cross_entropy_scan.default
loss_op = torch.ops.auxkernels.cross_entropy_loss.default
backward_op = torch.ops.auxkernels.cross_entropy_backward.default
rescale_op = torch.ops.auxkernels.cross_entropy_rescale_.default
check_target_op = torch.ops.auxkernels.check_target.default


def sources(given: dict) -> list:
    """The leading arguments of the ops for a base and an auxiliary that are matrices of logits, given by name."""
    base, aux = given["base"], given.get("aux")
    leaves, softcaps = [base, None, None, given.get("base_scale")], [given.get("base_softcap") or 0.0]
    if aux is not None:
        leaves += [aux, None, None, given.get("aux_scale")]
        softcaps.append(given.get("aux_softcap") or 0.0)
    vocab_size = given.get("vocab_size", base.shape[-1] if base.dim() else 0)
    end = (given.get("target"), given.get("weight"), given.get("ignore_index", -100), vocab_size)
    return [leaves, softcaps, 1, None, *end]


def needs_of(mask: int, given: dict) -> list[bool]:
    """`needs` of the ops for bits of row_kernels."""
    of_base, of_aux = ([bool(mask >> i & 1), False, False, bool(mask >> (i + 2) & 1)] for i in range(2))
    return [*of_base, *of_aux] if given.get("aux") is not None or any(of_aux) else of_base


def in_order(grads: list, mask: int) -> list:
    """Gradients as the ops give them, in the order of the bits."""
    found = dict(zip([i for i in (0, 2, 1, 3) if mask >> i & 1], grads, strict=True))
    return [found[i] for i in sorted(found)]


def scan(backend: str, *wanted: str, **given) -> dict[str, torch.Tensor]:
    """The wanted fields by name (all of them if none is named)."""
    mask = mask_of(*(wanted or FIELDS))
    return named_fields(mask, scan_op(*sources(given), mask, backend))[0]


def loss(
    backend: str, *, needs=0, wanted=0, normalizer=None, label_smoothing=0.0, z_loss=0.0, mean=True, **given
) -> list[torch.Tensor]:
    terms = (normalizer, label_smoothing, z_loss, mean, wanted)
    made = loss_op(*sources(given), *terms, needs_of(needs, given), backend)
    first = len(made) - needs.bit_count()
    return [*made[:first], *in_order(made[first:], needs)]


def backward(backend: str, coefficients: dict[str, torch.Tensor], needs: int, **given) -> list[torch.Tensor]:
    """Gradients for one number per row and coefficient, from the state of a scan."""
    names = list(RowState._fields)
    if given.get("target") is None:
        names.remove("nll")
    state = scan(backend, *names, **given)
    made = backward_op(
        *sources(given),
        *(state.get(name) for name in RowState._fields),
        [coefficients.get(name) for name in COEFFICIENTS],
        needs_of(needs, given),
        backend,
    )
    return in_order(made, needs)


def calls(backend: str) -> dict:
    """Every op that reads sources, as a function of the named arguments; for what all of them must refuse."""
    ones = {"G": torch.ones(3)}

    def of_backward(**given):
        row = [torch.zeros(3)] * 5
        listed = [ones.get(name) for name in COEFFICIENTS]
        return backward_op(*sources(given), *row, listed, needs_of(NEEDS_AUX, given), backend)

    return {
        "scan": lambda **given: scan(backend, "nll", "max", **given),
        "loss": lambda **given: loss(backend, needs=NEEDS_AUX, **given),
        "backward": of_backward,
    }
