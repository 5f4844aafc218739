"""Ends a connection whose peer does not answer in time, where nothing else can interrupt the wait.

A driver that waits inside a C library hears of no signal, and a server's own time-out does not cross a network that
drops packets. One thread for each process shuts the socket down from outside: the wait ends with an error.

It is a thread of the operating system under gevent and eventlet, too: no greenlet runs while a C library waits. So
there is no lock between it and the others: a greenlet that waited for one would stop them all, and a garbage collection
may have its owner give way to another greenlet at any moment. Each step is one operation on a dict or a set instead.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from _socket import SHUT_RDWR
from _socket import socket as native_socket

from workerpools._process.descriptors import SocketNumber
from workerpools._process.greenlets import Threads

__all__ = ["Watchdog"]

#: How often to ask whether a socket has been shut down, in seconds; that takes one call to the kernel.
_POLL = 0.0005


class Watchdog:
    """Shuts sockets down at given times, unless told otherwise before. Its thread starts with the first one."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._threads = Threads()
        self._numbers = itertools.count(1)
        #: By number: when, and which socket.
        self._watched: dict[int, tuple[float, SocketNumber]] = {}
        #: The numbers whose sockets are being shut down now, or were forgotten at the last moment.
        self._shutting: set[int] = set()
        #: When the thread looks again by itself.
        self._looks = math.inf
        #: Released to have it look at once.
        self._signal = self._threads.lock()
        self._signal.acquire()
        #: Taken by who starts the thread.
        self._start = self._threads.lock()

    def watch(self, descriptor: int, at: float) -> int:
        """Shut the socket ``descriptor`` down at ``at``, of :func:`time.monotonic`; return a number to forget it by.

        One that is closed before is left alone, whatever has its descriptor then.
        """
        if self._pid != os.getpid():
            # The thread did not come along in the fork.
            self._reset()
        number = next(self._numbers)
        self._watched[number] = (at, SocketNumber(descriptor))
        # Read after that is written, as the thread writes it before it reads that.
        if at < self._looks:
            self._rouse()
        return number

    def forget(self, number: int) -> bool:
        """Leave the socket alone; return whether it was still in time."""
        if self._watched.pop(number, None) is not None:
            return True
        # Until then its descriptor must not be closed: the number may be given away, and another socket be shut down.
        while number in self._shutting and self._pid == os.getpid():
            time.sleep(_POLL)
        return False

    def _rouse(self) -> None:
        if self._start.acquire(False):
            try:
                self._threads.start(self._run, ())
            except RuntimeError:
                # No more threads, or an interpreter on its way out: the server's own time-out is left.
                self._start.release()
        with contextlib.suppress(RuntimeError):
            # It may have been released already.
            self._signal.release()

    def _run(self) -> None:
        watched, shutting = self._watched, self._shutting
        while True:
            self._looks = math.inf
            now = time.monotonic()
            for number, (at, seen) in watched.copy().items():
                if at <= now:
                    shutting.add(number)
                    if watched.pop(number, None) is not None:
                        _shut_down(seen.fileno())
                    shutting.discard(number)
            self._looks = first = min((at for at, _ in watched.copy().values()), default=math.inf)
            self._signal.acquire(True, -1 if first == math.inf else max(0.0, first - time.monotonic()))


def _shut_down(descriptor: int) -> None:
    # The C class: the sockets of a patched process belong to the greenlets of one thread. It fails for -1, too.
    with contextlib.suppress(OSError):
        duplicate = native_socket(fileno=os.dup(descriptor))
        try:
            duplicate.shutdown(SHUT_RDWR)
        finally:
            duplicate.close()
