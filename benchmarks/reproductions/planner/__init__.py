"""Cornille et al. 2024: ``python -m benchmarks.reproductions.planner``."""
