"""The adapter for SQLAlchemy: one engine per process and one session per attempt, synchronous or asynchronous."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from workerpools.adapter import explained

try:
    import sqlalchemy
except ModuleNotFoundError as error:
    raise explained(error, "workerpools.sqlalchemy", "sqlalchemy", "sqlalchemy") from None

import sqlalchemy.exc
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.events import ConnectionEvents, DialectEvents
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool
from sqlalchemy.pool.events import PoolEvents as SQLAlchemyPoolEvents
from sqlalchemy.util import greenlet_spawn

from workerpools.adapter import (
    WEEK,
    Adapter,
    ExecutionPool,
    Failure,
    Lifetime,
    Limit,
    Opening,
    Setting,
    add_note,
    loop_is_running,
    on_loop,
    run_coroutine,
    seconds,
    sql_limits,
    start_coroutine,
    whole,
)
from workerpools.errors import ConfigurationError
from workerpools.sqlalchemy._async_pool import AsyncDeadlineQueuePool
from workerpools.sqlalchemy._async_session import AsyncTaskSession
from workerpools.sqlalchemy._commit import resolve_commits
from workerpools.sqlalchemy._connecting import bound_connecting
from workerpools.sqlalchemy._driver import LIBPQ_DRIVERS, MYSQL_DRIVERS, check_arguments, named, with_ports
from workerpools.sqlalchemy._errors import POOL_EXHAUSTED, classify_unwatched, error_code, note_errors
from workerpools.sqlalchemy._flight import RESETS, Flights
from workerpools.sqlalchemy._greenlets import suit_greenlets
from workerpools.sqlalchemy._names import application_name, is_own
from workerpools.sqlalchemy._pool import DeadlineQueuePool, PoolEvents, counted
from workerpools.sqlalchemy._session import EVENT_ATTRIBUTES, TaskSession, current_session
from workerpools.sqlalchemy._statements import watch_statements
from workerpools.sqlalchemy._url import (
    about_driver,
    asynchronous,
    check_options,
    check_types,
    parsed,
    refuse_async,
    without_secrets,
)

__all__ = [
    "AsyncSQLAlchemyEngine",
    "AsyncTaskSession",
    "SQLAlchemyEngine",
    "TaskSession",
    "classify",
    "connect_defaults",
    "current_session",
    "pool_defaults",
]

logger = logging.getLogger("workerpools")

E = TypeVar("E", sqlalchemy.Engine, AsyncEngine)

#: libpq's bounds, in seconds, but ``tcp_user_timeout`` in milliseconds. Both are needed: keepalives do not bound
#: unacknowledged data, and ``tcp_user_timeout`` does not bound waiting for a reply (PostgreSQL documentation,
#: "Parameter Key Words").
LIBPQ_DEFAULTS: Mapping[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}

#: Socket timeouts of every statement, in seconds; by default the drivers have none.
MYSQL_DEFAULTS: Mapping[str, Any] = {"read_timeout": 30, "write_timeout": 30}


def connect_defaults(url: URL, *, resource: str, connect_timeout: float) -> dict[str, Any]:
    """Return driver arguments that bound every wait and name the connection on the server.

    Args:
        url: The database's URL. Arguments set in its query are omitted.
        resource: The resource's name, shown by the server in ``application_name`` with this process's id.
        connect_timeout: In seconds, for each server; libpq uses whole seconds, at least 2. asyncpg's is for all.
    """
    driver = url.get_driver_name()
    whole = max(2, round(connect_timeout))
    if driver in LIBPQ_DRIVERS:
        wanted = {
            "connect_timeout": whole,
            "application_name": application_name(resource, os.getpid()),
            **LIBPQ_DEFAULTS,
        }
    elif driver == "asyncpg":
        wanted = {
            "timeout": connect_timeout,
            "server_settings": {"application_name": application_name(resource, os.getpid())},
        }
    elif driver in MYSQL_DRIVERS:
        wanted = {"connect_timeout": whole, **MYSQL_DEFAULTS}
    else:
        wanted = {}
    return {key: value for key, value in wanted.items() if key not in url.query}


def pool_defaults(execution_pool: ExecutionPool, acquire_timeout: float) -> dict[str, Any]:
    """Return the connection pool's options: one connection per concurrent task, and one spare.

    With the spare one, tasks that need two connections at a time make progress, one after another. Outside a worker
    SQLAlchemy's own sizes apply.

    Args:
        execution_pool: The worker's execution pool.
        acquire_timeout: The acquire timeout, in seconds.
    """
    options: dict[str, Any] = {"pool_timeout": acquire_timeout, "pool_use_lifo": True}
    if execution_pool.concurrency is not None:
        options.update(pool_size=execution_pool.concurrency, max_overflow=1)
    return options


class _Declared(Adapter[E]):
    """What the synchronous and the asynchronous engine have in common."""

    #: What the user knows the pool's sizes by.
    _sizes = ("pool_size", "max_overflow")

    kind = "database"
    event_attributes = EVENT_ATTRIBUTES
    #: Whether its engine is for ``async def`` bodies.
    asynchronous = False
    #: The modules that know a driver, by its name.
    _parts: Mapping[str, str] = {driver: f"_{driver}" for driver in LIBPQ_DRIVERS}
    libraries: Sequence[str] = ("sqlalchemy", "psycopg2", "psycopg", "psycopg_pool", "pymysql", "MySQLdb", "sqlite3")

    def __init__(
        self,
        url: str | URL,
        *,
        connect_timeout: float = 5.0,
        acquire_timeout: float = 10.0,
        pool_size: int | None = None,
        max_overflow: int | None = None,
        resolve_commit: bool = True,
        resolve_timeout: float = 30.0,
        check_after: float | None = 1.0,
        max_idle: float | None = 600.0,
        max_lifetime: float | None = 1800.0,
        max_lifetime_jitter: float = 0.1,
        credentials: Callable[[], tuple[str, str]] | None = None,
        on_open: Callable[[E], object] | None = None,
        pgbouncer: bool = False,
        batch: bool = True,
        reset_session: bool | Sequence[str] = True,
        leak_after: float | None = None,
        **options: Any,
    ) -> None:
        found = self._understood(url)
        check_options(options, inspect.signature(_Declared).parameters)
        check_types(
            found,
            options,
            resolve_commit=resolve_commit,
            pgbouncer=pgbouncer,
            batch=batch,
            credentials=credentials,
            on_open=on_open,
        )
        if credentials is not None and (own := [name for name in _CREATORS if options.get(name) is not None]):
            raise ConfigurationError(
                f"SQLAlchemyEngine: with {own[0]}=, which opens the connections, credentials= would never be called; "
                f"leave out one of them"
            )
        self._url = without_secrets(with_ports(found, options), options)
        check_arguments(self._url, options.get("connect_args"))
        for name, wait in (
            ("connect_timeout", connect_timeout),
            ("acquire_timeout", acquire_timeout),
            ("resolve_timeout", resolve_timeout),
        ):
            seconds(wait, f"SQLAlchemyEngine: {name}", most=WEEK)
        if pool_size is not None:
            whole(pool_size, "SQLAlchemyEngine: pool_size", optional=True)
        if max_overflow is not None:
            # For SQLAlchemy, -1 means no limit.
            whole(max_overflow, "SQLAlchemyEngine: max_overflow", least=-1, optional=True)
        if leak_after is not None:
            seconds(leak_after, "SQLAlchemyEngine: leak_after", optional=True)
        self._connect_timeout = connect_timeout
        self._acquire_timeout = acquire_timeout
        self._lifetime = Lifetime(check_after, max_idle, max_lifetime, max_lifetime_jitter)
        self._credentials = credentials
        self._pgbouncer = pgbouncer
        self._batch = batch
        self._resets = _resets(reset_session)
        self.leak_after = leak_after
        self.on_open = on_open
        self._resolve_timeout = resolve_timeout if resolve_commit else 0.0
        sizes = {"pool_size": pool_size, "max_overflow": max_overflow}
        self._events: weakref.WeakKeyDictionary[E, PoolEvents] = weakref.WeakKeyDictionary()
        self._options: dict[str, Any] = {**options, **{key: value for key, value in sizes.items() if value is not None}}

    def _understood(self, url: str | URL) -> URL:
        """Return a URL, and keep its text without secrets."""
        found, self._shown = parsed(url)
        refuse_async(found, self._shown)
        return found

    def _create(self, options: dict[str, Any]) -> E:
        raise NotImplementedError

    @property
    def bounds_statements(self) -> bool | None:
        """Whether connections are opened with a bound on each statement; None if only the server knows."""
        driver = self._url.get_driver_name()
        if driver not in (*LIBPQ_DRIVERS, "asyncpg"):
            return True if driver in MYSQL_DRIVERS else None
        if self.on_open is not None or self._creator(self._options) is not None:
            return None
        given = {**self._url.query, **(self._options.get("connect_args") or {})}
        return "command_timeout" in given or "statement_timeout" in repr(given)

    def _creator(self, options: dict[str, Any]) -> Callable[..., Any] | None:
        """Return the user's function that opens connections; None for none."""
        return options.get("creator")

    def _dialect(self) -> type[DefaultDialect]:
        return _dialect(self._url)

    def prepare(self) -> None:
        """Import the driver."""
        try:
            self._dialect().import_dbapi()
        except ImportError as error:
            add_note(error, about_driver(self._url))
            raise

    def open(self, opening: Opening) -> E:
        chosen = self._pool_options(opening.execution_pool)
        options = {**chosen, **self._options}
        lifetime = self._lifetime
        if options.get("pool_pre_ping"):
            # The user chose SQLAlchemy's own check.
            lifetime = replace(lifetime, check_after=None)
        resolves = self._resolve_timeout > 0
        events = PoolEvents(
            opening,
            lifetime,
            resolves=resolves,
            connect_timeout=self._connect_timeout,
            session_settings=not self._pgbouncer,
            sizes=self._sizes,
        )
        if chosen:
            options["poolclass"] = counted(chosen["poolclass"], events)
        try:
            options["connect_args"] = self._connect_args(opening.resource)
            if (creator := self._creator(options)) is not None:
                options["creator"] = events.creating(creator)
                self._say_what_creator_drops(opening.resource)
            value = self._create(options)
        except ImportError as error:
            add_note(error, about_driver(self._url))
            raise
        except TypeError as error:
            if "sent to create_engine()" not in str(error):
                raise
            raise ConfigurationError(f"SQLAlchemyEngine: {error}") from None
        engine = _synchronous(value)
        events.flights = flights = self._flights(opening)
        opening.limited(_limit(options))
        if engine.dialect.driver == "asyncpg":
            from workerpools.sqlalchemy import _asyncpg

            _asyncpg.observe(engine, opening)
        events.watch(engine)
        if not engine.dialect.is_async:
            suit_greenlets(engine, opening.resource)
        bound_connecting(engine, opening, self._connect_timeout)
        if (credentials := self._credentials) is not None:

            @event.listens_for(engine, "do_connect")
            def fresh(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
                parameters["user"], parameters["password"] = credentials()

        resolve_commits(engine, opening, self._resolve_timeout, flights)
        watch_statements(engine, opening, flights)
        failed = note_errors(
            engine,
            opening,
            recycle=lambda: events.recycle(engine.pool, time.monotonic()),
            nested=None if events.own_locks is None else events.own_locks.ended,
        )
        if flights is not None:
            flights.failed = failed
        self._events[value] = events
        return value

    def _arguments(self, resource: str) -> dict[str, Any]:
        """Return the driver's arguments: the user's, and our defaults for the others."""
        own = dict(self._options.get("connect_args") or {})
        found = connect_defaults(self._url, resource=resource, connect_timeout=self._connect_timeout)
        given: Mapping[str, Any] = {**self._url.query, **own}
        if self._url.get_driver_name() in LIBPQ_DRIVERS:
            # The driver lets arguments override a connection string.
            given = named(self._dialect().import_dbapi(), given)
        if self._pgbouncer and self._url.get_driver_name() == "psycopg":
            found["prepare_threshold"] = None
        if "server_settings" in own:
            own["server_settings"] = {**found.get("server_settings", {}), **own["server_settings"]}
        return {**{name: value for name, value in found.items() if name not in given}, **own}

    def _connect_args(self, resource: str) -> dict[str, Any]:
        """Return the driver's arguments, and the classes of its connections."""
        found = self._arguments(resource)
        if self._url.get_driver_name() == "psycopg2":
            from workerpools.sqlalchemy._psycopg2 import FlightConnection, flying

            found["connection_factory"] = flying(found.get("connection_factory", FlightConnection), False)
        elif self._url.get_driver_name() == "asyncpg":
            from workerpools.sqlalchemy import _asyncpg

            found["connection_class"] = _asyncpg.connection_class(found.get("connection_class", _asyncpg.DEFAULT))
        return found

    def _say_what_creator_drops(self, resource: str) -> None:
        if self._options.get("connect_args"):
            logger.warning("the resource %r: creator= opens the connections, so connect_args= has no effect", resource)
        found = connect_defaults(self._url, resource=resource, connect_timeout=self._connect_timeout)
        logger.debug(
            "the resource %r: creator= opens the connections, without these arguments: %s", resource, ", ".join(found)
        )

    def attached(self, value: E) -> Iterator[tuple[str, object]]:
        """Return the engine's own event listeners; those of classes, such as ``Engine``, survive a fork.

        Args:
            value: The engine.
        """
        engine = _synchronous(value)
        for events, target in (
            (ConnectionEvents, engine),
            (DialectEvents, engine.dialect),
            (SQLAlchemyPoolEvents, engine.pool),
        ):
            for name in dir(events):
                if not name.startswith("_") and name != "dispatch":
                    for listener in getattr(target.dispatch, name).listeners:
                        yield name, listener

    def _flights(self, opening: Opening) -> Flights | None:
        name = self._parts.get(self._url.get_driver_name())
        if name is None:
            return None
        # The driver is imported where it is needed.
        part = importlib.import_module(f"workerpools.sqlalchemy.{name}")
        return Flights(opening, part, batch=self._batch, resets=self._resets)

    def _pool_options(self, execution_pool: ExecutionPool) -> dict[str, Any]:
        if "pool" in self._options:
            return {}
        pool_class = self._options.get("poolclass") or self._dialect().get_pool_class(self._url)
        # Other pools (NullPool, StaticPool, SQLite's in memory) reject the options of a QueuePool.
        defaults = pool_defaults(execution_pool, self._acquire_timeout) if issubclass(pool_class, QueuePool) else {}
        # Keep a pool class of the user.
        return {**defaults, "poolclass": _OURS.get(pool_class, pool_class)}

    def recycle(self, value: E, since: float) -> bool:
        """Close idle connections now, and those in use when they are checked in.

        Args:
            value: The engine.
            since: Connections opened before this :func:`time.monotonic` time are replaced.

        Returns:
            Whether the engine itself is kept.
        """
        events = self._events.get(value)
        if events is not None:
            events.recycle(value.pool, since)
        return events is not None

    def capacity(self, execution_pool: ExecutionPool) -> int | None:
        """Return ``pool_size + max_overflow``; None for a database in a file.

        Args:
            execution_pool: The execution pool of the process.
        """
        if self._url.get_backend_name() == "sqlite":
            return None
        return _limit({**self._pool_options(execution_pool), **self._options})

    def limits(self, value: E, resource: str) -> Sequence[Limit]:
        """Ask the server for its limits, and PgBouncer's console for its own.

        Args:
            value: The engine.
            resource: The resource's name.
        """

        def ask(connection: sqlalchemy.Connection) -> Sequence[Limit]:
            url = connection.engine.url
            return sql_limits(
                lambda statement: connection.exec_driver_sql(statement).all(),
                connection.dialect.name,
                host=url.host or "",
                port=url.port,
                user=url.username or "",
                database=url.database or "",
                connection=connection.connection.driver_connection,
                console=partial(self._console, url.set(database="pgbouncer")),
                pooler=self._pgbouncer,
                own=partial(is_own, resource),
            )

        async def asking(engine: AsyncEngine) -> Sequence[Limit]:
            async with engine.connect() as connection:
                return await connection.run_sync(ask)

        try:
            if isinstance(value, AsyncEngine):
                return run_coroutine(asking(value))
            with value.connect() as connection:
                return ask(connection)
        except sqlalchemy.exc.DBAPIError as error:
            # Drivers keep passwords out of their messages; this one is shown.
            why = (str(error.orig).strip().splitlines() or [type(error.orig).__name__])[0]
            if password := self._url.password:
                why = why.replace(str(password), "***")
            return [Limit(self._shown, "connections", self._shown, unknown=why)]

    def _console(self, url: URL) -> Any:
        """Connect to PgBouncer's console by the driver alone: it knows none of SQLAlchemy's questions."""
        dialect = sqlalchemy.create_engine(url).dialect
        positional, arguments = dialect.create_connect_args(url)
        arguments.update(self._arguments("console"))
        if self._credentials is not None:
            arguments["user"], arguments["password"] = self._credentials()
        connection: Any = dialect.connect(*positional, **arguments)
        connection.autocommit = True
        return connection

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        # Only errors without an engine event. Another engine's errors are not ours to classify.
        if isinstance(error, sqlalchemy.exc.TimeoutError):
            return POOL_EXHAUSTED
        return earlier[0] if earlier and _follows(error) else None

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        return classify(error)

    def describe(self) -> str:
        return f"{type(self).__name__} {self._shown}"


class SQLAlchemyEngine(_Declared[sqlalchemy.Engine]):
    """Declares a ``sqlalchemy.Engine`` whose sockets never cross a fork and whose waits are bounded.

    Args:
        url: The database's URL, as for ``sqlalchemy.create_engine``.
        connect_timeout: Time limit for opening a connection, in seconds; with several hosts in the URL, for each.
        acquire_timeout: Time limit for acquiring a connection from the pool, in seconds; SQLAlchemy's
            ``pool_timeout``.
        pool_size: Number of connections that a process keeps; by default 1 under prefork and solo, else the
            concurrency.
        max_overflow: Number of connections that a process may open beyond ``pool_size``; by default 1 in a worker.
        resolve_commit: Whether to find out if a COMMIT succeeded when its acknowledgement was lost. Needs PostgreSQL
            13 or later; takes one round trip per COMMIT and one per connection.
        resolve_timeout: Time limit for finding that out, in seconds.
        check_after: Idle time after which a connection is checked on checkout, and replaced if it is dead, in seconds;
            None for never. ``pool_pre_ping=True`` overrides it.
        max_idle: Idle time after which a connection is replaced on checkout, in seconds; None for never.
        max_lifetime: Age at which a connection is replaced on checkout, in seconds; None for never.
        max_lifetime_jitter: The fraction of ``max_lifetime``, from 0 to 1, by which it is shortened at random.
        credentials: Called for each new connection; returns its ``(user, password)``. For passwords that change.
        on_open: Called with every engine opened, in the process that opens it, before its first use: the place to
            attach event listeners. If it raises, the engine is closed again and the task gets the error.
        pgbouncer: Whether the URL is that of a PgBouncer in transaction mode: no session settings are used, and
            psycopg 3 prepares no statements.
        batch: Whether BEGIN, the deadline's timeout, the reset of the session and the question for the transaction's id
            share the round trip of a transaction's first statement. PostgreSQL only.
        reset_session: Whether what an attempt left on a session (settings, role, advisory locks, temporary tables,
            LISTEN) is gone for the next one; or the statements that reset it, such as ``["RESET ALL"]``. They must be
            allowed in a transaction. PostgreSQL only, and not behind PgBouncer.
        leak_after: How long a connection may be in use, in seconds, before that is logged with the place of its
            acquisition; None for the setting ``workerpools_leak_after``.
        options: Other options of ``sqlalchemy.create_engine``. They override the defaults, as do ``connect_args`` and
            the URL's query. With ``creator`` (or ``pool``) the connections are yours: the driver gets neither our
            arguments nor those of ``connect_args`` and the URL.

    Raises:
        ConfigurationError: ``url`` is not a URL, its driver is asynchronous, an option is misspelt, a driver's argument
            cannot be right, ``credentials`` is given with ``creator`` or ``pool``, or a number is out of range:
            timeouts are at most a week, other times at most a year, sizes at most a million.
    """

    settings = (
        Setting.url(
            "database_url",
            "SQLAlchemy URL of ``DatabaseTask.engine``, which requires it.",
            example="postgresql+psycopg2://app@localhost/shop",
        ),
        Setting.timeout("database_connect_timeout", "Connect timeout, in seconds (5)."),
        Setting.timeout("database_acquire_timeout", "Acquire timeout, in seconds (10)."),
        Setting.whole("database_pool_size", "Connections that a process keeps (1, or the concurrency).", least=1),
        Setting.whole("database_max_overflow", "Connections that a process may open beyond ``pool_size`` (1)."),
    )

    def _create(self, options: dict[str, Any]) -> sqlalchemy.Engine:
        return sqlalchemy.create_engine(self._url, **options)

    def close(self, value: sqlalchemy.Engine, timeout: float) -> None:
        """Close the idle connections, after waiting for those in use.

        Args:
            value: The engine.
            timeout: How long to wait, in seconds.
        """
        _drain(value.pool, time.monotonic() + timeout)
        value.dispose()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SQLAlchemyEngine:
        if "database_url" not in settings:
            raise ConfigurationError(
                "workerpools_database_url is not set; DatabaseTask needs it: set it in app.conf, or "
                "WORKERPOOLS_DATABASE_URL in the environment, such as postgresql+psycopg2://app@db/shop"
            )
        names = ("connect_timeout", "acquire_timeout", "pool_size", "max_overflow")
        options = {name: settings[f"database_{name}"] for name in names if f"database_{name}" in settings}
        made = cls(settings["database_url"], **options)
        made._sizes = ("workerpools_database_pool_size", "workerpools_database_max_overflow")
        return made


class AsyncSQLAlchemyEngine(_Declared[AsyncEngine]):
    """Declares a ``sqlalchemy.ext.asyncio.AsyncEngine``, for ``async def`` bodies and ``pools.run()``.

    The engine lives on the process's event loop. Its drivers are psycopg 3 (``postgresql+psycopg://``) and asyncpg
    (``postgresql+asyncpg://``). ``credentials`` stays a plain function, and listeners are attached to
    ``engine.sync_engine``.

    Args:
        options: Those of :class:`SQLAlchemyEngine` and of ``create_async_engine``, but ``creator``, ``pool`` and
            ``poolclass``.

    Raises:
        ConfigurationError: As for :class:`SQLAlchemyEngine`; or its driver is synchronous.
    """

    asynchronous = True
    libraries: Sequence[str] = (*_Declared.libraries, "asyncpg")
    _parts: Mapping[str, str] = {"psycopg": "_psycopg_async", "asyncpg": "_asyncpg"}

    def __init__(self, url: str | URL, **options: Any) -> None:
        try:
            if sqlalchemy.__version__.startswith("2.0."):
                raise ConfigurationError("SQLAlchemyEngine: it needs SQLAlchemy 2.1: pip install -U sqlalchemy")
            for name in ("creator", "pool", "poolclass"):
                if options.get(name) is not None:
                    raise ConfigurationError(
                        f"SQLAlchemyEngine: {name}= is not taken: connections and their pool live on the event loop of "
                        "workerpools. For connections of your own, async_creator="
                    )
            super().__init__(url, **options)
            if self._pgbouncer and self._url.get_driver_name() == "asyncpg":
                raise ConfigurationError(
                    "SQLAlchemyEngine: pgbouncer=True needs psycopg 3: asyncpg prepares statements in a round trip of "
                    "their own, for which PgBouncer may choose another server connection; write postgresql+psycopg://"
                )
        except ConfigurationError as error:
            raise ConfigurationError(re.sub(r"^SQLAlchemyEngine\b", type(self).__name__, str(error))) from None

    def _understood(self, url: str | URL) -> URL:
        found, self._shown = parsed(url)
        return asynchronous(found, self._shown)

    def _dialect(self) -> type[DefaultDialect]:
        return cast("type[DefaultDialect]", _dialect(self._url).get_async_dialect_cls(self._url))

    def _creator(self, options: dict[str, Any]) -> Callable[..., Any] | None:
        creator = options.pop("async_creator", None)
        if creator is None:
            return None
        # As create_async_engine() does.
        driver: Any = self._dialect().import_dbapi()
        return partial(driver.connect, async_creator_fn=creator)

    def _create(self, options: dict[str, Any]) -> AsyncEngine:
        return create_async_engine(self._url, **options)

    def recycle(self, value: AsyncEngine, since: float) -> bool:
        """Close idle connections, and those in use when they are checked in.

        Args:
            value: The engine.
            since: Connections opened before this :func:`time.monotonic` time are replaced.

        Returns:
            Whether the engine itself is kept.
        """
        events = self._events.get(value)
        if events is None:
            return False
        # What is checked out before they are closed is replaced, too.
        events.since = since
        start_coroutine(greenlet_spawn(events.recycle, value.pool, since))
        return True

    def close(self, value: AsyncEngine, timeout: float) -> None:
        """Close the idle connections, after waiting for those in use.

        Args:
            value: The engine.
            timeout: How long to wait, in seconds.
        """
        if on_loop():
            start_coroutine(value.dispose())
            return
        until = time.monotonic() + timeout
        _drain(value.pool, until)
        if loop_is_running():
            # Without a loop nothing was ever opened.
            run_coroutine(asyncio.wait_for(value.dispose(), max(until - time.monotonic(), 0.25)))


def _drain(pool: Pool, until: float) -> None:
    while isinstance(pool, QueuePool) and pool.checkedout() > 0 and time.monotonic() < until:
        time.sleep(0.01)


#: The options that open a connection in place of the driver's arguments.
_CREATORS = ("creator", "pool", "async_creator")

_OURS: Mapping[type[Pool], type[Pool]] = {
    QueuePool: DeadlineQueuePool,
    AsyncAdaptedQueuePool: AsyncDeadlineQueuePool,
}


def _synchronous(value: sqlalchemy.Engine | AsyncEngine) -> sqlalchemy.Engine:
    return value.sync_engine if isinstance(value, AsyncEngine) else value


def _resets(given: Any) -> tuple[str, ...]:
    if isinstance(given, bool):
        return RESETS if given else ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) and each.strip() for each in given):
        raise ConfigurationError(
            "SQLAlchemyEngine: reset_session is neither True, False nor a list of statements, such as "
            '["RESET ALL", "SELECT pg_advisory_unlock_all()"]'
        )
    return tuple(statement.strip().rstrip(";") for statement in given)


def _limit(options: Mapping[str, Any]) -> int:
    """Return the maximum number of connections of an engine with these options; 0 if unlimited or unknown."""
    if "pool" in options or not issubclass(options["poolclass"], QueuePool):
        return 0
    # The defaults are SQLAlchemy's own.
    size, overflow = int(options.get("pool_size", 5)), int(options.get("max_overflow", 10))
    return 0 if size == 0 or overflow < 0 else size + overflow


def _dialect(url: URL) -> type[DefaultDialect]:
    # Every dialect derives from DefaultDialect, although get_dialect() is annotated more loosely.
    try:
        return cast("type[DefaultDialect]", url.get_dialect())
    except sqlalchemy.exc.NoSuchModuleError:
        raise ConfigurationError(
            f"SQLAlchemyEngine: SQLAlchemy has no dialect {url.drivername!r}; is the package that brings it installed?"
        ) from None


def classify(error: BaseException) -> Failure | None:
    """Classify an exception of any SQLAlchemy engine; None if it is not a connection failure.

    For an engine of :class:`SQLAlchemyEngine`, :func:`workerpools.classify` knows more: what was being done.

    Args:
        error: The exception.
    """
    if isinstance(error, sqlalchemy.exc.TimeoutError):
        return POOL_EXHAUSTED
    return classify_unwatched(error) if isinstance(error, sqlalchemy.exc.DBAPIError) else None


def _follows(error: BaseException) -> bool:
    """Return whether ``error`` is only the consequence of an earlier, unhandled one."""
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        return error_code(error.orig) == "25P02"
    return isinstance(error, sqlalchemy.exc.PendingRollbackError)
