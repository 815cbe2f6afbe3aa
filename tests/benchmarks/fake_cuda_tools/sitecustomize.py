"""Python imports this before anything else where its folder is on PYTHONPATH: every process then has the stand-in."""

import fake_cuda

fake_cuda.install()
