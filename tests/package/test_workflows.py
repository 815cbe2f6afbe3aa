"""The workflows call what a person can call, and nothing that can change under them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import stub_build
from stub_build import ROOT

if reason := stub_build.missing():
    pytest.skip(reason, allow_module_level=True)

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
if not WORKFLOWS:
    pytest.skip("the source archive has no workflows", allow_module_level=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_steps_are_targets(path):
    text = path.read_text()
    for used in re.findall(r"uses: (.*)", text):
        is_pinned = re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", used)
        is_own = used.startswith("./.github/workflows/") and (ROOT / used).exists()
        assert is_pinned or is_own, used
    for command in re.findall(r"run: (.*)", text):
        words = command.split()
        if words[0] == "make" and "matrix" not in command:
            assert set(words[1:]) <= TARGETS, command
        else:
            assert words[0] in ("make", ".ci/run"), command
    for listed in re.findall(r"target: \[(.*)\]", text):
        assert set(listed.split(", ")) <= TARGETS
    assert "permissions:\n  contents: read\n" in text
    assert text.count("runs-on:") == text.count("timeout-minutes:")


def test_the_module_works_with_one_openmp_runtime():
    from auxkernels import native

    if reason := native.missing():
        pytest.skip(reason)
    module = Path(native.cpu().__file__)
    assert module.stat().st_size < 3e6 or "sanitized" in str(module)
    script = Path(__file__).with_name("wheel_works.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sys.platform != "linux" or "libgomp" in done.stdout


def test_the_citation_is_of_this_version():
    from auxkernels import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
