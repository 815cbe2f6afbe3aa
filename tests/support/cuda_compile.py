"""The CUDA kernels compiled for an architecture, without a device: what ptxas reports and the machine code."""

from __future__ import annotations

import fcntl
import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ninja

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-O3", "-std=c++17", "-fmad=false")  # as in setup.py
SOURCES = ("cross_entropy_resident", "cross_entropy_reread", "cross_entropy_backward")


class Kernel(NamedTuple):
    """One kernel: `name` without its arguments, as in `cross_entropy_reread_kernel<float, 0, Kind<1, 1, 8>>`."""

    name: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    listing: list[str]  # mnemonics with their modifiers, as they lie in memory
    instructions: Counter  # the same, counted

    def has(self, start: str) -> bool:
        return any(mnemonic.startswith(start) for mnemonic in self.instructions)


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    return None if _tool("cuobjdump") else "cuobjdump is not installed"


def _tool(name: str) -> str | None:
    """From CUDA's own folder or from Triton's wheel, which brings it."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(path) if path.exists() else None


@functools.cache
def kernels(architecture: str) -> list[Kernel]:
    """All kernels for one architecture; warnings are errors."""
    folder = ROOT / "build" / f"sm_{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes would compile at once
        _compile(architecture, folder)
    found = []
    for source in SOURCES:
        instructions = _instructions(folder / f"{source}.cubin")
        for name, resources in _resources((folder / f"{source}.log").read_text()).items():
            found.append(Kernel(_spoken(name), *resources, instructions[name], Counter(instructions[name])))
    return found


def _compile(architecture: str, folder: Path) -> None:
    with open(folder / "build.ninja", "w") as file:
        rules = ninja.Writer(file)
        rules.variable("builddir", str(folder))
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        flags = " ".join([*FLAGS, "-Werror all-warnings -Xptxas -v -cubin", target, f"-I{ROOT / 'csrc'}"])
        rules.rule("compile", f"nvcc {flags} -MD -MF $out.d $in -o $out > $log 2>&1", depfile="$out.d", deps="gcc")
        for source in SOURCES:
            outputs = str(folder / f"{source}.cubin")
            variables = {"log": str(folder / f"{source}.log")}
            rules.build(outputs, "compile", str(ROOT / "csrc/cuda" / f"{source}.cu"), variables=variables)
    command = [f"{ninja.BIN_DIR}/ninja", "-f", str(folder / "build.ninja"), "-j", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert done.returncode == 0, f"sm_{architecture}:\n{done.stdout[-1000:]}\n{logs[-4000:]}"


def _resources(log: str) -> dict[str, tuple[int, int, int]]:
    """(registers, bytes of stack, bytes spilled) of each kernel, from ptxas's report."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        spills = re.search(r"(\d+) bytes stack.* (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        stack, stores, loads = map(int, spills.groups())
        found[name] = (int(re.search(r"Used (\d+) registers", part)[1]), stack, stores + loads)
    return found


def _instructions(cubin: Path) -> dict[str, list[str]]:
    sass = subprocess.run([_tool("cuobjdump"), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    parts = (part.partition("\n") for part in sass.split("Function : ")[1:])
    return {name.strip(): pattern.findall(text) for name, _, text in parts}


def _spoken(mangled: str) -> str:
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |auxk::|\(int\)|\([^()]*\)$", "", text)
