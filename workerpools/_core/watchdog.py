"""Ends a connection whose peer does not answer in time, where nothing else can interrupt the wait.

A driver that waits inside a C library hears of no signal, and a server's own time-out does not cross a network that
drops packets. One thread for each process shuts the socket down from outside: the wait ends with an error.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import socket
import threading
import time

from workerpools._core.sockets import Seen

__all__ = ["Watchdog"]


#: How many times of forgotten sockets are kept, beside as many as there are sockets.
_FORGOTTEN = 100


class Watchdog:
    """Shuts sockets down at given times, unless told otherwise before. Its thread starts with the first one."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []
        self._watched: dict[int, Seen] = {}
        self._numbers = itertools.count(1)
        self._thread: threading.Thread | None = None

    def watch(self, descriptor: int, at: float) -> int:
        """Shut the socket ``descriptor`` down at ``at``, of :func:`time.monotonic`; return a number to forget it by.

        One that is closed before is left alone, whatever has its descriptor then.
        """
        if self._pid != os.getpid():
            # The thread did not come along in the fork, and its lock may have been held.
            self._reset()
        with self._changed:
            number = next(self._numbers)
            if len(self._due) > 2 * len(self._watched) + _FORGOTTEN:
                # What was forgotten would stay until its time: an hour's worth of statements.
                self._due = [entry for entry in self._due if entry[1] in self._watched]
                heapq.heapify(self._due)
            self._watched[number] = Seen(descriptor)
            heapq.heappush(self._due, (at, number))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="workerpools-watchdog", daemon=True)
                self._thread.start()
            elif self._due[0][1] == number:
                self._changed.notify()
        return number

    def forget(self, number: int) -> bool:
        """Leave the socket alone; return whether it was still in time."""
        with self._changed:
            return self._watched.pop(number, None) is not None

    def _run(self) -> None:
        with self._changed:
            while True:
                while self._due and self._due[0][1] not in self._watched:
                    heapq.heappop(self._due)
                if not self._due:
                    self._changed.wait()
                    continue
                at, number = self._due[0]
                left = at - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                heapq.heappop(self._due)
                # Under the lock, so that the descriptor is not given back, and away, at this very moment.
                _shut_down(self._watched.pop(number).fileno())


def _shut_down(descriptor: int) -> None:
    # It fails for a descriptor of -1, too.
    with contextlib.suppress(OSError):
        duplicate = socket.socket(fileno=os.dup(descriptor))
        try:
            duplicate.shutdown(socket.SHUT_RDWR)
        finally:
            duplicate.close()
