"""Processes that run side by side under one limit, their output kept line by line as it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.files import ROOT

# of its limit, what a process that is interrupted has left to say what it found
GRACE_SECONDS = 5.0
# for output that a process's own children still hold open
DRAIN_SECONDS = 2.0


class Ended(NamedTuple):
    """Exit status (None: it was stopped; negative: the signal that ended it) and output of a process."""

    status: int | None
    output: str

    def last(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1][:160] if lines else "no output"


class Log:
    """A file of lines, each behind the name of what said it; on the disk as soon as it is said."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._lock, self._begun = path.open("a"), threading.Lock(), time.perf_counter()

    def say(self, name: str, text: str) -> None:
        with self._lock:
            self._file.write(f"{time.perf_counter() - self._begun:6.1f} [{name}] {text.rstrip()}\n")
            self._file.flush()


class _Process:
    """A started command in a process group of its own, and the thread that reads what it says."""

    def __init__(self, name: str, command: list[str], log: Log, environment: dict[str, str]):
        self.lines: list[str] = []
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, text=True, **options
        )
        self.reader = threading.Thread(target=self._read, args=(name, log), daemon=True)
        self.reader.start()

    def _read(self, name: str, log: Log) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            log.say(name, line)

    def wait(self, deadline: float) -> bool:
        """Whether it has ended by then."""
        try:
            self.process.wait(max(deadline - time.perf_counter(), 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """It and its children: as its group's leader has not been waited for, the group is still its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(commands: dict[str, list[str]], log: Log, seconds: float, **variables: str) -> dict[str, Ended]:
    """Runs the commands at once, each by its name, and stops what has not ended after `seconds`.

    What is stopped is interrupted a little before that: pytest then says which tests have failed so far, and the
    benchmark writes its tables.
    """
    deadline = time.perf_counter() + seconds
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    started: dict[str, _Process] = {}
    stopped: set[str] = set()
    try:
        for name, command in commands.items():
            log.say(name, f"$ {' '.join(command)}")
            started[name] = _Process(name, command, log, environment)
        late = {name for name, p in started.items() if not p.wait(deadline - GRACE_SECONDS)}
        for name in late:
            started[name].process.send_signal(signal.SIGINT)
        stopped = late
        for name in late:
            started[name].wait(deadline)
    finally:  # an interrupted check leaves no process behind either
        for p in started.values():
            if p.process.returncode is None:
                p.kill()
            p.reader.join(DRAIN_SECONDS)
    return {
        name: Ended(None if name in stopped else p.process.returncode, "".join(p.lines)) for name, p in started.items()
    }
