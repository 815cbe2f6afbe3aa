"""Builds the native modules with ninja and records the outcome in auxkernels/native/_build.json, for show_config().

AUXKERNELS_BUILD       auto (default): whatever this machine can build; cpu, cuda: that one, or fail; none: nothing
AUXKERNELS_CUDA_ARCHS  of 80, 90a, 100, with commas; by default those of this machine's GPUs, all where it has none
AUXKERNELS_WERROR      1: compiler warnings are errors
AUXKERNELS_SANITIZE    sanitizers for the CPU module, for example address,undefined
CXX, CUDACXX           compilers, by default g++ or clang++, and nvcc, from PATH
MAX_JOBS               parallel compile jobs, by default 2
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from glob import glob
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

MODULES = [
    Extension("auxkernels.native._cpu", sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))),
    Extension("auxkernels.native._cuda", glob("csrc/cuda/bindings.cpp") + sorted(glob("csrc/cuda/*.cu"))),
]
# no -ffast-math: linked in, it flips flush-to-zero for the whole process. no -march: kernels choose at run time.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
CXX_FLAGS = ["-O3", "-std=c++17", *HOST_FLAGS]
# without contraction a row has the same bits from every kernel, whatever else the kernel does
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", ",".join(HOST_FLAGS)]
# 80 serves all of 8.x; 100 carries PTX for what comes after it
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100": "[sm_100,compute_100]"}
LINK_FLAGS = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
if os.environ.get("AUXKERNELS_WERROR") == "1":
    CXX_FLAGS += ["-Werror"]
    CUDA_FLAGS += ["-Werror", "all-warnings"]
if sanitizers := os.environ.get("AUXKERNELS_SANITIZE"):
    CXX_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
MODE = os.environ.get("AUXKERNELS_BUILD") or "auto"
if MODE not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"AUXKERNELS_BUILD must be auto, cpu, cuda or none, got {MODE!r}")

run = partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def find_compiler(variable, *defaults):
    names = [os.environ[variable]] if os.environ.get(variable) else defaults
    for command in map(shlex.split, names):
        if shutil.which(command[0]):
            version = re.search(r"\d+\.\d[\d.]*|$", run([*command, "--version"]).stdout)[0]
            return command, f"{Path(command[-1]).name} {version}"
    raise CompileError(f"no working compiler: {' or '.join(names)} not found; {variable} can name another")


def architectures():
    """nvcc's flags for the architectures that AUXKERNELS_CUDA_ARCHS or this machine's GPUs ask for."""
    names = os.environ.get("AUXKERNELS_CUDA_ARCHS")
    if names is None and shutil.which("nvidia-smi"):
        found = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).stdout
        majors = {int(major) for major in re.findall(r"^(\d+)\.\d+$", found, flags=re.MULTILINE)}
        names = ",".join(sorted({{8: "80", 9: "90a"}.get(major, "100") for major in majors if major >= 8}))
    names = [name.strip() for name in (names or ",".join(ARCHITECTURES)).split(",")]
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        sys.exit(f"AUXKERNELS_CUDA_ARCHS must be of {', '.join(ARCHITECTURES)}, got {unknown[0]!r}")
    return [f"-gencode=arch=compute_{name},code={ARCHITECTURES[name]}" for name in names]


def toolchain(kind):
    """Returns the command that compiles and links, and the compiler's name and version."""
    cxx, how = find_compiler("CXX", "g++", "clang++")
    if kind == "cuda":
        nvcc, how = find_compiler("CUDACXX", "nvcc")
        return [*nvcc, "-ccbin", cxx[-1], *CUDA_FLAGS, *architectures()], how
    probe = [*cxx, "-fopenmp", "-fPIC", "-shared", "-x", "c++", "-", "-o", os.devnull]
    if run(probe, input="#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n").returncode:
        return [*cxx, *CXX_FLAGS, "-fopenmp-simd"], f"{how}, without OpenMP"
    return [*cxx, *CXX_FLAGS, "-fopenmp"], how


class BuildNative(build_ext):
    def run(self):
        outcome, built = {}, []
        for extension in self.extensions:
            kind = extension.name.rpartition("_")[2]
            module = Path(self.get_ext_fullpath(extension.name))
            module.parent.mkdir(parents=True, exist_ok=True)
            try:
                outcome[kind] = f"built with {self.build_module(kind, extension.sources, module)}"
                built.append(extension)
            except CompileError as reason:
                if kind == MODE:
                    sys.exit(f"AUXKERNELS_BUILD={MODE}, but {extension.name} was not built: {reason}")
                outcome[kind] = f"not built: {reason}"
                module.unlink(missing_ok=True)  # an earlier build's module would contradict _build.json
                if extension.sources and MODE == "auto":
                    self.warn(f"{extension.name} {outcome[kind]}")
        (module.parent / "_build.json").write_text(json.dumps(outcome, indent=2) + "\n")
        self.extensions = self.distribution.ext_modules = built
        # bdist_wheel expected every module; a wheel without one fits every machine, and its name shall say so.
        self.distribution.get_command_obj("bdist_wheel").root_is_pure = not built

    def build_module(self, kind, sources, module):
        if MODE not in ("auto", kind):
            raise CompileError(f"AUXKERNELS_BUILD={MODE}")
        if not sources:
            raise CompileError(f"csrc has no {kind} sources")
        command, how = toolchain(kind)
        includes = [flag for path in (pybind11.get_include(), *self.include_dirs) for flag in ("-isystem", path)]
        scratch = Path(self.build_temp, kind)
        scratch.mkdir(parents=True, exist_ok=True)
        with open(scratch / "build.ninja", "w") as file:
            rules = ninja.Writer(file)
            rules.variable("builddir", str(scratch))
            rules.variable("cc", ninja.escape(shlex.join([*command, "-Icsrc", *includes])))
            rules.rule("compile", "$cc -MD -MF $out.d -c $in -o $out", description="$in", depfile="$out.d", deps="gcc")
            rules.rule("link", f"$cc {LINK_FLAGS} $in -o $out", description=module.name)
            objects = [rules.build(str(scratch / f"{source}.o"), "compile", source)[0] for source in sources]
            rules.build(str(module), "link", objects)
        done = run([os.path.join(ninja.BIN_DIR, "ninja"), "-f", file.name, "-j", os.environ.get("MAX_JOBS", "2")])
        print(done.stdout)
        if done.returncode:
            first_error = re.search(r".*(error|fatal) *:.*|$", done.stdout)[0]
            raise CompileError(f"{how} failed: {first_error or 'see the build log'}")
        return how


setup(ext_modules=MODULES, cmdclass={"build_ext": BuildNative})
