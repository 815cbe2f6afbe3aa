"""The options that the reproductions share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.training.command_line import positive, run_job


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.reproductions.<name>`; the caller adds what is its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.reproductions.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale_help = "tiny: seconds; small: meant for ten minutes on two cores (default); gpu: for one GPU, not run yet; "
    scale_help += "pretrained: from models that `make pretrained` installs, meant for half an hour on two cores"
    scales = ("tiny", "small", "gpu", "pretrained")
    parser.add_argument("--scale", choices=scales, default="small", help=scale_help)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: PyTorch's choice)")
    resume_help = "go on from the checkpoints of a run with the same settings (default); --no-resume removes them"
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help=resume_help)
    output, checkpoints = Path("benchmarks/results", name), Path("build", name)
    parser.add_argument("--output", type=Path, default=output, help="folder of JSON, PNG and report, one per scale")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints, help="folder of checkpoints and vocabulary")
    return parser


def main(arguments: argparse.Namespace, job_module: str) -> int:
    """Runs the reproduction; returns the exit status: 0, 1 for a missing dependency or file, 130 for Ctrl-C."""
    return run_job(arguments, job_module, "the reproduction", "the same command goes on from the last checkpoint")
