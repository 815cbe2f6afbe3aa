"""The package's main job on real text: adapt a frozen language model to another domain with an auxiliary model.

A small causal language model is fitted on the code of Python's standard library and frozen. A smaller auxiliary,
trained with `aux_cross_entropy` on the sum of the two models' heads (`Head`: hidden states and weight, whose logits
are never stored whole), adapts it to the library's docstrings. The same training with eager PyTorch, which stores the
logits, runs beside it: the loss curves must coincide, or the exit status is 1.

    python -m benchmarks.demo [--scale tiny|small] [--steps N] [--dtype float32|bfloat16]

With --scale pretrained the base is SmolLM2-135M-Instruct (`make pretrained`), which reads the text, the Bible of 1901,
once; the same prompts are then continued with the auxiliary's logits times 0 (the base alone), 1 and 1.5.

Source: Zeldes et al. 2020, Technical Report: Auxiliary Tuning and its Application to Conditional Text Generation.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.training.command_line import positive, run_job


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale",
        choices=("tiny", "small", "pretrained"),
        default="small",
        help="tiny: seconds; small, pretrained: minutes (default small)",
    )
    parser.add_argument("--steps", type=positive, help="training steps of the auxiliary (default: as the scale says)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and data order (default 0)")
    dtypes = ("float32", "bfloat16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="of heads, or of a pretrained base (float32)"
    )
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: PyTorch's choice)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/demo"), help="folder of PNG and JSON (not pretrained)"
    )
    parser.add_argument("--cache", type=Path, default=Path("build/demo"), help="folder of what is kept for a next run")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the demo; returns the exit status: 0, 1 for a failed check or a missing dependency, 130 for Ctrl-C."""
    arguments = parse_arguments(argv)
    job = "benchmarks.demo.pretrained" if arguments.scale == "pretrained" else "benchmarks.demo.job"
    return run_job(arguments, job, "the demo", "no half-written file is left")


if __name__ == "__main__":
    sys.exit(main())
