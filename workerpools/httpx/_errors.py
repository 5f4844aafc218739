"""Classification of failed HTTP requests, by method and progress on the wire. Pure functions."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime, timezone

from workerpools.adapter import Failure, FailureKind, Phase, Sent, causes, kept_key, retry_after

from ._library import httpx

__all__ = [
    "PLUMBING",
    "RESOURCE",
    "Progress",
    "classify_transport",
    "classify_unwatched",
    "is_idempotent",
    "is_repeated",
    "retry_after",
]

#: RFC 9110 §9.2.2: a request with one of these methods may be sent again.
IDEMPOTENT_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))

#: The extension of a response, and of a request that failed, that holds the name of the resource.
RESOURCE = "workerpools_resource"


#: The request extension of what an ``httpx.Auth`` sends for itself, such as the request for a token.
PLUMBING = "workerpools_plumbing"


def is_idempotent(request: httpx.Request) -> bool:
    """Return whether ``request`` has an idempotent method or an Idempotency-Key, or asks for a token.

    An empty key is none.
    """
    return _needs_no_key(request) or bool(request.headers.get("idempotency-key", "").strip())


def is_repeated(request: httpx.Request) -> bool:
    """Return whether a replay may send ``request`` again; gives it the key that it had in a run before."""
    if _needs_no_key(request) or not is_idempotent(request):
        return is_idempotent(request)
    key = request.headers["idempotency-key"]
    # Not known before it is sent: an iterator, a form with files, whose boundary is another one each time.
    content = b"".join(request.stream) if isinstance(request.stream, httpx.ByteStream) else None
    kept = kept_key(f"{request.method} {request.url}", content, key)
    if kept is not None and kept != key:
        request.headers["Idempotency-Key"] = kept
    return kept is not None


def _needs_no_key(request: httpx.Request) -> bool:
    return PLUMBING in request.extensions or request.method.upper() in IDEMPOTENT_METHODS


@dataclass
class Progress:
    """A request's progress on the wire.

    Attributes:
        watched: Whether a step of the request was heard of. Without one nothing is known: a mock or a user's transport
            may report none, and their silence proves nothing.
        sent_before: Whether an earlier try of the transport's own may have reached the server.
        fresh: Whether a new connection was opened for the request.
        head_started: Whether sending the head began.
        head_failed: Whether sending the head failed, so that the server cannot have acted on the request.
        refused: Whether the server said that it does not process the request, so that it may be sent again.
        body_sent: Whether the request was sent completely.
        answered: Whether the head of the response arrived.
    """

    watched: bool = True
    sent_before: bool = False
    fresh: bool = False
    head_started: bool = False
    head_failed: bool = False
    refused: bool = False
    body_sent: bool = False
    answered: bool = False

    @property
    def is_unserved(self) -> bool:
        """Whether the server cannot have acted on the request."""
        return self.head_failed or self.refused or not self.head_started


def classify_transport(
    error: BaseException, progress: Progress, *, idempotent: bool, plumbing: bool = False, resource: str = ""
) -> Failure | None:
    """Classify an ``httpx.TransportError``; None if it is not a connection failure.

    ``ReadError`` and ``RemoteProtocolError`` are treated alike: TLS turns one into the other.

    Args:
        error: The exception.
        progress: The request's progress on the wire.
        idempotent: Whether the request may be sent again (RFC 9110 §9.2.2, or an Idempotency-Key).
        plumbing: Whether an ``httpx.Auth`` sent it for itself: the body's own request has not left.
        resource: The resource's name.
    """
    if not isinstance(error, httpx.TransportError) or isinstance(error, _NO_CONNECTION_FAILURE):
        return None
    timed_out = isinstance(error, httpx.TimeoutException)
    sent = _sent(progress)

    def failure(kind: FailureKind, phase: Phase, known: str) -> Failure:
        if plumbing and kind is FailureKind.INDETERMINATE:
            kind, known = FailureKind.UNAVAILABLE, "a request of the auth flow was lost; the body's own was not sent"
        return Failure(kind, sent, resource, phase, timed_out=timed_out, known=known)

    if progress.sent_before and not idempotent:
        return failure(FailureKind.INDETERMINATE, Phase.REQUEST, "an earlier try of the transport may have been served")
    if isinstance(error, httpx.PoolTimeout):
        return failure(FailureKind.POOL_EXHAUSTED, Phase.ACQUIRE, "no connection became free in time")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)) or (
        progress.watched and not progress.head_started
    ):
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
            return failure(FailureKind.PERMANENT, Phase.CONNECT, "the server's certificate was rejected")
        if isinstance(error, httpx.ProxyError) and str(error).startswith("407"):
            return failure(FailureKind.PERMANENT, Phase.CONNECT, _REFUSED_BY_PROXY)
        return failure(FailureKind.UNAVAILABLE, Phase.CONNECT, "nothing was sent")
    if progress.answered:
        return failure(
            FailureKind.INDETERMINATE, Phase.RESPONSE, "the server had answered, but its response is incomplete"
        )
    if progress.head_failed or progress.refused:
        known = _REFUSED if progress.refused else "the request's headers were not sent completely"
        kind = FailureKind.UNAVAILABLE if progress.fresh else FailureKind.STALE
        return failure(kind, Phase.REQUEST, known)
    if progress.watched and not progress.fresh and not timed_out and idempotent:
        return failure(
            FailureKind.STALE,
            Phase.REQUEST,
            "a kept-alive connection ended without a response, and the request is idempotent",
        )
    return failure(FailureKind.INDETERMINATE, Phase.REQUEST, "the server may have acted on the request")


_REFUSED_BY_PROXY = "the proxy wants other credentials (407)"

_REFUSED = "the server did not process the request, as it says"

_NO_CONNECTION_FAILURE = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)


def _sent(progress: Progress) -> Sent:
    if not progress.watched or progress.sent_before:
        return Sent.UNKNOWN
    if not progress.head_started:
        return Sent.NOTHING
    return Sent.ALL if progress.body_sent or progress.answered else Sent.PARTIAL


def classify_status(error: httpx.HTTPStatusError, now: datetime | None = None) -> Failure | None:
    """Classify an exception of ``Response.raise_for_status()``; None if its status is not a connection failure.

    407 (by a proxy), 429 and 503 mean that the request was not processed; with 502 and 504 it may have been.

    Args:
        error: The exception.
        now: The time to which a Retry-After date is compared; None for the current time.
    """
    response, status = error.response, error.response.status_code
    resource = str(response.extensions.get(RESOURCE, ""))
    if status == 407:
        return Failure(FailureKind.PERMANENT, Sent.ALL, resource, Phase.RESPONSE, "407", known=_REFUSED_BY_PROXY)
    if status in (429, 503):
        kind, known = FailureKind.UNAVAILABLE, "the server temporarily declined the request"
    elif status in (502, 504):
        idempotent = is_idempotent(error.request)
        kind = FailureKind.UNAVAILABLE if idempotent else FailureKind.INDETERMINATE
        known = "a gateway got no answer from the server behind it"
    else:
        return None
    wait = retry_after(response.headers.get("retry-after"), now or datetime.now(timezone.utc))
    return Failure(kind, Sent.ALL, resource, Phase.RESPONSE, str(status), wait, known=f"{known} ({status})")


def classify_unwatched(error: BaseException) -> Failure | None:
    """Classify an exception of httpx without knowledge of the wire; None if it is not a connection failure."""
    if isinstance(error, httpx.HTTPStatusError):
        return classify_status(error)
    if not isinstance(error, httpx.TransportError):
        return None
    return classify_transport(error, Progress(watched=False), idempotent=False)
