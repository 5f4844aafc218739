"""What a failed HTTP request proves: pure decisions over its method and what was seen on the wire."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import httpx

from workerpools.adapter import Failure, FailureKind, Phase, Sent, causes

__all__ = ["RESOURCE", "Progress", "classify_transport", "classify_unwatched", "is_idempotent", "retry_after"]

#: RFC 9110 §9.2.2: a request with one of these methods may be sent again.
IDEMPOTENT_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))

#: The key of a response's extensions that names the resource it came through.
RESOURCE = "workerpools_resource"


def is_idempotent(request: httpx.Request) -> bool:
    """Return whether ``request`` may be sent again, by its method or because it has an Idempotency-Key."""
    return request.method.upper() in IDEMPOTENT_METHODS or "idempotency-key" in request.headers


@dataclass
class Progress:
    """What was seen of one request on the wire.

    Attributes:
        watched: Whether anything can be seen at all; a transport of the user's may tell nothing.
        fresh: A connection was made for it.
        head_started: Its head began to leave.
        head_failed: Its head never left as a whole, so that the server cannot have acted on it.
        body_sent: It left as a whole.
        answered: The response's head arrived.
    """

    watched: bool = True
    fresh: bool = False
    head_started: bool = False
    head_failed: bool = False
    body_sent: bool = False
    answered: bool = False


def classify_transport(
    error: BaseException, progress: Progress, *, idempotent: bool, resource: str = ""
) -> Failure | None:
    """Return what a ``httpx.TransportError`` proves; None if it is no failure of a connection.

    A ``ReadError`` and a ``RemoteProtocolError`` are never told apart: TLS turns one into the other.

    Args:
        error: The exception.
        progress: What was seen on the wire.
        idempotent: Whether the request may be sent again (RFC 9110 §9.2.2, or an Idempotency-Key).
        resource: The resource's name.
    """
    if not isinstance(error, httpx.TransportError) or isinstance(error, _NO_CONNECTION_FAILURE):
        return None
    timed_out = isinstance(error, httpx.TimeoutException)
    sent = _sent(progress)

    def failure(kind: FailureKind, phase: Phase, known: str) -> Failure:
        return Failure(kind, sent, resource, phase, timed_out=timed_out, known=known)

    if isinstance(error, httpx.PoolTimeout):
        return failure(FailureKind.POOL_EXHAUSTED, Phase.ACQUIRE, "no connection of the client came free in time")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)) or (
        progress.watched and not progress.head_started
    ):
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
            return failure(FailureKind.PERMANENT, Phase.CONNECT, "the server's certificate was not accepted")
        return failure(FailureKind.UNAVAILABLE, Phase.CONNECT, "nothing was sent")
    if progress.answered:
        return failure(
            FailureKind.INDETERMINATE, Phase.RESPONSE, "the server had answered, and its response is not complete"
        )
    if progress.head_failed:
        known = "the request never left as a whole"
        kind = FailureKind.UNAVAILABLE if progress.fresh else FailureKind.STALE
        return failure(kind, Phase.REQUEST, known)
    if progress.watched and not progress.fresh and not timed_out and idempotent:
        return failure(
            FailureKind.STALE,
            Phase.REQUEST,
            "a kept connection ended without an answer, and the request may be sent again",
        )
    return failure(FailureKind.INDETERMINATE, Phase.REQUEST, "the server may have acted on the request")


_NO_CONNECTION_FAILURE = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)


def _sent(progress: Progress) -> Sent:
    if not progress.watched:
        return Sent.UNKNOWN
    if not progress.head_started:
        return Sent.NOTHING
    return Sent.ALL if progress.body_sent or progress.answered else Sent.PARTIAL


def classify_status(error: httpx.HTTPStatusError, now: datetime | None = None) -> Failure | None:
    """Return what ``Response.raise_for_status()`` proves: 429 and 503 were not processed, 502 and 504 may have been.

    Args:
        error: The exception.
        now: For a Retry-After that is a date; the current time if None.
    """
    response, status = error.response, error.response.status_code
    if status in (429, 503):
        kind, known = FailureKind.UNAVAILABLE, "the server declined the request for now"
    elif status in (502, 504):
        idempotent = is_idempotent(error.request)
        kind = FailureKind.UNAVAILABLE if idempotent else FailureKind.INDETERMINATE
        known = "a gateway got no answer from the server behind it"
    else:
        return None
    wait = retry_after(response.headers.get("retry-after"), now or datetime.now(timezone.utc))
    resource = str(response.extensions.get(RESOURCE, ""))
    return Failure(kind, Sent.ALL, resource, Phase.RESPONSE, str(status), wait, known=f"{known} ({status})")


def retry_after(value: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks to wait (RFC 9110 §10.2.3): a year at most; None without a
    valid one.
    """
    text = (value or "").strip()
    # Other digits of Unicode are digits to Python, and not to HTTP.
    if text.isascii() and text.isdigit():
        # Longer ones are more than Python converts; leading zeros are no size.
        text = text.lstrip("0")
        return float(min(int(text[:12] or "0"), _LONGEST))
    try:
        when = parsedate_to_datetime(text)
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        return min(max(0.0, (when - now).total_seconds()), _LONGEST)
    except (ValueError, OverflowError, IndexError, TypeError):
        # The parser of the standard library raises each of them.
        return None


#: The longest wait that a server may ask for, in seconds: a year.
_LONGEST = 31_536_000.0


def classify_unwatched(error: BaseException) -> Failure | None:
    """Return what an exception of httpx proves, where nothing was seen on the wire."""
    if isinstance(error, httpx.HTTPStatusError):
        return classify_status(error)
    if not isinstance(error, httpx.TransportError):
        return None
    return classify_transport(error, Progress(watched=False), idempotent=False)
