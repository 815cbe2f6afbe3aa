"""Code in an interpreter of its own: for what a test cannot undo, and for memory that nothing else has touched."""

import subprocess
import sys
import textwrap
from pathlib import Path

# to be put in front of code that measures: the process's resident size, and its high-water mark set back to the present
RESIDENT_SIZE = """
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
"""


def huge_page() -> int:
    """Bytes of a page that the kernel may back a large tensor with: with 64 KiB pages it is much more than 2 MiB."""
    size = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    return int(size.read_text()) if size.exists() else 2 << 20


def run(code: str, preamble: str = "") -> str:
    """Standard output of preamble and (indented) code in a fresh interpreter; a hang is a failure."""
    command = [sys.executable, "-c", preamble + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
