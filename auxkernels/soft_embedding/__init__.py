"""Label embeddings mixed by predicted probabilities.

request.py    the mathematics, and by name what operators and row kernels are asked
api.py        the public function: contract, checks
autograd.py   the autograd functions
ops.py        the operators as PyTorch sees them
chunked.py    rows in chunks: a row kernel, and products with the tables
noise.py      the counter-based generator of Gumbel noise
segments.py   from one row for each segment to one for each token
native_plain.py   calls without any option on CPU, by less Python
reference.py, native.py, triton/   the implementations, which never import each other
"""

from .api import LookupStats, soft_embedding
from .segments import segments_to_tokens

__all__ = ["LookupStats", "segments_to_tokens", "soft_embedding"]
