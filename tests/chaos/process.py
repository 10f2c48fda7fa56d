"""The processes of a run: started, signalled and ended by their id, and none outlives the run."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1
_PARENT = "CHAOS_PARENT"
"""The variable that tells a process who started it: by the time it can look, that one may be gone."""


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends, in whatever way; also while it is suspended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.get(_PARENT, os.getppid())):
            os._exit(1)


class Process:
    """One that is started again whenever it has ended.

    Args:
        name: Of all its lives together.
        command: Gives the arguments of a life by its number, from 1, behind ``python -m``.
        log: A file for what it prints.
    """

    def __init__(self, name: str, command: Callable[[int], list[str]], log: Path) -> None:
        self.name = name
        self.lives = 0
        self.frozen = False
        self.up = False
        """Whether this life has come as far as to work."""
        self.told_to_end = False
        """Whether this life was sent a signal that ends it."""
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def life(self) -> str:
        """The name of this life."""
        return f"{self.name}-{self.lives}"

    @property
    def alive(self) -> bool:
        """Whether it runs, or is suspended."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended_as(self) -> int | None:
        """The exit code of the last life, or the signal that ended it with a minus."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Begin another life. From the main thread only: a child dies with the thread that made it."""
        self.lives += 1
        self.frozen = self.up = self.told_to_end = False
        kept = {key: value for key, value in os.environ.items() if not key.startswith("AGENTRUN_")}
        # Inherited: they come to nothing until it knows what to do with them.
        before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGUSR1, signal.SIGUSR2)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command(self.lives)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=kept | {_PARENT: str(os.getpid())},
            )
        for number, handler in before:
            signal.signal(number, handler)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is there to get one."""
        self.told_to_end = self.told_to_end or number in (signal.SIGKILL, signal.SIGTERM)
        if self._process is not None:
            self._process.send_signal(number)

    def freeze(self) -> None:
        """Suspend it."""
        self.frozen = True
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.frozen = False
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill it and wait for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
