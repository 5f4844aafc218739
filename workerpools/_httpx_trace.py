"""Follows one request on the wire through httpcore's trace (the request extension ``trace``, a documented hook)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from workerpools._core.adapter import Opening
from workerpools._core.effects import Effect, note_effect, withdraw_effect
from workerpools._httpx_classify import Progress, is_idempotent

__all__ = ["Trace"]

_CONNECTING = (".connect_tcp.started", ".connect_unix_socket.started")
_GAVE_UP = (".connect_tcp.failed", ".connect_unix_socket.failed")
_OPENED = (".connect_tcp.complete", ".connect_unix_socket.complete", ".start_tls.complete")


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
        if name.endswith(_OPENED):
            self.progress.fresh = True
            self._opened(name, info["return_value"])
        elif name.endswith(_CONNECTING):
            self._opening.descriptors.connecting(info.get("port"))
        elif name.endswith(".start_tls.started"):
            self._handshake = _Handshake(self._number)
            self._opening.descriptors.add(self._handshake)
        elif name.endswith(".start_tls.failed"):
            self._opening.descriptors.drop(self._handshake)
        elif name.endswith(_GAVE_UP):
            self._opening.descriptors.gave_up()
        elif name.endswith(".send_request_headers.started"):
            self.progress.head_started = True
            self.leaves()
        elif name.endswith(".send_request_headers.failed"):
            self.progress.head_failed = True
        elif name.endswith(".send_request_body.complete"):
            self.progress.body_sent = True
        elif name.endswith(".receive_response_headers.complete"):
            self.progress.answered = True
        return self._chained(name, info) if self._chained is not None else None

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

    def _opened(self, name: str, stream: Any) -> None:
        connection = stream.get_extra_info("socket")
        if connection is None:
            return
        if name.endswith(".start_tls.complete"):
            # The same descriptor in a new object; the connection was counted when it was made.
            self._opening.descriptors.add(connection)
            self._opening.descriptors.drop(self._handshake)
            _tell_of_close(stream, connection, self._opening)
        else:
            self._opening.connected(connection)
            self._number = connection.fileno()
            _tell_of_close(stream, connection, self._opening)


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
