"""The planner on real text: does a mixture of predicted labels, trained end to end, beat the likeliest label?

A small GPT-2 is trained on the American Standard Version and frozen. A planner predicts a label for each verse, a
k-means centroid of its embedding, from the verses before it; the language model is conditioned on embeddings of these
labels in its layers. Compared at equal training, over seeds: no plan, a fixed label, the predicted hard label,
straight-through, the mixture with a frozen planner, the mixture with planner and conditioning trained end to end, these
two also where the paper's code adds labels, before the attention's output projection, and the oracle label. Measured:
perplexity of held-out chapters, and which labels the planner predicts.
With --scale pretrained the language model is SmolLM2-135M, the embeddings are those of all-MiniLM-L6-v2, and labels
are added at the layers' input alone.

    python -m benchmarks.reproductions.planner [--scale tiny|small|gpu|pretrained] [--seeds N] [--no-resume]

An interrupted run goes on from its checkpoints. Needs: pip install '.[bench,models,labels,repro]'; make pretrained
Source: Cornille et al. 2024, End-to-end Planner Training for Language Modeling.
"""

import sys

from benchmarks.reproductions import command_line
from benchmarks.training.command_line import positive


def parse_arguments(argv):
    parser = command_line.argument_parser("planner", __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="how many: seeds 0, 1, ... (default 3)")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the reproduction; returns the exit status: 0, 1 for a missing dependency or file, 130 for Ctrl-C."""
    return command_line.main(parse_arguments(argv), "benchmarks.reproductions.planner.job")


if __name__ == "__main__":
    sys.exit(main())
