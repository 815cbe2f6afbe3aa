"""The workflows call what a person can call, and nothing that can change under them."""

import os
import re
import shutil
import subprocess

import pytest
import stub_build
from stub_build import ROOT

from auxkernels import __version__

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


def check_tag(**variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("TAG", "GITHUB_REF_NAME")}
    command = ["make", "-s", "-C", ROOT, "check-tag"]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_tag_of_another_version_is_refused_before_anything_is_built():
    assert check_tag(TAG=f"v{__version__}").returncode == 0
    assert check_tag(GITHUB_REF_NAME=f"v{__version__}").returncode == 0
    for tag in ("v999.0", __version__, f"v{__version__}.post1", f"v{__version__}; true", ""):
        done = check_tag(GITHUB_REF_NAME=tag)
        assert done.returncode != 0
        assert f"the tag must be v{__version__}, which auxkernels/__init__.py says, got '{tag}'" in done.stderr
    jobs = (ROOT / ".github/workflows/publish.yml").read_text().partition("\njobs:\n")[2]
    names = re.findall(r"^  (\w+):$", jobs, flags=re.MULTILINE)
    assert names[0] == "tag" and "run: make check-tag\n" in jobs
    assert re.findall(r"^    needs: (\w+)$", jobs, flags=re.MULTILINE) == names[:-1]  # each job after the one before


def test_the_citation_is_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
