"""vLLM, and this checkout as a plugin of it, as if it were installed: with the entry points of pyproject.toml."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit threads
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    # threads that spin while they wait take the time of whatever else runs
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


def _as_plugin() -> None:
    """Puts the checkout and the metadata of a distribution on the path of this process and of those that it starts."""
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        line for group, named in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in named.items()))
    ]
    folder = Path(tempfile.mkdtemp(prefix="auxkernels-plugin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = folder / "auxkernels-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: auxkernels\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(ROOT), str(folder)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


if importlib.util.find_spec("vllm") is not None:  # else each module is skipped
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _as_plugin()


@pytest.fixture(scope="session")
def engines():
    from engines import Engines

    one = Engines()
    yield one
    one.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function of a pair's name: the folder that it is saved in."""
    import pairs

    made, parent = {}, tmp_path_factory.mktemp("pairs")

    def saved(name: str) -> Path:
        if name not in made:
            made[name] = pairs.make(name, parent, seed=len(name))
        return made[name]

    return saved
