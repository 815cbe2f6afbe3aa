"""The job at the scale whose language model and sentence encoder come pretrained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import pretrained
from benchmarks.reproductions.bible import load_verses, split_chapters
from benchmarks.reproductions.planner.job import Job
from benchmarks.reproductions.planner.methods import ARMS
from benchmarks.reproductions.planner.task import SegmentedWindows, Task, make_task, reduced


class PretrainedJob(Job):
    """Conditions the upper layers of a pretrained language model that is never trained.

    The lower layers read the same in every way to condition, so that a batch's hidden states are kept from the first
    reading on, float32: 147 kB for a window of 64 tokens at width 576.
    """

    arms = tuple(name for name, arm in ARMS.items() if arm.place == "layer_input")
    evaluation_batch = 16  # of each window, [length, vocabulary of 49152] logits
    checkpoint_steps = 20

    def load_task(self, checkpoints) -> Task:
        scale = self.scale
        self.base, tokenizer = pretrained.load_language_model()
        self.base.requires_grad_(False).to(self.device)
        splits = split_chapters(load_verses(), scale.max_chapters)
        splits |= {split: splits[split][:: scale.held_out_one_in] for split in ("validation", "test")}
        return make_task(splits, tokenizer.backend_tokenizer, scale.length, scale.context)

    def embeddings(self, texts: list[str], train: slice, dim: int) -> Tensor:
        """The sentence encoder's, on the first `dim` singular vectors of those of texts[train]."""
        with self.autocast():
            return reduced(encoded(texts, self.device), train, dim)

    def load_base(self) -> None:
        first, count = self.scale.first_layer, self.base.config.num_hidden_layers
        self.lower = part_of_layers(self.base, 0, first)
        self.lower.base_model.norm = nn.Identity()
        self.conditioned = part_of_layers(self.base, first, count)
        self.layers = list(range(count - first))
        self.states: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def reading(self, windows: SegmentedWindows) -> dict[str, Tensor]:
        key = windows.tokens.cpu().numpy().tobytes()
        if key not in self.states:
            outputs = self.lower.base_model(input_ids=windows.tokens, use_cache=False)
            self.states[key] = outputs.last_hidden_state
        return {"inputs_embeds": self.states[key]}

    def codebook(self) -> Tensor:
        """The centroids, and one number beside them: what this text has in common is learnt by all labels together.

        The language model has not been trained on it, and that is by far the most of what conditioning can give. Adam
        moves all weights of the projection alike, so that the number's size is how fast that is learnt; the
        projection's bias alone would learn it many times slower.
        """
        centroids = self.labels.centroids
        size = self.scale.common_size * centroids.abs().sum(dim=1).mean()
        return torch.cat([centroids, size.expand(len(centroids), 1)], dim=1)

    def fit_base(self) -> dict:
        config = self.base.config
        return {
            "name": self.scale.language_model,
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "vocab_size": config.vocab_size,
        }


def part_of_layers(lm: PreTrainedModel, first: int, end: int) -> PreTrainedModel:
    """The model with its decoder layers first, ..., end - 1 alone, which shares its weights. It is no trained model:
    the hidden states before layer `first` are its `inputs_embeds`."""
    part = copy.deepcopy(lm, {id(weight): weight for weight in lm.parameters()})
    part.base_model.layers = part.base_model.layers[first:end]
    part.config.num_hidden_layers = end - first
    part.config.use_cache = False  # which knows layers by their place in the whole model
    return part


def encoded(texts: list[str], device: torch.device):
    """Embeddings by the pretrained sentence encoder, NumPy float32 [texts, its width]."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(pretrained.sentence_encoder_folder()), device=str(device))
    return encoder.encode(texts, batch_size=64, show_progress_bar=False)
