"""Database drivers under greenlets: whether waiting blocks the process, and a bound for connecting."""

from __future__ import annotations

import logging
import sys
from types import FunctionType
from typing import Any

import sqlalchemy

from workerpools.adapter import greenlet_library, greenlet_time_limit
from workerpools.sqlalchemy._driver import attempts, named, whole_seconds

__all__ = ["advice", "suit_greenlets"]

logger = logging.getLogger("workerpools")

_REMEDIES = {
    ("psycopg2", "gevent"): (
        "call psycogreen.gevent.patch_psycopg() before the first task (pip install psycogreen), or use psycopg 3 "
        "(postgresql+psycopg://)"
    ),
    ("psycopg2", "eventlet"): "have eventlet.monkey_patch() patch it, as it does by default",
    ("psycopg", "gevent"): "import it after gevent.monkey.patch_all()",
    ("psycopg", "eventlet"): "set PSYCOPG_WAIT_FUNC=wait_select in the worker's environment",
    ("mysqldb", "gevent"): "use PyMySQL (mysql+pymysql://)",
    ("mysqldb", "eventlet"): "use PyMySQL (mysql+pymysql://)",
}


def advice(resource: str, driver: str, library: str) -> str:
    """Return a warning about a driver that blocks all greenlets while it waits in C; empty without advice for it.

    Args:
        resource: The resource's name.
        driver: SQLAlchemy's name for the driver.
        library: ``gevent`` or ``eventlet``.
    """
    remedy = _REMEDIES.get((driver, library))
    if remedy is None:
        return ""
    return (
        f"the resource {resource!r} uses {driver}, which waits for its server in C: under {library} this blocks every "
        f"other task of the process and Celery's time limits. To change that, {remedy}"
    )


def _waits_in_c(dialect: Any) -> bool:
    """Return whether the loaded driver of ``dialect`` is known to block greenlets while it waits."""
    if dialect.driver == "psycopg2":
        return dialect.loaded_dbapi.extensions.get_wait_callback() is None
    if dialect.driver == "psycopg":
        # Chosen at import: a Python function uses the modules that the greenlet libraries patch.
        wait = getattr(sys.modules.get("psycopg.waiting"), "wait", None)
        return wait is not None and not isinstance(wait, FunctionType)
    return bool(dialect.driver == "mysqldb")


def suit_greenlets(engine: sqlalchemy.Engine, resource: str) -> None:
    """Under a greenlet library, warn about a driver that blocks greenlets, and bound psycopg2's connecting.

    Patching psycopg2 is left to the user: it affects the whole process and disables COPY and large objects.

    Args:
        engine: The engine, not yet used.
        resource: The resource's name.
    """
    library = greenlet_library()
    if not library:
        return
    warning = advice(resource, engine.dialect.driver, library)
    if warning and _waits_in_c(engine.dialect):
        logger.warning(warning)
    if engine.dialect.driver == "psycopg2":
        _bound_connecting(engine.dialect)


def _bound_connecting(dialect: Any) -> None:
    # With a wait callback, libpq does not enforce connect_timeout (PostgreSQL documentation, "PQconnectStartParams").
    connect = dialect.connect

    def bounded(*arguments: Any, **parameters: Any) -> Any:
        given = named(dialect.loaded_dbapi, parameters)
        # libpq applies the timeout per host.
        seconds = (whole_seconds(given.get("connect_timeout")) or 0) * attempts(given)
        if seconds <= 0 or _waits_in_c(dialect):
            return connect(*arguments, **parameters)
        with greenlet_time_limit(seconds, dialect.loaded_dbapi.OperationalError("timeout expired")):
            return connect(*arguments, **parameters)

    dialect.connect = bounded
