"""One session, many tasks: what a body changes on it, and the cookies that it is sent, end with the body's run."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import requests
from requests.cookies import RequestsCookieJar, cookiejar_from_dict

from workerpools.adapter import Opening, Scoped, current, failure_of, in_attempt
from workerpools.requests._errors import PLUMBING, RESOURCE, classify_unwatched, is_idempotent

__all__ = ["PooledSession"]

logger = logging.getLogger("workerpools")

# What requests itself would call; its types do not tell of it.
_utils: Any = requests.utils


class _Own(Scoped):
    """What one attempt has of a session: its cookies, and the defaults that its body changed."""

    def __init__(self, session: PooledSession) -> None:
        self._session = session
        self.values: dict[str, Any] = {}

    def end(self) -> None:
        self._session.ended(self.values)


class PooledSession(requests.Session):
    """A ``requests.Session`` for all tasks of a process.

    Args:
        opening: The opening to which it reports.
        cookie_mode: ``attempt``, ``process`` or ``off``: how long the cookies that a server sets are kept.
        base_url: What URLs without a host are appended to; empty for none.
        timeout: The timeouts of requests that give none, as for ``requests.request``.
        has_context: Whether ``verify=True`` stands for a context of the user's.
    """

    def __init__(
        self, opening: Opening, cookie_mode: str, base_url: str, timeout: Any, *, has_context: bool = False
    ) -> None:
        #: The process's defaults.
        self.process: dict[str, Any] = {"base_url": base_url, "timeout": timeout}
        #: Whether it has been set up: what changes from then on in an attempt is the attempt's.
        self.is_set_up = False
        self._opening = opening
        self._cookie_mode = cookie_mode
        self._has_context = has_context
        self._told: set[str] = set()
        #: The threads in which an authentication is being applied.
        self._authenticating: set[int] = set()
        super().__init__()

    def own(self) -> dict[str, Any] | None:
        """Return what the calling attempt has of the session; None outside one."""
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
            values: What the attempt had of the session.
        """
        for name, value in values.items():
            if name != "cookies" and name not in self._told and value != self.process[name]:
                self._told.add(name)
                logger.warning(
                    "a task changed %r of the session %r, which all tasks share; the change ended with the task's run. "
                    "Pass it with the request, or declare it: %s",
                    name,
                    self._opening.resource,
                    "RequestsSession(on_open=…)" if name == "adapters" else f"RequestsSession({name}=…)",
                )

    @property
    def cookies(self) -> RequestsCookieJar:
        """The cookies to send, and where those that a server sets are kept."""
        jar: RequestsCookieJar = self.process["cookies"]
        if self._cookie_mode == "process" or not self.is_set_up:
            return jar
        own = self.own() if self._cookie_mode == "attempt" else None
        if own is not None:
            if "cookies" not in own:
                own["cookies"] = jar.copy()
            mine: RequestsCookieJar = own["cookies"]
            return mine
        # In a thread of a body nothing tells whose cookies they are.
        return jar.copy() if self._cookie_mode == "off" or in_attempt() else jar

    @cookies.setter
    def cookies(self, cookies: Any) -> None:
        own = self.own() if self._cookie_mode == "attempt" else None
        (self.process if own is None else own)["cookies"] = (
            cookiejar_from_dict(cookies) if isinstance(cookies, dict) else cookies
        )

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """Prepare a request, as ``requests.Session`` does; a URL without a host is appended to the base URL."""
        base, url, thread = self.base_url, request.url, threading.get_ident()  # type: ignore[attr-defined]
        if base and isinstance(url, str) and not urlsplit(url).netloc and "://" not in url:
            request = copy.copy(request)
            request.url = f"{base.rstrip('/')}/{url.lstrip('/')}" if url else base
        within = thread in self._authenticating
        self._authenticating.add(thread)
        try:
            return super().prepare_request(request)
        finally:
            if not within:
                self._authenticating.discard(thread)

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """Add what the environment says, as ``requests.Session`` does; a declared ``verify`` is kept."""
        if _no_proxy_is_named():
            # For a URL without a host requests looks for none.
            url = ""
        declared = self.verify
        if verify is None and (declared is not True or self._has_context):
            verify = declared
            settings = super().merge_environment_settings(url, proxies, stream, False, cert)
            return {**settings, "verify": verify}
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send a request, as ``requests.Session`` does."""
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = self.timeout  # type: ignore[attr-defined]
        vars(request).pop(RESOURCE, None)
        if threading.get_ident() in self._authenticating:
            # A request for a token, which is no work of the body.
            setattr(request, PLUMBING, True)
        try:
            response = super().send(request, **kwargs)
        except requests.RequestException as error:
            if not hasattr(request, RESOURCE) and failure_of(error) is None:
                # By an adapter of the user's, or by a mock in the place of ours.
                self._unseen(request)
                self._opening.failed(error, classify_unwatched(error))
            raise
        if not hasattr(request, RESOURCE):
            self._unseen(request)
        return response

    def _unseen(self, request: requests.PreparedRequest) -> None:
        setattr(request, RESOURCE, self._opening.resource)
        if not is_idempotent(request):
            self._opening.effect(f"{request.method} by {self._opening.resource!r}")

    def close(self) -> None:
        """Close the session: the next use of the resource opens another one."""
        self._opening.ended()
        super().close()


# In messages and reprs it is what users know it as.
PooledSession.__name__ = PooledSession.__qualname__ = "Session"


def _no_proxy_is_named() -> bool:
    """Return whether the environment surely names no proxy.

    requests reads each variable four times per request, at a tenth of what the request costs. Names are enough here.
    Where proxies are set up elsewhere, too (macOS, Windows), it is left to look for them.
    """
    return _utils.getproxies is getproxies_environment and "_proxy" not in " ".join(os.environ).lower()


def _hooks(hooks: dict[str, Any]) -> dict[str, Any]:
    return {name: list(each) if isinstance(each, list) else each for name, each in hooks.items()}


def _copy(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else value


def _same(value: Any) -> Any:
    return value


#: The defaults of a session, and how an attempt gets its own one.
_DEFAULTS: dict[str, Callable[[Any], Any]] = {
    "adapters": OrderedDict,
    "auth": _same,
    "base_url": _same,
    "cert": _same,
    "headers": _copy,
    "hooks": _hooks,
    "max_redirects": _same,
    "params": _copy,
    "proxies": _copy,
    "stream": _same,
    "timeout": _same,
    "trust_env": _same,
    "verify": _same,
}


def _scoped(name: str) -> Any:
    """Return a property of the session whose value an attempt may change for itself."""
    copied = _DEFAULTS[name]

    def get(session: PooledSession) -> Any:
        own = session.own()
        if own is None:
            return session.process[name]
        if name in own:
            return own[name]
        value = session.process[name]
        if copied is not _same:
            # The body may change it in place.
            value = own[name] = copied(value)
        return value

    def change(session: PooledSession, value: Any) -> None:
        own = session.own()
        (session.process if own is None else own)[name] = value

    return property(get, change)


for _name in _DEFAULTS:
    setattr(PooledSession, _name, _scoped(_name))
