"""What torch.compile is asked to do, and how near its results are to eager ones."""

import torch
from tolerance import assert_alike


class Counter:
    """A compiler backend that counts how often it is asked; tracing and autograd are those of aot_eager."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


def assert_same(impl, compiled_out, eager_out):
    """Bits for the fused ones, whose op is the same; plain torch is traced into other kernels, so a few roundings."""
    assert len(compiled_out) == len(eager_out)
    for got, want in zip(compiled_out, eager_out, strict=True):
        if impl.backend == "reference":
            assert_alike(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
