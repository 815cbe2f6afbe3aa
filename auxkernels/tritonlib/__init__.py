"""What the Triton kernels of all operators share. Only this package and the folders triton/ import Triton."""
