"""What a frozen base gives on a set of tokens, computed once and read by every training run.

`python -m auxkernels.models.base_cache` writes one; its options are in `command.py`.
"""

from .batches import DataCollatorForBaseCache
from .cache import BaseCache
from .dataset import BaseCacheDataset
from .fingerprints import data_fingerprint, tokenizer_fingerprint
from .plan import CachePlan
from .texts import rows_of_texts

__all__ = [
    "BaseCache",
    "BaseCacheDataset",
    "CachePlan",
    "DataCollatorForBaseCache",
    "data_fingerprint",
    "rows_of_texts",
    "tokenizer_fingerprint",
]
