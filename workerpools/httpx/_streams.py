"""The streams of HTTP/2 connections: a request waits here for one, as it does for a connection of a full pool.

httpcore sends all requests to an origin over one HTTP/2 connection, and waits without any bound for a stream of it, and
for the thread that is making it. So no request is given to httpcore that would have to wait.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ._library import httpx

__all__ = ["POLL", "Stream", "Streams"]

#: The interval between looks for a free stream, in seconds.
POLL = 0.005

#: httpcore uses no more streams, whatever the server says.
_MOST = 100

#: ``SETTINGS_MAX_CONCURRENT_STREAMS`` (RFC 9113 §6.5.2).
_MAX_CONCURRENT_STREAMS = 3


class _Connection:
    def __init__(self) -> None:
        #: As httpcore: one, until it is known which protocol it speaks and what the server allows.
        self.limit: float = 1
        self.streams: set[Stream] = set()


class Streams:
    """The newest connection of a transport to each origin, with its streams."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connections: dict[object, _Connection] = {}


class Stream:
    """A request's stream.

    Args:
        streams: The streams of the transport.
        request: The request.
    """

    def __init__(self, streams: Streams, request: httpx.Request) -> None:
        self._streams = streams
        self._request = request
        self._origin = (request.url.scheme, request.url.host, request.url.port)
        self._connection = _Connection()

    def acquire(self, timeout: float | None) -> None:
        """Wait until the connection has a stream free.

        Args:
            timeout: How long to wait, in seconds; None for ever.

        Raises:
            httpx.PoolTimeout: None became free in time.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.acquired(until):
            # Polled, so that the end of a request costs no notification.
            time.sleep(POLL)

    def acquired(self, until: float | None) -> bool:
        """Return whether the connection had a stream free, which is the request's from now on.

        Args:
            until: When the wait for one ends, on the clock of :func:`time.monotonic`; None for never.

        Raises:
            httpx.PoolTimeout: None became free in time.
        """
        with self._streams.lock:
            # Kept before it is counted: an interruption in between leaves it to be released.
            self._connection = self._streams.connections.setdefault(self._origin, _Connection())
            if len(self._connection.streams) < self._connection.limit:
                self._connection.streams.add(self)
                return True
        if until is not None and time.monotonic() >= until:
            message = "no stream of the HTTP/2 connection became free in time"
            raise httpx.PoolTimeout(message, request=self._request)
        return False

    def hears(self, step: str, info: Any) -> None:
        """Note a step of httpcore's."""
        if step == "http2.send_connection_init.started":
            # The streams of the former connection end on it.
            self.release()
            with self._streams.lock:
                self._connection = self._streams.connections[self._origin] = _Connection()
                self._connection.streams.add(self)
        elif step == "http2.receive_remote_settings.complete":
            setting = info["return_value"].changed_settings.get(_MAX_CONCURRENT_STREAMS)
            if setting is not None and setting.new_value:
                self._connection.limit = min(setting.new_value, _MOST)
        elif step == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
            # Each request has a connection of its own.
            self._connection.limit = float("inf")

    def release(self) -> None:
        """Give the stream back. Can be repeated."""
        self._connection.streams.discard(self)
