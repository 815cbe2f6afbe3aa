"""The checkout's folders, files that are written whole or not at all, and parts of pages that commands write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its place whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_results(folder: Path, contents: dict[str, bytes | str]) -> list[Path]:
    """Writes each content under its name; returns the paths."""
    for name, content in contents.items():
        data = content.encode() if isinstance(content, str) else content
        write_atomically(folder / name, lambda temporary, data=data: temporary.write_bytes(data))
    return [folder / name for name in contents]


def with_section(text: str, name: str, command: str, new: str) -> str:
    """A page with new text between the markers of one part. Raises ValueError where they are not there once each."""
    begin, end = f"<!-- {name}: written by `{command}` -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must have {begin} and {end} once each, in this order")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"
