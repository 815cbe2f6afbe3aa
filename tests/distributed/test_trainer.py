"""transformers' Trainer by torchrun trains as it does in one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import trainer_processes

from auxkernels import dispatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(bool(dispatch.native_missing()), reason=f"native on cpu: {dispatch.native_missing()}"),
]


def by_torchrun(arguments: list[str], num_processes: int = 2) -> None:
    given = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    found = subprocess.run(
        [sys.executable, *launch, *arguments], env=given, capture_output=True, text=True, timeout=540
    )
    assert found.returncode == 0, found.stderr[-4000:]


def test_losses_are_those_of_one_process(tmp_path):
    """Of batches whose texts, and so the processes' numbers of tokens, differ; gradients accumulated or not."""
    by_torchrun([trainer_processes.__file__, str(tmp_path / "found")])
    of_runs = json.loads((tmp_path / "found").read_text())
    for found, accumulate in zip(of_runs, trainer_processes.ACCUMULATED, strict=True):
        want = trainer_processes.trained(accumulate)
        assert len(want["loss"]) == trainer_processes.STEPS and want["loss"][-1] < want["loss"][0] - 1e-3
        for name in want:
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(want[name]), rtol=1e-6, atol=1e-6)
