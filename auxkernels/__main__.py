"""`python -m auxkernels`: what this installation can run, and why not the rest."""

import argparse

from . import show_config

argparse.ArgumentParser("python -m auxkernels", description="Says what this installation can run.").parse_args()
print(show_config())
