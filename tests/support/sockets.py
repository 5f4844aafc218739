"""Ending a TCP connection in a chosen way, and keeping a helper's sockets out of forked children."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import weakref
from collections.abc import Callable, Iterable
from typing import Literal

Ending = Literal["fin", "rst"]

# struct linger: on, zero seconds. With it, close() drops what is unsent and answers the peer with a reset.
_LINGER_ZERO = struct.pack("ii", 1, 0)


def end(sock: socket.socket, how: Ending) -> None:
    """Close a connection so that its peer sees a FIN or an RST.

    Args:
        sock: A connected TCP socket that no other thread is blocked on (a blocked call would keep it open).
        how: `"fin"` for an orderly end, `"rst"` for a reset.
    """
    if how == "rst":
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    else:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            # Closing with unread data makes the kernel send an RST after the FIN: read it away first.
            sock.setblocking(False)
            while sock.recv(65536):
                pass
    with contextlib.suppress(OSError):
        sock.close()


def close_listener(sock: socket.socket) -> None:
    """Stop listening at once, even while a forked child still holds a copy of the descriptor."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def drop_in_forked_child(method: Callable[[], Iterable[socket.socket]]) -> None:
    """Close the sockets that `method` lists in every process forked from this one.

    A child that held copies would keep a connection open that the test means to cut, and would show the
    helper's own sockets among those it shares with its parent. Closing a copy sends nothing: the parent's stays.

    Args:
        method: A bound method. It is held weakly, runs in the child, and must not take a lock.
    """
    reference = weakref.WeakMethod(method)

    def in_child() -> None:
        bound = reference()
        if bound is None:
            return
        for sock in bound():
            with contextlib.suppress(OSError):
                descriptor = sock.detach()
                if descriptor >= 0:
                    os.close(descriptor)

    os.register_at_fork(after_in_child=in_child)
