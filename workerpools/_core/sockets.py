"""Finds the socket of a connection that is still being made, and that no object tells of yet."""

from __future__ import annotations

import os
import socket
import stat

__all__ = ["is_socket", "made_since", "numbers"]


def is_socket(number: int) -> bool:
    """Return whether the descriptor ``number`` is open and a socket."""
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False


def numbers() -> frozenset[int]:
    """Return the descriptors of this process that are sockets; none where the system does not tell."""
    try:
        names = os.listdir("/dev/fd")
    except OSError:
        return frozenset()
    # Sockets alone: the number of the listing itself is free again at once, and the next socket may get it.
    return frozenset(number for name in names if name.isdigit() and is_socket(number := int(name)))


def made_since(before: frozenset[int], port: int | None) -> list[int]:
    """Return the sockets that may belong to a connection which was begun when ``before`` were open.

    Args:
        before: What :func:`numbers` returned when connecting began.
        port: The peer's TCP port; None for any.
    """
    return [number for number in numbers() - before if _may_lead_to(number, port)]


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
