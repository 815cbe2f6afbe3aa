"""Cross-entropy and row statistics of softmax(base + aux).

api.py        the public functions: contract, checks
autograd.py   the autograd functions
ops.py        the operators as PyTorch sees them
chunked.py    any sources, in chunks of rows
reference.py, native.py, cuda.py, triton/   the implementations, which never import each other
"""

from .api import LogitStats, aux_cross_entropy, logit_stats

__all__ = ["LogitStats", "aux_cross_entropy", "logit_stats"]
