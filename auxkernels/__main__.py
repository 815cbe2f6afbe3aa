"""`python -m auxkernels`: what this installation can run, and why not the rest."""

from . import show_config

print(show_config())
