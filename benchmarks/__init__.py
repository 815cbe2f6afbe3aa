"""Benchmarks of auxkernels: ``python -m benchmarks --help``; the regression cases are in tests/benchmarks."""
