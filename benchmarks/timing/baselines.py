"""Other packages that the benchmarks compare with: how they are found, and which of them are here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata

import torch
import torch.nn.functional as F

from benchmarks.timing.harness import Unavailable

# name in the tables: name in the package index
DISTRIBUTIONS = {"Liger": "liger-kernel", "Cut Cross Entropy": "cut-cross-entropy", "QuACK": "quack-kernels"}


def imported(module: str, name: str) -> Callable:
    """A function of an optional package. Raises Unavailable with the reason where it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(str(error)) from error


def installed() -> dict[str, str]:
    """Version of every baseline, or "unavailable: " and why; imports nothing."""
    versions = {"eager": torch.__version__, "compile": torch.__version__}
    has_linear = hasattr(F, "linear_cross_entropy")
    versions["F.linear_cross_entropy"] = (
        torch.__version__ if has_linear else f"unavailable: torch {torch.__version__} has none"
    )
    for name, distribution in DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[name] = f"unavailable: {distribution} is not installed"
    return versions
