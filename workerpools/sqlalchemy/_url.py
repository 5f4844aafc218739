"""Checks an engine's URL and options on declaration, and hides the URL's secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from workerpools.adapter import meant
from workerpools.errors import ConfigurationError

__all__ = ["about_driver", "check_options", "parsed", "refuse_async"]

#: How to install each driver.
_PACKAGES = {"psycopg": 'pip install "psycopg[binary]"', "psycopg2": "pip install psycopg2-binary"}

#: A driver to write in place of an asynchronous one.
_SYNCHRONOUS = {
    "postgresql": "postgresql+psycopg2:// or postgresql+psycopg://",
    "mysql": "mysql+pymysql://",
    "mariadb": "mariadb+pymysql://",
    "sqlite": "sqlite://",
    "oracle": "oracle+oracledb://",
    "mssql": "mssql+pyodbc://",
}

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
        other = _SYNCHRONOUS.get(url.get_backend_name(), "a synchronous driver of the same database")
        raise ConfigurationError(
            f"SQLAlchemyEngine({shown}): {url.get_driver_name()!r} is an asynchronous driver, and sqlalchemy.Engine is "
            f"synchronous, as task bodies are; write {other}"
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


def about_driver(url: URL) -> str:
    """Return a note that says how to fix a driver that cannot be imported."""
    driver = url.get_driver_name()
    names = f"names the driver {driver!r}"
    if "+" not in url.drivername:
        names = f"names no driver, and SQLAlchemy {sqlalchemy.__version__} defaults to {driver!r}"
    install = _PACKAGES.get(driver, f"install {driver}")
    other = ", or write postgresql+psycopg2://" if driver == "psycopg" else ""
    return f"workerpools: the URL {names}, which cannot be imported: {install}{other}"
