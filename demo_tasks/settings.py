"""Where the shop's servers are, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Settings", "from_environment"]


@dataclass(frozen=True)
class Settings:
    """The servers of the shop.

    Attributes:
        redis_url: The broker, which keeps the results and the demo's counts, too.
        database_url: PostgreSQL, as a SQLAlchemy URL.
        upstream_url: The HTTP API that the shop talks to.
        key_prefix: What every key in Redis begins with; empty where Redis serves nobody else.
    """

    redis_url: str
    database_url: str
    upstream_url: str
    key_prefix: str

    @property
    def client_name(self) -> str:
        """What the connections of the worker's ``cache`` are called on the Redis server."""
        return f"{self.key_prefix}shop"

    def reservation(self, order_id: str) -> str:
        """Return the key in Redis of an order's reservation."""
        return f"{self.key_prefix}shop-reserved-{order_id}"


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of ``environ``: REDIS_URL, DATABASE_URL, UPSTREAM_URL and SHOP_KEY_PREFIX.

    Args:
        environ: The environment. What is not set there is looked for on this machine.
    """
    return Settings(
        redis_url=environ.get("REDIS_URL") or "redis://localhost:6379/0",
        database_url=_with_driver(environ.get("DATABASE_URL") or "postgresql://localhost/shop"),
        upstream_url=environ.get("UPSTREAM_URL") or "http://localhost:8080",
        key_prefix=environ.get("SHOP_KEY_PREFIX", ""),
    )


def _with_driver(url: str) -> str:
    # Many services give a URL without a driver, and SQLAlchemy's default driver depends on its version.
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg2{separator}{rest}" if scheme in ("postgres", "postgresql") else url
