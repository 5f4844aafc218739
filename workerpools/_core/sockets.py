"""Finds the socket of a connection that no object tells of: one being made, or one that its driver keeps to itself."""

from __future__ import annotations

import os
import socket
import stat

__all__ = ["Seen", "is_socket", "made_since", "numbers"]


class Seen:
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
