"""Ends a connection whose peer does not answer in time, where nothing else can interrupt the wait.

A driver that waits inside a C library hears of no signal, and a server's own time-out does not cross a network that
drops packets. One thread for each process shuts the socket down from outside: the wait ends with an error.

It is a thread of the operating system under gevent and eventlet, too: no greenlet runs while a C library waits. So
there is no lock between it and the others: a greenlet that waited for one would stop them all, and a garbage collection
may have its owner give way to another greenlet at any moment. Each step is one operation on a dict or a set instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from _socket import SHUT_RDWR
from _socket import socket as native_socket

from workerpools._process.descriptors import SocketNumber
from workerpools._process.greenlets import Threads

__all__ = ["Watch", "Watchdog"]

#: How often to ask whether a socket has been shut down, in seconds; that takes one call to the kernel.
_POLL = 0.0005


class Watch:
    """One socket that a :class:`Watchdog` may shut down: at :attr:`at`, and only while something waits on it.

    Whatever waits puts a token into :attr:`waiting` before, and takes it out after. If the token is gone by then, the
    watchdog has taken it: see :meth:`Watchdog.stop_waiting`.

    Args:
        socket: The socket. One that is closed is left alone, whatever has its descriptor then.

    Attributes:
        at: When, of :func:`time.monotonic`; set by :meth:`Watchdog.arm`.
        armed: Whether the watchdog will look at it.
        waiting: At most one token.
    """

    __slots__ = ("armed", "at", "shut_down", "socket", "waiting")

    def __init__(self, socket: SocketNumber) -> None:
        self.socket = socket
        self.at = math.inf
        self.armed = False
        self.waiting: list[bool] = []
        self.shut_down = False


class Watchdog:
    """Shuts sockets down at given times, while something waits on them. Its thread starts with the first one."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._threads = Threads()
        #: Those to look at; a dict, because it takes no lock. One whose socket is closed is taken out.
        self.watched: dict[Watch, None] = {}
        #: Those that are being shut down now, or were found at the last moment to wait no longer.
        self._shutting: set[Watch] = set()
        #: When the thread looks again by itself.
        self._looks = math.inf
        #: Released to have it look at once.
        self._signal = self._threads.lock()
        self._signal.acquire()
        #: Taken by who starts the thread.
        self._start = self._threads.lock()

    def watch(self, descriptor: int, at: float) -> Watch:
        """Shut the socket ``descriptor`` down at ``at``, of :func:`time.monotonic`; return what to forget it by."""
        watch = Watch(SocketNumber(descriptor))
        self.arm(watch, at)
        watch.waiting.append(True)
        if not watch.armed:
            self.arm(watch, at)
        return watch

    def arm(self, watch: Watch, at: float) -> None:
        """Look at ``watch`` at ``at``: what waits then is ended. Call it before the token is put in."""
        if self._pid != os.getpid():
            # The thread did not come along in the fork.
            self._reset()
        watch.at = at
        watch.armed = True
        self.watched[watch] = None
        # Read after that is written, as the thread writes it before it reads that.
        if at < self._looks:
            self._rouse()

    def stop_waiting(self, watch: Watch) -> bool:
        """Take the token out; return whether the socket was shut down since it was put in."""
        try:
            watch.waiting.pop()
        except IndexError:
            # Until then its descriptor must not be closed: the number may be given away, and another socket shut down.
            while watch in self._shutting and self._pid == os.getpid():
                time.sleep(_POLL)
            watch.waiting.clear()
        found, watch.shut_down = watch.shut_down, False
        return found

    def forget(self, watch: Watch) -> bool:
        """Leave the socket alone for good; return whether it was still in time."""
        late = self.stop_waiting(watch)
        self.watched.pop(watch, None)
        watch.armed = False
        return not late

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
        watched, shutting = self.watched, self._shutting
        while True:
            self._looks = math.inf
            now = time.monotonic()
            first = math.inf
            for watch in watched.copy():
                if watch.at > now:
                    continue
                shutting.add(watch)
                try:
                    token = watch.waiting.pop()
                except IndexError:
                    # Nothing waits. Armed again by the next wait, which looks at this after it has put its token in.
                    watch.armed = False
                    watched.pop(watch, None)
                    if watch.waiting or watch.at > now:
                        watch.armed = True
                        watched[watch] = None
                else:
                    # The token of a later wait, with a later time, may have come in between.
                    if watch.at <= now:
                        watch.shut_down = True
                        _shut_down(watch.socket.fileno())
                        watch.armed = False
                        watched.pop(watch, None)
                    else:
                        watch.waiting.append(token)
                shutting.discard(watch)
            for watch in watched.copy():
                first = min(first, watch.at)
            self._looks = first
            self._signal.acquire(True, -1 if first == math.inf else max(0.0, first - time.monotonic()))


def _shut_down(descriptor: int) -> None:
    # The C class: the sockets of a patched process belong to the greenlets of one thread. It fails for -1, too.
    with contextlib.suppress(OSError):
        duplicate = native_socket(fileno=os.dup(descriptor))
        try:
            duplicate.shutdown(SHUT_RDWR)
        finally:
            duplicate.close()
