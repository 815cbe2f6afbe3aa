"""What a training shows while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Terminal:
    """Lines that stay, and one progress bar at a time; no bar where the output is not a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """Bar of a stage; yields advance(text). The stage's line with its duration is printed when it ends."""
        columns = [TextColumn("{task.description}"), BarColumn()]
        if total is not None:
            columns += [MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
        start = time.perf_counter()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=total, text="")
            yield lambda text: progress.update(task, advance=1, text=text)
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")
