"""Adapters by transformers' own `add_adapter`, which may ask for a newer PEFT than is installed."""

import pytest
from packaging.version import Version


def add_adapter(model, config, **options) -> None:
    peft = pytest.importorskip("peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers' add_adapter needs PEFT {MIN_PEFT_VERSION}, and this is {peft.__version__}")
    model.add_adapter(config, **options)
