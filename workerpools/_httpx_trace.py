"""Follows one request on the wire through httpcore's trace (the request extension ``trace``, a documented hook)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from workerpools._core.adapter import Opening
from workerpools._core.effects import Effect, note_effect, withdraw_effect
from workerpools._httpx_classify import Progress, is_idempotent

__all__ = ["Trace"]


class _Handshake:
    """Stands for a connection between TCP and TLS: its descriptor has left one object and is in no other yet."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number


class Trace:
    """What became of one request; called by httpcore at each step.

    Args:
        opening: Where connections are reported.
        request: The request.
        watched: Whether the transport is known to tell of each step.
    """

    def __init__(self, opening: Opening, request: httpx.Request, *, watched: bool) -> None:
        self._opening = opening
        self._request = request
        self._chained: Callable[[str, Any], Any] | None = request.extensions.get("trace")
        self.progress = Progress(watched=watched)
        self._effect: Effect | None = None
        self._number = -1
        self._handshake = _Handshake(-1)

    def __call__(self, name: str, info: Any) -> Any:
        # The first part of a name is the protocol: connection, http11, http2, proxy, socks.
        step = _STEPS.get(name.partition(".")[2])
        if step is not None:
            step(self, info)
        return self._chained(name, info) if self._chained is not None else None

    def _connects(self, info: Any) -> None:
        self._opening.descriptors.connecting(info.get("port"))

    def _gives_up(self, info: Any) -> None:
        self._opening.descriptors.gave_up()

    def _connected(self, info: Any) -> None:
        self.progress.fresh = True
        stream = info["return_value"]
        connection = stream.get_extra_info("socket")
        if connection is not None:
            self._opening.connected(connection)
            self._number = connection.fileno()
            _tell_of_close(stream, connection, self._opening)

    def _starts_tls(self, info: Any) -> None:
        self._handshake = _Handshake(self._number)
        self._opening.descriptors.add(self._handshake)

    def _started_tls(self, info: Any) -> None:
        self.progress.fresh = True
        stream = info["return_value"]
        connection = stream.get_extra_info("socket")
        if connection is not None:
            # The same descriptor in a new object; the connection was counted when it was made.
            self._opening.descriptors.add(connection)
            self._opening.descriptors.drop(self._handshake)
            _tell_of_close(stream, connection, self._opening)

    def _failed_tls(self, info: Any) -> None:
        self._opening.descriptors.drop(self._handshake)

    def _head_starts(self, info: Any) -> None:
        self.progress.head_started = True
        self.leaves()

    def _head_failed(self, info: Any) -> None:
        self.progress.head_failed = True

    def _body_sent(self, info: Any) -> None:
        self.progress.body_sent = True

    def _answered(self, info: Any) -> None:
        self.progress.answered = True

    def leaves(self) -> None:
        """Note the effect that the request may have, once."""
        if self._effect is None and not is_idempotent(self._request):
            self._effect = Effect(f"{self._request.method} by {self._opening.resource!r}")
            note_effect(self._effect)

    def never_left(self) -> None:
        """Take the effect back: the server cannot have acted on the request."""
        if self._effect is not None:
            withdraw_effect(self._effect)
            self._effect = None


_STEPS: dict[str, Callable[[Trace, Any], None]] = {
    "connect_tcp.started": Trace._connects,
    "connect_unix_socket.started": Trace._connects,
    "connect_tcp.failed": Trace._gives_up,
    "connect_unix_socket.failed": Trace._gives_up,
    "connect_tcp.complete": Trace._connected,
    "connect_unix_socket.complete": Trace._connected,
    "start_tls.started": Trace._starts_tls,
    "start_tls.complete": Trace._started_tls,
    "start_tls.failed": Trace._failed_tls,
    "send_request_headers.started": Trace._head_starts,
    "send_request_headers.failed": Trace._head_failed,
    "send_request_body.complete": Trace._body_sent,
    "receive_response_headers.complete": Trace._answered,
}


def _tell_of_close(stream: Any, connection: object, opening: Opening) -> None:
    # The trace has no event for it, and every way of closing a connection ends in its network stream's close().
    close, told = stream.close, False

    def close_and_tell() -> None:
        nonlocal told
        close()
        if not told:
            told = True
            opening.disconnected(connection)

    stream.close = close_and_tell
