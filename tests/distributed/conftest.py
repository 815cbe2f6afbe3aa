"""Processes for all of these tests: to start them takes longer than what they do."""

import processes as started
import pytest
import torch.distributed as dist

from auxkernels import dispatch


@pytest.fixture(scope="session")
def pool():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    if dispatch.native_missing():
        pytest.skip(f"native on cpu: {dispatch.native_missing()}")
    with started.Pool() as found:
        yield found


@pytest.fixture
def running(pool):
    """Started for the first test that needs them, and again after one that has left them out of step."""
    return pool.processes()
