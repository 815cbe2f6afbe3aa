"""Label embeddings mixed by predicted probabilities.

api.py        the public function: contract, checks
chunked.py    the operators, in chunks of rows
request.py    what the row kernels are asked
segments.py   from one row for each segment to one for each token
native.py, triton/   the implementations, which never import each other
"""

from .api import LookupStats, soft_embedding
from .segments import segments_to_tokens

__all__ = ["LookupStats", "segments_to_tokens", "soft_embedding"]
