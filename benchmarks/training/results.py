"""What results are told in: Markdown tables, PNGs, standard errors."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.figure import Figure


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / count)


def machine_text(described: dict) -> str:
    """What `ReproductionJob.describe` says of the machine, its software and the commit."""
    threads = f"{described['threads']} thread{'s' if described['threads'] > 1 else ''}"
    return (
        f"{described['device']}, {threads}, torch {described['torch']}, transformers {described['transformers']}, "
        f"commit {described['commit']}{' (changed)' if described['is_dirty'] else ''}"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others, which hold numbers, to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
