"""Looks at an engine's URL and options when they are declared: mistakes, and what may be shown of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from workerpools.adapter import meant
from workerpools.errors import ConfigurationError

__all__ = ["about_driver", "check_options", "parsed"]

#: How to get a driver.
_PACKAGES = {"psycopg": 'pip install "psycopg[binary]"', "psycopg2": "pip install psycopg2-binary"}

_HIDDEN = "it is not shown here, as it may hold a password"
_ESCAPE = "a password's special characters must be escaped (urllib.parse.quote_plus)"

# What SQLAlchemy takes for a password, and what is left of the URL then.
_PASSWORD = re.compile(r"[\w+]+://[^:/]*:[^@]*@(?P<rest>.*)", re.DOTALL)


def parsed(url: str | URL | None) -> tuple[URL, str]:
    """Return a URL, and what may be shown of it.

    Raises:
        ConfigurationError: It is none, or a part of its password stands in another part; drivers would show that.
    """
    if url is None:
        raise ConfigurationError("SQLAlchemyEngine: the URL is None; is the variable that it is read from set?")
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
            f"SQLAlchemyEngine: SQLAlchemy knows no dialect 'postgres' (the URL: {_HIDDEN}); write postgresql+psycopg2://"
        )
    text = url if isinstance(url, str) else ""
    split = _PASSWORD.match(text)
    if "@" in (found.host or "") or (split is not None and "@" in split["rest"]):
        raise ConfigurationError(f"SQLAlchemyEngine: the URL has an '@' after its host ({_HIDDEN}); {_ESCAPE}")
    parts = (found.username, found.host, found.database)
    if text.count("@") > 1 or any("@" in part for part in parts if part):
        # Nobody can tell which part of it is whose.
        return found, f"{found.drivername}://***"
    return found, URL.create(
        found.drivername, found.username, host=found.host, port=found.port, database=found.database
    ).render_as_string()


def check_options(options: Mapping[str, Any], own: Iterable[str]) -> None:
    """Refuse what is misspelt.

    A name that is like none that is documented may be one of a dialect's own: create_engine() knows when it is used.

    Args:
        options: Those of ``create_engine``, by name.
        own: The names of our own.
    """
    documented = set(re.findall(r":param (\w+)", sqlalchemy.create_engine.__doc__ or ""))
    documented.update(own)
    for option in options:
        if option not in documented and (nearest := meant(option, documented, 0.85)):
            raise ConfigurationError(f"SQLAlchemyEngine: there is no option {option}; did you mean {nearest}?")


def about_driver(url: URL) -> str:
    """Return what to do about a driver that cannot be imported, for a note."""
    driver = url.get_driver_name()
    names = f"names the driver {driver!r}"
    if "+" not in url.drivername:
        names = f"names no driver, and SQLAlchemy {sqlalchemy.__version__} takes {driver!r}"
    install = _PACKAGES.get(driver, f"install {driver}")
    other = ", or write postgresql+psycopg2://" if driver == "psycopg" else ""
    return f"workerpools: the URL {names}, which cannot be imported: {install}{other}"
