"""The implementations of sample_logits."""

from implementations import REFERENCE, REFERENCE_ON_CUDA, implementation_fixture

HERE = (REFERENCE, REFERENCE_ON_CUDA)
impl = implementation_fixture(HERE, "Every implementation: what the contract promises of all of them.")
doubles = implementation_fixture(HERE, "Those that know float64.")
