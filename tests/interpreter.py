"""Code in an interpreter of its own: for what a test cannot undo, and for memory that nothing else has touched."""

import subprocess
import sys
import textwrap

# to be put in front of code that measures: the process's resident size, and its high-water mark set back to the present
RESIDENT_SIZE = """
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
"""


def run(code: str, preamble: str = "") -> str:
    """Standard output of preamble and (indented) code in a fresh interpreter; a hang is a failure."""
    command = [sys.executable, "-c", preamble + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
