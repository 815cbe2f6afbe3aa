"""What every operator's cases need of torch and auxkernels: dtypes, backends by name, torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from benchmarks.timing.harness import Unavailable

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# ours on GPUs, beside "auxkernels", which is whichever of them is chosen without a word
OWN_BACKENDS = {"auxkernels (triton)": "triton", "auxkernels (cuda)": "native"}


def ours_package():
    try:
        import auxkernels
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return auxkernels


@contextlib.contextmanager
def unusable_is_unavailable():
    """A backend that "cannot be used" here is no failure."""
    try:
        yield
    except RuntimeError as error:
        if is_unusable(error):
            raise Unavailable(str(error)) from error
        raise


def is_unusable(error: RuntimeError) -> bool:
    return "cannot be used" in str(error)


def compiled(function: Callable) -> Callable[[], Callable]:
    """Compiles for the shapes of its case alone; the reset keeps earlier cases from using up the recompile limit."""

    def prepare():
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return prepare
