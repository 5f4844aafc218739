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

from workerpools._process.descriptors import HasFileno, SocketNumber
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
        every: The time after which it is shut down again, in seconds, if the caller still waits: the client library may
            go on with another socket. None for once.

    Attributes:
        at: The time of the shutdown, on the clock of :func:`time.monotonic`; set by :meth:`Watchdog.arm`.
        armed: Whether the watchdog will examine it.
        waiting: At most one token.
        shut_down: Whether the watchdog has shut the socket down since the token was added.
    """

    __slots__ = ("armed", "at", "every", "shut_down", "socket", "waiting")

    def __init__(self, socket: HasFileno, every: float | None = None) -> None:
        self.socket = socket
        self.every = every
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
        self._next_pass = math.inf
        #: Released to start a pass at once.
        self._signal = self._threads.lock()
        self._signal.acquire()
        #: Acquired by the caller that starts the thread.
        self._start = self._threads.lock()

    def watch(self, socket: int | HasFileno, at: float, every: float | None = None) -> Watch:
        """Shut a socket down at ``at``, unless :meth:`forget` is called before.

        Args:
            socket: The socket, or its descriptor.
            at: On the clock of :func:`time.monotonic`.
            every: As for :class:`Watch`.

        Returns:
            The watch to pass to :meth:`forget`.
        """
        watch = Watch(SocketNumber(socket) if isinstance(socket, int) else socket, every)
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
        if at < self._next_pass:
            self._rouse()

    def stop_waiting(self, watch: Watch) -> bool:
        """Remove the token at the end of a wait. Blocks for a moment if a shutdown is in progress.

        Args:
            watch: The watch.

        Returns:
            Whether the socket was shut down since the token was added.
        """
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
        """Disarm a watch for good. Blocks for a moment if a shutdown is in progress.

        Args:
            watch: The watch.

        Returns:
            Whether the wait ended in time: False if the socket was shut down.
        """
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
            self._next_pass = math.inf
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
                        if _shut_down(watch.socket) or watch.every is None:
                            watch.shut_down = True
                        if watch.every is None:
                            watch.armed = False
                            watched.pop(watch, None)
                        else:
                            watch.at = now + watch.every
                            watch.waiting.append(token)
                    else:
                        watch.waiting.append(token)
                shutting.discard(watch)
            for watch in watched.copy():
                first = min(first, watch.at)
            self._next_pass = first
            self._signal.acquire(True, -1 if first == math.inf else max(0.0, first - time.monotonic()))


def _shut_down(socket: HasFileno) -> bool:
    # -1 raises OSError, too.
    with contextlib.suppress(OSError):
        # The C class: a patched socket works only in the greenlets of one thread.
        duplicate = native_socket(fileno=os.dup(socket.fileno()))
        try:
            # A client library may have closed it meanwhile, and the number may be another one's.
            if os.path.sameopenfile(socket.fileno(), duplicate.fileno()):
                duplicate.shutdown(SHUT_RDWR)
                return True
        finally:
            duplicate.close()
    return False
