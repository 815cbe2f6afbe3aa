"""Python imports this before anything else where its folder is on PYTHONPATH: every process has the fake device."""

import fake_cuda

fake_cuda.install()
