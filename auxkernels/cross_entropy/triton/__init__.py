"""Row kernels of cross-entropy in Triton."""
