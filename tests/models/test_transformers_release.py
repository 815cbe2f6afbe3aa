"""Where transformers is missing, or too old, importing the models says so, and what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def said_of(tmp_path, package: str) -> str:
    """The last line of an error, where transformers is a package of that content."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text(package)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import auxkernels.models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode
    return done.stderr.strip().splitlines()[-1]


def oldest() -> str:
    tomllib = pytest.importorskip("tomllib")
    path = ROOT / "pyproject.toml"
    (requirement,) = tomllib.loads(path.read_text())["project"]["optional-dependencies"]["models"]
    return requirement.partition(">=")[2].partition(",")[0]


def test_a_transformers_that_is_too_old_is_named(tmp_path):
    want = f"ImportError: auxkernels.models needs transformers {oldest()} or newer, got 4.57.6: "
    assert said_of(tmp_path, "__version__ = '4.57.6'\n") == f"{want}pip install 'auxkernels[models]'"


def test_a_missing_transformers_is_named(tmp_path):
    missing = "raise ModuleNotFoundError('no module', name='transformers')\n"
    want = f"ImportError: auxkernels.models needs transformers {oldest()} or newer: pip install 'auxkernels[models]'"
    assert said_of(tmp_path, missing) == want


def test_what_transformers_itself_lacks_is_not_hidden(tmp_path):
    assert said_of(tmp_path, "import no_such_module\n") == "ModuleNotFoundError: No module named 'no_such_module'"
