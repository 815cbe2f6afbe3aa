"""Text as a model reads it: a byte-level BPE vocabulary, and windows of tokens."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from benchmarks.files import write_atomically

IGNORE_INDEX = -100
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Windows:
    """Fixed-length windows of a token stream; the last token of each and the padding have no target (IGNORE_INDEX)."""

    tokens: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index) -> Windows:
        return Windows(self.tokens[index], self.targets[index])

    def spread(self, count: int) -> Windows:
        """`count` windows at equal distances, or all of them where there are fewer."""
        return self[torch.linspace(0, len(self) - 1, min(count, len(self))).long()]


def load_tokenizer(texts: list[str], vocab_size: int, cache_folder: Path) -> Tokenizer:
    """Byte-level BPE trained on the texts, or read from `cache_folder` if it was trained on the same texts before.

    Raises FileNotFoundError if the texts are too few for the size, as where only a part of the library is installed.
    """
    key = hashlib.sha256(f"{tokenizers.__version__} {vocab_size}".encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    path = Path(cache_folder) / f"bpe-{vocab_size}-{key.hexdigest()[:16]}.json"
    if path.exists():
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise FileNotFoundError(
            f"too little text: {tokenizer.get_vocab_size()} tokens for a vocabulary of {vocab_size}"
        )
    write_atomically(path, lambda temporary: tokenizer.save(str(temporary)))
    return tokenizer


def make_windows(tokenizer: Tokenizer, texts: list[str], length: int) -> Windows:
    """Join the texts, each followed by END_OF_TEXT, and cut the token stream into windows of `length` tokens."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = []
    for encoding in tokenizer.encode_batch(texts):
        stream.extend(encoding.ids)
        stream.append(end)
    count = math.ceil(len(stream) / length)
    tokens = torch.full((count * length,), end)
    tokens[: len(stream)] = torch.tensor(stream)
    targets = torch.full((count * length,), IGNORE_INDEX)
    targets[: len(stream) - 1] = tokens[1 : len(stream)]
    targets = targets.view(count, length)
    targets[:, -1] = IGNORE_INDEX
    return Windows(tokens.view(count, length), targets)
