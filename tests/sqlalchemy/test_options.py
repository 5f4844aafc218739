"""An engine's options are checked where they are declared: refused, or they work."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.pool import NullPool, QueuePool

from tests.support.databases import Database
from workerpools import ConfigurationError, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine

NAN = float("nan")
ODD = ("x", -1, object(), [1], 10**400, NAN, float("inf"), b"\xff", {1: 1}, lambda: 1, True, 1.5, {1}, ())

OPTIONS = (
    *("connect_timeout", "acquire_timeout", "pool_size", "max_overflow", "resolve_commit", "resolve_timeout"),
    *("check_after", "max_idle", "max_lifetime", "max_lifetime_jitter", "credentials", "on_open", "pgbouncer"),
    *("batch", "reset_session", "leak_after", "connect_args", "execution_options", "isolation_level", "echo_pool"),
    *("pool_pre_ping", "pool_recycle", "pool_timeout", "pool_use_lifo", "pool_reset_on_return", "poolclass", "pool"),
    *("paramstyle", "label_length", "query_cache_size", "logging_name", "json_serializer", "hide_parameters"),
)
#: Called, and what they return is their author's.
FUNCTIONS = ("credentials", "on_open", "json_serializer")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_odd_option_is_refused_or_works(name: str, database: Database) -> None:
    """Never an engine that fails its first task."""
    refused: list[str] = []
    with WorkerPools() as pools:
        for number, value in enumerate(ODD):
            if name in FUNCTIONS and callable(value):
                continue
            try:
                resource = pools.add(SQLAlchemyEngine(database.url(), **{name: value}), name=f"r{number}")
            except ConfigurationError as error:
                refused.append(str(error))
                continue
            with resource.get().connect() as connection:
                assert connection.scalar(sqlalchemy.text("SELECT 1")) == 1, (name, value)
            resource.close(1.0)
    assert refused
    assert all(name in message for message in refused)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("postgresql+psycopg2://h:99999/d", {}, "port"),
        ("postgresql+psycopg2://h:port/d", {}, "cannot be parsed"),
        ("postgresql+psycopg2://h/d", {"isolation_level": "READ MOSTLY"}, "wanted: .*READ COMMITTED"),
        ("postgresql+psycopg2://h/d", {"execution_options": {"isolation_level": 7}}, "isolation_level"),
        ("sqlite://", {"isolation_level": "REPEATABLE READ"}, "wanted: .*SERIALIZABLE"),
        ("sqlite://", {"pool_recycle": NAN}, "pool_recycle"),
        ("sqlite://", {"pool_recycle": -2}, "pool_recycle"),
        ("sqlite://", {"reset_session": 7}, "reset_session"),
        ("sqlite://", {"reset_session": [" "]}, "reset_session"),
    ],
)
def test_refused_on_declaration(url: str, options: dict[str, Any], message: str) -> None:
    """With a word about what would be right."""
    with pytest.raises(ConfigurationError, match=message):
        SQLAlchemyEngine(url, **options)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [("x://y", {}, "no dialect 'x'"), ("sqlite://", {"unheard_of": 1}, "unheard_of")],
)
def test_refused_where_it_is_opened(url: str, options: dict[str, Any], message: str) -> None:
    """What only an installed dialect can tell: another machine may have it."""
    with WorkerPools() as pools:
        resource = pools.add(SQLAlchemyEngine(url, **options), name="db")
        with pytest.raises(ConfigurationError, match=message):
            resource.get()


def test_accepted(database: Database) -> None:
    """What SQLAlchemy takes is taken."""
    accepted: list[dict[str, Any]] = [
        {"isolation_level": "repeatable_read"},
        {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
        {"pool_recycle": -1, "pool_timeout": 0.5, "echo": None, "echo_pool": False, "max_overflow": -1},
        {"poolclass": NullPool, "paramstyle": "pyformat"},
        {"poolclass": QueuePool, "pool_reset_on_return": None, "label_length": 10},
        {"reset_session": ("RESET ALL;",), "query_cache_size": 0, "connect_args": None},
    ]
    with WorkerPools() as pools:
        for number, options in enumerate(accepted):
            engine = pools.add(SQLAlchemyEngine(database.url(), **options), name=f"r{number}").get()
            with engine.connect() as connection:
                assert connection.scalar(sqlalchemy.text("SELECT 1")) == 1
