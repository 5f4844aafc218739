"""What a server's process is made of, and starting it so that it cannot outlive its parent for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from demo_tasks.servers.errors import ServerError

DENIED = 126
_LAUNCHER = Path(__file__).with_name("_launch.py")


@dataclass(frozen=True)
class Identity:
    """The user that a server runs as.

    Attributes:
        spec: What the launcher script is told: `same`, `UID:GID` or `userns:UID:GID`.
        owner: The user and group that must own the server's files, or None for the ones who create them.
    """

    spec: str = "same"
    owner: tuple[int, int] | None = None


@dataclass(frozen=True)
class Command:
    """One program to run as a server or as a step towards one.

    Attributes:
        argv: The program's path and its arguments. Other users can read them: no secret belongs here.
        directory: The working directory.
        environment: The whole environment of the process.
        identity: The user to run as.
        death_signal: What the kernel sends to the process when this one dies (Linux only).
        inherit: File descriptors that the process keeps.
    """

    argv: Sequence[str]
    directory: Path
    environment: Mapping[str, str]
    identity: Identity = Identity()
    death_signal: signal.Signals = signal.SIGKILL
    inherit: Sequence[int] = field(default=())

    def launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the program in a session of its own, so that the terminal's Ctrl-C does not reach it.

        Args:
            log: Where the program's output goes.

        Returns:
            The running process.

        Raises:
            ServerError: The caller is not the main thread. The kernel ties a child to the thread that started
                it, so the server would be killed at the end of any other thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ServerError(
                "Start local servers from the main thread: each one ends with the thread that started it."
            )
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(_LAUNCHER)),
                *(str(os.getpid()), str(int(self.death_signal)), self.identity.spec, str(self.directory)),
                *self.argv,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(self.environment),
            pass_fds=tuple(self.inherit),
            start_new_session=True,
        )

    def run(self, log: IO[bytes], timeout: float) -> int:
        """Run the program to its end.

        Args:
            log: Where the program's output goes.
            timeout: How long to wait, in seconds, before the program is killed.

        Returns:
            Its exit status, or minus the number of the signal that ended it.
        """
        process = self.launch(log)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
