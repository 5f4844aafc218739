"""Sends requests: bounds their waits, classifies their failures, and sends one again where that is safe."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import EmptyPoolError
from urllib3.util import Timeout

from workerpools.adapter import Deadline, Failure, FailureKind, Phase, add_note, failure_of
from workerpools.adapter import deadline as current_deadline
from workerpools.errors import DeadlineExceeded
from workerpools.requests._errors import PLUMBING, RESOURCE, classify_transport, is_idempotent, is_repeated
from workerpools.requests._tls import Contexts
from workerpools.requests._wire import TOO_LATE, Answer, Exchange, Traffic, running, watched

__all__ = ["WatchedAdapter"]


class WatchedAdapter(HTTPAdapter):
    """An ``HTTPAdapter`` that watches its requests on the wire.

    Args:
        traffic: The session's traffic.
        contexts: The TLS contexts.
        socket_options: Options for each TCP socket.
        connections: The number of servers for which connections are kept.
        maxsize: The number of connections to each server.
    """

    def __init__(
        self,
        traffic: Traffic,
        contexts: Contexts,
        *,
        socket_options: list[tuple[int, int, int | bytes]],
        connections: int,
        maxsize: int,
    ) -> None:
        self._traffic = traffic
        self._contexts = contexts
        self._socket_options = socket_options
        super().__init__(pool_connections=connections, pool_maxsize=maxsize, max_retries=0, pool_block=True)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        """Make the pools, as ``HTTPAdapter`` does."""
        super().init_poolmanager(connections, maxsize, block, socket_options=self._socket_options, **pool_kwargs)
        _watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        """Return the pools of a proxy, as ``HTTPAdapter`` does."""
        if proxy not in self.proxy_manager:
            proxy_kwargs.setdefault("socket_options", self._socket_options)
            if proxy.lower().startswith("https:"):
                proxy_kwargs.setdefault("proxy_ssl_context", self._contexts.context(True, None))
        return _watch(super().proxy_manager_for(proxy, **proxy_kwargs))

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """Return what tells a server's pools apart: with a context of ours, where certificates are verified."""
        host, options = super().build_connection_pool_key_attributes(request, verify, cert)
        if host["scheme"] == "https" and verify is not False:
            context = self._contexts.context(verify if isinstance(verify, str) else True, cert)
            options = {"ssl_context": context, "cert_reqs": context.verify_mode}
        return host, options

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Check the files, as ``HTTPAdapter`` does."""
        # With files of its own, a pool would read them for each connection, into the context that others share.
        own = url.lower().startswith("https") and verify is not False
        super().cert_verify(SimpleNamespace() if own else conn, url, verify, cert)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send a request, as ``HTTPAdapter`` does."""
        setattr(request, RESOURCE, self._traffic.opening.resource)
        try:
            return self._send(request, stream, timeout, verify, cert, proxies)
        except requests.RequestException as error:
            if not self._may_send_again(request, error, failure_of(error)):
                raise
        return self._send(request, stream, timeout, verify, cert, proxies)

    def _may_send_again(
        self, request: requests.PreparedRequest, error: requests.RequestException, failure: Failure | None
    ) -> bool:
        # One automatic retry only (RFC 9110 §9.2.2). What is read from a file or an iterator may be gone.
        if failure is None or failure.kind is not FailureKind.STALE:
            return False
        if not isinstance(request.body, (bytes, str, type(None))) or self._traffic.closed:
            # Closing the session caused the failure, or a new connection would outlive it.
            return False
        return self._traffic.opening.replay(error, method=request.method)

    def _send(
        self, request: requests.PreparedRequest, stream: bool, timeout: Any, verify: Any, cert: Any, proxies: Any
    ) -> requests.Response:
        traffic, method = self._traffic, request.method or ""
        opening, deadline = traffic.opening, current_deadline()
        if deadline.remaining() == 0.0:
            raise DeadlineExceeded(
                f"{method} by the resource {opening.resource!r} was not sent: the task's deadline has passed"
            )
        total = traffic.total_timeout
        limit = deadline if total is None else deadline.nearest(Deadline(time.monotonic() + total))
        opening.notice()
        exchange = Exchange(
            traffic,
            f"{method} by {opening.resource!r}",
            repeated=is_repeated(request),
            limit=limit,
            write_timeout=_read_timeout(timeout),
        )
        thread = threading.get_ident()
        around = running.get(thread)
        try:
            traffic.exchanges[exchange] = None
            running[thread] = exchange
            try:
                response = super().send(request, stream, timeout, verify, cert, proxies)
            except EmptyPoolError as error:
                raise requests.ConnectTimeout(error, request=request) from error
            if not exchange.progress.watched:
                # By a mock in the place of HTTPAdapter.send(): nothing is known.
                exchange.leaves()
            if not isinstance(response.raw, Answer):
                exchange.over()
            return response
        except BaseException as error:
            if not exchange.progress.watched and not exchange.exhausted and not _is_refusal(error):
                exchange.leaves()
            exchange.over()
            if isinstance(error, requests.RequestException):
                raised = self._failed(error, request, exchange)
                if raised is not error:
                    raise raised from error
            raise
        finally:
            if around is None:
                running.pop(thread, None)
            else:
                # The body of the request around this one sends it.
                running[thread] = around

    def _failed(
        self, error: requests.RequestException, request: requests.PreparedRequest, exchange: Exchange
    ) -> requests.RequestException:
        """Note what an error means; return the one to raise: a timeout if the watchdog caused it."""
        progress, opening = exchange.progress, self._traffic.opening
        if exchange.late:
            wanted: type[requests.Timeout] = requests.Timeout
            if not progress.head_started:
                wanted = requests.ConnectTimeout
            elif progress.body_sent or progress.answered:
                wanted = requests.ReadTimeout
            if not isinstance(error, wanted):
                error = wanted(TOO_LATE, request=request)
        host = urlsplit(request.url or "").hostname or "a URL without a host"
        add_note(error, f"workerpools: {request.method} by the resource {opening.resource!r} to {host}")
        failure = classify_transport(
            error,
            progress,
            idempotent=is_idempotent(request),
            exhausted=exchange.exhausted,
            plumbing=hasattr(request, PLUMBING),
            late=exchange.late,
        )
        if failure is not None and failure.timed_out and current_deadline().remaining() == 0.0:
            add_note(error, "workerpools: the task's deadline had passed")
            opening.failed(error, None, phase=Phase.REQUEST, deadline=True)
            return error
        if failure is not None and failure.timed_out and exchange.limit.remaining() == 0.0:
            add_note(error, f"workerpools: total_timeout={self._traffic.total_timeout:g} s had passed")
        if failure is not None and failure.kind is FailureKind.POOL_EXHAUSTED:
            endless = opening.endless_wait()
            if endless:
                failure = replace(failure, kind=FailureKind.PERMANENT, known=endless)
        opening.failed(error, failure, phase=failure.phase if failure else Phase.REQUEST)
        if progress.is_unserved:
            exchange.never_left()
        if failure is not None and failure.kind is FailureKind.STALE and exchange.slots is not None:
            # Where one was dead, the others are suspect.
            exchange.slots.retire(time.monotonic(), "stale")
        return error

    def close(self) -> None:
        """Close the connections that are idle, and the others after their exchanges."""
        self._traffic.closed = True
        self._traffic.retire(time.monotonic(), "shutdown")
        super().close()


def _watch(manager: Any) -> Any:
    """Have a manager of urllib3's make pools whose connections tell what they do."""
    classes = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: watched(pool) for scheme, pool in classes.items()}
    return manager


def _read_timeout(timeout: Any) -> float | None:
    if isinstance(timeout, Timeout):
        timeout = timeout.read_timeout
    elif isinstance(timeout, tuple):
        timeout = timeout[-1]
    return timeout if isinstance(timeout, (int, float)) else None


def _is_refusal(error: BaseException) -> bool:
    """Return whether requests refuses to send what it was given: what ValueErrors mean, and nothing else does."""
    return isinstance(error, ValueError) and isinstance(error, requests.RequestException)
