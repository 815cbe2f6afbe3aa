"""Sources that are heads or sums: chunks of rows, with library GEMMs around the row kernels of the other folders.

rows.py             which rows there are, and how they are cut into chunks
products.py         the GEMMs of one head: logits of a chunk, gradients of hidden, weight and bias
shared_weights.py   heads of one weight as one product
sums.py             several sources as one
operands.py         base, auxiliary or scores as the row kernels take them: one matrix for each chunk
"""

from .rows import ChunkSettings, settings

__all__ = ["ChunkSettings", "settings"]
