"""What the tests of the reproductions share."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.training import loop


def without_times(value):
    """Results without what differs from one run to the next."""
    if isinstance(value, dict):
        timed = ("seconds", "measuring_seconds", "wall_seconds", "machine")
        return {key: without_times(entry) for key, entry in value.items() if key not in timed}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def whole_and_interrupted(main, folder, options: list[str], checkpoints_before: int, job=None, steps: int = 0):
    """(results of a whole tiny run, of one that is interrupted in a training and goes on, the results' folder).

    checkpoints_before  how many are written before the interruption; job, steps: a class to write one so often
    """
    torch.set_num_threads(1)
    arguments = [
        *("--scale", "tiny", "--threads", "1", "--device", "cpu", *options),
        *("--output", str(folder / "results"), "--checkpoints", str(folder / "whole")),
    ]
    results = folder / "results" / "tiny"
    assert main(arguments) == 0
    whole = json.loads((results / "results.json").read_text())

    calls = []
    original = loop.save_checkpoint

    def interrupting(*arguments):
        original(*arguments)
        calls.append(arguments)
        if len(calls) == checkpoints_before:
            raise KeyboardInterrupt

    arguments[-1] = str(folder / "parts")
    with pytest.MonkeyPatch.context() as patch:
        if job is not None:
            patch.setattr(job, "checkpoint_steps", steps)
        patch.setattr(loop, "save_checkpoint", interrupting)
        assert main(arguments) == 130
        patch.setattr(loop, "save_checkpoint", original)
        assert main(arguments) == 0
    return whole, json.loads((results / "results.json").read_text()), results
