"""The demo's text: Python's standard library, split into code and docstrings, and a byte-level BPE vocabulary of it.

Every machine that runs the demo has this text, so nothing is downloaded. A file belongs to the held-out tenth if the
SHA-256 of its path (relative to the library, with forward slashes) is 0 modulo 10: code and docstrings of one file
are therefore on the same side, and the vocabulary is trained on the training side alone.
"""

import ast
import hashlib
import math
import sysconfig
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from benchmarks.timing.report import write_atomically

IGNORE_INDEX = -100
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 10
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# not library code as people write it: tests, installed packages, generated tables, and prose stored as a module
EXCLUDED_FOLDERS = {"__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
EXCLUDED_FOLDERS |= {"site-packages", "test", "tests", "turtledemo"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Corpus:
    """Texts of the standard library: one code text per file, one docstring text per module, class or function."""

    train_code: list[str]
    held_out_code: list[str]
    train_docstrings: list[str]
    held_out_docstrings: list[str]


@dataclass(frozen=True)
class Windows:
    """Fixed-length windows of a token stream; the last token of each and the padding have no target (IGNORE_INDEX)."""

    tokens: torch.Tensor
    targets: torch.Tensor

    def __len__(self):
        return self.tokens.shape[0]

    def __getitem__(self, index):
        return Windows(self.tokens[index], self.targets[index])

    def spread(self, count):
        """`count` windows at equal distances, or all of them where there are fewer."""
        return self[torch.linspace(0, len(self) - 1, min(count, len(self))).long()]


def path_digest(relative_path):
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big")


def library_files(max_files=None):
    """(relative path, path) of the library's modules in path order; with `max_files` those of the smallest hashes."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            found.append(("/".join(parts), path))
    if max_files is not None:
        found = sorted(found, key=lambda entry: path_digest(entry[0]))[:max_files]
    return sorted(found)


def split_source(text):
    """Split a module into its code without docstrings and the list of its docstrings, dedented."""
    source = text.encode()
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    docstrings, spans = [], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            docstrings.append(docstring)
            constant = node.body[0]
            start = line_starts[constant.lineno - 1] + constant.col_offset
            spans.append((start, line_starts[constant.end_lineno - 1] + constant.end_col_offset))
    code, position = [], 0
    for start, end in sorted(spans):
        code.append(source[position:start].rstrip(b" "))
        position = end
    code.append(source[position:])
    return b"".join(code).decode(), docstrings


def load_corpus(max_files=None):
    """Read and split the running interpreter's standard library; FileNotFoundError where its sources are missing."""
    corpus = Corpus([], [], [], [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ast warns about invalid escapes in old modules
        for relative_path, path in library_files(max_files):
            try:
                with tokenize.open(path) as file:
                    code, docstrings = split_source(file.read())
            except (SyntaxError, UnicodeDecodeError):
                continue
            is_held_out = path_digest(relative_path) % HELD_OUT_ONE_IN == 0
            (corpus.held_out_code if is_held_out else corpus.train_code).append(code)
            (corpus.held_out_docstrings if is_held_out else corpus.train_docstrings).extend(docstrings)
    if not (corpus.train_docstrings and corpus.held_out_docstrings):
        raise FileNotFoundError(f"no sources of the standard library in {sysconfig.get_path('stdlib')}")
    return corpus


def load_tokenizer(texts, vocab_size, cache_folder):
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


def make_windows(tokenizer, texts, length):
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


def batch_order(window_count, batch_size, steps, seed):
    """Window indices [steps, batch_size]: every window once before any comes again, in an order fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / window_count)
    order = torch.cat([torch.randperm(window_count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)
