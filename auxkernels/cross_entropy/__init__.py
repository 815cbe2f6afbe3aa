"""Cross-entropy and row statistics of softmax(base + aux).

request.py    the mathematics, and by name what the row kernels are asked and answer
api.py        the public functions: contract, checks
many.py       the losses of several auxiliaries of one base
rows.py       losses, statistics and coefficients, as arithmetic on the numbers of a row
autograd.py   the autograd functions
ops.py        the operators as PyTorch sees them
chunked.py    any sources, in chunks of rows
reference.py, native.py, cuda.py, triton/   the implementations, which never import each other
"""

from .api import aux_cross_entropy, logit_stats
from .many import aux_cross_entropies
from .rows import LogitStats

__all__ = ["LogitStats", "aux_cross_entropies", "aux_cross_entropy", "logit_stats"]
