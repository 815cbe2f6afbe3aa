"""The implementations of sample_logits: as everywhere, less the CUDA module, which has none of it."""

from implementations import NATIVE, REFERENCE, REFERENCE_ON_CUDA, implementation_fixture

HERE = (REFERENCE, REFERENCE_ON_CUDA, NATIVE)
impl = implementation_fixture(HERE, "Every implementation: what the contract promises of all of them.")
fused = implementation_fixture([NATIVE], "The fused ones, which are to give the reference's tokens.")
doubles = implementation_fixture(HERE, "Those that know float64.")
