"""Fixtures of the models' tests; `tiny` builds the models."""

import os

import pytest
import torch

pytest.importorskip("transformers")

from tiny import PAIRS, VOCAB_SIZE, tiny_pair


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
    """All four combinations of architectures."""
    return tiny_pair(*request.param)


@pytest.fixture
def tokens():
    """[3, 9], without padding and end of text."""
    return torch.randint(2, VOCAB_SIZE, (3, 9))


@pytest.fixture
def interrupted(monkeypatch):
    """A function after whose call the second file that is moved to its place interrupts the process."""
    replace, moved = os.replace, []

    def fail_after_one(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    return lambda: monkeypatch.setattr(os, "replace", fail_after_one)
