"""What database drivers do to greenlets: whether others run while one waits, and how long connecting may take."""

from __future__ import annotations

import logging
import sys
from types import FunctionType
from typing import Any

import sqlalchemy

from workerpools.adapter import greenlet_library, greenlet_time_limit

__all__ = ["advice", "suit_greenlets"]

logger = logging.getLogger("workerpools")

_WHAT_TO_DO = {
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
    """Return the warning of a driver that waits in C, where no greenlet runs; an empty text where nothing is known.

    Args:
        resource: The resource's name.
        driver: SQLAlchemy's name of the driver.
        library: ``gevent`` or ``eventlet``.
    """
    to_do = _WHAT_TO_DO.get((driver, library))
    if to_do is None:
        return ""
    return (
        f"the resource {resource!r} uses {driver}, which waits for its server in C: under {library} no other task of "
        f"this process runs meanwhile, and no time limit of Celery strikes. To change that, {to_do}"
    )


def _waits_in_c(dialect: Any) -> bool:
    """Return whether the loaded driver of ``dialect`` waits without letting greenlets run, as far as it tells."""
    if dialect.driver == "psycopg2":
        return dialect.loaded_dbapi.extensions.get_wait_callback() is None
    if dialect.driver == "psycopg":
        # It chooses when it is imported: a function of Python's uses what the libraries replace.
        wait = getattr(sys.modules.get("psycopg.waiting"), "wait", None)
        return wait is not None and not isinstance(wait, FunctionType)
    return bool(dialect.driver == "mysqldb")


def suit_greenlets(engine: sqlalchemy.Engine, resource: str) -> None:
    """Warn of a driver that lets no greenlets run, and bound what the others leave unbounded; needed in few processes.

    How psycopg2 waits is a setting of the whole process, and takes COPY and large objects away: it is the user's.

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
    # Where another function waits for it, libpq itself keeps no connect_timeout (PostgreSQL documentation,
    # "PQconnectStartParams").
    connect = dialect.connect

    def bounded(*arguments: Any, **parameters: Any) -> Any:
        # libpq counts for each of several hosts.
        seconds = float(parameters.get("connect_timeout") or 0) * (str(parameters.get("host", "")).count(",") + 1)
        if seconds <= 0 or _waits_in_c(dialect):
            return connect(*arguments, **parameters)
        with greenlet_time_limit(seconds, dialect.loaded_dbapi.OperationalError("timeout expired")):
            return connect(*arguments, **parameters)

    dialect.connect = bounded
