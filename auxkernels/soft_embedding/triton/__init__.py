"""Row kernels of soft_embedding in Triton."""
