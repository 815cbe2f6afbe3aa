"""Hugging Face models around the operators: auxiliary tuning and planners. Needs transformers: `auxkernels[models]`."""

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":  # it is there, and lacks something itself
        raise
    raise ImportError("auxkernels.models needs transformers 5.17 or newer: pip install 'auxkernels[models]'") from None
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        f"auxkernels.models needs transformers 5.17 or newer, got {transformers.__version__}: "
        "pip install 'auxkernels[models]'"
    )

from transformers import AutoConfig, AutoModelForCausalLM

from .auxiliary import AuxiliaryForCausalLM
from .base_cache import BaseCache, BaseCacheDataset, DataCollatorForBaseCache
from .collators import DataCollatorForPrefixes, DataCollatorForSegments
from .conditioning import predicted_segments
from .configuration import AuxiliaryConfig
from .ensemble import AuxiliaryEnsembleForCausalLM
from .ensemble_cache import EnsembleCache
from .ensemble_config import AuxiliaryEnsembleConfig
from .fsdp import apply_fully_shard
from .group import AuxiliaryGroupForCausalLM, AuxiliaryGroupOutput
from .group_config import AuxiliaryGroupConfig
from .label_statistics import label_statistics_of_all
from .paired_cache import PairedCache
from .planner import PlannerCausalLMOutput, PlannerForCausalLM
from .planner_config import PlannerConfig
from .planner_training import UnfreezePlanner
from .sums import AuxiliaryCausalLMOutput

for config, model in (
    (AuxiliaryConfig, AuxiliaryForCausalLM),
    (AuxiliaryEnsembleConfig, AuxiliaryEnsembleForCausalLM),
    (AuxiliaryGroupConfig, AuxiliaryGroupForCausalLM),
    (PlannerConfig, PlannerForCausalLM),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
del config, model

__all__ = [
    "AuxiliaryCausalLMOutput",
    "AuxiliaryConfig",
    "AuxiliaryEnsembleConfig",
    "AuxiliaryEnsembleForCausalLM",
    "AuxiliaryForCausalLM",
    "AuxiliaryGroupConfig",
    "AuxiliaryGroupForCausalLM",
    "AuxiliaryGroupOutput",
    "BaseCache",
    "BaseCacheDataset",
    "DataCollatorForBaseCache",
    "DataCollatorForPrefixes",
    "DataCollatorForSegments",
    "EnsembleCache",
    "PairedCache",
    "PlannerCausalLMOutput",
    "PlannerConfig",
    "PlannerForCausalLM",
    "UnfreezePlanner",
    "apply_fully_shard",
    "label_statistics_of_all",
    "predicted_segments",
]
