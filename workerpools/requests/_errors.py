"""Classification of failed requests, by method and progress on the wire. Pure functions."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import requests
import urllib3.exceptions

from workerpools.adapter import Failure, FailureKind, Phase, Sent, causes, kept_key, retry_after

__all__ = [
    "PLUMBING",
    "RESOURCE",
    "Progress",
    "classify_status",
    "classify_transport",
    "classify_unwatched",
    "is_idempotent",
    "is_repeated",
]

#: RFC 9110 §9.2.2: a request with one of these methods may be sent again.
IDEMPOTENT_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))

#: The attribute of a prepared request that holds the name of the resource by which it was sent.
RESOURCE = "workerpools_resource"

#: The attribute of what an authentication sends for itself, such as the request for a token.
PLUMBING = "workerpools_plumbing"


@dataclass
class Progress:
    """A request's progress on the wire.

    Attributes:
        watched: Whether a step of the request was heard of. Without one nothing is known: a mock or a user's adapter
            may tell none, and their silence proves nothing.
        fresh: Whether a new connection was opened for the request.
        head_started: Whether sending the head began.
        head_failed: Whether sending the head failed, so that the server cannot have acted on the request.
        body_sent: Whether the request was sent completely.
        answered: Whether the head of the response arrived.
    """

    watched: bool = True
    fresh: bool = False
    head_started: bool = False
    head_failed: bool = False
    body_sent: bool = False
    answered: bool = False

    @property
    def is_unserved(self) -> bool:
        """Whether the server cannot have acted on the request."""
        return self.watched and not self.answered and (self.head_failed or not self.head_started)


def is_idempotent(request: requests.PreparedRequest) -> bool:
    """Return whether ``request`` has an idempotent method or an Idempotency-Key, or asks for a token.

    An empty key is none.
    """
    return _needs_no_key(request) or bool(_key(request).strip())


def is_repeated(request: requests.PreparedRequest) -> bool:
    """Return whether a replay may send ``request`` again; gives it the key that it had in a run before."""
    if _needs_no_key(request) or not is_idempotent(request):
        return _needs_no_key(request)
    key, body = _key(request), request.body or b""
    # Not known before it is sent: a file, an iterator. A form with files has another boundary each time.
    content = body.encode() if isinstance(body, str) else body if isinstance(body, bytes) else None
    kept = kept_key(f"{request.method} {request.url}", content, key)
    if kept is not None and kept != key:
        request.headers["Idempotency-Key"] = kept
    return kept is not None


def _needs_no_key(request: requests.PreparedRequest) -> bool:
    return hasattr(request, PLUMBING) or (request.method or "").upper() in IDEMPOTENT_METHODS


def _key(request: requests.PreparedRequest) -> str:
    # A request that was not prepared as a whole has none.
    headers: Any = request.headers or {}
    key: Any = headers.get("Idempotency-Key", "")
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


def classify_transport(
    error: BaseException,
    progress: Progress,
    *,
    idempotent: bool,
    exhausted: bool = False,
    plumbing: bool = False,
    late: bool = False,
) -> Failure | None:
    """Classify an exception that a request ended with; None if it is not a connection failure.

    Args:
        error: The exception.
        progress: The request's progress on the wire.
        idempotent: Whether the request may be sent again (RFC 9110 §9.2.2, or an Idempotency-Key).
        exhausted: Whether no connection became free in time.
        plumbing: Whether an authentication sent it for itself: the body's own request has not left.
        late: Whether the request's time was over.
    """
    if not isinstance(error, requests.RequestException) or isinstance(error, _NO_CONNECTION_FAILURE):
        return None
    chain = causes(error)
    timed_out = late or any(isinstance(each, _TIMEOUTS) for each in chain)
    sent = _sent(progress)

    def failure(kind: FailureKind, phase: Phase, known: str) -> Failure:
        if plumbing and kind is FailureKind.INDETERMINATE:
            kind, known = FailureKind.UNAVAILABLE, "a request of the authentication was lost; the body's was not sent"
        return Failure(kind, sent, phase=phase, timed_out=timed_out, known=known)

    if exhausted:
        return failure(FailureKind.POOL_EXHAUSTED, Phase.ACQUIRE, "no connection became free in time")
    if (progress.watched and not progress.head_started) or (not progress.watched and _is_unconnected(error, chain)):
        if any(isinstance(each, _REJECTIONS) for each in chain):
            return failure(FailureKind.PERMANENT, Phase.CONNECT, "the server's certificate was rejected")
        if any("Tunnel connection failed: 407" in str(each) for each in chain):
            return failure(FailureKind.PERMANENT, Phase.CONNECT, _REFUSED_BY_PROXY)
        return failure(FailureKind.UNAVAILABLE, Phase.CONNECT, "nothing was sent")
    if progress.answered:
        known = "the server had answered, but its response is incomplete"
        return failure(FailureKind.INDETERMINATE, Phase.RESPONSE, known)
    if progress.head_failed:
        kind = FailureKind.UNAVAILABLE if progress.fresh else FailureKind.STALE
        return failure(kind, Phase.REQUEST, "the request's headers were not sent completely")
    if progress.watched and not progress.fresh and not timed_out and idempotent:
        known = "a kept-alive connection ended without a response, and the request is idempotent"
        return failure(FailureKind.STALE, Phase.REQUEST, known)
    return failure(FailureKind.INDETERMINATE, Phase.REQUEST, "the server may have acted on the request")


def _is_unconnected(error: BaseException, chain: list[BaseException]) -> bool:
    unconnected = (requests.ConnectTimeout, requests.exceptions.ProxyError)
    return isinstance(error, unconnected) or any(isinstance(each, _UNCONNECTED) for each in chain)


_REFUSED_BY_PROXY = "the proxy wants other credentials (407)"

_NO_CONNECTION_FAILURE = (
    # What is wrong with the request itself, or with a response that has arrived.
    ValueError,
    requests.HTTPError,
    requests.TooManyRedirects,
    requests.exceptions.ContentDecodingError,
    requests.exceptions.StreamConsumedError,
    requests.exceptions.UnrewindableBodyError,
)

_TIMEOUTS = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)

_UNCONNECTED = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)

_REJECTIONS = (ssl.SSLCertVerificationError, ssl.CertificateError)


def _sent(progress: Progress) -> Sent:
    if not progress.watched:
        return Sent.UNKNOWN
    if not progress.head_started:
        return Sent.NOTHING
    return Sent.ALL if progress.body_sent or progress.answered else Sent.PARTIAL


def classify_status(error: requests.HTTPError, now: datetime | None = None) -> Failure | None:
    """Classify an exception of ``Response.raise_for_status()``; None if its status is not a connection failure.

    407 (by a proxy), 429 and 503 mean that the request was not processed; with 502 and 504 it may have been.

    Args:
        error: The exception.
        now: The time to which a Retry-After date is compared; None for the current time.
    """
    response: requests.Response | None = error.response
    if response is None:
        return None
    status = response.status_code
    # Mocks leave it out.
    request: Any = response.request
    resource = str(getattr(request, RESOURCE, ""))
    if status == 407:
        return Failure(FailureKind.PERMANENT, Sent.ALL, resource, Phase.RESPONSE, "407", known=_REFUSED_BY_PROXY)
    if status in (429, 503):
        kind, known = FailureKind.UNAVAILABLE, "the server temporarily declined the request"
    elif status in (502, 504):
        kind = FailureKind.INDETERMINATE
        if isinstance(request, requests.PreparedRequest) and is_idempotent(request):
            kind = FailureKind.UNAVAILABLE
        known = "a gateway got no answer from the server behind it"
    else:
        return None
    wait = retry_after(response.headers.get("Retry-After"), now or datetime.now(timezone.utc))
    return Failure(kind, Sent.ALL, resource, Phase.RESPONSE, str(status), wait, known=f"{known} ({status})")


def classify_unwatched(error: BaseException) -> Failure | None:
    """Classify an exception of requests without knowledge of the wire; None if it is not a connection failure."""
    if isinstance(error, requests.HTTPError):
        return classify_status(error)
    return classify_transport(error, Progress(watched=False), idempotent=False)
