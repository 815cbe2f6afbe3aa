"""Builds the native modules with ninja and records the outcome in auxkernels/native/_build.json, for show_config().

AUXKERNELS_BUILD       auto (default): the CPU module, and the CUDA module where there is a GPU or AUXKERNELS_CUDA_ARCHS
                       asks for it, each as far as this machine can build it; cpu, cuda, all: these, or fail; none
AUXKERNELS_CUDA_ARCHS  of 80, 90a, 100, with commas; by default those of this machine's GPUs, all where it has none
AUXKERNELS_WERROR      1: compiler warnings are errors
AUXKERNELS_SANITIZE    sanitizers for the CPU module, for example address,undefined
CXX                    compiler, with wrappers before and flags after it; else the one beside CC; else g++ or clang++
CUDACXX                nvcc; else the one on PATH; else that of CUDA_HOME, CUDA_PATH or /usr/local/cuda
CPPFLAGS, CXXFLAGS     flags after ours, of the host compiler of nvcc too; LDFLAGS when linking; ARCHFLAGS on macOS.
                       CFLAGS are of C, of which there is none. NVCC_APPEND_FLAGS is read by nvcc itself
MAX_JOBS               parallel compile jobs, by default 2

A module counts as built once a Python of its own has imported it. One for another platform (_PYTHON_HOST_PLATFORM, or a
file name that this Python would not import) or with sanitizers, which need their runtime first, is not tried.
"""

import filecmp
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from glob import glob
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = os.path.dirname(os.path.abspath(__file__))  # cuda_wheel/setup.py runs in its own folder
CPU_SOURCES = sorted(glob("csrc/cpu/**/*.cpp", root_dir=ROOT, recursive=True))
CUDA_SOURCES = glob("csrc/cuda/bindings.cpp", root_dir=ROOT) + sorted(glob("csrc/cuda/*.cu", root_dir=ROOT))
MODULES = [Extension("auxkernels.native._cpu", CPU_SOURCES), Extension("auxkernels.native._cuda", CUDA_SOURCES)]
# no -ffast-math: linked in, it flips flush-to-zero for the whole process. no -march: kernels choose at run time.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
CXX_FLAGS = ["-O3", "-std=c++17", *HOST_FLAGS]
# where bits are the same on every machine, nothing is contracted
EXACT_SOURCES = ("csrc/cpu/sampling.cpp", "csrc/cpu/simd/sample_ops.cpp")
# without contraction a row has the same bits from every kernel, whatever else the kernel does
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", ",".join(HOST_FLAGS)]
# 80 serves all of 8.x; 100 carries PTX for what comes after it
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100": "[sm_100,compute_100]"}
LINK_FLAGS = ["-shared", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
if os.environ.get("AUXKERNELS_WERROR") == "1":
    CXX_FLAGS += ["-Werror"]
    CUDA_FLAGS += ["-Werror", "all-warnings"]
SANITIZERS = os.environ.get("AUXKERNELS_SANITIZE")
if SANITIZERS:
    CXX_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
MODES = {"auto": (), "cpu": ("cpu",), "cuda": ("cuda",), "all": ("cpu", "cuda"), "none": ()}
MODE = os.environ.get("AUXKERNELS_BUILD") or "auto"
if MODE not in MODES:
    sys.exit(f"AUXKERNELS_BUILD must be auto, cpu, cuda, all or none, got {MODE!r}")
JOBS = os.environ.get("MAX_JOBS") or "2"
if not re.fullmatch(r"0*[1-9][0-9]*", JOBS):
    sys.exit(f"MAX_JOBS must be a whole number of at least 1, got {JOBS!r}")


class NotAsked(CompileError):
    """Nothing is wrong: this build is not to make that module."""


run = partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


# -- compilers and flags -----------------------------------------------------------------------------------------------


def words_of(variable):
    """The words of an environment variable as the shell would split them; a program's own path stays whole."""
    value = os.environ.get(variable, "")
    if shutil.which(value):
        return [value]
    try:
        return shlex.split(value)
    except ValueError as error:
        sys.exit(f"{variable} must be words as a shell reads them, got {value!r}: {error}")


def absolute(flags):
    """The same with absolute paths, since the compiler works in another folder."""
    found = list(flags)
    for i, flag in enumerate(flags):
        option, path = re.fullmatch(r"(-[ILBF]|--sysroot=|@)?(.*)", flag, flags=re.DOTALL).groups()
        is_path = option or (i > 0 and re.fullmatch(r"-(i[a-z]+|[ILBF])", flags[i - 1]))
        if is_path and path and os.path.exists(path):
            found[i] = (option or "") + os.path.abspath(path)
    return found


def flags_of(*variables):
    return absolute([flag for variable in variables for flag in words_of(variable)])


def position_of_compiler(command):
    """`ccache g++ -pthread`: the last word before the flags. `env` has options and assignments of its own."""
    start = 0
    if Path(command[0]).name == "env":
        start = 1
        while start < len(command) - 1 and (command[start].startswith("-") or "=" in command[start]):
            start += 2 if command[start] in ("-u", "-C", "--unset", "--chdir") else 1
    end = start + 1
    while end < len(command) and not command[end].startswith("-"):
        end += 1
    return min(end, len(command)) - 1


def beside_c_compiler():
    """CC's command with the C++ compiler of the same name, where there is one: g++-12 for gcc-12, clang++ for clang."""
    command = words_of("CC")
    if not command:
        return []
    at = position_of_compiler(command)
    folder, name = os.path.split(command[at])
    spoken = {"gcc": "g++", "clang": "clang++", "cc": "c++"}
    name, is_known = re.subn(r"(?<![a-z])(gcc|clang|cc)(?![a-z])", lambda match: spoken[match[0]], name)
    command[at] = os.path.join(folder, name)
    return [command] if is_known and shutil.which(command[at]) else []


def find_compiler(variable, *defaults):
    """The first command that exists, without relative paths; the compiler's place in it; its name and version."""
    given = words_of(variable)
    candidates = [given] if given else defaults
    for command in candidates:
        if program := shutil.which(command[0]):
            at = position_of_compiler(command)
            words = [os.path.abspath(word) if os.path.dirname(word) else word for word in command[: at + 1]]
            if not os.path.isabs(program):  # by a relative path, or by a relative folder of PATH
                words[0] = os.path.abspath(program)
            command = [*words, *absolute(command[at + 1 :])]
            try:
                version = re.search(r"\d+\.\d[\d.]*|$", run([*command, "--version"]).stdout)[0]
            except OSError as error:
                raise CompileError(f"{command[0]} does not run: {error.strerror}; see {variable}") from error
            return command, at, f"{Path(command[at]).name} {version}".rstrip()
    names = " or ".join(command[0] for command in candidates)
    raise CompileError(f"no working compiler: {names} not found; {variable} can name another")


def architectures_here():
    """Those of this machine's GPUs, as far as the driver's tool names them."""
    if not shutil.which("nvidia-smi"):
        return []
    found = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).stdout
    majors = {int(major) for major in re.findall(r"^(\d+)\.\d+$", found, flags=re.MULTILINE)}
    return sorted({{8: "80", 9: "90a"}.get(major, "100") for major in majors if major >= 8})


def architectures():
    """nvcc's flags for the architectures that are asked for or here. Raises NotAsked if nothing asks for any."""
    if names := os.environ.get("AUXKERNELS_CUDA_ARCHS", "").strip():
        names = [name.strip() for name in names.split(",")]
        if unknown := [name for name in names if name not in ARCHITECTURES]:
            sys.exit(f"AUXKERNELS_CUDA_ARCHS must be of {', '.join(ARCHITECTURES)}, got {unknown[0]!r}")
    else:
        names = architectures_here() or (list(ARCHITECTURES) if "cuda" in MODES[MODE] else [])
    if not names:
        asked = "AUXKERNELS_BUILD=all or AUXKERNELS_CUDA_ARCHS builds it all the same"
        raise NotAsked(f"no GPU of compute capability 8.0 or newer is visible; {asked}")
    return [f"-gencode=arch=compute_{name},code={ARCHITECTURES[name]}" for name in names]


def toolchain(kind, shown):
    """The command that compiles, its flags to link, the compiler's name and version; adds to the folders shown."""
    user, user_link = flags_of("CPPFLAGS", "CXXFLAGS"), flags_of("LDFLAGS")
    if sys.platform == "darwin":
        user = flags_of("ARCHFLAGS") + user
    targets = architectures() if kind == "cuda" else []
    cxx, at, how = find_compiler("CXX", *beside_c_compiler(), ["g++"], ["clang++"])
    if kind == "cuda":
        folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
        nvcc, _, how = find_compiler("CUDACXX", ["nvcc"], *([f"{folder}/bin/nvcc"] for folder in folders if folder))
        # nvcc takes one program; wrappers stay behind. what it passes on it splits at commas and gives a shell as it is
        host = cxx[at]
        if re.search(r"[^\w./+-]", host):
            folder, name = os.path.split(os.path.abspath(shutil.which(host)))
            shown["host"], host = folder, f"host/{name}"
        command = [*nvcc, "-ccbin", host, *CUDA_FLAGS, *targets]
        user, user_link = (
            [word for flag in flags for word in ("-Xcompiler", shlex.quote(flag).replace(",", "\\,"))]
            for flags in (cxx[at + 1 :] + user, user_link)
        )
        return [*command, *user], user_link, how
    probe = [*cxx, *user, *user_link, "-fopenmp", "-fPIC", "-shared", "-x", "c++", "-", "-o", os.devnull]
    threads = "-fopenmp"
    if run(probe, input="#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n").returncode:
        threads, how = "-fopenmp-simd", f"{how}, without OpenMP"
    return [*cxx, *CXX_FLAGS, threads, *user], user_link, how


# -- the build ---------------------------------------------------------------------------------------------------------


def show_as(name, target):
    """`name` becomes a link to target. An earlier layout had a folder of objects in its place."""
    if name.is_dir() and not name.is_symlink():
        shutil.rmtree(name)
    name.unlink(missing_ok=True)
    name.symlink_to(os.path.abspath(target), target_is_directory=True)


def write_rules(path, command, link_flags, sources, module):
    """All names are relative to path's folder and plain; only the command and its flags may hold anything."""
    if any("\n" in word for word in (*command, *link_flags)):
        raise CompileError("ninja takes no line break in a compiler's path or flags")
    # the encoding of the names that Python was given, so that they reach the compiler byte for byte
    encoding = {"encoding": sys.getfilesystemencoding(), "errors": sys.getfilesystemencodeerrors()}
    with open(path, "w", **encoding) as file:
        rules = ninja.Writer(file, width=sys.maxsize)
        rules.variable("cc", ninja.escape(shlex.join(command)))
        compile_command = "$cc $more -MD -MF $out.d -c $in -o $out"
        rules.rule("compile", compile_command, description="$in", depfile="$out.d", deps="gcc")
        rules.rule("link", f"$cc {ninja.escape(shlex.join(link_flags))} $in -o $out", description="$out")
        objects = []
        for source in sources:
            more = {"more": "-ffp-contract=off"} if source in EXACT_SOURCES else None
            objects += rules.build(f"objects/{source}.o", "compile", source, variables=more)
        rules.build(module, "link", objects)


def why_not_tried(suffix, flags):
    """Why this Python cannot import what was built; None if it can."""
    target = os.environ.get("_PYTHON_HOST_PLATFORM", "")
    here = {"darwin": "macosx"}.get(sys.platform, sys.platform)
    if target and not (target.startswith(here) and target.endswith((f"-{platform.machine()}", "-universal2"))):
        return f"for {target}"
    if suffix not in EXTENSION_SUFFIXES:
        return f"for {suffix}"
    return "with sanitizers" if any("-fsanitize" in flag for flag in flags) else None


IMPORT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def check_import(name, module):
    done = run([sys.executable, "-I", "-c", IMPORT, name, str(module)])
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompileError(f"the module does not import: {lines[-1]}")


def put(content, place):
    """`content`, a file, appears at `place` whole or not at all; an unchanged file is left alone."""
    if place.exists() and filecmp.cmp(content, place, shallow=False):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial_file = place.with_name(f"{place.name}.part")
    try:
        shutil.copy(content, partial_file)
        os.replace(partial_file, place)
    finally:
        partial_file.unlink(missing_ok=True)


class BuildNative(build_ext):
    def run(self):
        try:
            self.build_and_record()
        except OSError as error:
            sys.exit(f"the native modules cannot be built here: {error}")

    def build_and_record(self):
        outcome, modules, built = {}, {}, []
        record = Path(self.build_temp, "_build.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        for extension in self.extensions:
            kind = extension.name.rpartition("_")[2]
            place = Path(self.get_ext_fullpath(extension.name))
            try:
                module, how = self.build_module(kind, extension, place.name)
                outcome[kind] = f"built with {how}"
                modules[place] = module
                built.append(extension)
            except CompileError as reason:
                if kind in MODES[MODE]:
                    sys.exit(f"AUXKERNELS_BUILD={MODE}, but {extension.name} was not built: {reason}")
                outcome[kind] = f"not built: {reason}"
                modules[place] = None
                if extension.sources and not isinstance(reason, NotAsked):
                    self.warn(f"{extension.name} {outcome[kind]}")
        # only now, so that a build that fails leaves an earlier one as it was
        for place, module in modules.items():
            if module is None:
                place.unlink(missing_ok=True)  # an earlier build's module would contradict _build.json
            else:
                put(module, place)
        record.write_text(json.dumps(outcome, indent=2) + "\n")
        put(record, place.with_name("_build.json"))
        self.extensions = self.distribution.ext_modules = built
        # bdist_wheel expected every module; a wheel without one fits every machine, and its name shall say so.
        self.distribution.get_command_obj("bdist_wheel").root_is_pure = not built

    def build_module(self, kind, extension, file_name):
        """Compiles, links and tries the module in build_temp; returns its path there and what it was built with.

        ninja, make-style dependency files and nvcc's own shell each read some characters of a path as syntax. They run
        in the build folder, which shows them sources and include folders by plain names.
        """
        if MODE != "auto" and kind not in MODES[MODE]:
            raise NotAsked(f"AUXKERNELS_BUILD={MODE}")
        if not extension.sources:
            raise CompileError(f"csrc has no {kind} sources")
        includes = [pybind11.get_include(), *self.include_dirs]
        shown = {"csrc": os.path.join(ROOT, "csrc")} | {f"include{i}": path for i, path in enumerate(includes)}
        command, link_flags, how = toolchain(kind, shown)
        command += ["-Icsrc", *(word for i in range(len(includes)) for word in ("-isystem", f"include{i}"))]
        scratch, module = Path(self.build_temp, kind), f"_{kind}.so"
        scratch.mkdir(parents=True, exist_ok=True)
        for name, target in shown.items():
            show_as(scratch / name, target)
        write_rules(scratch / "build.ninja", command, [*LINK_FLAGS, *link_flags], extension.sources, module)
        done = run([os.path.join(ninja.BIN_DIR, "ninja"), "-j", JOBS], cwd=scratch)
        print(done.stdout)
        if done.returncode:
            first_error = re.search(r".*(error|fatal) *:.*|$", done.stdout)[0]
            how = how.partition(",")[0]
            raise CompileError(f"{how} failed: {first_error or 'see the build log'}")
        suffix = file_name.removeprefix(extension.name.rpartition(".")[2])
        if reason := why_not_tried(suffix, [*command, *link_flags]):
            return scratch / module, f"{how}, {reason}, which was not tried here"
        check_import(extension.name, scratch / module)
        return scratch / module, how


if __name__ == "__main__":
    setup(ext_modules=MODULES, cmdclass={"build_ext": BuildNative})
