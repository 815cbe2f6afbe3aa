"""Fixtures of what builds with sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def preload() -> str:
    """The runtimes that must be loaded before Python's own libraries."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not sys.platform.startswith("linux") or shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on Linux to build with")
    if not (CHECKOUT / "csrc").is_dir():
        pytest.skip("an installed package has no sources to build")
    found = []
    for library in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={library}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} comes without {library}")
        found.append(path)
    return " ".join(found)
