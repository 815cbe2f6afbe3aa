"""A copy of the source tree whose native sources are a module of a few lines, so that a build takes about a second."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing():
    """Why nothing can be built here; None if it can."""
    if not (ROOT / "setup.py").exists():
        return "no source tree around the tests"
    wanted = ("ninja", "pybind11", "setuptools")
    lacking = [name for name in wanted if importlib.util.find_spec(name) is None]
    return f"{lacking[0]} is not installed" if lacking else None


STUB = """
#include <Python.h>
#include "answer.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", kAnswer);
  return module;
}
"""


def make_tree(folder):
    """A copy of the source tree with nothing built in it, and the stub for csrc."""
    tree = folder / "source tree"  # a path with a space must build too
    not_source = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "auxkernels", tree / "auxkernels", ignore=not_source)
    shutil.copytree(ROOT / "cuda_wheel", tree / "cuda_wheel", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    (tree / "csrc/cpu").mkdir(parents=True)
    (tree / "csrc/cpu/bindings.cpp").write_text(STUB)
    (tree / "csrc/answer.h").write_text("constexpr int kAnswer = 42;\n")
    (tree / "tests").mkdir()
    (tree / "tests/helper.py").touch()
    return tree


# what the developer's own environment may hold and a test decides
READ_BY_THE_BUILD = {"CC", "CXX", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "ARCHFLAGS", "MAX_JOBS"}
READ_BY_THE_BUILD |= {"CUDACXX", "CUDA_HOME", "CUDA_PATH", "_PYTHON_HOST_PLATFORM"}


def run(tree, *arguments, **variables):
    left_out = {name for name in os.environ if name.startswith("AUXKERNELS_")} | READ_BY_THE_BUILD
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True)


def build_module(tree, **variables):
    return run(tree, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "scratch", **variables)


def rules(tree, kind="cpu"):
    """The words of build.ninja."""
    return shlex.split((tree / "scratch" / kind / "build.ninja").read_text().replace("$$", "$"))


def record(tree):
    return json.loads((tree / "out/auxkernels/native/_build.json").read_text())


def modules(tree):
    return list((tree / "out/auxkernels/native").glob("*.so"))
