"""Benchmarks of auxkernels: ``python -m benchmarks --help``, and ``pytest benchmarks`` for the regression cases."""
