"""The two drivers, redis-py and valkey-py: the same code, in classes of each, synchronous and asynchronous."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

from workerpools.adapter import explained
from workerpools.redis import _client
from workerpools.redis._async import AsyncWatchedConnection, AsyncWatchedPool
from workerpools.redis._connection import WatchedConnection
from workerpools.redis._pool import Pooled, WatchedPool

__all__ = ["Library", "library"]


class Library:
    """One of the drivers.

    Args:
        name: ``redis`` or ``valkey``.
        asynchronous: Whether the classes are those of its package ``asyncio``.

    Raises:
        ModuleNotFoundError: It is not installed.
    """

    def __init__(self, name: str, asynchronous: bool = False) -> None:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise explained(error, "workerpools.redis", name, name) from None
        self.distribution = name
        self.name = f"{name}-py"
        self.version = importlib.metadata.version(name)
        self.RedisError: type[Exception] = module.RedisError if name == "redis" else module.ValkeyError
        self.ConnectionError: type[Exception] = module.ConnectionError
        self.TimeoutError: type[Exception] = module.TimeoutError
        self.ResponseError: type[Exception] = module.ResponseError
        self.WatchError: type[Exception] = module.WatchError
        self.parse_url: Any = importlib.import_module(f"{name}.connection").parse_url
        parsers = importlib.import_module(f"{name}._parsers")
        self.RESP3: Any = parsers._AsyncRESP3Parser if asynchronous else parsers._RESP3Parser
        package = f"{name}.asyncio" if asynchronous else name
        connection, client, lock, retry = (
            importlib.import_module(f"{package}.{part}") for part in ("connection", "client", "lock", "retry")
        )
        #: Bounds what is awaited.
        self.timeout: Any = connection.async_timeout if asynchronous else None
        ours: Any = AsyncWatchedConnection if asynchronous else WatchedConnection
        self.plain = (connection.Connection, connection.SSLConnection, connection.UnixDomainSocketConnection)
        self.tcp, self.tls, self.unix = (_joined(ours, each) for each in self.plain)
        self.Pool: Any = _joined(AsyncWatchedPool if asynchronous else WatchedPool, connection.ConnectionPool)
        self.Pipeline: Any = _joined(_client.AsyncPipeline if asynchronous else _client.Pipeline, client.Pipeline)
        self.Client: Any = _joined(
            _client.AsyncClient if asynchronous else _client.Client, client.Redis if name == "redis" else client.Valkey
        )
        self.Lock: Any = _joined(_client.AsyncLock if asynchronous else _client.Lock, lock.Lock)
        #: Nothing of what a newer redis-py does by itself: moving connections when a server announces its maintenance.
        self.pool_options: dict[str, Any] = {}
        try:
            importlib.import_module(f"{package}.maint_notifications")
        except ModuleNotFoundError:
            pass
        else:
            maintenance = importlib.import_module(f"{name}.maint_notifications")
            self.pool_options["maint_notifications_config"] = maintenance.MaintNotificationsConfig(enabled=False)
        #: No retries.
        backoff = importlib.import_module(f"{name}.backoff")
        self.quiet: dict[str, Any] = {"retry": retry.Retry(backoff.NoBackoff(), 0)}

    def sentinel_connection(self, *, secure: bool = False, **options: Any) -> Any:
        """Return a connection to a Sentinel."""
        return self.plain[1 if secure else 0](**options)

    def client(self, pool: Pooled) -> Any:
        """Return a client over a pool."""
        return self.Client(connection_pool=pool)


def _joined(ours: type, theirs: type) -> Any:
    namespace = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__}
    return type(theirs.__name__, (ours, theirs), namespace)


@functools.cache
def library(name: str, asynchronous: bool = False) -> Library:
    """Return the driver, imported on first use."""
    return Library(name, asynchronous)
