"""Tests of Triton kernels in one file: some interpret them, the others compile them, and no process does both."""

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreted_kernels_pass")
compiles = pytest.mark.skipif(INTERPRETED, reason="compiled kernels and interpreted ones exclude each other")


def check_interpreted(file):
    """Runs the file's interpreted tests in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
