"""What transformers must not do to the modules that a user gives: draw their weights anew, or lose their buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

MARK = "_is_hf_initialized"


@contextmanager
def marked_as_initialized(*given: nn.Module | None) -> Iterator[None]:
    """While it lasts, transformers initializes no submodule of those given; then each gets back the mark it had."""
    before = [(module, vars(module).get(MARK)) for root in given if root is not None for module in root.modules()]
    for module, _ in before:
        setattr(module, MARK, True)
    try:
        yield
    finally:
        for module, mark in before:
            vars(module).pop(MARK, None) if mark is None else setattr(module, MARK, mark)


@contextmanager
def kept_buffers(root: nn.Module | None) -> Iterator[None]:
    """Gives the buffers that are not saved their values back afterwards, in their dtypes, where they were moved to.

    from_pretrained() replaces them by uninitialized memory, which only a model's own initialization would fill.
    """
    clones = {}
    places = []
    for module in () if root is None else root.modules():
        for name in module._non_persistent_buffers_set:
            value = module._buffers.get(name)
            if value is not None:
                clones.setdefault(id(value), value.detach().clone())  # a shared buffer stays shared
                places.append((module, name, value))
    yield
    moved = {}
    for module, name, value in places:
        key = id(value), module._buffers[name].device
        if key not in moved:
            moved[key] = clones[id(value)].to(key[1])
        module._buffers[name] = moved[key]
