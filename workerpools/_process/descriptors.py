"""The sockets that an open value owns, so that a forked child can discard them."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

__all__ = ["Descriptors", "HasFileno", "SocketNumber", "is_socket", "made_since", "numbers"]


class SocketNumber:
    """A socket that is known by its number alone, which may be another file's once it is closed.

    Args:
        number: The descriptor of an open socket.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._inode = _inode(number)

    def fileno(self) -> int:
        """Return the number; -1 when the socket is closed."""
        return self._number if self._inode is not None and _inode(self._number) == self._inode else -1


def is_socket(number: int) -> bool:
    """Return whether the descriptor ``number`` is open and a socket."""
    return _inode(number) is not None


def _inode(number: int) -> int | None:
    # No two sockets have the same one at a time; numbers are given away again at once.
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def numbers() -> frozenset[tuple[int, int]]:
    """Return the descriptors of this process that are sockets, with their inodes; none where nothing tells of them."""
    try:
        names = os.listdir("/dev/fd")
    except OSError:
        return frozenset()
    # Sockets alone: the number of the listing itself is free again at once, and the next socket may get it.
    found = ((int(name), _inode(int(name))) for name in names if name.isdigit())
    return frozenset((number, inode) for number, inode in found if inode is not None)


def made_since(before: frozenset[tuple[int, int]], port: int | None) -> list[int]:
    """Return the sockets that may belong to a connection which was begun when ``before`` were open.

    Args:
        before: What :func:`numbers` returned when connecting began.
        port: The peer's TCP port; None for any.
    """
    return [number for number, _ in numbers() - before if _may_lead_to(number, port)]


def _may_lead_to(number: int, port: int | None) -> bool:
    try:
        # On a number of its own: closing this object must not close what was asked about.
        with socket.socket(fileno=os.dup(number)) as asked:
            if asked.type != socket.SOCK_STREAM or asked.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            peer = asked.getpeername()
    except OSError:
        # Not connected yet: it is just being connected.
        return True
    if isinstance(peer, tuple):
        return port is None or peer[1] == port
    # A Unix socket: a pair of the process's own has no name.
    return bool(peer)


logger = logging.getLogger("workerpools")


class HasFileno(Protocol):
    """A connection or socket that tells its file descriptor."""

    def fileno(self) -> int:
        """Return the descriptor; -1 or an exception when closed."""
        ...


class Descriptors:
    """The connections that one open value owns at the moment, held weakly.

    An adapter adds each connection when it is made and drops it when it is closed. Descriptors are asked for only at
    a fork, so a connection that was closed unseen is skipped, not mistaken for the next file of that number.
    """

    def __init__(self) -> None:
        #: By the id of each; :meth:`drop` takes one out.
        self.connections: dict[int, Callable[[], Any]] = {}
        self._borrowers: dict[int, Callable[[], Any]] = {}
        self._sources: list[Callable[[], Iterable[Any]]] = []
        self._holders: list[Callable[[], Iterable[object]]] = []
        self._kept: list[object] = []
        self._connecting: dict[int, tuple[frozenset[tuple[int, int]], int | None]] = {}
        self._seen: weakref.WeakKeyDictionary[object, SocketNumber] = weakref.WeakKeyDictionary()

    def connecting(self, port: int | None) -> None:
        """Note that the calling thread begins to connect, until it calls :meth:`add` or :meth:`gave_up`.

        Until then no object tells of the socket, and a fork must look for it among those that were made since.

        Args:
            port: The TCP port it connects to; None where that is not known.
        """
        self._connecting[threading.get_ident()] = (numbers(), port)

    def gave_up(self) -> None:
        """Note that the calling thread connects no longer."""
        self._connecting.pop(threading.get_ident(), None)

    def look(self, connection: Any) -> SocketNumber | None:
        """Find the socket of a connection without a ``fileno()`` that the calling thread has just made.

        Returns:
            What tells its descriptor; None where it cannot be told from the sockets that other threads make.
        """
        begun = self._connecting.get(threading.get_ident())
        found = [] if begun is None else made_since(*begun)
        if len(found) != 1:
            return None
        seen = self._seen[connection] = SocketNumber(found[0])
        return seen

    def add(self, connection: Any) -> None:
        """Note a connection that was just opened: one with a ``fileno()``, or that was looked for."""
        self.gave_up()
        _hold(self.connections, id(connection), connection)

    def drop(self, connection: object) -> None:
        """Forget a connection that was closed."""
        self.connections.pop(id(connection), None)

    def lend(self, connection: object, borrower: object) -> None:
        """Note who holds a checked-out connection.

        Args:
            connection: Anything that stands for the connection in its pool; a later call replaces its borrower.
            borrower: Must not be finalized in a forked child, because its finalizer talks to the server.
        """
        _hold(self._borrowers, id(connection), borrower)

    def watch(self, source: Callable[[], Iterable[HasFileno]]) -> None:
        """Ask ``source`` for the value's connections whenever they are wanted, where nothing tells of each."""
        self._sources.append(source)

    def hold(self, source: Callable[[], Iterable[object]]) -> None:
        """Ask ``source`` at a fork who holds checked-out connections, where noting each with :meth:`lend` costs."""
        self._holders.append(source)

    def keep(self, companion: object) -> None:
        """Keep an object that belongs to the value and must not be finalized in a forked child."""
        self._kept.append(companion)

    def count(self) -> int:
        """Return how many connections are open."""
        return sum(1 for connection in self._open() if self._fileno(connection) >= 0)

    def pin(self) -> object:
        """Return strong references to everything that a forked child must not finalize."""
        held = [held for ref in list(self._borrowers.values()) if (held := ref()) is not None]
        for source in self._holders:
            held.extend(source())
        return self._open(), held

    def filenos(self) -> list[int]:
        """Return the descriptors that are open now, those of connections that are still being made included."""
        found = [number for connection in self._open() if (number := self._fileno(connection)) >= 0]
        for before, port in list(self._connecting.values()):
            found += made_since(before, port)
        return found

    def _fileno(self, connection: Any) -> int:
        if self._seen and not hasattr(connection, "fileno"):
            return fileno(self._seen.get(connection))
        return fileno(connection)

    def _open(self) -> list[Any]:
        noted = [held for ref in list(self.connections.values()) if (held := ref()) is not None]
        for source in self._sources:
            try:
                noted.extend(source())
            except Exception:  # somebody else's function: a fork goes on without it
                logger.exception("could not list the connections of a value")
        return noted


def _hold(table: dict[int, Callable[[], Any]], key: int, value: object) -> None:
    def forget(ref: object) -> None:
        # The number of a dead object may have been given to its successor already.
        if table.get(key) is ref:
            table.pop(key, None)

    try:
        table[key] = weakref.ref(value, forget)
    except TypeError:
        table[key] = lambda: value


def fileno(connection: Any) -> int:
    """Return the connection's descriptor, or -1 when it has none any more."""
    # Each driver has an exception of its own for a closed connection.
    try:
        return int(connection.fileno())
    except Exception:
        return -1
