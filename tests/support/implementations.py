"""What a test may run on: an implementation and a device, and fixtures of them."""

from typing import NamedTuple

import emulated_cuda
import pytest
import torch

from auxkernels import dispatch


class Implementation(NamedTuple):
    backend: str
    device: str
    is_emulated: bool = False  # the CUDA module on CPU tensors, see emulated_cuda.py

    def unavailable(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.is_emulated:
            return emulated_cuda.missing()
        if self.backend == "native" and self.device == "cuda":
            return dispatch.cuda_missing()
        missing = {"native": dispatch.native_missing, "triton": dispatch.triton_missing}.get(self.backend)
        return missing() if missing else None

    def __str__(self) -> str:
        return f"{self.backend}-{'emulated' if self.is_emulated else self.device}"


REFERENCE, REFERENCE_ON_CUDA = Implementation("reference", "cpu"), Implementation("reference", "cuda")
NATIVE, EMULATED = Implementation("native", "cpu"), Implementation("native", "cpu", is_emulated=True)
TRITON, CUDA = Implementation("triton", "cuda"), Implementation("native", "cuda")

FUSED = (NATIVE, EMULATED, TRITON, CUDA)
ALL = (REFERENCE, REFERENCE_ON_CUDA, *FUSED)
ON_CPU = (REFERENCE, NATIVE)
ON_CUDA = (REFERENCE_ON_CUDA, TRITON, CUDA)
IN_FLOAT64 = (REFERENCE, REFERENCE_ON_CUDA, NATIVE, EMULATED, CUDA)


def implementation_fixture(implementations, doc: str):
    """A fixture that is each of them in turn. Those on CUDA devices are left out where there is none."""
    marks = {"cpu": (), "cuda": pytest.mark.gpu}
    params = [pytest.param(each, id=str(each), marks=marks[each.device]) for each in implementations]
    here = [param for param in params if not param.marks or torch.cuda.is_available()]

    @pytest.fixture(params=here or params)
    def implementation(request) -> Implementation:
        chosen = request.param
        if reason := chosen.unavailable():
            pytest.skip(f"{chosen.backend} on {chosen.device}: {reason}")
        if chosen.is_emulated:
            emulated_cuda.install(request.getfixturevalue("monkeypatch"))
        return chosen

    implementation.__doc__ = doc
    return implementation
