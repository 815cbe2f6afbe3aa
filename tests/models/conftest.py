"""Fixtures of the models' tests; `tiny` builds the models."""

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
