"""The token of each row of summed logits: filters and choice in one operator.

request.py     the mathematics, and by name what an implementation is asked
arithmetic.py  exponential and logarithm of fixed operations, which have the same bits everywhere
api.py         the public function: contract, checks
ops.py         the operator as PyTorch sees it
chunked.py     heads and sums in chunks of rows
reference.py, native.py, triton/   the implementations, which never import each other
"""

from .api import SampleStats, sample_logits

__all__ = ["SampleStats", "sample_logits"]
