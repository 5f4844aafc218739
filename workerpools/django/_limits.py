"""How many connections Django's settings let a process open, and what the servers say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from django.db import Error, connections
from django.db.utils import load_backend

from workerpools.adapter import ExecutionPool, Limit, sql_limits

__all__ = ["capacity", "counted", "limits"]


def counted() -> list[str]:
    """Return the aliases whose server counts connections."""
    return [alias for alias in connections if _class_of(_settings(alias)).vendor != "sqlite"]


def capacity(aliases: Sequence[str], execution_pool: ExecutionPool) -> int:
    """Return the most connections of one process.

    Each thread, or greenlet, has one per alias; those of psycopg's pool they share.

    Args:
        aliases: The aliases.
        execution_pool: The execution pool of the process.
    """
    return sum(_size_of_pool(_settings(alias)) or execution_pool.concurrency or 1 for alias in aliases)


def limits(aliases: Sequence[str]) -> list[Limit]:
    """Ask the servers for their limits, each over a connection outside of psycopg's pool.

    Args:
        aliases: The aliases.
    """
    found: dict[str, tuple[Limit, list[str]]] = {}
    for alias in aliases:
        for limit in _limits_of(alias):
            first, sharing = found.setdefault(limit.key, (limit, []))
            sharing.append(alias)
            # Two roles may be kept from a different number of slots.
            found[limit.key] = max(first, limit, key=lambda each: each.reserved), sharing
    return [replace(limit, capacity=partial(capacity, sharing)) for limit, sharing in found.values()]


def _limits_of(alias: str) -> Sequence[Limit]:
    found = _settings(alias)
    options = {name: value for name, value in found["OPTIONS"].items() if name != "pool"}
    settings = {**found, "OPTIONS": options}
    wrapper = _class_of(settings)(settings, alias)
    server = f"{wrapper.display_name} of the alias {alias!r}"
    try:
        return _asked(wrapper)
    except Error as error:
        # Drivers keep passwords out of their messages; this one is shown.
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if password := settings["PASSWORD"]:
            why = why.replace(str(password), "***")
        return [Limit(server, "connections", f"Django {alias}", unknown=why)]
    finally:
        wrapper.close()


def _asked(wrapper: Any) -> list[Limit]:
    def ask(statement: str) -> Sequence[Sequence[Any]]:
        with wrapper.cursor() as cursor:
            cursor.execute(statement)
            return cast("Sequence[Sequence[Any]]", cursor.fetchall())

    def console() -> Any:
        connection = wrapper.Database.connect(**{**wrapper.get_connection_params(), "dbname": "pgbouncer"})
        connection.autocommit = True
        return connection

    wrapper.ensure_connection()
    # One transaction, for the time limit that the questions begin with.
    wrapper.set_autocommit(False)
    settings = wrapper.settings_dict
    return sql_limits(
        ask,
        wrapper.vendor,
        host=settings["HOST"],
        port=settings["PORT"],
        user=settings["USER"],
        database=settings["NAME"] or "",
        connection=wrapper.connection,
        console=console,
    )


def _settings(alias: str) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", cast(Any, connections.settings)[alias])


def _class_of(settings: Mapping[str, Any]) -> Any:
    return load_backend(settings["ENGINE"]).DatabaseWrapper


def _size_of_pool(settings: Mapping[str, Any]) -> int:
    """Return the most connections of psycopg's pool; 0 without one."""
    pool = settings.get("OPTIONS", {}).get("pool")
    if not pool:
        return 0
    given = pool if isinstance(pool, Mapping) else {}
    # psycopg_pool's own defaults: a fixed size, of 4.
    return int(given.get("max_size") or given.get("min_size", 4))
