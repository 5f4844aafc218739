"""Watchdog that shuts down a socket whose peer does not answer in time, when nothing else can interrupt the wait.

A driver that waits inside a C library receives no signal, and a server-side timeout does not cross a network that
drops packets. One thread per process shuts the socket down from outside, which ends the wait with an error.

Under gevent and eventlet it is still an operating-system thread, because no greenlet runs while a C library waits. It
shares no lock with the others: a greenlet waiting for one would block them all, and a garbage collection can switch
greenlets at any moment. Every step is a single operation on a dict or a set instead.
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

#: The polling interval while a shutdown is in progress, in seconds; a shutdown takes one system call.
_POLL = 0.0005


class Watch:
    """One socket that a :class:`Watchdog` may shut down at :attr:`at`, only while a caller waits on it.

    A caller puts a token into :attr:`waiting` before it waits, and removes it afterwards. If the token is gone by then,
    the watchdog has taken it: see :meth:`Watchdog.stop_waiting`.

    Args:
        socket: The socket. Once closed it is left alone, even if its descriptor is reused.

    Attributes:
        at: The time of the shutdown, on the clock of :func:`time.monotonic`; set by :meth:`Watchdog.arm`.
        armed: Whether the watchdog will examine it.
        waiting: At most one token.
        shut_down: Whether the watchdog has shut the socket down since the token was added.
    """

    __slots__ = ("armed", "at", "shut_down", "socket", "waiting")

    def __init__(self, socket: SocketNumber) -> None:
        self.socket = socket
        self.at = math.inf
        self.armed = False
        self.waiting: list[bool] = []
        self.shut_down = False


class Watchdog:
    """Shuts sockets down at given times, while callers wait on them. Its thread is started on first use."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._threads = Threads()
        #: The armed watches. A dict, because its operations need no lock.
        self.watched: dict[Watch, None] = {}
        #: The watches being examined right now, and possibly shut down.
        self._shutting: set[Watch] = set()
        #: The time of the thread's next pass.
        self._looks = math.inf
        #: Released to start a pass at once.
        self._signal = self._threads.lock()
        self._signal.acquire()
        #: Acquired by the caller that starts the thread.
        self._start = self._threads.lock()

    def watch(self, descriptor: int, at: float) -> Watch:
        """Shut a socket down at ``at``, unless :meth:`forget` is called before.

        Args:
            descriptor: The socket's descriptor.
            at: On the clock of :func:`time.monotonic`.

        Returns:
            The watch to pass to :meth:`forget`.
        """
        watch = Watch(SocketNumber(descriptor))
        self.arm(watch, at)
        watch.waiting.append(True)
        if not watch.armed:
            self.arm(watch, at)
        return watch

    def arm(self, watch: Watch, at: float) -> None:
        """Shut down the socket of ``watch`` at ``at`` if a caller is waiting on it then.

        Call it before adding the token.

        Args:
            watch: The watch; arming it again replaces its time.
            at: On the clock of :func:`time.monotonic`.
        """
        if self._pid != os.getpid():
            # Threads do not survive a fork.
            self._reset()
        watch.at = at
        watch.armed = True
        self.watched[watch] = None
        # Read after the write above; the thread does both in the opposite order, so one of the two sees the other.
        if at < self._looks:
            self._rouse()

    def stop_waiting(self, watch: Watch) -> bool:
        """Remove the token; return whether the socket was shut down since it was added."""
        try:
            watch.waiting.pop()
        except IndexError:
            # The caller must not close the descriptor before: its number may be reused, and another socket shut down.
            while watch in self._shutting and self._pid == os.getpid():
                time.sleep(_POLL)
            watch.waiting.clear()
        found, watch.shut_down = watch.shut_down, False
        return found

    def forget(self, watch: Watch) -> bool:
        """Disarm ``watch`` for good; return False if the socket was shut down already."""
        late = self.stop_waiting(watch)
        self.watched.pop(watch, None)
        watch.armed = False
        return not late

    def _rouse(self) -> None:
        if self._start.acquire(False):
            try:
                self._threads.start(self._run, ())
            except RuntimeError:
                # Thread limit or interpreter shutdown: only the server-side timeout is left.
                self._start.release()
        with contextlib.suppress(RuntimeError):
            # Released already.
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
                    # No caller waits. The next one checks `armed` after adding its token, and arms it again.
                    watch.armed = False
                    watched.pop(watch, None)
                    if watch.waiting or watch.at > now:
                        watch.armed = True
                        watched[watch] = None
                else:
                    # The token may belong to a later wait, with a later time.
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
    # The C class: a patched socket works only in the greenlets of one thread. -1 raises OSError, too.
    with contextlib.suppress(OSError):
        duplicate = native_socket(fileno=os.dup(descriptor))
        try:
            duplicate.shutdown(SHUT_RDWR)
        finally:
            duplicate.close()
