"""auxkernels-cuda: the CUDA module as a wheel of its own, for a machine where auxkernels came without one.

    python -m pip wheel --no-deps ./cuda_wheel

Compiled by ../setup.py, whose variables it reads but for AUXKERNELS_BUILD; auxkernels/native/__init__.py finds it.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "csrc/cuda").is_dir():
    sys.exit("auxkernels-cuda is built in the source tree of auxkernels: python -m pip wheel --no-deps ./cuda_wheel")
os.environ["AUXKERNELS_BUILD"] = "cuda"
spec = importlib.util.spec_from_file_location("setup_of_auxkernels", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
version = re.search(r'^__version__ = "(.*)"$', (ROOT / "auxkernels/__init__.py").read_text(), flags=re.MULTILINE)[1]
setup(
    version=version,
    install_requires=[f"auxkernels=={version}"],
    ext_modules=[Extension("auxkernels_cuda._cuda", build.CUDA_SOURCES)],
    cmdclass={"build_ext": build.BuildNative},
)
