"""What only a CUDA device can show: the check (``python -m benchmarks.gpu.check``) and what README says of it."""
