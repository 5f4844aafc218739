"""Loopback ports for servers that several runs start at the same time.

A port that was free a moment ago can be taken before a server binds it. Nothing prevents that for a server
that binds for itself, so its launcher recognises the loss in the server's log and asks for another port. A
server that accepts an open socket gets one from `listening_socket` and has no race to lose.
"""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"

# What PostgreSQL, Valkey and Redis write when the bind fails; they use strerror() under the C locale.
_CONFLICT = ("Address already in use", "already in use", "EADDRINUSE")


def free_port() -> int:
    """Return a loopback TCP port that was free at the time of the call.

    Returns:
        The port number. Another process may take it at any moment: see `is_port_conflict`.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def listening_socket(port: int = 0) -> socket.socket:
    """Bind a loopback socket for a server that inherits it.

    Args:
        port: The port to bind, or 0 for any free one.

    Returns:
        A bound socket; the server calls listen() on it. The caller closes its own copy once the server runs,
        so that connections are refused while the server is down.

    Raises:
        OSError: The port is taken.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections of the server's previous life may still be in TIME_WAIT on this port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))
    except BaseException:
        sock.close()
        raise
    return sock


def is_port_conflict(log: str) -> bool:
    """Tell whether a server's log says that its port was taken by another process.

    Args:
        log: The text that the server wrote since it was started.

    Returns:
        True when the server should be started again on another port.
    """
    return any(mark in log for mark in _CONFLICT)
