"""What the build makes of the machine that it runs on: odd paths, the environment's compilers and flags, failures.

As in test_packaging.py, the native sources are a module of a few lines (stub_build.py).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stub_build
from stub_build import ROOT, build_module, make_tree, modules, record, rules, run

if reason := stub_build.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); import _cpu as module; print(module.answer)"


def answer(folder, name="_cpu"):
    """What the module in that folder says in a process of its own."""
    command = [sys.executable, "-c", IMPORT.replace("_cpu", name), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def answer_of(tree):
    return answer(tree / "out/auxkernels/native")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# -- paths -------------------------------------------------------------------------------------------------------------

# syntax of ninja, of dependency files, of a shell or of a pattern, and what an encoding may not know
ODD = "-a $b$$ c: |d#e&;(f)%~[g]{h}*?!<i>'j\"k\\l=@,^`é"
VERY_ODD = f"{ODD}\nm"


def test_a_tree_with_an_odd_path_is_built_in_place(tree):
    moved = tree.parent / VERY_ODD / "tree"
    moved.parent.mkdir()
    tree.rename(moved)
    for number in (42, 43):  # the second time, ninja must find the header among what it noted
        (moved / "csrc/answer.h").write_text(f"constexpr int kAnswer = {number};\n")
        done = run(moved, "setup.py", "build_ext", "--inplace", AUXKERNELS_BUILD="cpu")
        assert done.returncode == 0, done.stderr
        assert answer(moved / "auxkernels/native") == number
    assert "no work to do" in run(moved, "setup.py", "build_ext", "--inplace").stdout
    assert [path.name for path in moved.parent.iterdir()] == ["tree"]


@pytest.mark.parametrize("is_absolute", [False, True])
def test_folders_of_the_build_and_of_headers_may_have_odd_paths(tree, is_absolute):
    odd = tree / ODD
    for folder in ("of flags", "of pybind11"):
        (odd / folder).mkdir(parents=True)
    (tree / "csrc/answer.h").write_text("#include <of_flags.h>\n")
    (odd / "of flags/of_flags.h").write_text("#include <of_pybind11.h>\nconstexpr int kAnswer = ANSWER;\n")
    place = f"{tree}/{ODD}" if is_absolute else ODD
    # beside setup.py, it is found before the one that is installed
    (tree / "pybind11.py").write_text(f"def get_include():\n    return {place + '/of pybind11'!r}\n")
    flags = shlex.quote(f"-I{place}/of flags")
    for number in (42, 43):  # the second time, ninja must find the header among what it noted
        (odd / "of pybind11/of_pybind11.h").write_text(f"#define ANSWER {number}\n")
        command = ("setup.py", "build_ext", f"--build-temp={place}/temp", f"--build-lib={place}/lib")
        done = run(tree, *command, AUXKERNELS_BUILD="cpu", CPPFLAGS=flags)
        assert done.returncode == 0, done.stderr
        assert answer(odd / "lib/auxkernels/native") == number


@pytest.mark.parametrize("is_quoted", [False, True])
def test_a_compiler_may_have_an_odd_path(tree, is_quoted):
    compiler = script(tree / ODD / "g++", 'exec g++ "$@"')
    cxx = f"{shlex.quote(str(compiler))} -DNOTHING" if is_quoted else str(compiler)
    done = build_module(tree, AUXKERNELS_BUILD="cpu", CXX=cxx)
    assert done.returncode == 0, done.stderr
    assert answer_of(tree) == 42
    assert record(tree)["cpu"].startswith("built with g++ ")


# -- compilers and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cxx", ["g++ -pthread", "env g++", "env -u NOTHING A=b g++ -pthread -B .", "tools/g++"])
def test_compiler_is_the_word_before_the_flags_for_nvcc_too(tree, cxx):
    script(tree / "tools/g++", 'exec g++ "$@"')
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").touch()
    done = build_module(tree, CXX=cxx, CUDACXX="g++", AUXKERNELS_CUDA_ARCHS="90a")
    assert done.returncode == 0, done.stderr
    assert record(tree)["cpu"].startswith("built with g++ ")
    words = rules(tree, "cuda")
    host = words[words.index("-ccbin") + 1]  # by a plain name, because the tree's path has a space
    assert host == "g++" or os.path.samefile(tree / "scratch/cuda" / host, tree / "tools/g++")
    if "-pthread" in cxx:
        assert "-pthread" in rules(tree) and words[words.index("-pthread") - 1] == "-Xcompiler"


def test_flags_of_the_environment_come_after_ours_and_reach_the_compiler_whole(tree):
    (tree / "csrc/answer.h").write_text("#include <size.h>\nconstexpr int kAnswer = SIZE;\n")
    (tree / "extra").mkdir()
    (tree / "extra/size.h").write_text("#define SIZE sizeof(TEXT)\n")
    flags = {"CPPFLAGS": "-Iextra", "CXXFLAGS": r"""-O2 -DTEXT='"a  b$c\"d"'""", "LDFLAGS": "-Wl,-rpath,$ORIGIN"}
    done = build_module(tree, AUXKERNELS_BUILD="cpu", **flags, CFLAGS="-DNOT_FOR_CXX")
    assert done.returncode == 0, done.stderr
    assert answer_of(tree) == len('a  b$c"d') + 1
    words = rules(tree)
    assert words.index("-O3") < words.index("-O2") and "-Wl,-rpath,$ORIGIN" in words and "-DNOT_FOR_CXX" not in words


def test_unset_cxx_means_the_compiler_beside_cc(tree):
    script(tree / "tools/odd-g++-7", 'exec g++ "$@"')
    for cc, name in ((f"{tree}/tools/odd-gcc-7", "odd-g++-7"), ("tools/odd-gcc-7 -pthread", "odd-g++-7")):
        if " " in str(tree) and cc.startswith("/"):
            cc = shlex.quote(cc)
        assert build_module(tree, AUXKERNELS_BUILD="cpu", CC=cc).returncode == 0
        assert record(tree)["cpu"].startswith(f"built with {name} ")
    assert build_module(tree, AUXKERNELS_BUILD="cpu", CC=cc, CXX="g++").returncode == 0
    assert record(tree)["cpu"].startswith("built with g++ ")
    assert build_module(tree, AUXKERNELS_BUILD="cpu", CC="no-such-cc").returncode == 0


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_beside_the_path_is_found(tree, variable):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").touch()
    nvcc = script(tree / "toolkit/bin/nvcc", 'exec g++ "$@"')
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not shutil.which("nvcc", path=folder))
    if not shutil.which("g++", path=path):
        pytest.skip("nvcc and g++ are in one folder")
    variables = {"PATH": path, "AUXKERNELS_CUDA_ARCHS": "90a", variable: str(tree / "toolkit")}
    assert build_module(tree, **variables).returncode == 0
    assert str(nvcc) in rules(tree, "cuda")


CUDA_STUB = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", "", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cuda() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", sizeof(TEXT));
  return module;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_builds_in_an_odd_folder_with_the_flags_of_the_environment(tree):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").write_text(CUDA_STUB)
    compiler = script(tree / "tools $b/g++", 'exec g++ "$@"')
    flags = {"CXXFLAGS": """-DTEXT='"a  b$c,d"'""", "LDFLAGS": "-Wl,-z,now", "CXX": f"'{compiler}' -pthread"}
    command = ["setup.py", "build_ext", f"--build-lib={VERY_ODD}", f"--build-temp={VERY_ODD}temp"]
    done = run(tree, *command, AUXKERNELS_BUILD="cuda", AUXKERNELS_CUDA_ARCHS="90a", **flags)
    assert done.returncode == 0, done.stderr
    assert answer(tree / VERY_ODD / "auxkernels/native", "_cuda") == len("a  b$c,d") + 1


# -- failures ----------------------------------------------------------------------------------------------------------


def files_of(tree):
    return {path.name: path.read_bytes() for path in (tree / "out/auxkernels/native").iterdir()}


UNLINKED = "int nowhere();\nstatic const int kAnswer = nowhere();\n"  # a shared library may name what nobody defines


def test_a_module_that_does_not_import_counts_as_not_built(tree):
    (tree / "csrc/answer.h").write_text(UNLINKED)
    assert build_module(tree).returncode == 0
    assert list(files_of(tree)) == ["_build.json"]
    assert "does not import" in record(tree)["cpu"] and "nowhere" in record(tree)["cpu"]
    done = build_module(tree, AUXKERNELS_BUILD="cpu")
    assert done.returncode != 0 and "does not import" in done.stderr


def test_a_module_for_another_platform_is_not_tried(tree):
    (tree / "csrc/answer.h").write_text(UNLINKED)
    done = build_module(tree, AUXKERNELS_BUILD="cpu", _PYTHON_HOST_PLATFORM="linux-riscv64")
    assert done.returncode == 0, done.stderr
    assert modules(tree) and record(tree)["cpu"].endswith("for linux-riscv64, which was not tried here")


@pytest.mark.parametrize("broken", ["#error on purpose\n", UNLINKED])
def test_a_build_that_fails_leaves_the_earlier_one_as_it_was(tree, broken):
    assert build_module(tree, AUXKERNELS_BUILD="cpu").returncode == 0
    before = files_of(tree)
    (tree / "csrc/answer.h").write_text(broken)
    assert build_module(tree, AUXKERNELS_BUILD="cpu").returncode != 0
    assert files_of(tree) == before


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"CXX": "no-such-compiler -O2"}, "no-such-compiler not found"),
        ({"CXX": "false"}, "failed: see the build log"),
        ({"CXX": "./garbage"}, "garbage does not run"),
        ({"CXX": "g++ 'unclosed"}, "CXX must be words as a shell reads them"),
        ({"CXXFLAGS": '-DX="unclosed'}, "CXXFLAGS must be words as a shell reads them"),
        ({"CXXFLAGS": "'-DX=\n'"}, "no line break"),
        ({"MAX_JOBS": "abc"}, "MAX_JOBS must be a whole number of at least 1, got 'abc'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a whole number of at least 1, got '0'"),
    ],
    ids=str,
)
def test_a_build_that_cannot_be_says_why_in_a_line(tree, variables, said):
    (tree / "garbage").write_bytes(b"\x7fELF")
    (tree / "garbage").chmod(0o755)
    done = build_module(tree, AUXKERNELS_BUILD="cpu", **variables)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("folder", ["scratch", "out"])
def test_a_folder_that_cannot_be_written_is_named(tree, folder):
    (tree / folder).touch()
    done = build_module(tree, AUXKERNELS_BUILD="cpu")
    assert done.returncode != 0
    assert f"'{folder}" in done.stderr and "Traceback" not in done.stderr


# -- clang -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_builds_every_instruction_set_without_a_warning(tmp_path):
    variables = {"CXX": "clang++", "AUXKERNELS_BUILD": "cpu", "AUXKERNELS_WERROR": "1"}
    done = run(ROOT, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/temp", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    native = tmp_path / "auxkernels/native"
    assert json.loads((native / "_build.json").read_text())["cpu"].startswith("built with clang++ ")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _cpu; print(*_cpu.instruction_sets())"
    found = subprocess.run([sys.executable, "-c", code, native], capture_output=True, text=True).stdout.split()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    has_avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags)
    expected = {"avx512bf16": has_avx512 and "avx512_bf16" in flags, "avx512": has_avx512, "avx2": "avx2" in flags}
    assert found == [*(name for name, is_here in expected.items() if is_here), "baseline"]
