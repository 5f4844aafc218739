"""One client, many tasks: what a body changes on it, and the cookies that it is sent, end with the body's run.

Also the requests of an ``httpx.Auth``: those for a token are no work of the body, and one thread at a time asks.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

from workerpools.adapter import Opening, Scoped, current, deadline, in_attempt

from ._errors import PLUMBING, RESOURCE, classify_unwatched, is_idempotent
from ._library import httpx

__all__ = ["SINGLE", "TOKEN_WAIT", "Flow", "Pooled", "PooledClient", "failed_request", "is_plumbing"]

#: The longest wait for a token that another thread asks for, in seconds: afterwards the thread asks itself.
TOKEN_WAIT = 30.0

#: What sends no request of its own.
SINGLE = (httpx.BasicAuth, httpx.NetRCAuth)

logger = logging.getLogger("workerpools")


class _Own(Scoped):
    """What one attempt has of a client: its cookies, and the defaults that its body changed."""

    def __init__(self, client: Pooled) -> None:
        self._client = client
        self.values: dict[str, Any] = {}

    def end(self) -> None:
        self._client.ended(self.values)


class Pooled:
    """What the clients of all tasks of a process have in common, synchronous and asynchronous.

    Args:
        opening: The opening to which it reports.
        cookie_mode: ``attempt``, ``process`` or ``off``: how long the cookies that a server sets are kept.
        options: As for ``httpx.Client``.
    """

    _cookies: httpx.Cookies
    _headers: httpx.Headers
    _event_hooks: dict[str, list[Any]]
    #: Makes what is held while one asks for a token.
    _lock: Callable[[], Any]
    #: The declaration's name, for messages.
    _declaration = "HttpxClient"

    def __init__(self, opening: Opening, cookie_mode: str, **options: Any) -> None:
        #: Whether it has been set up: what changes from then on in an attempt is the attempt's.
        self.is_set_up = False
        self._opening = opening
        self._cookie_mode = cookie_mode
        self._told: set[str] = set()
        self._fetching: weakref.WeakKeyDictionary[httpx.Auth, Any] = weakref.WeakKeyDictionary()
        super().__init__(**options)

    def own(self) -> dict[str, Any] | None:
        """Return what the calling attempt has of the client; None outside one."""
        attempt = current()
        if attempt is None or not self.is_set_up:
            return None
        own = attempt.scoped.get(self)
        if own is None:
            own = attempt.scoped[self] = _Own(self)
        values: dict[str, Any] = own.values
        return values

    def ended(self, values: dict[str, Any]) -> None:
        """Tell of the defaults that a body had changed, once for each.

        Args:
            values: What the attempt had of the client.
        """
        hooks = values.pop("event_hooks", self._event_hooks)
        changed = [name for name in values if name != "cookies" and values[name] != _OF_PROCESS[name](self)]
        if hooks != self._event_hooks:
            self._event_hooks = hooks
            changed.append("event_hooks")
        for name in set(changed) - self._told:
            self._told.add(name)
            logger.warning(
                "a task changed %r of the client %r, which all tasks share; the change ended with the task's run. Pass "
                "it with the request, or declare it: %s(%s=…)",
                name,
                self._opening.resource,
                self._declaration,
                name,
            )

    @property
    def cookies(self) -> httpx.Cookies:
        """The cookies to send, and where those that a server sets are kept."""
        if self._cookie_mode == "process" or not self.is_set_up:
            return self._cookies
        own = self.own() if self._cookie_mode == "attempt" else None
        if own is not None:
            if "cookies" not in own:
                own["cookies"] = httpx.Cookies(self._cookies)
            jar: httpx.Cookies = own["cookies"]
            return jar
        # In a thread of a body nothing tells whose cookies they are.
        return httpx.Cookies(self._cookies) if self._cookie_mode == "off" or in_attempt() else self._cookies

    @cookies.setter
    def cookies(self, cookies: Any) -> None:
        own = self.own() if self._cookie_mode == "attempt" else None
        if own is None:
            self._cookies = httpx.Cookies(cookies)
        else:
            own["cookies"] = httpx.Cookies(cookies)

    @property
    def headers(self) -> httpx.Headers:
        """The headers to send with each request."""
        own = self.own()
        if own is None:
            return self._headers
        if "headers" not in own:
            own["headers"] = self._headers.copy()
        headers: httpx.Headers = own["headers"]
        return headers

    @headers.setter
    def headers(self, headers: Any) -> None:
        _change(self, "headers", headers)

    @property
    def event_hooks(self) -> dict[str, list[Any]]:
        """The hooks, which httpx calls for every task: those of a body are taken off at its end."""
        own = self.own()
        if own is not None and "event_hooks" not in own:
            own["event_hooks"] = {name: list(hooks) for name, hooks in self._event_hooks.items()}
        return self._event_hooks

    @event_hooks.setter
    def event_hooks(self, event_hooks: dict[str, list[Any]]) -> None:
        _ = self.event_hooks
        self._event_hooks = {name: list(event_hooks.get(name, ())) for name in ("request", "response")}

    def _unseen(self, request: httpx.Request) -> None:
        if not is_idempotent(request):
            self._opening.effect(f"{request.method} by {self._opening.resource!r}")

    def _lock_of(self, auth: httpx.Auth) -> Any:
        try:
            return self._fetching.setdefault(auth, self._lock())
        except TypeError:
            # It is not hashable, or admits no weak reference.
            return None


class PooledClient(Pooled, httpx.Client):
    """An ``httpx.Client`` for all tasks of a process."""

    # From Python 3.14 on a function, which an attribute of a class would bind.
    _lock = staticmethod(threading.RLock)

    def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx.USE_CLIENT_DEFAULT,
    ) -> httpx.Response:
        """Send a request, as ``httpx.Client`` does."""
        chosen: Any = self.auth if auth is httpx.USE_CLIENT_DEFAULT else auth
        if isinstance(chosen, httpx.Auth) and not isinstance(chosen, SINGLE):
            chosen = Flow(chosen, self._lock_of(chosen), self._opening)
        try:
            response = super().send(request, stream=stream, auth=chosen, follow_redirects=follow_redirects)
        except httpx.TransportError as error:
            if RESOURCE not in failed_request(error, request).extensions:
                # By a mock in the place of the transports.
                self._unseen(request)
                self._opening.failed(error, classify_unwatched(error))
            raise
        if RESOURCE not in response.extensions:
            self._unseen(request)
        return response


# In messages and reprs it is what users know it as.
PooledClient.__name__ = PooledClient.__qualname__ = "Client"


def failed_request(error: httpx.TransportError, request: httpx.Request) -> httpx.Request:
    """Return the request that failed: ``request``, or one that it led to."""
    try:
        # Of a redirect, or of the auth flow.
        return error.request
    except RuntimeError:
        return request


def _change(client: Pooled, name: str, value: Any) -> None:
    inherited = _INHERITED[name]
    own = client.own()
    if own is None:
        inherited.fset(client, value)
    else:
        # Its setters convert, and know only the client itself.
        scratch = copy.copy(client)
        scratch.is_set_up = False
        inherited.fset(scratch, value)
        own[name] = inherited.fget(scratch)


def _scoped(name: str) -> Any:
    """Return a property of the client whose value an attempt may change for itself."""
    inherited = _INHERITED[name]

    def get(client: Pooled) -> Any:
        own = client.own()
        return inherited.fget(client) if own is None or name not in own else own[name]

    return property(get, lambda client, value: _change(client, name, value), doc=inherited.__doc__)


def _attribute(name: str) -> property:
    """Return a property for a plain attribute of the client."""
    return property(
        lambda client: vars(client)[name], lambda client, value: vars(client).__setitem__(name, value), doc=None
    )


_INHERITED: dict[str, Any] = {
    name: getattr(httpx.Client, name) for name in ("auth", "base_url", "headers", "params", "timeout")
}
_INHERITED.update({name: _attribute(name) for name in ("follow_redirects", "max_redirects")})
_OF_PROCESS = {name: inherited.fget for name, inherited in _INHERITED.items()}

for _name in _INHERITED.keys() - {"headers"}:
    setattr(Pooled, _name, _scoped(_name))


class Flow(httpx.Auth):
    """Follows the requests of another ``httpx.Auth``.

    Args:
        auth: The other one.
        lock: Held while it asks for a token, so that others find the token instead of asking for one; None for no such
            lock.
        opening: The opening to which an effect is reported.
    """

    def __init__(self, auth: httpx.Auth, lock: Any, opening: Opening) -> None:
        self._auth = auth
        self._lock = lock
        self._opening = opening

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        flow = self._auth.sync_auth_flow(request)
        locked = False
        sent = request
        try:
            locked = self._locked()
            step = next(flow)
            while True:
                sent = step
                if is_plumbing(sent, request):
                    sent.extensions = {**sent.extensions, PLUMBING: True}
                elif locked:
                    self._release()
                    locked = False
                response = yield sent
                locked = locked or self._locked()
                try:
                    step = flow.send(response)
                except StopIteration:
                    break
        finally:
            if locked:
                self._release()
            flow.close()
        self._ended_with(sent)

    def _ended_with(self, sent: httpx.Request) -> None:
        if PLUMBING in sent.extensions and sent.method.upper() not in ("GET", "HEAD", "OPTIONS"):
            # The flow ends with it: it stood for the body's request.
            self._opening.effect(f"{sent.method} by {self._opening.resource!r}")

    def _locked(self) -> bool:
        if self._lock is None:
            return False
        remaining = deadline().remaining()
        return bool(self._lock.acquire(timeout=TOKEN_WAIT if remaining is None else min(TOKEN_WAIT, remaining)))

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def is_plumbing(sent: httpx.Request, request: httpx.Request) -> bool:
    """Return whether an ``httpx.Auth`` sends a request of its own, rather than the body's, perhaps built anew."""
    if sent is request:
        return False
    return (sent.method, sent.url.copy_with(query=None)) != (request.method, request.url.copy_with(query=None))
