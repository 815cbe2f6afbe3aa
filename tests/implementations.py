"""What a test may run on: an implementation and a device."""

from typing import NamedTuple

import emulated_cuda
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
