"""Python imports this before anything else where its folder is on PYTHONPATH: every process then has the stand-in."""

from benchmarks.standin import device

device.install()
