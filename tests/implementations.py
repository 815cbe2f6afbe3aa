"""What a test may run on: an implementation and a device."""

from typing import NamedTuple

import torch

from auxkernels import backends


class Implementation(NamedTuple):
    backend: str
    device: str

    def unavailable(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        missing = {"native": backends.native_missing, "triton": backends.triton_missing}.get(self.backend)
        return missing() if missing else None
