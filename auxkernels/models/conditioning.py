"""Label embeddings added in chosen decoder layers, through hooks on the layers or on modules in them."""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import checks
from ..soft_embedding import soft_embedding
from ..soft_embedding.segments import segments_to_tokens
from .modules import backbone

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from ..soft_embedding import LookupStats

# -- what is added -----------------------------------------------------------------------------------------------------


class Conditioning(nn.Module):
    """Codebooks and projections of all conditioned layers, stacked: one row for each layer and segment.

    Layer l of L adds `gate_l * (weight_l @ e + bias_l)` at its place, where e is the segment's label embedding in the
    layer's own codebook: a row of it, or the average of its rows with the probabilities of one softmax for all layers.

    codebooks   [L, K, E]: K labels of width E
    weight      [L, H, E] and bias [L, H]: from E to the width H at the place (`places.width_at`)
    gate        [L, H], or None: only for init="zero_gate"
    Source      Cornille et al. 2024. The authors' code adds inside the layer: in GPT-2 before the attention's output
                projection, in OLMo before the feed-forward part. `PlannerConfig.place` says where.
    """

    def __init__(
        self,
        num_layers: int,
        num_labels: int,
        label_dim: int,
        hidden_size: int,
        *,
        init: str = "zero_projection",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.codebooks = nn.Parameter(torch.empty((num_layers, num_labels, label_dim), **options))
        self.weight = nn.Parameter(torch.empty((num_layers, hidden_size, label_dim), **options))
        self.bias = nn.Parameter(torch.empty((num_layers, hidden_size), **options))
        has_gate = init == "zero_gate"
        self.gate = nn.Parameter(torch.empty((num_layers, hidden_size), **options)) if has_gate else None
        self.init = init
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Standard normal codebooks, equal in all layers; Xavier-normal or zero projections; zero biases and gates."""
        self.codebooks.copy_(torch.empty_like(self.codebooks[0]).normal_())
        if self.init == "zero_projection":
            self.weight.zero_()
        else:
            self.weight.normal_(std=math.sqrt(2.0 / sum(self.weight.shape[1:])))
        self.bias.zero_()
        if self.gate is not None:
            self.gate.zero_()

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor) -> None:
        """Every layer's codebook becomes `codebook` [K, E]."""
        if codebook.shape != self.codebooks.shape[1:]:
            want, got = list(self.codebooks.shape[1:]), list(codebook.shape)
            raise ValueError(f"codebook must be [num_labels, label_dim] = {want}, got {got}")
        self.codebooks.copy_(codebook)

    def forward(
        self, scores: Tensor, *, folded: bool | None = None, are_labels: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, LookupStats]:
        """The rows of segments whose labels are predicted, or given (`of_labels`, through the module and its hooks).

        scores    [S, K] floating point; with are_labels, labels [S], for which the rows alone are returned
        folded    whether the codebooks are projected, not the mixtures; None: what multiplies less (`is_folded`)
        options   temperature, hard, gumbel, clean_gradient, seed: as for `soft_embedding`
        Returns   rows [L, S, H], and (rows, `LookupStats`) the statistics of the label probabilities
        """
        if are_labels:
            return self.of_labels(scores, folded=folded)
        num_labels, label_dim = self.codebooks.shape[1:]
        if folded is None:
            folded = is_folded(len(scores), num_labels, label_dim, self.weight.shape[1])
        if folded:
            rows, stats = soft_embedding(scores, self._project(self.codebooks), return_stats=True, **options)
        else:
            mixture, stats = soft_embedding(scores, self.codebooks, return_stats=True, **options)
            rows = self._project(mixture)
        return rows + self._offset(), stats

    def of_labels(self, label_ids: Tensor, *, folded: bool | None = None) -> Tensor:
        """The rows [L, S, H] of segments with labels [S], int64 in [0, K).

        Raises   IndexError for another label, on CPU; on GPU its row is NaN.
        """
        num_labels = self.codebooks.shape[1]
        label_ids = _checked_labels(label_ids, num_labels)
        if num_labels < len(label_ids) if folded is None else folded:
            rows = segments_to_tokens(self._project(self.codebooks), label_ids)
        else:
            rows = self._project(segments_to_tokens(self.codebooks, label_ids))
        return rows + self._offset()

    def _project(self, embeddings: Tensor) -> Tensor:
        """[L, *, E] -> [L, *, H]."""
        projected = torch.matmul(embeddings, self.weight.mT)
        return projected if self.gate is None else projected * self.gate.unsqueeze(1)

    def _offset(self) -> Tensor:
        """[L, 1, H]."""
        return (self.bias if self.gate is None else self.bias * self.gate).unsqueeze(1)

    def extra_repr(self) -> str:
        layers, labels, width = self.codebooks.shape
        return f"layers={layers}, labels={labels}, label_dim={width}, hidden={self.weight.shape[1]}, init={self.init!r}"


def is_folded(num_segments: int, num_labels: int, label_dim: int, hidden_size: int) -> bool:
    """Whether projecting the codebooks takes fewer multiplications than projecting the segments' mixtures.

    Folded: K E H for the table and S K H for the mixture of its rows. Unfolded: S K E for the mixture and S E H for its
    projection. Backward needs twice the same products in both forms, and the layers share the factor L.
    """
    folded = num_labels * hidden_size * (label_dim + num_segments)
    unfolded = num_segments * label_dim * (num_labels + hidden_size)
    return folded < unfolded


def _checked_labels(label_ids: Tensor, num_labels: int) -> Tensor:
    if label_ids.dtype not in (torch.int64, torch.int32) or label_ids.dim() != 1:
        raise TypeError(f"label_ids must be int64 [segments], got {label_ids.dtype} {list(label_ids.shape)}")
    if label_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((label_ids < 0) | (label_ids >= num_labels)).nonzero()
        if len(wrong):
            segment = int(wrong[0])
            raise IndexError(
                f"label_ids must be in [0, {num_labels}), got {int(label_ids[segment])} for segment {segment}"
            )
    return label_ids.masked_fill(label_ids < 0, num_labels)  # a negative id would otherwise mean: no segment


# -- where it is added -------------------------------------------------------------------------------------------------


def predicted_segments(segment_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The segment that each token predicts a token of: the alignment of conditioning with next-token prediction.

    A token is conditioned on the segment of its successor, so the last token of a segment already carries the next
    segment's label. The last token of a row, whose successor is unknown or padding, keeps its own segment.

    segment_ids      [batch, seq] integers, the segment that each token is part of; negative: none
    attention_mask   [batch, seq], 0: padding; None: no padding
    Returns          [batch, seq]
    """
    of_successors = torch.cat((segment_ids[:, 1:], segment_ids[:, -1:]), dim=1)
    if attention_mask is None:
        return of_successors
    if attention_mask.shape != segment_ids.shape:
        shapes = f"{list(attention_mask.shape)} for segment_ids {list(segment_ids.shape)}"
        raise ValueError(f"attention_mask must have the shape of segment_ids, got {shapes}")
    is_token = attention_mask.to(segment_ids.device).bool()
    is_followed = torch.cat((is_token[:, 1:], is_token[:, -1:]), dim=1)
    return torch.where(is_followed, of_successors, segment_ids)


def token_mask(attention_mask: object, shape: torch.Size) -> Tensor | None:
    """The mask [batch, seq] of the given tokens alone; None where a mask does not tell."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] < shape[1]:
        return None
    return attention_mask[:, attention_mask.shape[1] - shape[1] :]


def checked_segments(segment_ids: Tensor | None, mode: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The segment of each token, [batch, seq], as it is given. Mode "fixed" needs none."""
    if segment_ids is None:
        if mode != "fixed":
            raise ValueError(f"mode {mode!r} needs segment_ids")
        return torch.zeros(shape, dtype=torch.int64, device=device)
    if segment_ids.is_floating_point() or segment_ids.shape != shape:
        got = f"{segment_ids.dtype} {list(segment_ids.shape)}"
        raise ValueError(f"segment_ids must be int64 {list(shape)}, as the tokens, got {got}")
    return segment_ids


def conditioning_segments(
    segment_ids: Tensor, are_aligned: bool, attention_mask: Tensor | None, num_segments: int | None
) -> Tensor:
    """The row of segments that conditions each token, [batch, seq]; num_segments None: a single row for all."""
    if num_segments is None:
        segment_ids = segment_ids.clamp(max=0)
    else:
        segment_ids = refuse_numbers_of_rows(segment_ids, num_segments, attention_mask)
    return segment_ids if are_aligned else predicted_segments(segment_ids, attention_mask)


def refuse_numbers_of_rows(segment_ids: Tensor, num_segments: int, attention_mask: Tensor | None = None) -> Tensor:
    """The segments of tokens [batch, seq], which must be numbered over the whole batch, as they are.

    Collators that know nothing of segments leave each example's own ids. With them all rows would follow the first
    row's plans, so such ids are recognised: 0, 1, 2, ... in every row, while labels of further segments are given.

    Raises   ValueError for them on CPU; on GPU they become unknown segments (NaN).
    """
    if segment_ids.shape[0] < 2 or segment_ids.shape[1] == 0:
        return segment_ids
    is_token = segment_ids >= 0
    if attention_mask is not None:
        is_token &= attention_mask.to(segment_ids.device) != 0
    highest = segment_ids.masked_fill(~is_token, -1).cummax(dim=1).values
    steps = highest.diff(dim=1, prepend=torch.full_like(highest[:, :1], -1))
    counts = highest[:, -1] + 1
    is_counted = (steps <= 1).all() & (~is_token | (segment_ids == highest)).all()
    begins_anew = is_counted & ((counts > 0).sum() > 1) & (counts.max() < num_segments)
    if segment_ids.device.type == "cpu" and not torch.compiler.is_compiling() and begins_anew:
        raise ValueError(
            "segment_ids must be numbered over the whole batch, got ids that begin anew in each row, at most "
            f"{int(counts.max())} where labels of {num_segments} segments are given: number them on from row to row, "
            "as labels.collate_segments does"
        )
    return torch.where(begins_anew & is_token, num_segments, segment_ids)


class ActiveRows(threading.local):
    """What the hooks of one model add at this moment, in this thread; nothing outside its forward pass.

    So others may share the language model, also in other threads. The hooks hold this object and no weights. It is
    copied and pickled with the hooks, as one object with the model's; the copy adds nothing.
    """

    rows: tuple[Tensor, ...] | None = None
    segment_ids: Tensor | None = None

    def __reduce__(self) -> tuple[type[ActiveRows], tuple[()]]:
        return type(self), ()

    def set(self, rows: tuple[Tensor, ...] | None, segment_ids: Tensor | None) -> None:
        """rows [S, H] of each conditioned layer, segment_ids [batch, seq] below S; None, None: add nothing."""
        self.rows, self.segment_ids = rows, segment_ids


class AddRows:
    """A forward pre-hook that adds the active rows of one layer to the hidden states, the module's first argument."""

    has_run = False

    def __init__(self, active: ActiveRows, index: int):
        self.active, self.index = active, index

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.active.rows is None:
            return None
        self.has_run = True
        if args:
            return (self._added(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: self._added(kwargs[name])}

    def _added(self, hidden: Tensor) -> Tensor:
        rows, segment_ids = self.active.rows, self.active.segment_ids
        assert rows is not None and segment_ids is not None, "both are set where one is"
        of_layer = rows[self.index].to(device=hidden.device, dtype=hidden.dtype)
        added = segments_to_tokens(of_layer, segment_ids.to(hidden.device))
        return hidden + (added.flatten(0, 1) if hidden.dim() == 2 else added)  # some flatten tokens inside a layer


class LayerHooks:
    """`AddRows` hooks on the n-th modules for row set n. They are removed by `remove`, or when this object dies."""

    def __init__(self, modules: list[list[nn.Module]], active: ActiveRows):
        self.added = [AddRows(active, n) for n, of_layer in enumerate(modules) for _ in of_layer]
        flat = [module for of_layer in modules for module in of_layer]
        self.handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module, hook in zip(flat, self.added, strict=True)
        ]
        self.remove = _remover(self)

    def passed_by(self) -> list[int]:
        """Row sets that have never been added, where hooks were never called."""
        return sorted({hook.index for hook in self.added if not hook.has_run})

    def __getstate__(self) -> tuple[list[RemovableHandle], list[AddRows]]:
        return self.handles, self.added

    def __setstate__(self, state: tuple[list[RemovableHandle], list[AddRows]]) -> None:
        self.handles, self.added = state
        self.remove = _remover(self)


def _remover(hooks: LayerHooks) -> weakref.finalize[..., LayerHooks]:
    remover = weakref.finalize(hooks, _remove, hooks.handles)
    remover.atexit = False
    return remover


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _text_parts(lm: PreTrainedModel) -> list[nn.Module]:
    """Where the layers of the text are: not in the towers of other modalities, which may have as many."""
    part = lm.get_decoder() if hasattr(lm, "get_decoder") else None  # in ModernBERT's decoder that is the output layer
    return [part, backbone(lm)] if isinstance(part, nn.Module) and part is not lm else [backbone(lm)]


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a transformers causal LM: the outermost list of as many modules as the config has layers.

    Raises   ValueError where there is no such list, TypeError for an encoder-decoder model.
    """
    config = lm.config.get_text_config()
    if lm.config.is_encoder_decoder:
        raise TypeError(f"the language model must be a decoder only, got {type(lm).__name__}")
    count = config.num_hidden_layers
    for part in _text_parts(lm):
        outermost, least_depth = None, 0
        for name, module in part.named_modules():  # min(..., key=...) would break a graph of torch.compile
            depth = name.count(".")
            is_list = isinstance(module, nn.ModuleList) and len(module) == count
            if is_list and (outermost is None or depth < least_depth):
                outermost, least_depth = module, depth
        if outermost is not None:
            return outermost
    raise ValueError(f"{type(lm).__name__} has no list of {count} decoder layers")


def chosen_layers(layers: Any, count: int) -> list[int]:
    """Checked indices of decoder layers, ascending; None: all but the first two, as in the paper."""
    if layers is None:
        if count < 3:
            raise ValueError(f"layers must be given for a model of {count} decoder layers: the default skips two")
        return list(range(2, count))
    layers = [checks.integer("layers", layer) for layer in layers]
    chosen = sorted(layers)
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < count for i in chosen):
        raise ValueError(f"layers must be distinct indices in [0, {count}), at least one, got {layers}")
    return chosen
