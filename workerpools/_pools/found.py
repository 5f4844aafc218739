"""Discovery of adapter classes through entry points."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from workerpools._run.failure import know_libraries

__all__ = ["GROUP", "adapter_of", "adapters", "not_installed"]

logger = logging.getLogger("workerpools")

#: The group of entry points. An entry's name is the client's top-level package, its value the adapter's class::
#:
#:     [project.entry-points."workerpools.adapters"]
#:     pymemcache = "shop.memcached:MemcachedClient"
GROUP = "workerpools.adapters"


def adapter_of(package: str) -> type[Any] | None:
    """Return the adapter class for a client library; None if none is installed.

    Args:
        package: The client's top-level package, such as the first part of an exception's ``__module__``.
    """
    entry = _entries().get(package)
    return None if entry is None else _loaded(entry)


def adapters() -> list[type[Any]]:
    """Import and return the adapter classes with an installed client, sorted by the client's name."""
    found = (_loaded(entry) for _, entry in sorted(_entries().items()))
    return [each for each in found if each is not None]


def not_installed() -> list[str]:
    """Return the names of the adapters that cannot be imported, usually because their client is not installed."""
    return sorted(name for name, entry in _entries().items() if _loaded(entry) is None)


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@cache
def _loaded(entry: EntryPoint) -> type[Any] | None:
    try:
        adapter: type[Any] = entry.load()
    except ImportError as error:
        # Usually an extra that is not installed.
        logger.debug("the adapter %s cannot be imported: %s", entry.value, error)
        return None
    know_libraries(getattr(adapter, "libraries", ()))
    return adapter
