"""Zeldes et al. 2020: ``python -m benchmarks.reproductions.auxiliary_tuning``."""
