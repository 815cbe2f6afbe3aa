"""vLLM serves folders of `AuxiliaryForCausalLM`: a plugin, `auxkernels[vllm]`. vLLM is imported when it asks for it.

vLLM loads the plugin by its entry point (group `vllm.general_plugins`) in each of its processes, whatever they serve.
"""

from __future__ import annotations

import logging

REFUSED = ("AuxiliaryEnsembleForCausalLM", "AuxiliaryGroupForCausalLM", "PlannerForCausalLM")


def register() -> None:
    """Makes vLLM know the model. May be called several times; where it cannot, other models are served all the same."""
    try:
        _register()
    except Exception as error:
        logging.getLogger("vllm.auxkernels").warning(
            "AuxiliaryForCausalLM cannot be served (%s: %s)", type(error).__name__, error
        )


def _register() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..models import AuxiliaryForCausalLM
    from .checks import Checks
    from .config import AuxiliaryConfig

    AutoConfig.register(AuxiliaryConfig.model_type, AuxiliaryConfig, exist_ok=True)
    AutoModelForCausalLM.register(AuxiliaryConfig, AuxiliaryForCausalLM, exist_ok=True)
    for name in (AuxiliaryForCausalLM.__name__, *REFUSED):
        # as text: the class is imported where a model is made, and by a process of its own that asks what it can do
        ModelRegistry.register_model(name, "auxkernels.vllm.model:AuxiliaryForCausalLM")
        MODELS_CONFIG_MAP[name] = Checks
