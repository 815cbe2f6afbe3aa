"""The planner's task: verses as segments, windows that know the verse of each predicted token, labels of verses.

A chapter is one stream of tokens: END_OF_TEXT, then each verse with a leading space and a closing line break. The line
break belongs to the verse that it closes, so that the verse after it, whose label conditions its tokens, begins where
the text itself says so: a change of the label tells nobody that a verse is about to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from auxkernels.models.labels import fit_codebook, nearest_labels
from benchmarks.files import write_atomically
from benchmarks.reproductions.bible import SPLITS, load_verses, split_chapters, train_tokenizer
from benchmarks.training.text import END_OF_TEXT, IGNORE_INDEX

END_OF_VERSE = "\n"
NO_VERSE = -1


@dataclass(frozen=True)
class SegmentedWindows:
    """Windows of chapters: tokens, targets (the next token, or IGNORE_INDEX) and verses, int64 [n, length].

    verses     the number of the verse that the *target* is part of, over all splits; on padding that of the last target
    chapters   [n], the chapter of each window within its split
    """

    tokens: Tensor
    targets: Tensor
    verses: Tensor
    chapters: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> SegmentedWindows:
        return SegmentedWindows(*(value[index] for value in vars(self).values()))

    def to(self, device: torch.device) -> SegmentedWindows:
        return SegmentedWindows(*(value.to(device) for value in vars(self).values()))


@dataclass(frozen=True)
class Task:
    """Windows by split; the verses' texts, numbered through all splits; what each split's numbers are.

    contexts   int64 [number of verses, context]: the verses before each one, nearest first, as row numbers of
               `Labels.rows`: verse number + 1, 0 for the beginning of the chapter, NO_VERSE before that.
    """

    tokenizer: Tokenizer
    texts: list[str]
    verses_of: dict[str, slice]
    windows: dict[str, SegmentedWindows]
    contexts: Tensor


def load_task(vocab_size: int, length: int, context: int, max_chapters: int | None, cache_folder: Path) -> Task:
    """The whole text, or `max_chapters` chapters of it, as windows of `length` tokens."""
    splits = split_chapters(load_verses(), max_chapters)
    return make_task(splits, train_tokenizer(splits["train"], vocab_size, cache_folder), length, context)


def make_task(splits: dict[str, list[list[str]]], tokenizer: Tokenizer, length: int, context: int) -> Task:
    """The task of verses by split and chapter."""
    texts: list[str] = []
    verses_of, windows, contexts = {}, {}, []
    for split in SPLITS:
        first = len(texts)
        streams = []
        for chapter in splits[split]:
            streams.append(chapter_stream(tokenizer, chapter, len(texts)))
            contexts.append(chapter_contexts(len(chapter), len(texts), context))
            texts += chapter
        verses_of[split] = slice(first, len(texts))
        windows[split] = segmented_windows(streams, length)
    return Task(tokenizer, texts, verses_of, windows, torch.cat(contexts))


def chapter_stream(tokenizer: Tokenizer, chapter: list[str], first: int) -> tuple[Tensor, Tensor]:
    """Tokens [n] of a chapter and the number of the verse that each is part of; verses are numbered from `first`."""
    encodings = tokenizer.encode_batch([" " + verse + END_OF_VERSE for verse in chapter])
    tokens, verses = [tokenizer.token_to_id(END_OF_TEXT)], [first]
    for number, encoding in enumerate(encodings, first):
        tokens += encoding.ids
        verses += [number] * len(encoding.ids)
    return torch.tensor(tokens), torch.tensor(verses)


def chapter_contexts(num_verses: int, first: int, context: int) -> Tensor:
    """Row numbers [num_verses, context] of what comes before each verse of a chapter (see `Task`), nearest first."""
    before = torch.arange(num_verses).unsqueeze(1) - 1 - torch.arange(context)
    rows = (before + first + 1).masked_fill(before == -1, 0)
    return rows.masked_fill(before < -1, NO_VERSE)


def segmented_windows(streams: list[tuple[Tensor, Tensor]], length: int) -> SegmentedWindows:
    """Each chapter's stream cut into windows of `length` targets; the last of a chapter is padded with END_OF_TEXT."""
    parts = []
    for chapter, (tokens, verses) in enumerate(streams):
        num_targets = len(tokens) - 1
        count = math.ceil(num_targets / length)
        padding = count * length - num_targets
        parts.append(
            SegmentedWindows(
                tokens=_padded(tokens[:-1], padding, 0).view(count, length),
                targets=_padded(tokens[1:], padding, IGNORE_INDEX).view(count, length),
                verses=_padded(verses[1:], padding, int(verses[-1])).view(count, length),
                chapters=torch.full((count,), chapter),
            )
        )
    return SegmentedWindows(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _padded(values: Tensor, padding: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, padding), value=fill)


# -- labels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Embeddings and labels of verses.

    rows        float32 [1 + verses, E]: zeros for the beginning of a chapter, then each verse's embedding of length 1
    centroids   float32 [K, E]: the codebook
    oracle      int64 [verses]: the nearest centroid of each
    """

    rows: Tensor
    centroids: Tensor
    oracle: Tensor


def tfidf_embeddings(texts: list[str], train: slice, dim: int) -> Tensor:
    """Embeddings [texts, dim] of length 1: TF-IDF and its singular vectors, both of texts[train]."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english")
    return reduced(vectorizer.fit(texts[train]).transform(texts), train, dim)


def reduced(features, train: slice, dim: int) -> Tensor:
    """Rows of a matrix (SciPy's or NumPy's) on the first `dim` singular vectors of features[train], of length 1."""
    svd = TruncatedSVD(dim, random_state=0).fit(features[train])
    return normalize(torch.from_numpy(svd.transform(features)).float(), dim=1)


def load_labels(
    task: Task,
    num_labels: int,
    label_dim: int,
    path: Path,
    embed: Callable[[list[str], slice, int], Tensor] = tfidf_embeddings,
) -> Labels:
    """Labels of the task's verses, kept at `path`: embeddings by embed(texts, training part, label_dim) and centroids
    of the training verses."""
    if not path.exists():
        train = task.verses_of["train"]
        embeddings = embed(task.texts, train, label_dim)
        centroids = fit_codebook(embeddings[train], num_labels, seed=0).centroids
        tensors = {"rows": torch.cat((torch.zeros(1, label_dim), embeddings)), "centroids": centroids}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
    saved = load_file(path)
    rows, centroids = saved["rows"], saved["centroids"]
    return Labels(rows, centroids, nearest_labels(rows[1:], centroids))
