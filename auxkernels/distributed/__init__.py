"""Operators over a vocabulary that is sharded over processes: each holds the columns [start, stop) of the logits.

shard.py           `VocabShard`: which columns a process holds
agreement.py       that all processes make the same call, and errors that all of them raise
collectives.py     gathers, and gradients of what all processes hold
local.py           the sources' own columns, of plain tensors
row_state.py       what processes tell each other of a row, and the row that this makes
scan.py            a scan of the own columns, exchanged
one_pass.py        reduced losses of heads, in chunks of rows
cross_entropy.py   losses and statistics
soft_embedding.py  lookups of labels in shards: lookup.py over all labels, selection.py over the likeliest ones

The kernels are those of one process. A row's scan is made over the own columns, with the target's class where it is one
of them; the numbers of all processes (some floats a row) are gathered once and merged in the order of the ranks, so
that all hold the same bits. Gradients are then made from the merged numbers, each process's of its own columns.
"""

from .shard import VocabShard

__all__ = ["VocabShard"]
