"""Auxiliary tuning on real text: a passage that contains a given keyword, from a base that has never seen keywords.

A small GPT-2 is trained on passages of the American Standard Version and frozen. Then, at equal training compute: an
auxiliary model whose logits are added to the frozen base's and which alone reads the keyword; the same language model
trained from scratch with the keyword in front of the passage; and the base fine-tuned so. Measured on held-out
chapters: perplexity given the keyword, the share of written passages that contain the requested keyword, their
perplexity under the untouched base, and the perplexity on plain text afterwards. With --scale pretrained the base is
SmolLM2-135M, LoRA and auxiliaries that are trained from the base's cached hidden states are compared too, and what each
does to other text (docstrings).

    python -m benchmarks.reproductions.auxiliary_tuning [--scale tiny|small|gpu|pretrained] [--seed N] [--no-resume]

An interrupted run goes on from its checkpoints. Needs: pip install '.[bench,models,repro]'; make pretrained
Source: Zeldes et al. 2020, Technical Report: Auxiliary Tuning and its Application to Conditional Text Generation.
"""

import sys

from benchmarks.reproductions import command_line


def parse_arguments(argv):
    parser = command_line.argument_parser("auxiliary_tuning", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (default 0)")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the reproduction; returns the exit status: 0, 1 for a missing dependency or file, 130 for Ctrl-C."""
    arguments = parse_arguments(argv)
    module = "pretrained_job" if arguments.scale == "pretrained" else "job"
    return command_line.main(arguments, f"benchmarks.reproductions.auxiliary_tuning.{module}")


if __name__ == "__main__":
    sys.exit(main())
