"""Calls of the registered ops themselves, past the public functions and their checks."""

import torch

from auxkernels.cross_entropy import ops

scan_op = torch.ops.auxkernels.cross_entropy_scan.default
loss_op = torch.ops.auxkernels.cross_entropy_loss.default
backward_op = torch.ops.auxkernels.cross_entropy_backward.default
rescale_op = torch.ops.auxkernels.cross_entropy_rescale_.default
check_target_op = torch.ops.auxkernels.check_target.default

SOURCES = (
    *("base", "aux", "target", "weight", "base_scale", "aux_scale", "base_softcap", "aux_softcap"),
    *("ignore_index", "vocab_size"),
)
DEFAULTS = dict.fromkeys(SOURCES) | {"ignore_index": -100}


def sources(given: dict) -> list:
    filled = DEFAULTS | {"vocab_size": given["base"].shape[-1] if given["base"].dim() else 0} | given
    return [filled[name] for name in SOURCES]


def scan(backend: str, *wanted: str, **given) -> dict[str, torch.Tensor]:
    """The wanted fields by name (all of them if none is named)."""
    mask = ops.mask_of(*(wanted or ops.FIELDS))
    return ops.named_fields(mask, scan_op(*sources(given), mask, backend))[0]


def loss(
    backend: str, *, needs=0, wanted=0, normalizer=None, label_smoothing=0.0, z_loss=0.0, mean=True, **given
) -> list[torch.Tensor]:
    return loss_op(*sources(given), normalizer, label_smoothing, z_loss, mean, wanted, needs, backend)


def backward(backend: str, coefficients: dict[str, torch.Tensor], needs: int, **given) -> list[torch.Tensor]:
    """Gradients for one number per row and coefficient, from the state of a scan."""
    names = ["max", "log_denom", "nll", "base_max", "base_log_denom"]
    if given.get("target") is None:
        names.remove("nll")
    state = scan(backend, *names, **given)
    return backward_op(
        *sources(given),
        *(state.get(name) for name in ("max", "log_denom", "nll", "base_max", "base_log_denom")),
        [coefficients.get(name) for name in ops.COEFFICIENTS],
        needs,
        backend,
    )


def calls(backend: str) -> dict:
    """Every op that reads sources, as a function of the named arguments; for what all of them must refuse."""
    ones = {"G": torch.ones(3)}

    def of_backward(**given):
        row = [torch.zeros(3)] * 5
        listed = [ones.get(name) for name in ops.COEFFICIENTS]
        return backward_op(*sources(given), *row, listed, ops.NEEDS_AUX, backend)

    return {
        "scan": lambda **given: scan(backend, "nll", "max", **given),
        "loss": lambda **given: loss(backend, needs=ops.NEEDS_AUX, **given),
        "backward": of_backward,
    }
