"""Asks HTTP servers how long they keep idle connections: the only part of the checks that connects."""

from __future__ import annotations

import http.client
import re
import select
import socket
import ssl
import time
from contextlib import closing

__all__ = ["idle_time"]

#: How long connecting and the answer may take, in seconds.
TIMEOUT = 5.0


def idle_time(host: str, port: int, tls: bool, expiry: float, most: float = 10.0) -> float | None:
    """Return how long a server keeps an idle connection, in seconds; None if that is at least ``expiry``.

    Sends one HEAD request without credentials, believes a header ``Keep-Alive: timeout=…`` (RFC 2068 §19.7.1.1), and
    otherwise waits for the server to close the connection.

    Args:
        host: The server.
        port: Its port.
        tls: Whether it speaks TLS. Its certificate is not checked: nothing secret is sent.
        expiry: How long the client keeps one, in seconds.
        most: How long to wait at most, in seconds.

    Raises:
        OSError: The server cannot be reached, or does not answer in time.
    """
    connection: http.client.HTTPConnection
    if tls:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    with closing(connection):
        try:
            connection.request("HEAD", "/")
            answer = connection.getresponse()
            answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP response: {type(error).__name__}") from None
        kept = time.monotonic()
        if connection.sock is None:
            # "Connection: close": there is nothing to be kept.
            return None
        told = re.search(r"timeout=(\d+)", answer.getheader("Keep-Alive") or "")
        if told is not None:
            return float(told[1]) if float(told[1]) <= expiry else None
        # TLS may have something to say without closing: session tickets, for one.
        connection.sock.setblocking(False)
        while (left := kept + min(expiry, most) - time.monotonic()) > 0:
            if select.select([connection.sock], [], [], left)[0] and _closed(connection.sock):
                return time.monotonic() - kept
    return None


def _closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1024) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
