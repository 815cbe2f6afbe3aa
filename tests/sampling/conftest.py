"""The implementations of sample_logits: as everywhere, less the CUDA module, which has none of it."""

import implementations
from implementations import CUDA, EMULATED, implementation_fixture


def _of(chosen, doc):
    return implementation_fixture([each for each in chosen if each not in (CUDA, EMULATED)], doc)


impl = _of(implementations.ALL, "Every implementation: what the contract promises of all of them.")
fused = _of(implementations.FUSED, "The fused ones, which are to give the reference's tokens.")
doubles = _of(implementations.IN_FLOAT64, "Those that know float64.")
