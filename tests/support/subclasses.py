"""Tensor subclasses."""

import torch
from torch.utils._pytree import tree_map


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as quantised and sharded ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, Wrapped) else t, (args, kwargs or {}))
        return func(*args, **kwargs)
