"""Notes that a connection of httpx is closed, and why: no event of its trace tells of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx

from workerpools._pools.adapter import Opening

__all__ = ["FAILING", "Closing", "closing_of"]

#: The threads that are closing a connection because a request has failed on it.
FAILING: set[int] = set()


class Closing:
    """Stands for the ``close`` of a connection's network stream: the trace has no event for it, and every way of
    closing a connection ends there.

    Args:
        stream: The network stream.
        connection: What it was reported as.
        opening: Where it was reported.
        keepalive_expiry: How long httpx keeps an idle connection, in seconds; None for ever.
    """

    def __init__(self, stream: Any, connection: object, opening: Opening, keepalive_expiry: float | None) -> None:
        self._stream = stream
        self._close = stream.close
        self._connection = connection
        self._opening = opening
        self._keepalive_expiry = keepalive_expiry
        self._users = 0
        self._idle_since: float | None = None
        self._made = time.monotonic()
        self._told = False

    def begin(self) -> None:
        """Note that a response comes over the connection."""
        self._users += 1
        self._idle_since = None

    def end(self) -> None:
        """Note that a response has ended."""
        self._users -= 1
        if self._users == 0:
            self._idle_since = time.monotonic()

    def __call__(self) -> None:
        # Asked first: a closed one tells nothing.
        reason = "" if self._told else self._reason()
        self._close()
        if not self._told:
            self._told = True
            self._opening.disconnected(self._connection, reason=reason, age=time.monotonic() - self._made)

    def _reason(self) -> str:
        if self._idle_since is None:
            return ""
        failed = threading.get_ident() in FAILING
        if (
            not failed
            and self._keepalive_expiry is not None
            and time.monotonic() - self._idle_since >= self._keepalive_expiry
        ):
            return "idle"
        # There is nothing to read from an idle connection but its end.
        return "stale" if self._stream.get_extra_info("is_readable") else ""


def closing_of(response: httpx.Response) -> Closing | None:
    """Return what stands for the close of the connection that ``response`` comes over, if it is known."""
    found = getattr(response.extensions.get("network_stream"), "close", None)
    return found if isinstance(found, Closing) else None
