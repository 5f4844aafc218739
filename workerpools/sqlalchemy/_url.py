"""Checks an engine's URL and options on declaration, and hides the URL's secrets.

The types and ranges of SQLAlchemy's options are those of its documentation ("Engine Creation API").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import Pool

from workerpools.adapter import WEEK, meant, seconds, whole
from workerpools.errors import ConfigurationError

__all__ = ["about_driver", "asynchronous", "check_options", "check_types", "parsed", "refuse_async", "without_secrets"]

#: How to install each driver.
_PACKAGES = {
    "psycopg": 'pip install "psycopg[binary]"',
    "psycopg2": "pip install psycopg2-binary",
    "asyncpg": "pip install asyncpg",
}

#: A driver to write in place of an asynchronous one.
_SYNCHRONOUS = {
    "postgresql": "postgresql+psycopg2:// or postgresql+psycopg://",
    "mysql": "mysql+pymysql://",
    "mariadb": "mariadb+pymysql://",
    "sqlite": "sqlite://",
    "oracle": "oracle+oracledb://",
    "mssql": "mssql+pyodbc://",
}

#: The drivers of an asynchronous engine, and their own names: SQLAlchemy takes two for psycopg 3.
_ASYNCHRONOUS = {"psycopg": "psycopg", "psycopg_async": "psycopg", "asyncpg": "asyncpg"}

#: Common and synchronous. Loading a dialect takes 60 ms, which a command that imports the application need not spend.
_KNOWN = frozenset(
    (
        "postgresql",
        "postgresql+psycopg2",
        "postgresql+psycopg",
        "mysql+pymysql",
        "mysql+mysqldb",
        "mariadb+pymysql",
        "sqlite",
    )
)

_HIDDEN = "not shown here, as it may contain a password"
_ESCAPE = "escape special characters of a password (urllib.parse.quote_plus)"

# The password as SQLAlchemy parses it, and the rest of the URL.
_PASSWORD = re.compile(r"[\w+]+://[^:/]*:[^@]*@(?P<rest>.*)", re.DOTALL)


def parsed(url: str | URL | None) -> tuple[URL, str]:
    """Parse a URL; return it, and its text without secrets.

    Raises:
        ConfigurationError: It is not a URL, or part of its password ended up in another part, which drivers would show.
    """
    if url is None:
        raise ConfigurationError("SQLAlchemyEngine: the URL is None; is its environment variable set?")
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        # SQLAlchemy's messages repeat the text, password included.
        raise ConfigurationError(
            f"SQLAlchemyEngine: the URL cannot be parsed ({_HIDDEN}); "
            f"wanted: dialect+driver://user:password@host:port/database; {_ESCAPE}"
        ) from None
    if found.get_backend_name() == "postgres":
        raise ConfigurationError(
            f"SQLAlchemyEngine: SQLAlchemy has no dialect 'postgres' (the URL is {_HIDDEN}); write postgresql+psycopg2://"
        )
    text = url if isinstance(url, str) else ""
    split = _PASSWORD.match(text)
    if "@" in (found.host or "") or (split is not None and "@" in split["rest"]):
        raise ConfigurationError(f"SQLAlchemyEngine: the URL has an '@' after its host ({_HIDDEN}); {_ESCAPE}")
    parts = (found.username, found.host, found.database)
    if text.count("@") > 1 or any("@" in part for part in parts if part):
        # Ambiguous: any part may contain the password.
        return found, f"{found.drivername}://***"
    return found, URL.create(
        found.drivername, found.username, host=found.host, port=found.port, database=found.database
    ).render_as_string()


def refuse_async(url: URL, shown: str) -> None:
    """Refuse an asynchronous driver: an ``Engine`` of it fails at its first use.

    Args:
        url: The URL.
        shown: Its text without secrets.

    Raises:
        ConfigurationError: The URL names an asynchronous driver.
    """
    if url.drivername in _KNOWN:
        return
    try:
        asynchronous = url.get_dialect().is_async
    except Exception:  # no such dialect, or one that cannot be imported: opening the engine says so
        return
    if asynchronous:
        driver = url.get_driver_name()
        other = _SYNCHRONOUS.get(url.get_backend_name(), "a synchronous driver of the same database")
        instead = "declare an AsyncSQLAlchemyEngine, for async def bodies, or " if driver in _ASYNCHRONOUS else ""
        raise ConfigurationError(
            f"SQLAlchemyEngine({shown}): {driver!r} is an asynchronous driver, and sqlalchemy.Engine is synchronous; "
            f"{instead}write {other}"
        )


def asynchronous(url: URL, shown: str) -> URL:
    """Return the URL of an asynchronous engine, with the name by which both of its drivers' engines go.

    Args:
        url: The URL.
        shown: Its text without secrets.

    Raises:
        ConfigurationError: The URL names another driver.
    """
    try:
        driver = url.get_driver_name()
    except Exception:  # no such dialect, or one that cannot be imported
        driver = ""
    if url.get_backend_name() == "postgresql" and driver in _ASYNCHRONOUS:
        return url.set(drivername=f"postgresql+{_ASYNCHRONOUS[driver]}")
    try:
        of_loop = url.get_dialect().is_async
    except Exception:
        of_loop = False
    wanted = "write postgresql+psycopg:// or postgresql+asyncpg://"
    if of_loop:
        raise ConfigurationError(
            f"SQLAlchemyEngine({shown}): the driver {driver!r} is not among those that it knows; {wanted}"
        )
    raise ConfigurationError(
        f"SQLAlchemyEngine({shown}): {driver or url.drivername!r} is not an asynchronous driver; {wanted}, or declare "
        "a SQLAlchemyEngine, for plain bodies"
    )


def check_options(options: Mapping[str, Any], own: Iterable[str]) -> None:
    """Refuse misspelt options.

    A name unlike any documented one may be a dialect's option; ``create_engine()`` checks it later.

    Args:
        options: The options for ``create_engine``, by name.
        own: The names of SQLAlchemyEngine's own options.

    Raises:
        ConfigurationError: An option is misspelt; the message suggests the right name.
    """
    documented = set(re.findall(r":param (\w+)", sqlalchemy.create_engine.__doc__ or ""))
    documented.update(own)
    for option in options:
        if option not in documented and (nearest := meant(option, documented, 0.85)):
            raise ConfigurationError(f"SQLAlchemyEngine: there is no option {option}; did you mean {nearest}?")


def without_secrets(url: URL, options: dict[str, Any]) -> URL:
    """Return a URL whose query has no password: ``repr(engine)`` would show it.

    Args:
        url: The database's URL.
        options: The options of ``create_engine``; passwords move to ``connect_args``, which override them.
    """
    secrets = {name: value for name, value in url.query.items() if name in _SECRETS and isinstance(value, str)}
    connect_args = options.get("connect_args")
    if not secrets or not (connect_args is None or isinstance(connect_args, Mapping)):
        return url
    options["connect_args"] = {**secrets, **(connect_args or {})}
    return url.difference_update_query(list(secrets))


#: Of libpq, and of PyMySQL and mysqlclient.
_SECRETS = frozenset(("password", "passwd", "sslpassword", "ssl_key_password"))


def check_types(url: URL, options: Mapping[str, Any], **own: Any) -> None:
    """Refuse options of a type or range that would fail the first task.

    Args:
        url: The database's URL.
        options: The options for ``create_engine``, by name.
        own: SQLAlchemyEngine's own options of other types than numbers, by name.

    Raises:
        ConfigurationError: An option has the wrong type or is out of range; the message omits its value.
    """
    given = {**options, **own}
    for name, value in given.items():
        for accepts, wanted, names in _TYPES:
            if name in names and not accepts(value):
                raise ConfigurationError(
                    f"SQLAlchemyEngine: {name} is a value of the type {type(value).__name__}; wanted: {wanted}"
                )
        if name in _SIZES and value is not None:
            whole(value, f"SQLAlchemyEngine: {name}", least=_SIZES[name])
    if "pool_timeout" in options:
        seconds(options["pool_timeout"], "SQLAlchemyEngine: pool_timeout", most=WEEK)
    if (age := options.get("pool_recycle", -1)) != -1:
        seconds(age, "SQLAlchemyEngine: pool_recycle")
    for level in (options.get("isolation_level"), (options.get("execution_options") or {}).get("isolation_level")):
        if level is not None:
            _check_isolation_level(url, level)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_function(value: object) -> bool:
    return value is None or callable(value)


#: What accepts a value, what it accepts, and for which options.
_TYPES: tuple[tuple[Callable[[Any], bool], str, frozenset[str]], ...] = (
    (
        _is_flag,
        "True or False",
        frozenset(
            (
                *("resolve_commit", "pgbouncer", "batch"),
                *("enable_from_linting", "hide_parameters", "pool_pre_ping", "pool_use_lifo", "use_insertmanyvalues"),
            )
        ),
    ),
    (
        lambda value: value in (None, "debug") or isinstance(value, bool),
        "True, False or 'debug'",
        frozenset(("echo", "echo_pool")),
    ),
    (
        _is_function,
        "a function",
        frozenset(("credentials", "on_open", "creator", "async_creator", "json_serializer", "json_deserializer")),
    ),
    (
        lambda value: value is None or isinstance(value, str),
        "a text",
        frozenset(("isolation_level", "logging_name", "pool_logging_name")),
    ),
    (
        lambda value: value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)),
        "a dict",
        frozenset(("connect_args", "execution_options")),
    ),
    (
        lambda value: value is None or (isinstance(value, type) and issubclass(value, Pool)),
        "a class of sqlalchemy.pool",
        frozenset(("poolclass",)),
    ),
    (lambda value: value is None or isinstance(value, Pool), "a sqlalchemy.pool.Pool", frozenset(("pool",))),
    (
        lambda value: value in (None, "qmark", "numeric", "named", "format", "pyformat", "numeric_dollar"),
        "a paramstyle of PEP 249",
        frozenset(("paramstyle",)),
    ),
    (
        lambda value: value is None or isinstance(value, bool) or value in ("rollback", "commit"),
        "'rollback', 'commit' or None",
        frozenset(("pool_reset_on_return",)),
    ),
)

#: The least value of the options that are sizes.
_SIZES = {"insertmanyvalues_page_size": 1, "label_length": 0, "max_identifier_length": 0, "query_cache_size": 0}


def _check_isolation_level(url: URL, level: Any) -> None:
    try:
        # Most dialects know them without a connection.
        known = list(url.get_dialect()().get_isolation_level_values(None))  # type: ignore[arg-type]
    except Exception:
        return
    if not isinstance(level, str) or level.replace("_", " ").upper() not in known:
        raise ConfigurationError(
            f"SQLAlchemyEngine: isolation_level is none of this database's; wanted: {', '.join(known)}"
        )


def about_driver(url: URL) -> str:
    """Return a note that says how to fix a driver that cannot be imported."""
    driver = url.get_driver_name()
    names = f"names the driver {driver!r}"
    if "+" not in url.drivername:
        names = f"names no driver, and SQLAlchemy {sqlalchemy.__version__} defaults to {driver!r}"
    install = _PACKAGES.get(driver, f"install {driver}")
    other = ", or write postgresql+psycopg2://" if driver == "psycopg" else ""
    return f"workerpools: the URL {names}, which cannot be imported: {install}{other}"
