"""The URL of a server, or of a service behind Sentinels: what it names, checked. Pure but for importing the driver."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from workerpools.adapter import meant, redact_url
from workerpools.errors import ConfigurationError
from workerpools.redis._libraries import Library, library

__all__ = ["Target", "target_of"]

#: For each scheme the driver, whether the connection is encrypted, and whether the URL names Sentinels.
SCHEMES = {
    "redis": ("redis", False, False),
    "rediss": ("redis", True, False),
    "unix": ("redis", False, False),
    "valkey": ("valkey", False, False),
    "valkeys": ("valkey", True, False),
    "redis+sentinel": ("redis", False, True),
    "rediss+sentinel": ("redis", True, True),
    "valkey+sentinel": ("valkey", False, True),
    "valkeys+sentinel": ("valkey", True, True),
}

_SENTINEL_PORT = 26379


class Target(NamedTuple):
    """What a URL names.

    Attributes:
        library: The driver.
        secure: Whether connections are encrypted.
        options: The driver's options.
        sentinels: Host and port of each Sentinel; empty without.
        service: The service's name; empty without Sentinels.
        shown: The URL without secrets.
    """

    library: Library
    secure: bool
    options: dict[str, Any]
    sentinels: tuple[tuple[str, int], ...]
    service: str
    shown: str


def target_of(url: object, called: str, *, asynchronous: bool = False) -> Target:
    """Return what a URL names.

    Args:
        url: The URL.
        called: The declaration's name, for messages.
        asynchronous: Whether the driver's asynchronous classes are meant.

    Raises:
        ConfigurationError: It is not that of a Redis or Valkey server.
    """
    if not isinstance(url, str):
        raise ConfigurationError(f"{called}: url is a value of the type {type(url).__name__}: wanted a string")
    shown = redact_url(url)
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if "cluster" in scheme:
        raise ConfigurationError(
            f"{called}: {shown!r}: Redis Cluster is not supported. Use a function that returns the driver's "
            "RedisCluster, pools.add(function): it is opened and closed per process; nothing is known of what it sends"
        )
    if not separator or scheme not in SCHEMES:
        nearest = meant(scheme, SCHEMES)
        hint = f" (did you mean {nearest}://?)" if nearest else ""
        raise ConfigurationError(f"{called}: {shown!r}: wanted a URL such as redis://localhost:6379/0{hint}")
    name, secure, through_sentinels = SCHEMES[scheme]
    driver = library(name, asynchronous)
    sentinels: tuple[tuple[str, int], ...] = ()
    service = ""
    plain = f"{name}{'s' if secure else ''}://{rest}" if scheme != "unix" else url
    if through_sentinels:
        plain, sentinels, service = _sentinels(name, rest, f"{called}: {shown!r}")
    try:
        options = dict(driver.parse_url(plain))
    except ValueError as error:
        # The driver takes a part of a password that is not escaped for a port, and says it.
        said = str(error)
        if not said.startswith("Invalid value for "):
            said = "it cannot be read; is the password escaped, as urllib.parse.quote(password, safe='') does?"
        raise ConfigurationError(f"{called}: {shown!r}: {said}") from None
    _check_database(plain, options, f"{called}: {shown!r}")
    options.pop("connection_class", None)
    if "path" not in options and not sentinels:
        options.setdefault("host", "localhost")
        options.setdefault("port", 6379)
    return Target(driver, secure, options, sentinels, service, shown)


def _check_database(url: str, options: dict[str, Any], whose: str) -> None:
    # The driver takes a path that is no number for database 0, without a word.
    path = urlsplit(url).path.strip("/")
    if "path" not in options and path and not path.isdigit():
        raise ConfigurationError(f"{whose}: the path is to be the number of a database")


def _sentinels(name: str, rest: str, whose: str) -> tuple[str, tuple[tuple[str, int], ...], str]:
    """Return the URL without Sentinels, their addresses, and the service."""
    address, _, query = rest.partition("?")
    place, _, path = address.partition("/") if "@" not in address else _after_user(address)
    info, at, hosts = place.rpartition("@")
    service, _, database = path.partition("/")
    if not service:
        raise ConfigurationError(f"{whose}: wanted the service's name, as in redis+sentinel://host:26379/mymaster/0")
    found = []
    for host in hosts.split(","):
        try:
            parts = urlsplit(f"//{host}")
            found.append((parts.hostname or "", parts.port or _SENTINEL_PORT))
        except ValueError:
            found.append(("", 0))
    if not all(host for host, _ in found):
        raise ConfigurationError(f"{whose}: wanted one or more Sentinels, as host:port,host:port")
    return f"{name}://{info}{at}localhost/{database}?{query}", tuple(found), unquote(service)


def _after_user(address: str) -> tuple[str, str, str]:
    # A password may contain a slash.
    info, _, after = address.rpartition("@")
    hosts, slash, path = after.partition("/")
    return f"{info}@{hosts}", slash, path
