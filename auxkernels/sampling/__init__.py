"""The token of each row of summed logits: filters and choice in one operator.

request.py     the mathematics, and by name what an implementation is asked
arithmetic.py  exponential and logarithm of fixed operations, which have the same bits everywhere
api.py         the public function: contract, checks
reference.py   the implementation in plain PyTorch
"""

from .api import SampleStats, sample_logits

__all__ = ["SampleStats", "sample_logits"]
