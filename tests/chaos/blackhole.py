"""Packets that vanish: a half-open connection, as a firewall leaves it that has forgotten its state.

`TcpProxy.blackhole` is a program that no longer reads: the kernel goes on acknowledging for it. Here a socket filter of
the kernel (Linux, socket(7), SO_ATTACH_FILTER) drops what arrives, so that nothing is acknowledged either.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

from tests.support.proxy import TcpProxy

# Of asm-generic/socket.h; Python has no names for them.
_ATTACH = 26
_DETACH = 27

# struct sock_filter: the one instruction BPF_RET | BPF_K with 0, "keep no byte of the packet".
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
# struct sock_fprog.
_PROGRAM = struct.pack("@HP", 1, ctypes.addressof(_DROP))


def sever(proxy: TcpProxy) -> None:
    """Lose, from now on, every packet of the open connections towards the proxy, from both of their ends.

    What the proxy has read already is still sent on. May be called in the proxy's own thread.
    """
    for link in proxy._links:
        for end in (link.client, link.upstream):
            if end is not None:
                end.setsockopt(socket.SOL_SOCKET, _ATTACH, _PROGRAM)


def refuse_silently(proxy: TcpProxy) -> None:
    """Lose the packets that would open a connection, until `heal`."""
    assert proxy._listener is not None
    proxy._listener.setsockopt(socket.SOL_SOCKET, _ATTACH, _PROGRAM)


def heal(proxy: TcpProxy) -> None:
    """Pass everything again; both ends of severed connections see them end."""
    severed = [end for link in proxy._links for end in (link.client, link.upstream)]
    for end in (*severed, proxy._listener):
        # Most of them have no filter.
        with contextlib.suppress(OSError):
            if end is not None:
                end.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
