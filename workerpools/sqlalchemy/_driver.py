"""What the drivers are given: arguments that cannot be right, and a connect timeout that fits a deadline.

A URL's values are text, ``connect_args`` are anything, and libpq takes several servers in one parameter (PostgreSQL
documentation, "Parameter Key Words" and "Specifying Multiple Hosts"). What libpq accepts is left as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from workerpools.errors import ConfigurationError

__all__ = [
    "LIBPQ_DRIVERS",
    "MYSQL_DRIVERS",
    "STRINGS",
    "attempts",
    "check_arguments",
    "fitted",
    "named",
    "ports",
    "whole_seconds",
    "with_ports",
]

LIBPQ_DRIVERS = frozenset(("psycopg2", "psycopg"))
MYSQL_DRIVERS = frozenset(("pymysql", "mysqldb"))

#: libpq reads these as decimal integers of 32 bits.
_INTEGERS = (
    "connect_timeout",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "tcp_user_timeout",
)
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")

_CHOICES: Mapping[str, Sequence[str]] = {
    "load_balance_hosts": ("disable", "random"),
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
}

#: Arguments of the drivers themselves, which are no text.
_OBJECTS = frozenset(
    (
        "async",
        "async_",
        "autocommit",
        "connection_factory",
        "context",
        "cursor_factory",
        "prepare_threshold",
        "row_factory",
    )
)

#: The drivers' argument for a connection string.
STRINGS = {"psycopg2": "dsn", "psycopg": "conninfo"}


# At declaration.


def with_ports(url: URL, options: dict[str, Any]) -> URL:
    """Return a URL without ports that SQLAlchemy refuses and libpq takes: one for all servers, those of ``hostaddr``.

    Args:
        url: The database's URL.
        options: The options of ``create_engine``; the ports move to ``connect_args``, which override them.
    """
    port, connect_args = url.query.get("port"), options.get("connect_args")
    several = any("," in str(url.query.get(name, "")) for name in ("host", "hostaddr", "port"))
    if not several or not isinstance(port, str) or not isinstance(url.query.get("host", ""), str):
        return url
    if connect_args is None or isinstance(connect_args, Mapping):
        options["connect_args"] = {"port": port, **(connect_args or {})}
    return url.difference_update_query(("port",))


def check_arguments(url: URL, connect_args: Any) -> None:
    """Refuse driver arguments that no connection can be opened with.

    Arguments inside a connection string (``dsn``, ``conninfo``) are not checked: that takes the driver.

    Args:
        url: The database's URL.
        connect_args: The option of ``create_engine``; None for none.

    Raises:
        ConfigurationError: A value cannot be right; the message has the remedy.
    """
    try:
        dialect = url.get_dialect()()
        driver = dialect.driver
        if driver not in LIBPQ_DRIVERS | MYSQL_DRIVERS:
            return
        # SQLAlchemy splits an IPv6 address at its colons.
        named_hosts = url.query.get("host", ())
        hosts = (named_hosts,) if isinstance(named_hosts, str) else named_hosts
        if any(host.count(":") > 1 for host in hosts if host.startswith("[")):
            raise ValueError("IPv6 addresses need ports of their own")
        _, parameters = dialect.create_connect_args(url)
    except NoSuchModuleError:
        # Raised where the engine is opened, like that of a driver that is not installed.
        return
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(f"SQLAlchemyEngine: the URL's query: {error}; wanted: host=a,b&port=1,2") from None
    if driver in MYSQL_DRIVERS:
        _check_numbers(connect_args or {})
        return
    for name in sorted(_OBJECTS.intersection(url.query)):
        raise ConfigurationError(
            f"SQLAlchemyEngine: {name} is in the URL's query, whose values are text; wanted: "
            f"connect_args={{{name!r}: …}}"
        )
    given = {**parameters, **(connect_args or {})}
    for name, value in given.items():
        if value is None or name in _OBJECTS:
            continue
        if isinstance(value, (list, tuple, set, Mapping)):
            raise ConfigurationError(
                f"SQLAlchemyEngine: {name} has several values; libpq takes one text, for several servers with commas: "
                "host=a,b and port=1,2"
            )
        if name in _INTEGERS:
            _check_integer(name, value, driver)
        elif value not in ("", *_CHOICES.get(name, (value,))):
            raise ConfigurationError(
                f"SQLAlchemyEngine: {name} is {value!r}; libpq takes one of {', '.join(_CHOICES[name])}"
            )
    _check_servers(given)


def _check_integer(name: str, value: Any, driver: str) -> None:
    text = str(value)
    whole = _INTEGER.fullmatch(text) is not None and abs(int(text)) < 2**31
    if name == "connect_timeout" and driver == "psycopg" and not isinstance(value, bool):
        # psycopg 3 rounds it down itself.
        whole = whole_seconds(value) is not None
    if isinstance(value, bool) or not whole:
        unit = {"connect_timeout": " of seconds", "tcp_user_timeout": " of milliseconds"}.get(name, "")
        raise ConfigurationError(
            f"SQLAlchemyEngine: {name} is {value!r}; libpq takes a whole number{unit}, such as {name}=3"
        )


def _check_numbers(given: Mapping[str, Any]) -> None:
    for name in ("connect_timeout", "read_timeout", "write_timeout"):
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigurationError(
                f"SQLAlchemyEngine: connect_args: {name} is {value!r}; wanted: a number of seconds, {{{name!r}: 3}}"
            )


def _check_servers(given: Mapping[str, Any]) -> None:
    hosts, addresses, numbers = (_listed(given, name) for name in ("host", "hostaddr", "port"))
    for number in numbers:
        if number and not (_INTEGER.fullmatch(number) and 0 < int(number) < 2**16):
            raise ConfigurationError(f"SQLAlchemyEngine: port is {given['port']!r}; wanted: 1 to 65535, as port=5432")
    servers = max(len(hosts), len(addresses))
    for host in hosts:
        if re.fullmatch(r"[\w.-]+:[0-9]+", host):
            raise ConfigurationError(
                f"SQLAlchemyEngine: host is {given['host']!r}; wanted: host=a,b&port=1,2, or host=a:1&host=b:2 in a URL"
            )
    if hosts and addresses and len(hosts) != len(addresses):
        raise ConfigurationError(
            f"SQLAlchemyEngine: there are {len(hosts)} values of host and {len(addresses)} of hostaddr; wanted: as many"
        )
    # Without any, libpq takes its own default, or PGHOST.
    if servers and len(numbers) > 1 and len(numbers) != servers:
        raise ConfigurationError(
            f"SQLAlchemyEngine: there are {len(numbers)} values of port for {servers} of host; wanted: one for all, or "
            "one for each"
        )


def _listed(given: Mapping[str, Any], name: str) -> list[str]:
    value = given.get(name)
    return [] if value in (None, "") else str(value).split(",")


# On connecting.


def named(driver: Any, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return libpq's parameters by name, with those inside a connection string.

    Args:
        driver: The driver's module.
        parameters: Its arguments by name; they override those in the string, as in the drivers.
    """
    text = parameters.get(STRINGS.get(driver.__name__, ""))
    if not text:
        return parameters
    try:
        if driver.__name__ == "psycopg2":
            return {**driver.extensions.parse_dsn(text), **parameters}
        return {**driver.conninfo.conninfo_to_dict(text), **parameters}
    except driver.Error:
        # Connecting will fail with the driver's own error.
        return parameters


def attempts(parameters: Mapping[str, Any]) -> int:
    """Return how many servers libpq may try, each with its own ``connect_timeout``.

    A name with several addresses counts once: resolving it would take time of its own.

    Args:
        parameters: libpq's parameters by name.
    """
    hosts = _listed(parameters, "host") or _listed(os.environ, "PGHOST")
    servers = max(1, len(hosts), len(_listed(parameters, "hostaddr") or _listed(os.environ, "PGHOSTADDR")))
    # It tries all for a standby first, then all for any.
    twice = (parameters.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS")) == "prefer-standby"
    return servers * 2 if twice and servers > 1 else servers


def ports(parameters: Mapping[str, Any]) -> frozenset[int]:
    """Return the TCP ports that a driver may connect to; empty if unknown.

    Args:
        parameters: The driver's arguments by name.
    """
    numbers = _listed(parameters, "port")
    return frozenset(map(int, numbers)) if numbers and all(map(_INTEGER.fullmatch, numbers)) else frozenset()


def whole_seconds(value: Any) -> int | None:
    """Return a ``connect_timeout`` as the drivers read it; None if they do not."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def fitted(value: Any, remaining: float, servers: int) -> Any:
    """Return a ``connect_timeout`` that ends by a deadline: whole seconds, at least 2, for each server.

    Args:
        value: The timeout so far; None for none. For libpq 0 or less is none, too.
        remaining: The time until the deadline, in seconds.
        servers: How many servers may be tried.

    Returns:
        The timeout; ``value`` itself if it fits, or if it is no number, which the driver refuses.
    """
    seconds = 0 if value in (None, "") else whole_seconds(value)
    if seconds is None:
        return value
    # Of one server the deadline itself ends the wait, and is reported as such. Several share what remains.
    fits = max(2, ceil(remaining) if servers == 1 else int(remaining / servers))
    return value if 0 < seconds <= fits else fits
