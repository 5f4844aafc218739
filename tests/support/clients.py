"""Every client that workerpools has, and a proxy for each before its server: for `tests.worker.clients`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import sqlalchemy

from tests.support.stand import Stand
from workerpools.testing import TcpProxy


class Client(NamedTuple):
    """A client.

    Attributes:
        scheme: What its URL begins with.
        runs: How often a body runs whose connection has died: a client may see that, and send again, by itself.
    """

    scheme: str
    runs: int = 1

    @property
    def database(self) -> bool:
        """Whether its server is PostgreSQL."""
        return self.scheme.startswith("postgresql")


CLIENTS = {
    "httpx": Client("http"),
    "httpx2": Client("http"),
    "async_httpx": Client("http"),
    "requests": Client("http"),
    "redis": Client("redis"),
    "valkey": Client("valkey"),
    "async_redis": Client("redis"),
    "async_valkey": Client("valkey"),
    "psycopg2": Client("postgresql+psycopg2", 2),
    "psycopg": Client("postgresql+psycopg", 2),
    "async_psycopg": Client("postgresql+psycopg", 2),
    "asyncpg": Client("postgresql+asyncpg", 2),
    "factory": Client("http", 2),
}
if sys.version_info < (3, 11):
    del CLIENTS["httpx2"]
if sqlalchemy.__version__ < "2.1":
    del CLIENTS["async_psycopg"], CLIENTS["asyncpg"]


@dataclass(frozen=True)
class Servers:
    """For each client the proxy before its server, and the URL that leads there."""

    proxies: dict[str, TcpProxy]
    urls: dict[str, str]


@contextmanager
def servers_of(stand: Stand) -> Iterator[Servers]:
    """Put a proxy before the stand's server for each client."""
    broker = urlsplit(stand.broker_url)
    found = Servers({}, {})
    with ExitStack() as opened:
        for name, client in CLIENTS.items():
            if client.scheme == "http":
                host, port = stand.echo.host, stand.echo.port
            elif client.database:
                host, port = stand.database.host, stand.database.port
            else:
                host, port = str(broker.hostname), broker.port or 0
            proxy = found.proxies[name] = opened.enter_context(TcpProxy(host, port))
            if client.scheme == "http":
                url = f"http://{proxy.host}:{proxy.port}"
            elif client.database:
                url = stand.database.through(proxy).url(client.scheme.partition("+")[2])
            else:
                url = f"{client.scheme}://:{broker.password}@{proxy.host}:{proxy.port}{broker.path}"
            found.urls[name] = url
        yield found
