"""The implementations of soft_embedding: as everywhere, less the CUDA module, which has no lookups."""

import implementations
import pytest
from implementations import CUDA, EMULATED, implementation_fixture

from auxkernels.soft_embedding import native_plain


def _of(chosen, doc):
    return implementation_fixture([each for each in chosen if each not in (CUDA, EMULATED)], doc)


impl = _of(implementations.ALL, "Every implementation: what the contract promises of all of them.")
fused = _of(implementations.FUSED, "The fused ones: promises about bits and memory.")
on_gpu = _of(implementations.ON_CUDA, "Those on CUDA devices.")
doubles = _of(implementations.IN_FLOAT64, "Those that know float64.")


@pytest.fixture
def general_path(monkeypatch):
    """Without native's lookup of plain calls, whose bits are its own: equal bits are a promise of each path alone."""
    monkeypatch.setattr(native_plain, "serves", lambda *_: False)
