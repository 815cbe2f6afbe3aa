"""Python's standard library as text, split into code and docstrings.

It comes with Python, so nothing is downloaded. A file belongs to the held-out tenth if the
SHA-256 of its path (relative to the library, with forward slashes) is 0 modulo 10: code and docstrings of one file
are therefore on the same side.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path

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


def path_digest(relative_path: str) -> int:
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big")


def library_files(max_files: int | None = None) -> list[tuple[str, Path]]:
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


def split_source(text: str) -> tuple[str, list[str]]:
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


def load_corpus(max_files: int | None = None) -> Corpus:
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
