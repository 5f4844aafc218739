"""The sockets of an open value, so that a forked child can discard them."""

from __future__ import annotations

import logging
import os
import socket
import stat
import weakref
from _socket import socket as native_socket
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

from workerpools._process.flows import flow

__all__ = ["ConnectingSocket", "Descriptors", "HasFileno", "SocketNumber", "is_socket", "made_since", "numbers"]


class SocketNumber:
    """A socket known only by its number, which the system may reuse for another file once it is closed.

    Args:
        number: The descriptor of an open socket.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._inode = _inode(number)

    def fileno(self) -> int:
        """Return the descriptor; -1 once the socket is closed."""
        return self._number if self._inode is not None and _inode(self._number) == self._inode else -1


def is_socket(number: int) -> bool:
    """Return whether the descriptor ``number`` is open and a socket."""
    return _inode(number) is not None


def _inode(number: int) -> int | None:
    # Unique among open sockets, whereas descriptor numbers are reused at once.
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def numbers() -> frozenset[tuple[int, int]]:
    """Return this process's socket descriptors and their inodes; empty where the system does not list them."""
    try:
        names = os.listdir("/dev/fd")
    except OSError:
        return frozenset()
    # Sockets only: the descriptor of the listing itself is free again at once, and the next socket may get it.
    found = ((int(name), _inode(int(name))) for name in names if name.isdigit())
    return frozenset((number, inode) for number, inode in found if inode is not None)


def made_since(before: frozenset[tuple[int, int]], ports: Collection[int]) -> list[int]:
    """Return the sockets opened since ``before`` that may belong to one new connection.

    Args:
        before: The result of :func:`numbers` from before connecting.
        ports: The peer's possible TCP ports; empty for any.
    """
    return [number for number, _ in numbers() - before if _may_lead_to(number, ports)]


def _may_lead_to(number: int, ports: Collection[int]) -> bool:
    try:
        # A duplicate: closing this object must not close the original.
        with socket.socket(fileno=os.dup(number)) as asked:
            if asked.type != socket.SOCK_STREAM or asked.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            peer = asked.getpeername()
    except OSError:
        # Still connecting.
        return True
    if isinstance(peer, tuple):
        return not ports or peer[1] in ports
    # A Unix socket; the ends of a local socketpair() have no name.
    return bool(peer)


class ConnectingSocket:
    """The socket of a connection that a client library is opening, looked for at each call.

    Args:
        before: The result of :func:`numbers` from before connecting.
        ports: The peer's possible TCP ports; empty for any.
        mark: A ``TCP_USER_TIMEOUT``, in milliseconds, that no other socket has; None for none.
        others: Returns the descriptors of open connections.
    """

    def __init__(
        self,
        before: frozenset[tuple[int, int]],
        ports: Collection[int],
        mark: int | None,
        others: Callable[[], Iterable[int]],
    ) -> None:
        self._before, self._ports, self._mark, self._others = before, ports, mark, others

    def fileno(self) -> int:
        """Return the descriptor; -1 if there is none yet, or if it cannot be told apart from others."""
        # By inode: the same socket may have several descriptors for a moment.
        found = {inode: number for number, inode in numbers() - self._before if self._is_it(number)}
        if len(found) > 1:
            for other in self._others():
                found.pop(_inode(other) or 0, None)
        return next(iter(found.values())) if len(found) == 1 else -1

    def _is_it(self, number: int) -> bool:
        try:
            # The C class: a patched one belongs to the greenlets of one thread.
            asked = native_socket(fileno=os.dup(number))
        except OSError:
            return False
        try:
            if self._mark is not None and asked.family in (socket.AF_INET, socket.AF_INET6):
                return asked.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == self._mark
            peer = asked.getpeername()
        except OSError:
            # Still connecting: it may be anyone's.
            return False
        finally:
            asked.close()
        return (not self._ports or peer[1] in self._ports) if isinstance(peer, tuple) else bool(peer)


logger = logging.getLogger("workerpools")


class HasFileno(Protocol):
    """A connection or socket with a file descriptor."""

    def fileno(self) -> int:
        """Return the descriptor; -1 or an exception when closed."""
        ...


class Descriptors:
    """The current connections of one open value, held weakly.

    An adapter adds each connection after opening it and drops it after closing it. Descriptors are looked up only at a
    fork, so a connection closed without notice is skipped and not mistaken for the next file with that number.
    """

    def __init__(self) -> None:
        #: By id; :meth:`drop` removes one.
        self.connections: dict[int, Callable[[], Any]] = {}
        self._borrowers: dict[int, Callable[[], Any]] = {}
        self._sources: list[Callable[[], Iterable[Any]]] = []
        self._holders: list[Callable[[], Iterable[object]]] = []
        self._kept: list[object] = []
        self._connecting: dict[int, tuple[frozenset[tuple[int, int]], Collection[int]]] = {}
        self._seen: weakref.WeakKeyDictionary[object, SocketNumber] = weakref.WeakKeyDictionary()

    def connecting(self, *ports: int | None) -> None:
        """Record that the calling thread, or the event loop's task, connects, until :meth:`add` or :meth:`gave_up`.

        Meanwhile no object exposes the socket, so a fork has to search the sockets created since this call.

        Args:
            ports: The peer's TCP port, or those of several servers, one of which will be the peer; None if unknown.
        """
        self._connecting[flow()] = (numbers(), [port for port in ports if port is not None])

    def gave_up(self) -> None:
        """Record that the calling thread has stopped connecting."""
        self._connecting.pop(flow(), None)

    def in_progress(self, mark: int | None = None) -> ConnectingSocket:
        """Return the socket that the calling thread is connecting, for a :class:`Watchdog`.

        Args:
            mark: The socket's ``TCP_USER_TIMEOUT``, in milliseconds, if no other socket has the same; None for none.
        """
        before, ports = self._connecting.get(flow()) or (numbers(), ())
        return ConnectingSocket(before, ports, mark, lambda: map(self._fileno, self._open()))

    def look(self, connection: Any) -> SocketNumber | None:
        """Find the socket of a connection without a ``fileno()``, just opened by the calling thread.

        Args:
            connection: The new connection. Held weakly.

        Returns:
            The socket; None if it cannot be told apart from sockets that other threads opened meanwhile.
        """
        begun = self._connecting.get(flow())
        found = [] if begun is None else made_since(*begun)
        if len(found) != 1:
            return None
        seen = self._seen[connection] = SocketNumber(found[0])
        return seen

    def add(self, connection: Any) -> None:
        """Add a connection that was just opened.

        Args:
            connection: Anything with a ``fileno()``, or a connection passed to :meth:`look` before. Held weakly where
                its type allows that.
        """
        self.gave_up()
        _hold(self.connections, id(connection), connection)

    def drop(self, connection: object) -> None:
        """Remove a closed connection.

        Args:
            connection: The object passed to :meth:`add`; an unknown one is ignored.
        """
        self.connections.pop(id(connection), None)

    def lend(self, connection: object, borrower: object) -> None:
        """Record the holder of a checked-out connection.

        Args:
            connection: The connection, or its entry in the pool; a later call replaces the borrower.
            borrower: The holder. Kept from finalization in a forked child, because its finalizer uses the network.
        """
        _hold(self._borrowers, id(connection), borrower)

    def watch(self, source: Callable[[], Iterable[HasFileno]]) -> None:
        """List the value's connections with ``source`` at each fork, for clients without hooks for single connections.

        Args:
            source: Returns the open connections. Must not block.
        """
        self._sources.append(source)

    def hold(self, source: Callable[[], Iterable[object]]) -> None:
        """List the holders of checked-out connections with ``source`` at each fork; a cheaper form of :meth:`lend`.

        Args:
            source: Returns the holders. Must not block.
        """
        self._holders.append(source)

    def keep(self, companion: object) -> None:
        """Keep an object of the value from finalization in a forked child.

        Args:
            companion: The object. Held strongly, for as long as the value is open.
        """
        self._kept.append(companion)

    def count(self) -> int:
        """Return the number of open connections."""
        return sum(1 for connection in self._open() if self._fileno(connection) >= 0)

    def pin(self) -> object:
        """Return strong references to every object that a forked child must not finalize."""
        held = [held for ref in list(self._borrowers.values()) if (held := ref()) is not None]
        for source in self._holders:
            held.extend(source())
        return self._open(), held

    def filenos(self) -> list[int]:
        """Return the open descriptors, including those of connections in progress."""
        found = [number for connection in self._open() if (number := self._fileno(connection)) >= 0]
        for before, ports in list(self._connecting.values()):
            found += made_since(before, ports)
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
            except Exception:  # third-party code: the fork goes on without it
                logger.exception("could not list the connections of a value")
        return noted


def _hold(table: dict[int, Callable[[], Any]], key: int, value: object) -> None:
    def forget(ref: object) -> None:
        # A new object may have the id of the dead one already.
        if table.get(key) is ref:
            table.pop(key, None)

    try:
        table[key] = weakref.ref(value, forget)
    except TypeError:
        table[key] = lambda: value


def fileno(connection: Any) -> int:
    """Return the connection's descriptor; -1 once it is closed."""
    # Every driver raises its own exception for a closed connection.
    try:
        return int(connection.fileno())
    except Exception:
        return -1
