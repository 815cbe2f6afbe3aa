"""Sizes of the reproduction: of what is trained in every scale, and of the language model that it starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of a reproduction. `length` is the tokens of a window, `context` the verses that the planner reads.

    Batches are windows for the language model, verses for the planner; learning rates are of AdamW. Conditioning is
    trained in two stages, alone (`start_steps`) and, at a lower rate, with the planner where a way trains it
    (`joint_steps`): from an untrained conditioning the planner would first get noise for a gradient, and forget.
    """

    length: int
    max_chapters: int | None
    num_labels: int
    label_dim: int
    context: int
    dtype: str
    batch: int
    planner_batch: int
    planner_steps: int
    planner_rate: float
    start_steps: int
    start_rate: float
    joint_steps: int
    joint_rate: float
    conditioning_init: str


@dataclass(frozen=True)
class TrainedScale(Scale):
    """With a GPT-2 that is trained on the text first."""

    vocab_size: int
    width: int
    layers: int
    dropout: float
    base_steps: int
    base_rate: float


@dataclass(frozen=True)
class PretrainedScale(Scale):
    """With a language model and a sentence encoder that come pretrained.

    first_layer         index of the first conditioned layer. What is below is the same in every way to condition, so
                        that it is run once for each batch and no gradient passes through it.
    common_size         of the number that all labels share, in units of a centroid's entries together
    held_out_one_in     how many held-out chapters there are for each one that is measured
    """

    language_model: str
    sentence_encoder: str
    first_layer: int
    common_size: float
    held_out_one_in: int


SMALL = TrainedScale(
    vocab_size=4096,
    length=64,
    max_chapters=None,
    width=128,
    layers=4,
    dropout=0.0,
    num_labels=128,
    label_dim=64,
    context=8,
    dtype="float32",
    batch=16,
    base_steps=1000,
    base_rate=3e-3,
    planner_batch=128,
    planner_steps=1000,
    planner_rate=3e-3,
    start_steps=200,
    start_rate=1e-2,
    joint_steps=200,
    joint_rate=1e-3,
    conditioning_init="zero_projection",
)
SCALES: dict[str, Scale] = {
    "tiny": dataclasses.replace(
        SMALL,
        vocab_size=1024,
        length=32,
        max_chapters=60,
        width=32,
        layers=3,
        num_labels=16,
        label_dim=16,
        context=4,
        batch=8,
        base_steps=60,
        planner_batch=32,
        planner_steps=40,
        planner_rate=1e-3,
        start_steps=20,
        joint_steps=10,
    ),
    "small": SMALL,
    "gpu": dataclasses.replace(
        SMALL,
        vocab_size=8192,
        length=128,
        width=512,
        layers=8,
        dropout=0.2,
        num_labels=256,
        label_dim=128,
        dtype="bfloat16",
        batch=64,
        base_steps=1200,
        base_rate=1e-3,
        planner_steps=600,
        planner_rate=1e-3,
        start_steps=400,
        start_rate=3e-3,
        joint_steps=400,
        joint_rate=3e-4,
    ),
    "pretrained": PretrainedScale(
        language_model="SmolLM2-135M-Instruct",
        sentence_encoder="all-MiniLM-L6-v2",
        first_layer=20,
        # by the training loss of the oracle label, 3.39 (3.55, 3.45 and 3.40 with 1, 4 and 64)
        common_size=16.0,
        held_out_one_in=4,
        length=64,
        max_chapters=None,
        num_labels=256,
        label_dim=128,
        context=8,
        dtype="float32",
        batch=8,
        planner_batch=128,
        planner_steps=1000,
        planner_rate=1e-3,
        start_steps=60,
        start_rate=5e-3,
        joint_steps=60,
        joint_rate=5e-4,
        conditioning_init="zero_projection",
    ),
}
