"""What a reproduction shows and keeps: progress bars, Markdown tables, and files written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.demo.report import Terminal
from benchmarks.timing.report import write_atomically

__all__ = ["Terminal", "figure_png", "markdown_table", "share_error", "write_results"]


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / count)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others, which hold numbers, to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_results(folder: Path, contents: dict[str, bytes | str]) -> list[Path]:
    """Writes each content under its name; returns the paths."""
    for name, content in contents.items():
        data = content.encode() if isinstance(content, str) else content
        write_atomically(folder / name, lambda temporary, data=data: temporary.write_bytes(data))
    return [folder / name for name in contents]
