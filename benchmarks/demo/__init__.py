"""The package's main job on real text: ``python -m benchmarks.demo``."""
