"""Labels of text segments: sentences, their embeddings, k-means centroids, and the nearest centroid of each."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# -- segments ----------------------------------------------------------------------------------------------------------

# ends of sentences: stops with what closes a quotation or bracket, then space and what can begin a sentence
_END = re.compile(r"""(?<![.!?\u2026])[.!?\u2026]+["'\u201d\u2019)\]]*(?=\s+["'\u201c\u2018(\[]*[^\W_a-z])""")
_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:[A-Z]|[Mm]rs?|[Mm]s|[Dd]r|[Pp]rof|[Ss]t|[Ss]r|[Jj]r|[Gg]en|[Cc]ol|[Cc]apt|[Ll]t|[Rr]ev|[Hh]on|"
    r"[Vv]s|[Nn]o|[Vv]ol|[Pp]p?|[Cc]f|[Ff]ig|[Ee]q|(?:e\.g|i\.e|U\.S|U\.K|a\.m|p\.m))\.$"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of English text, in order, without the space around them.

    A sentence ends at `.`, `!`, `?` or an ellipsis, with the quotes and brackets that close there, if space follows and
    then something that is no lower-case letter; or at an empty line. A single full stop after a capital letter or one
    of a few abbreviations (Mr., Dr., e.g., No.) ends none. Rules only: for other languages give a splitter of your own
    where one is taken.
    """
    sentences = []
    for paragraph in _EMPTY_LINE.split(text):
        start = 0
        for match in _END.finditer(paragraph):
            end = match.end()
            if match.group() == "." and _ABBREVIATION.search(paragraph, max(start, end - 8), end):
                continue
            sentences.append(paragraph[start:end].strip())
            start = end
        sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def segment_ids_of_offsets(
    text: str, offsets: Iterable[tuple[int, int]], sentences: Sequence[str] | None = None
) -> list[int]:
    """The segment of each token of a text, from a tokenizer's offset mapping.

    offsets     (begin, end) of each token's characters; (0, 0) or any other empty range: a special token.
    sentences   the segments, in order and each found in the text after the one before; None: `split_sentences(text)`.
    Returns     indices of sentences, -1 for special tokens. A token belongs to the sentence of its last character, and
                a token of nothing but space to the sentence before.
    Raises      ValueError: a sentence that is not found.
    """
    begins, position = [], 0
    for i, sentence in enumerate(split_sentences(text) if sentences is None else sentences):
        begin = text.find(sentence, position)
        if begin < 0:
            raise ValueError(f"sentences[{i}] is not in the text after the one before: {sentence!r}")
        begins.append(begin)
        position = begin + len(sentence)
    return [-1 if begin >= end else max(bisect_right(begins, end - 1) - 1, 0) for begin, end in offsets]


def segment_ids_of_ends(is_segment_end: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The segment of each token of a batch, from where segments end, numbered over the whole batch.

    is_segment_end   bool [batch, seq]: the token is the last of its segment. Every row begins a new segment.
    attention_mask   [batch, seq], 0: padding, which belongs to no segment (-1); None: no padding.
    Returns          int64 [batch, seq], ids from 0 without a gap.
    """
    if is_segment_end.dtype != torch.bool or is_segment_end.dim() != 2:
        got = f"{is_segment_end.dtype} {list(is_segment_end.shape)}"
        raise TypeError(f"is_segment_end must be bool [batch, seq], got {got}")
    is_token = torch.ones_like(is_segment_end) if attention_mask is None else attention_mask.bool()
    place = is_token.cumsum(1)
    ends_before = (is_segment_end & is_token).cumsum(1) - (is_segment_end & is_token).long()
    begins = is_token & (place == 1)
    begins[:, 1:] |= is_token[:, 1:] & (ends_before[:, 1:] > ends_before[:, :-1])
    return (begins.flatten().cumsum(0).view_as(begins) - 1).masked_fill(~is_token, -1)


def collate_segments(
    examples: Sequence[Mapping[str, Any]], pad_token_id: int, padding_side: str = "right"
) -> dict[str, Any]:
    """A batch for `PlannerForCausalLM` of examples that number their own segments.

    examples       each with `input_ids` [n], `segment_ids` [n] in [-1, S_i), and any of `labels` [n] (default: the
                   input ids), `label_ids` [S_i], `label_scores` [S_i, K], `planner_inputs` (a dict of [S_i, ...]):
                   tensors or nested lists. An example without the last three has as many segments as its ids say.
    padding_side   "right" or "left"
    A Trainer removes the columns of segments, labels and scores, and any that this function does not read, before it
    calls the collator: give it `TrainingArguments(remove_unused_columns=False)`. `collators` has it as a class.
    Returns        input_ids, attention_mask, labels (-100 on padding), segment_ids numbered over the whole batch (-1 on
                   padding), all [batch, seq], with padding on the left also position_ids that count tokens alone;
                   label_ids [S], label_scores [S, K] and planner_inputs where the examples have them.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    shape = (len(examples), max(len(example["input_ids"]) for example in examples))
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100, "segment_ids": -1}
    batch = {name: torch.full(shape, fill, dtype=torch.int64) for name, fill in fills.items()}
    segment_ids, of_segments = joined_segments(examples)
    for i, example in enumerate(examples):
        tokens = torch.as_tensor(example["input_ids"])
        place = slice(None, len(tokens)) if padding_side == "right" else slice(shape[1] - len(tokens), None)
        batch["input_ids"][i, place] = tokens
        batch["attention_mask"][i, place] = 1
        batch["labels"][i, place] = torch.as_tensor(example.get("labels", tokens))
        batch["segment_ids"][i, place] = segment_ids[i]
        if padding_side == "left" and len(tokens) < shape[1]:
            batch["labels"][i, place.start] = -100  # padding would predict it
    if padding_side == "left":
        batch["position_ids"] = positions_of(batch["attention_mask"])
    return batch | of_segments


def positions_of(attention_mask: Tensor) -> Tensor:
    """The place of each token among those of its row; 0 for padding in front of them."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def joined_segments(examples: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], dict[str, Any]]:
    """The segment ids of each example, numbered on from one to the next, and what all segments have, joined.

    Raises   ValueError: fewer rows than segments, or rows for some examples only.
    """
    segment_ids: list[Tensor] = []
    of_segments: dict[str, list[Tensor]] = {}
    total = 0
    for i, example in enumerate(examples):
        segments = torch.as_tensor(example["segment_ids"])
        count = int(segments.max()) + 1 if len(segments) else 0
        given = {name: example[name] for name in ("label_ids", "label_scores") if name in example}
        for name, values in {**given, **example.get("planner_inputs", {})}.items():
            of_segments.setdefault(name, []).append(torch.as_tensor(values))
            if len(of_segments[name][-1]) < count:
                raise ValueError(f"examples[{i}] has {count} segments, but {len(of_segments[name][-1])} {name}")
            count = len(of_segments[name][-1])
        segment_ids.append(torch.where(segments < 0, -1, segments + total))
        total += count
    for name, values in of_segments.items():
        if len(values) != len(examples):
            raise ValueError(f"{name} must be given for every example or for none")
    joined = {name: torch.cat(values) for name, values in of_segments.items()}
    inputs = {name: joined.pop(name) for name in list(joined) if name not in ("label_ids", "label_scores")}
    return segment_ids, joined | ({"planner_inputs": inputs} if inputs else {})


# -- labels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids of segment embeddings, [K, E] float32: a label for each, and the first value of label embeddings."""

    centroids: Tensor

    def labels(self, embeddings: Tensor) -> Tensor:
        """The nearest centroid of each of [n, E]: int64 [n]."""
        return nearest_labels(embeddings, self.centroids)


def embed(segments: Sequence[str], encoder: Callable[[list[str]], Tensor], batch_size: int = 256) -> Tensor:
    """Embeddings of segments, float32 [n, E] on the CPU.

    encoder   called with at most batch_size strings, returns their embeddings [b, E]: a tensor or an array
    Raises    ValueError: no segments; an encoder that does not return one row for each string.
    """
    if not segments:
        raise ValueError("segments must hold at least one string, got none")
    rows = []
    for start in range(0, len(segments), batch_size):
        batch = list(segments[start : start + batch_size])
        with torch.no_grad():
            encoded = torch.as_tensor(encoder(batch))
        if encoded.dim() != 2 or len(encoded) != len(batch):
            raise ValueError(f"encoder must return [{len(batch)}, E] for {len(batch)} strings, got {[*encoded.shape]}")
        rows.append(encoded.detach().to("cpu", torch.float32))
    return torch.cat(rows)


def fit_codebook(embeddings: Tensor, num_labels: int, seed: int = 0, *, batch_size: int | None = None) -> Codebook:
    """Centroids of embeddings by k-means, started with k-means++. Needs scikit-learn: `auxkernels[labels]`.

    embeddings   [n, E], n at least num_labels
    seed         of the start: the same seed gives the same centroids on one machine
    batch_size   None: all embeddings at each step; a number: mini-batches of so many, for large n
    Source       Cornille et al. 2024; Arthur & Vassilvitskii 2007; Sculley 2010 (mini-batches).
    """
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("fit_codebook needs scikit-learn: pip install 'auxkernels[labels]'") from error
    points = torch.as_tensor(embeddings).detach().to("cpu", torch.float32)
    if points.dim() != 2 or not 1 <= num_labels <= len(points):
        raise ValueError(f"embeddings must be [n, E] with n >= num_labels = {num_labels}, got {list(points.shape)}")
    if not points.isfinite().all():
        raise ValueError("embeddings must be finite")
    options = {"n_clusters": num_labels, "init": "k-means++", "random_state": seed, "n_init": 1}
    means = KMeans(**options) if batch_size is None else MiniBatchKMeans(**options, batch_size=batch_size)
    with threadpool_limits(1):  # several threads add their sums up in the order in which they finish
        return Codebook(torch.from_numpy(means.fit(points.numpy()).cluster_centers_).float())


def nearest_labels(embeddings: Tensor, centroids: Tensor, chunk_size: int = 8192) -> Tensor:
    """The nearest centroid of each embedding, Euclidean: int64 [n].

    embeddings [n, E] and centroids [K, E] floating point; chunk_size embeddings are compared at a time.
    """
    if embeddings.dim() != 2 or centroids.dim() != 2 or embeddings.shape[1] != centroids.shape[1]:
        got = f"{list(embeddings.shape)} and {list(centroids.shape)}"
        raise ValueError(f"embeddings and centroids must be [n, E] and [K, E], got {got}")
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, centroids.dtype), torch.float32)
    centre = centroids.to(dtype).mean(0)  # distances do not change, their differences lose fewer digits
    table = centroids.to(dtype) - centre
    half_squares = 0.5 * table.square().sum(1)
    labels = [
        torch.argmin(half_squares - (chunk.to(dtype) - centre) @ table.mT, dim=1)
        for chunk in embeddings.split(chunk_size)
    ]
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64, device=embeddings.device)
