"""The planner and the ways in which its labels condition the language model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from auxkernels import aux_cross_entropy
from auxkernels.models.planner import PlannerForCausalLM
from benchmarks.reproductions.planner.task import NO_VERSE, Labels, SegmentedWindows, Task
from benchmarks.training.text import IGNORE_INDEX

NUM_HEADS = 2


@dataclass(frozen=True)
class Arm:
    """A way to condition the language model: a mode of `PlannerForCausalLM`, and what of the planner is used.

    labels   where labels come from: "none", "planner" or "oracle"
    start    the way with a frozen planner that the first stage of training is the same as; then the second trains the
             planner too. None: the planner is frozen in both.
    place    of `PlannerForCausalLM`; "attention_output" is that of the paper's own code
    """

    mode: str
    labels: str
    start: str | None = None
    place: str = "layer_input"


ARMS = {
    "fixed": Arm("fixed", "none"),
    "hard": Arm("hard", "planner"),
    "straight_through": Arm("straight_through", "planner", start="hard"),
    "soft_frozen": Arm("soft", "planner"),
    "soft": Arm("soft", "planner", start="soft_frozen"),
    "soft_attention_frozen": Arm("soft", "planner", place="attention_output"),
    "soft_attention": Arm("soft", "planner", start="soft_attention_frozen", place="attention_output"),
    "oracle": Arm("hard", "oracle"),
}


class Planner(nn.Module):
    """Scores the labels of a verse from the embeddings of the verses before it.

    Positions, a linear layer, one Transformer encoder layer, the mean of its outputs, and a policy head whose weight
    starts as the codebook [K, E]. Source: Cornille et al. 2024.
    """

    def __init__(self, codebook: Tensor, context: int):
        super().__init__()
        num_labels, width = codebook.shape
        self.register_buffer("positions", sinusoids(context, width), persistent=False)
        self.input = nn.Linear(width, width)
        self.encoder = nn.TransformerEncoderLayer(
            width, NUM_HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.policy = nn.Linear(width, num_labels)
        with torch.no_grad():
            self.policy.weight.copy_(codebook)
            self.policy.bias.zero_()

    def forward(self, embeddings: Tensor, is_padding: Tensor) -> Tensor:
        """embeddings [S, context, E], nearest verse first; is_padding bool [S, context]. Returns scores [S, K]."""
        hidden = self.encoder(self.input(embeddings + self.positions), src_key_padding_mask=is_padding)
        is_verse = (~is_padding).unsqueeze(-1)
        return self.policy(hidden.masked_fill(~is_verse, 0).sum(1) / is_verse.sum(1))


def sinusoids(count: int, width: int) -> Tensor:
    """Position encodings [count, width], sines then cosines, of wavelengths from 2 pi to 20,000 pi."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(count).unsqueeze(1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


def planner_inputs(verses: Tensor, task: Task, labels: Labels) -> dict[str, Tensor]:
    """What the planner reads to score verses [S]: the embeddings before each, nothing of the verse itself."""
    rows = task.contexts[verses]
    return {"embeddings": labels.rows[rows.clamp(min=0)], "is_padding": rows == NO_VERSE}


def conditioned_inputs(
    arm: Arm, windows: SegmentedWindows, task: Task, labels: Labels, reading: dict[str, Tensor] | None = None
) -> dict:
    """Arguments of `PlannerForCausalLM` for a batch of windows: one segment for each verse that occurs in it.

    reading   by which arguments the language model reads the windows; None: their tokens
    """
    inputs = {**(reading or {"input_ids": windows.tokens}), "mode": arm.mode, "use_cache": False}
    if arm.labels == "none":
        return inputs
    verses, segment_ids = windows.verses.unique(return_inverse=True)
    inputs |= {"segment_ids": segment_ids, "segments_are_aligned": True}
    if arm.labels == "oracle":
        return inputs | {"label_ids": labels.oracle[verses]}
    return inputs | {"planner_inputs": planner_inputs(verses, task, labels)}


def window_losses(model: nn.Module, inputs: dict, targets: Tensor) -> Tensor:
    """Summed nats of each window, [n], under any causal language model."""
    logits = model(**inputs).logits
    return aux_cross_entropy(logits, None, targets, ignore_index=IGNORE_INDEX, reduction="none").sum(1)


def conditioned_lm(
    lm, planner: Planner, arm: Arm, codebook: Tensor, seed: int, init: str, layers: list[int] | None = None
) -> PlannerForCausalLM:
    """The frozen language model with a frozen planner, and conditioning whose first values depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PlannerForCausalLM.from_lm(
            lm,
            planner,
            codebook=codebook,
            layers=layers,
            place=arm.place,
            mode=arm.mode,
            freeze_lm=True,
            conditioning_init=init,
        )
    model.freeze_planner()
    return model
