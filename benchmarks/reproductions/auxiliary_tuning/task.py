"""The task of the reproduction: write a passage that contains a given keyword.

The keyword of a passage is one of its content words. A word (a run of letters, whatever its case) is a candidate if it
has at least four letters, is no stop word, occurs in at least `min_verses` and at most `max_verses` training verses,
and is one token of the vocabulary in its most frequent spelling after a space. Among a passage's candidates the one
with the smallest SHA-256 of "<passage> <word>" is taken, as if drawn at random. A passage without one has no keyword.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.reproductions import bible
from benchmarks.training.text import END_OF_TEXT, Windows

WORD = re.compile(r"[^\W\d_]+")
MIN_LETTERS = 4
# function words of four letters and more; the most frequent ones, such as "they", are beyond any band anyway
FUNCTION_WORDS = """
about above according afterward again against alone already also although always among another anything around
aside away because been before behind being below beside besides between beyond both cannot concerning could
didst doest doeth doing done doth down during each either else even ever every except first forth from hadst
hath have having hence here hereby herein hereof himself hither howbeit however indeed into itself last least
lest like many mayest might mightest mine moreover more most much must myself near neither never nevertheless
nigh none nothing only other others ought ourselves over same second seeing shalt shall should shouldest since
some something still straightway such surely than that thee their theirs them themselves then thence there
thereby therefore therein thereof thereon thereto therewith these they thine third thither this those though
three through throughout thus thyself till together toward under until unto upon utterly verily very wast well
were wert what whatsoever when whence whensoever where whereas whereby wherefore wherein whereof whereon
wheresoever whereunto wherewith whether which while whither whithersoever whom whomsoever whose whosoever will
wilt with within without would wouldest your yours yourselves
"""
STOP_WORDS = frozenset(FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Task:
    """Everything that a run reads. Windows by split: `passages` all of them, `tuning` those that have a keyword.

    keywords, keyword_ids   by split, of each window of `tuning`: the word, and its token int64 [n, 1]
    num_candidates          how many words can be keywords
    """

    tokenizer: Tokenizer
    passages: dict[str, Windows]
    tuning: dict[str, Windows]
    keywords: dict[str, list[str]]
    keyword_ids: dict[str, Tensor]
    num_candidates: int


def words_of(text: str) -> list[str]:
    """The lower-case words of a text; ["god", "s"] for "God's"."""
    return [word.lower() for word in WORD.findall(text)]


def contains(text: str, keyword: str) -> bool:
    return keyword in words_of(text)


def candidate_ids(verses: Iterable[str], tokenizer: Tokenizer, min_verses: int, max_verses: int) -> dict[str, int]:
    """The candidate words with the token that stands for each, in alphabetical order."""
    counts: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for verse in verses:
        found = WORD.findall(verse)
        counts.update({word.lower() for word in found})
        for word in found:
            spellings.setdefault(word.lower(), Counter())[word] += 1
    candidates = {}
    for word in sorted(counts):
        if len(word) < MIN_LETTERS or word in STOP_WORDS or not min_verses <= counts[word] <= max_verses:
            continue
        ids = tokenizer.encode(" " + spellings[word].most_common(1)[0][0]).ids
        if len(ids) == 1:
            candidates[word] = ids[0]
    return candidates


def keyword_of(passage: str, candidates: Iterable[str]) -> str | None:
    """The keyword of a passage, or None where no word of it is a candidate."""
    found = set(words_of(passage)).intersection(candidates)
    return min(found, key=lambda word: hashlib.sha256(f"{passage} {word}".encode()).digest(), default=None)


def load_task(scale, cache_folder: Path, tokenizer: Tokenizer | None = None) -> Task:
    """Reads and tokenizes the text. `scale` has length (tokens of a window), max_chapters and the band.

    tokenizer   one in which END_OF_TEXT is a token; None: trained on the training chapters, of `scale.vocab_size`
    """
    splits = bible.split_chapters(bible.load_verses(), scale.max_chapters)
    if tokenizer is None:
        tokenizer = bible.train_tokenizer(splits["train"], scale.vocab_size, cache_folder)
    verses = [verse for chapter in splits["train"] for verse in chapter]
    candidates = candidate_ids(verses, tokenizer, scale.min_verses, scale.max_verses)
    passages, tuning, keywords, keyword_ids = {}, {}, {}, {}
    for split, chapters in splits.items():
        # END_OF_TEXT before and after a passage: its last token is predicted from the last but one of the window
        pieces = [[clause for verse in chapter for clause in bible.clauses(verse)] for chapter in chapters]
        texts = bible.make_passages(tokenizer, pieces, scale.length - 1)
        passages[split] = bible.text_windows(tokenizer, texts, scale.length)
        drawn = [keyword_of(text, candidates) for text in texts]
        rows = [row for row, keyword in enumerate(drawn) if keyword is not None]
        tuning[split] = passages[split][torch.tensor(rows, dtype=torch.long)]
        keywords[split] = [drawn[row] for row in rows]
        keyword_ids[split] = torch.tensor([candidates[word] for word in keywords[split]], dtype=torch.long).view(-1, 1)
    return Task(tokenizer, passages, tuning, keywords, keyword_ids, len(candidates))


def generated_text(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The text of generated tokens [length], up to END_OF_TEXT."""
    ids = tokens.tolist()
    end = tokenizer.token_to_id(END_OF_TEXT)
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
