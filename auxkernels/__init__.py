"""Fused kernels for steering a language model with a second one.

`aux_cross_entropy` and `logit_stats` add the logits of a base and an auxiliary model and take their log-softmax
cross-entropy (or row statistics) without storing the sum, nor the logits of a source that is a `Head`;
`aux_cross_entropies` does so for several auxiliaries of one base. The contract is docs/contract.md. `soft_embedding`
mixes label embeddings by predicted probabilities. `sample_logits` draws the next token of summed logits. `VocabShard`
says which columns of a vocabulary a process holds.
"""

from . import nn
from .cross_entropy.api import aux_cross_entropy, logit_stats
from .cross_entropy.many import aux_cross_entropies
from .cross_entropy.rows import LogitStats
from .dispatch import show_config
from .distributed.shard import VocabShard
from .heads import settings as chunk_settings
from .memory import cache_settings, empty_cache
from .sampling.api import SampleStats, sample_logits
from .soft_embedding.api import LookupStats, soft_embedding
from .soft_embedding.segments import segments_to_tokens
from .sources import Head, Logits

__version__ = "0.1.0"
__all__ = [
    "Head",
    "LogitStats",
    "Logits",
    "LookupStats",
    "SampleStats",
    "VocabShard",
    "__version__",
    "aux_cross_entropies",
    "aux_cross_entropy",
    "cache_settings",
    "chunk_settings",
    "empty_cache",
    "logit_stats",
    "nn",
    "sample_logits",
    "segments_to_tokens",
    "show_config",
    "soft_embedding",
]
