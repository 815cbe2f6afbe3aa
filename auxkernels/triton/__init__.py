"""Triton kernels, for NVIDIA and AMD devices. Only this package imports Triton."""
