"""Hugging Face models around the operators: auxiliary tuning and planners. Needs transformers: `auxkernels[models]`."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("auxkernels.models needs transformers: pip install 'auxkernels[models]'") from error
